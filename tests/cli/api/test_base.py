"""``tdc_ray.load_base``."""

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiTPipeline,
    UNet2DModel,
)

import tdc_ray as tdc
from tdc_ray.config.budget import BudgetConfig
from tdc_ray.config.run import to_json
from tdc_ray.errors import CheckpointError, ConfigError, UnsupportedModelError
from tdc_ray.models.first_stage import load_autoencoder
from tdc_ray.models.unet2d.unet import build_unet, load_unet, save_unet
from tdc_ray.storage.files import write_json
from tests.small import (
    TINY,
    assert_same,
    make_first_stage,
    make_run_dir,
    random_dit,
    random_unet,
    sizes,
    small_config,
)

NOISE = DDPMScheduler(600, beta_end=0.03)


def test_a_base_brings_its_noise_process_and_shape(tmp_path):
    DDPMPipeline(random_unet(), NOISE).save_pretrained(tmp_path)
    base = tdc.load_base(tmp_path)
    noise, data = base.config.diffusion, base.config.data
    assert (noise.num_train_timesteps, noise.beta_end) == (600, 0.03)
    assert (data.image_size, data.num_channels) == (8, 1)
    assert base.macs == sizes(TINY)[1]
    assert len(base.scheduler.timesteps) == base.config.sampler.num_inference_steps
    assert repr(base) == (
        f"Base({str(tmp_path)!r}, images of (1, 8, 8), {base.macs} macs, 600 timesteps of linear "
        "betas)"
    )


def test_a_model_in_memory_is_copied(tmp_path):
    unet = random_unet()
    base = tdc.load_base(unet, scheduler=NOISE)
    pipeline = tdc.load_base(DDPMPipeline(unet, NOISE))
    with torch.no_grad():
        unet.conv_in.weight.zero_()
    for one in (base, pipeline):
        one.save_pretrained(tmp_path / "saved")
        assert_same(load_unet(tmp_path / "saved/unet").state_dict(), random_unet().state_dict())
    assert tdc.load_base(tmp_path / "saved").config.diffusion == base.config.diffusion


def test_a_dit_in_memory_is_copied_with_its_first_stage(tmp_path):
    vae = load_autoencoder(make_first_stage(tmp_path / "vae"), "AutoencoderKL")
    dit = random_dit()
    alone = tdc.load_base(dit, scheduler=NOISE)
    of_latents = tdc.load_base(DiTPipeline(dit, vae, NOISE))
    assert of_latents.config.data.first_stage is not None
    assert of_latents.config.data.image_size == 16
    for one in (alone, of_latents):
        network = one.to_pipeline().experts[0]
        assert_same(network.state_dict(), dit.state_dict())


def test_what_diffusers_cannot_say_and_the_layout_in_memory_are_kept():
    unet = build_unet({**TINY, "num_heads": 4, "timestep_channels": 40})
    unet.to(memory_format=torch.channels_last)
    base = tdc.load_base(unet, scheduler=NOISE)
    assert unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    assert (base.network["num_heads"], base.network["timestep_channels"]) == (4, 40)


def test_timesteps_in_memory_that_are_embedded_otherwise_are_refused_by_name():
    base = tdc.load_base(UNet2DModel(**TINY, time_embedding_type="fourier"), scheduler=NOISE)
    with pytest.raises(UnsupportedModelError, match="time_embedding_type fourier is not"):
        _ = base.macs


def test_a_network_of_no_known_class_is_refused_before_it_is_saved():
    network = AutoencoderKL()
    network.save_pretrained = None
    with pytest.raises(ConfigError, match=r"in memory, has a AutoencoderKL: only"):
        tdc.load_base(network, scheduler=NOISE)


def test_a_base_samples_as_a_pipeline_of_one_expert():
    base = tdc.load_base(random_unet(), scheduler=NOISE, settings=small_config())
    pipeline = base.to_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    assert_same(pipeline.experts[0].state_dict(), random_unet().state_dict())
    assert pipeline(2, output_type="np").images.shape == (2, 8, 8, 1)


def test_a_run_brings_the_settings_of_its_training(tmp_path):
    run_dir = make_run_dir(tmp_path)
    write_json(run_dir.base_result, {})
    settings = small_config(seed=4, prune={"method": "taylor"}, diffusion={"beta_end": 0.01})
    write_json(run_dir.config, to_json(settings))
    config = tdc.load_base(tmp_path).config
    assert (config.seed, config.prune, config.diffusion) == (4, settings.prune, settings.diffusion)
    other = tdc.load_base(tmp_path, settings=small_config(seed=6)).config
    assert (other.seed, other.diffusion) == (6, settings.diffusion)


@pytest.mark.parametrize(
    "model",
    [
        {"config": "unet/config.json", "network": dict(TINY)},
        {"architecture": "auto", "width": 0.5, "depth": 1, "network": dict(TINY)},
        {"base": "openai:model.pt", "num_heads": 2},
    ],
)
def test_a_run_of_another_network_than_a_named_one_is_a_base(tmp_path, model):
    run_dir = make_run_dir(tmp_path)
    write_json(run_dir.base_result, {})
    write_json(run_dir.config, to_json(small_config(model=model, budget=BudgetConfig(epochs=2))))
    base = tdc.load_base(tmp_path)
    assert base.macs == sizes(TINY)[1]
    assert (base.config.model.base, base.config.model.network) == (str(tmp_path), None)
    assert base.config.budget == BudgetConfig()


def test_how_a_base_samples_otherwise_is_said(caplog):
    tdc.load_base(DDPMPipeline(random_unet(), DDIMScheduler(timestep_spacing="trailing")))
    assert "the pipeline of DDPMPipeline in memory samples by DDIMScheduler" in caplog.text


def test_steps_that_the_betas_do_not_allow_are_refused_with_where_to_set_them():
    cosine = DDPMScheduler(400, beta_schedule="squaredcos_cap_v2")
    with pytest.raises(ConfigError, match=r"Use ddim\. .*settings of tdc_ray.load_base"):
        tdc.load_base(random_unet(), scheduler=cosine)
    ddim = small_config(sampler={"num_inference_steps": 8})
    base = tdc.load_base(random_unet(), scheduler=cosine, settings=ddim)
    assert len(base.scheduler.timesteps) == 8


def bare_unet(folder):
    save_unet(random_unet(), folder / "unet")
    return {"source": folder / "unet"}


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (bare_unet, ConfigError, "does not say diffusion.num_train_timesteps.*tdc_ray.preset"),
        (lambda _: {"source": "no/where/at all"}, CheckpointError, "does not exist"),
        (lambda folder: {"source": folder}, CheckpointError, "holds no base"),
        (
            lambda folder: {"source": folder, "scheduler": NOISE},
            ConfigError,
            "scheduler goes with",
        ),
        (lambda _: {"source": random_unet()}, ConfigError, "scheduler must be given with a UNet"),
        (
            lambda _: {"source": DDPMPipeline(random_unet(), NOISE), "scheduler": NOISE},
            ConfigError,
            "a pipeline has its own",
        ),
        (lambda _: {"source": 7}, ConfigError, "a network of diffusers, got a int"),
        (
            lambda _: {
                "source": random_unet(),
                "scheduler": DDPMScheduler(prediction_type="sample"),
            },
            ConfigError,
            "prediction_type sample",
        ),
    ],
)
def test_bad_input_is_one_clear_error(tmp_path, arguments, error, words):
    with pytest.raises(error, match=words):
        tdc.load_base(**arguments(tmp_path))


def test_experts_are_no_base(tmp_path):
    base = tdc.load_base(random_unet(), scheduler=NOISE)
    with pytest.raises(ConfigError, match="got a ProgressivePipeline of experts"):
        tdc.load_base(base.to_pipeline())


def test_bad_weights_are_refused_when_they_are_loaded():
    unet = random_unet()
    unet.conv_in.weight.data[0, 0, 0, 0] = torch.nan
    with pytest.raises(CheckpointError, match=r"conv_in\.weight"):
        tdc.load_base(unet, scheduler=NOISE)
