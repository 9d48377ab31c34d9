import gc
import json
import math
import os
import shutil
import weakref
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel
from PIL import Image
from torch._dynamo.utils import counters

from tdc_ray.cli.main import run_command
from tdc_ray.config.run import RunConfig
from tdc_ray.diffusion.expert_denoiser import ExpertDenoiser
from tdc_ray.diffusion.pipeline import ProgressivePipeline, base_pipeline, swapped_pipeline
from tdc_ray.diffusion.pipeline_index import INDEX_FILE, PipelineIndex
from tdc_ray.diffusion.plan import TimestepGroup, plan_groups
from tdc_ray.diffusion.samplers import make_scheduler
from tdc_ray.diffusion.sampling import image_generators
from tdc_ray.diffusion.schedule import as_seen
from tdc_ray.errors import CheckpointError, ConfigError
from tdc_ray.models import winograd
from tdc_ray.models.saved_expert import load_expert, save_expert
from tdc_ray.models.unet2d.surgery import cut
from tdc_ray.models.unet2d.units import units_of
from tdc_ray.models.units import keep_everything
from tdc_ray.runs.export.templates.experts import Experts as ExportedExperts
from tdc_ray.runs.pipelines import pipeline_index
from tests.small import (
    TINY,
    assert_same,
    latent_config,
    make_first_stage,
    random_kept,
    random_unet,
    small_config,
)

UNITS = units_of(TINY)
CONFIG = small_config()


def groups_of(config: RunConfig) -> tuple[TimestepGroup, ...]:
    return plan_groups(config.diffusion, config.plan, config.sampler).groups


def test_settings_of_the_bases_scheduler_may_be_infinite(tmp_path):
    of_base = {"_class_name": "DPMSolverMultistepScheduler", "lambda_min_clipped": -math.inf}
    config = small_config(sampler={"scheduler": "base", "of_base": of_base})
    pipeline_index(config).save(tmp_path)
    assert PipelineIndex.load(tmp_path).sampler == config.sampler


def test_an_index_without_a_text_encoder_is_as_before_there_was_one():
    assert "text_encoder" not in pipeline_index(CONFIG).to_json()


def live(unets: Sequence[UNet2DModel], config: RunConfig = CONFIG) -> ProgressivePipeline:
    """A pipeline of experts that are in memory, made as a user would make it."""
    spans = [(group.first, group.last) for group in groups_of(config)]
    seen, scale = as_seen(config.diffusion, spans), config.diffusion.timestep_scale
    return ProgressivePipeline(
        ExpertDenoiser(unets, seen, timestep_scale=scale),
        make_scheduler(config.diffusion, config.sampler),
        shape=(1, 8, 8),
        num_inference_steps=config.sampler.num_inference_steps,
        eta=config.sampler.eta,
        use_clipped_model_output=config.sampler.clips_epsilon,
    )


def images_of(pipeline: ProgressivePipeline, count: int = 3, **arguments) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(count, output_type="pt", **arguments).images


def pruned_unets(config: RunConfig = CONFIG) -> list[UNet2DModel]:
    return [
        cut(random_unet(seed=seed), UNITS, random_kept(UNITS, seed))
        for seed in range(len(groups_of(config)))
    ]


def save_experts(folder: Path, config: RunConfig) -> Path:
    """Write a run directory's folder of experts, each cut from a base of its own."""
    groups = groups_of(config)
    names = [f"expert-{group.index:02d}" for group in groups]
    for seed, (name, unet) in enumerate(zip(names, pruned_unets(config), strict=True)):
        save_expert(folder / name, unet, TINY, random_kept(UNITS, seed))
    pipeline_index(config, dict(zip(names, groups, strict=True))).save(folder)
    return folder


@pytest.fixture
def saved(tmp_path) -> Path:
    return save_experts(tmp_path / "experts", CONFIG)


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        small_config(sampler={"eta": 1.0}),
        small_config(sampler={"sampler": "ddpm"}),
        small_config(sampler={"sampler": "pndm"}),
        small_config(sampler={"steps_offset": 1, "clip_sample": False}),
        small_config(diffusion={"prediction_type": "v_prediction"}),
        small_config(
            diffusion={
                "num_train_timesteps": 400,
                "beta_schedule": "squaredcos_cap_v2",
                "rescale_timesteps": True,
            },
            plan={"num_groups": 7},
        ),
        small_config(diffusion={"sigma_data": 0.5}, sampler={"scheduler": "EDMEulerScheduler"}),
    ],
    ids=["ddim", "eta", "ddpm", "pndm", "latent-like", "velocity", "cosine", "edm"],
)
def test_experts_that_are_copies_of_the_base_draw_the_images_of_the_base(tmp_path, config):
    base, groups = random_unet(), groups_of(config)
    expected = images_of(base_pipeline(base, pipeline_index(config)))
    assert expected.shape == (3, 1, 8, 8)
    assert_same(images_of(live([random_unet() for _ in groups], config)), expected)
    names = [str(group.index) for group in groups]
    for name in names:
        save_expert(tmp_path / name, base, TINY, keep_everything(UNITS))
    pipeline_index(config, dict(zip(names, groups, strict=True))).save(tmp_path)
    assert_same(images_of(ProgressivePipeline.from_pretrained(tmp_path)), expected)


def test_experts_of_edm_serve_the_conditioning_of_their_timesteps(tmp_path):
    config = small_config(
        diffusion={"sigma_data": 0.5}, sampler={"scheduler": "EDMEulerScheduler"}
    )
    groups = groups_of(config)
    unets = [random_unet(seed=group.index) for group in groups]
    expected = images_of(live(unets, config))
    names = [str(group.index) for group in groups]
    for name, unet in zip(names, unets, strict=True):
        save_expert(tmp_path / "a" / name, unet, TINY, keep_everything(UNITS))
    index = pipeline_index(config, dict(zip(names, groups, strict=True)))
    index.save(tmp_path / "a")
    pipeline = ProgressivePipeline.from_pretrained(tmp_path / "a")
    assert_same(images_of(pipeline), expected)
    pipeline.save_pretrained(tmp_path / "b")
    again = ProgressivePipeline.from_pretrained(tmp_path / "b", offload=True)
    assert_same(images_of(again), expected)
    denoiser = ExpertDenoiser.from_pretrained(tmp_path / "a")
    assert denoiser.experts.spans == pipeline.experts.spans
    span = (groups[1].first, groups[1].last)
    parts = [unets[0], unets[1], *[unets[0]] * (len(groups) - 2)]
    swapped = swapped_pipeline(unets[0], unets[1], span, index)
    assert_same(images_of(swapped), images_of(live(parts, config)))


def test_epsilon_follows_the_clipped_image_as_the_settings_or_the_call_say(saved, tmp_path):
    pipeline = ProgressivePipeline.from_pretrained(saved)
    expected = images_of(pipeline)
    plain = images_of(pipeline, use_clipped_model_output=False)
    assert not torch.equal(plain, expected)
    by_class = {"scheduler": "DDIMScheduler"}  # as diffusers' own pipeline does
    named = ProgressivePipeline.from_pretrained(saved, sampler=by_class)
    assert_same(images_of(named), plain)
    asked = {"scheduler": "DDIMScheduler", "use_clipped_model_output": True}
    assert_same(images_of(ProgressivePipeline.from_pretrained(saved, sampler=asked)), expected)
    pipeline.use_clipped_model_output = False
    pipeline.save_pretrained(tmp_path / "saved")
    assert_same(images_of(ProgressivePipeline.from_pretrained(tmp_path / "saved")), plain)


def test_experts_are_loaded_with_another_sampler_and_saved_with_it(saved, tmp_path):
    how = {"scheduler": "EulerDiscreteScheduler", "spacing": "trailing", "num_inference_steps": 7}
    pipeline = ProgressivePipeline.from_pretrained(saved, sampler=how)
    images = images_of(pipeline)
    assert len(pipeline.scheduler.timesteps) == 7
    pipeline.save_pretrained(tmp_path / "saved")
    assert_same(images_of(ProgressivePipeline.from_pretrained(tmp_path / "saved")), images)
    with pytest.raises(ConfigError, match="did you mean EulerDiscreteScheduler"):
        ProgressivePipeline.from_pretrained(saved, sampler={"scheduler": "EulerDiscrete"})


def test_saved_experts_draw_the_images_of_the_live_ones(saved):
    expected = images_of(live(pruned_unets()))
    assert_same(images_of(ProgressivePipeline.from_pretrained(saved)), expected)
    assert_same(images_of(ProgressivePipeline.from_pretrained(str(saved))), expected)
    run_dir = saved.parent
    assert_same(images_of(ProgressivePipeline.from_pretrained(run_dir)), expected)
    assert not torch.equal(
        expected, images_of(base_pipeline(random_unet(), pipeline_index(CONFIG)))
    )


def test_experts_that_are_read_when_they_are_needed_draw_the_same_images(saved):
    expected = images_of(ProgressivePipeline.from_pretrained(saved))
    pipeline = ProgressivePipeline.from_pretrained(saved, offload=True)
    assert_same(images_of(pipeline), expected)
    assert_same(images_of(pipeline), expected)
    assert sum(parameter.numel() for parameter in pipeline.experts.parameters()) == 0
    half = pipeline.to(torch.bfloat16)
    assert half.experts.for_timestep(999).dtype == torch.bfloat16
    torch.testing.assert_close(images_of(half), expected, rtol=0, atol=0.1)


def test_by_winograds_algorithm_the_images_are_the_same_but_for_rounding(saved, monkeypatch):
    monkeypatch.setattr(winograd, "LEAST_CHANNELS", 1)
    monkeypatch.setattr(winograd, "LEAST_TILES", 1)
    monkeypatch.setattr(winograd, "LEAST_PIXELS", 1)
    expected = images_of(ProgressivePipeline.from_pretrained(saved))
    pipeline = ProgressivePipeline.from_pretrained(saved, winograd=True)
    found = images_of(pipeline)
    assert not torch.equal(found, expected)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)
    pipeline.winograd = False
    assert_same(images_of(pipeline), expected)


def test_every_expert_is_compiled_once_and_draws_the_same_images(saved, monkeypatch):
    modes = []

    def compiled(function, *, mode, dynamic):
        modes.append(mode)
        return function

    monkeypatch.setattr(torch, "compile", compiled)
    expected = images_of(ProgressivePipeline.from_pretrained(saved))
    pipeline = ProgressivePipeline.from_pretrained(saved, compile_mode="default")
    for _ in range(2):
        torch.testing.assert_close(images_of(pipeline), expected)
    assert modes == ["default"] * len(pipeline.experts)
    pipeline.compile_mode = "none"
    assert_same(images_of(pipeline), expected)


@pytest.mark.slow  # compiles two experts to machine code, for minutes
@pytest.mark.timeout(3000)
@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="no C++ compiler")
@pytest.mark.filterwarnings("ignore")  # of the compiler
def test_compiled_experts_draw_the_images_of_the_plain_ones_but_for_rounding(tmp_path):
    config = small_config(plan={"num_groups": 2}, sampler={"num_inference_steps": 4})
    folder = save_experts(tmp_path / "experts", config)
    torch.compiler.reset()
    counters.clear()
    expected = images_of(ProgressivePipeline.from_pretrained(folder))
    found = images_of(ProgressivePipeline.from_pretrained(folder, compile_mode="default"))
    assert counters["aot_autograd"]["ok"] == counters["stats"]["unique_graphs"] == 2
    assert 0 < float((found - expected).abs().max()) < 1e-4

    def sampled(*arguments: str) -> np.ndarray:
        out, size = str(tmp_path / "images"), ("--num-images", "4", "--batch-size", "3")
        assert run_command(["sample", str(folder), *size, "--out-dir", out, *arguments]) == 0
        return np.load(tmp_path / "images" / "samples.npz")["arr_0"].astype(int)

    assert abs(sampled("--compile", "default") - sampled()).max() <= 1


@pytest.mark.parametrize("other", ["offload", "winograd"])
def test_what_would_not_stay_compiled_is_refused(saved, other):
    pipeline = ProgressivePipeline.from_pretrained(saved, compile_mode="default", **{other: True})
    with pytest.raises(ConfigError, match=f"compile_mode must be none with {other}"):
        pipeline(1)


def test_the_samplers_own_setting_of_compile_is_refused(saved):
    with pytest.raises(ConfigError, match=r"without compile, got default: give compile_mode"):
        ProgressivePipeline.from_pretrained(saved, sampler={"compile": "default"})


def test_the_expert_of_the_timesteps_below_is_read_before_they_come(saved, monkeypatch):
    read = []

    def reading(folder: Path) -> UNet2DModel:
        read.append(folder.name)
        return load_expert(folder)

    monkeypatch.setattr("tdc_ray.diffusion.expert_set.load_expert", reading)
    experts = ProgressivePipeline.from_pretrained(saved, offload=True).experts
    experts.for_timestep(999)
    experts._thread.shutdown(wait=True)
    assert read == ["expert-03", "expert-02"]


@pytest.mark.slow
def test_two_experts_are_in_memory_at_most_where_they_are_read_when_needed(saved):
    experts = ProgressivePipeline.from_pretrained(saved, offload=True).experts
    seen = []
    for timestep in range(999, -1, -50):
        seen.append(weakref.ref(experts.for_timestep(timestep)))
        gc.collect()
        assert len({id(unet()) for unet in seen if unet() is not None}) <= 2
    (saved / "expert-01" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="expert-01"):
        ProgressivePipeline.from_pretrained(saved, offload=True).experts.for_timestep(300)


def test_a_moved_folder_of_experts_still_loads(saved, tmp_path):
    expected = images_of(ProgressivePipeline.from_pretrained(saved))
    saved.rename(tmp_path / "elsewhere")
    assert_same(images_of(ProgressivePipeline.from_pretrained(tmp_path / "elsewhere")), expected)


def test_a_step_uses_the_expert_of_its_group_as_the_plan_and_an_export_count():
    plan = plan_groups(CONFIG.diffusion, CONFIG.plan, CONFIG.sampler)
    unets = [random_unet(seed=seed) for seed in range(len(plan.groups))]
    ours = live(unets).experts
    exported = ExportedExperts(unets, [(group.first, group.last) for group in plan.groups])
    for timestep in [*range(1000), *np.arange(0.25, 999, 0.25).tolist()]:
        expert = unets[plan.group_of(timestep).index]
        assert ours.for_timestep(timestep) is exported.for_timestep(timestep) is expert


def test_a_timestep_without_an_expert_is_an_error_that_names_it():
    pipeline = live([random_unet() for _ in range(4)])
    for timestep in (-1, 1000):
        with pytest.raises(ConfigError, match=f"no expert serves timestep {timestep}:"):
            pipeline.experts.for_timestep(timestep)
    pipeline.scheduler = DDPMScheduler(num_train_timesteps=4000)
    with pytest.raises(ConfigError, match="no expert serves timestep 3600"):
        images_of(pipeline)


def test_a_folder_without_an_index_is_a_checkpoint_error(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(CheckpointError, match=rf"{folder} holds no experts: {INDEX_FILE}"):
            ProgressivePipeline.from_pretrained(folder)


def test_an_index_of_another_format_is_a_checkpoint_error(saved):
    index = json.loads((saved / INDEX_FILE).read_text())
    (saved / INDEX_FILE).write_text(json.dumps(index | {"format": 2}))
    with pytest.raises(
        CheckpointError,
        match=f"{saved}/{INDEX_FILE} is malformed: format must be 1, got 2",
    ):
        ProgressivePipeline.from_pretrained(saved)


def test_an_expert_that_is_missing_is_a_checkpoint_error_that_names_it(saved):
    (saved / "expert-02" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="expert-02"):
        ProgressivePipeline.from_pretrained(saved)


@pytest.mark.parametrize(
    "text", ["{}", "[]", '{"format": 1', '{"format": 1, "experts": []}'], ids=repr
)
def test_a_spoilt_index_is_a_checkpoint_error(saved, text):
    (saved / INDEX_FILE).write_text(text)
    with pytest.raises(CheckpointError):
        ProgressivePipeline.from_pretrained(saved)


@pytest.mark.parametrize(
    ("place", "key", "value", "message"),
    [
        ("diffusion", "prediction_type", "v", "diffusion.prediction_type must be"),
        ("diffusion", "beta_schedule", "sigmoid", "diffusion.beta_schedule must be"),
        ("sampler", "eta", 2.0, "sampler.eta must be at most 1, got 2.0"),
        ("sampler", "num_inference_steps", "ten", "sampler.num_inference_steps must be"),
        (None, "shape", [1, 8], "shape.2: Field required"),
        (None, "experts", [{"folder": "a", "first": 0}], "experts.0.last: Field required"),
        (None, "upscaler", "x", "upscaler: Extra inputs"),
    ],
)
def test_a_malformed_index_is_one_error_that_names_the_field(saved, place, key, value, message):
    index = json.loads((saved / INDEX_FILE).read_text())
    (index[place] if place else index)[key] = value
    (saved / INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=rf"{INDEX_FILE} is malformed: {message}"):
        ProgressivePipeline.from_pretrained(saved)


def test_an_index_is_written_as_it_was_read(saved, tmp_path):
    PipelineIndex.load(saved).save(tmp_path)
    assert (tmp_path / INDEX_FILE).read_bytes() == (saved / INDEX_FILE).read_bytes()


def test_the_scheduler_can_be_swapped_for_another_made_from_its_config(saved):
    pipeline = ProgressivePipeline.from_pretrained(saved)
    before = images_of(pipeline)
    pipeline.scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    images = images_of(pipeline)
    assert images.shape == before.shape
    assert images.isfinite().all()
    assert not torch.allclose(images, before, atol=1e-2)
    assert_same(pipeline.scheduler.betas, make_scheduler(CONFIG.diffusion, CONFIG.sampler).betas)
    ddpm = small_config(sampler={"sampler": "ddpm"})
    assert_same(images, images_of(live(pruned_unets(), ddpm)))


def test_images_come_as_pil_numpy_or_torch():
    pipeline = base_pipeline(random_unet(), pipeline_index(CONFIG))
    tensor = images_of(pipeline, 2)
    assert tensor.dtype == torch.float32
    assert tensor.shape == (2, 1, 8, 8)
    pixels = pipeline(2, output_type="np").images
    assert pixels.dtype == np.uint8
    assert pixels.shape == (2, 8, 8, 1)
    expected = np.clip((tensor.numpy().transpose(0, 2, 3, 1) + 1) * 127.5, 0, 255)
    np.testing.assert_allclose(pixels, expected, atol=0.501)
    pictures = pipeline(2).images
    assert all(isinstance(picture, Image.Image) for picture in pictures)
    np.testing.assert_array_equal(np.stack([np.asarray(p) for p in pictures]), pixels[..., 0])


def test_colour_comes_as_rgb_pictures():
    config = {**TINY, "in_channels": 3, "out_channels": 3}
    settings = small_config(data={"num_channels": 3})
    (picture,) = base_pipeline(random_unet(config), pipeline_index(settings))().images
    assert (picture.mode, picture.size) == ("RGB", (8, 8))


def test_image_i_of_a_seed_is_the_same_in_every_batch():
    pipeline = base_pipeline(random_unet(), pipeline_index(CONFIG))
    four = images_of(pipeline, 4)
    assert_same(images_of(pipeline, 4, seed=0), four)
    torch.testing.assert_close(images_of(pipeline, 2), four[:2], rtol=1e-4, atol=1e-4)
    given = images_of(pipeline, 2, generator=image_generators(0, 2, 2))
    torch.testing.assert_close(given, four[2:], rtol=1e-4, atol=1e-4)


def test_another_seed_draws_other_images():
    pipeline = base_pipeline(random_unet(), pipeline_index(CONFIG))
    assert not torch.allclose(images_of(pipeline, seed=1), images_of(pipeline), atol=0.1)


def test_one_generator_serves_a_whole_batch_of_different_images():
    pipeline = base_pipeline(random_unet(), pipeline_index(CONFIG))
    images = images_of(pipeline, 2, generator=torch.Generator().manual_seed(3))
    assert_same(images_of(pipeline, 2, generator=torch.Generator().manual_seed(3)), images)
    assert not torch.allclose(images[0], images[1], atol=0.1)


@pytest.mark.parametrize("num", [0, 1, 3])
def test_the_number_of_generators_must_be_that_of_the_images(num):
    pipeline = base_pipeline(random_unet(), pipeline_index(CONFIG))
    with pytest.raises(ConfigError, match=f"got {num} for batch_size 2"):
        pipeline(2, image_generators(0, 0, num))


def test_steps_and_eta_of_a_call_win_over_the_planned_ones():
    planned = base_pipeline(
        random_unet(), pipeline_index(small_config(sampler={"num_inference_steps": 4}))
    )
    called = images_of(planned, num_inference_steps=10, eta=1.0)
    assert_same(
        called,
        images_of(
            base_pipeline(random_unet(), pipeline_index(small_config(sampler={"eta": 1.0})))
        ),
    )
    assert not torch.allclose(called, images_of(planned), atol=0.1)


def test_steps_of_a_call_begin_near_the_last_timestep(saved):
    pipeline = ProgressivePipeline.from_pretrained(saved)
    with pytest.raises(ConfigError, match=r"be 500 or 1000, got 600.* begin at 599, with"):
        pipeline(1, num_inference_steps=600)


@pytest.mark.parametrize("offload", [False, True])
def test_a_saved_pipeline_draws_the_same_images(saved, tmp_path, offload):
    pipeline = ProgressivePipeline.from_pretrained(saved, offload=offload)
    pipeline.num_inference_steps, pipeline.eta = 5, 0.5
    if not offload:
        with torch.no_grad():
            pipeline.experts[1].conv_in.weight.mul_(1.5)
    expected = images_of(pipeline)
    for _ in range(2):  # the second time over itself
        pipeline.save_pretrained(tmp_path / "out")
        pipeline = ProgressivePipeline.from_pretrained(tmp_path / "out", offload=offload)
        assert_same(images_of(pipeline), expected)
    assert not torch.equal(images_of(ProgressivePipeline.from_pretrained(saved)), expected)


def test_a_saved_pipeline_of_latents_brings_its_first_stage(tmp_path):
    unet, groups = random_unet(), groups_of(CONFIG)
    config = latent_config(make_first_stage(tmp_path / "stage"), tmp_path)
    names = [str(group.index) for group in groups]
    for name in names:
        save_expert(tmp_path / "experts" / name, unet, TINY, keep_everything(UNITS))
    index = pipeline_index(config, dict(zip(names, groups, strict=True)))
    index.save(tmp_path / "experts")
    pipeline = ProgressivePipeline.from_pretrained(tmp_path / "experts")
    pipeline.save_pretrained(tmp_path / "out")
    (tmp_path / "experts").rename(tmp_path / "elsewhere")
    loaded = ProgressivePipeline.from_pretrained(tmp_path / "out")
    assert_same(images_of(loaded), images_of(pipeline))


def swap_the_scheduler(pipeline: ProgressivePipeline) -> None:
    pipeline.scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)


def halve(pipeline: ProgressivePipeline) -> None:
    pipeline.to(torch.bfloat16)


def replace_an_expert(pipeline: ProgressivePipeline) -> None:
    pipeline.experts[0] = random_unet()


def forget_where_it_came_from(pipeline: ProgressivePipeline) -> None:
    pipeline._loaded = None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (swap_the_scheduler, "another scheduler"),
        (halve, "another precision"),
        (replace_an_expert, "expert-00 has other widths"),
        (forget_where_it_came_from, "tdc-ray export"),
    ],
)
def test_a_pipeline_that_could_not_be_loaded_the_same_is_not_saved(saved, tmp_path, change, words):
    pipeline = ProgressivePipeline.from_pretrained(saved)
    change(pipeline)
    with pytest.raises(ConfigError, match=words):
        pipeline.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_pipeline_is_saved_over_nothing_else_and_with_no_options_of_diffusers(saved, tmp_path):
    pipeline = ProgressivePipeline.from_pretrained(saved)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="has other things in it"):
        pipeline.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="cannot save push_to_hub"):
        pipeline.save_pretrained(tmp_path / "out", push_to_hub=True)


def test_a_pipeline_moves_as_a_whole(saved):
    pipeline = ProgressivePipeline.from_pretrained(saved)
    assert (pipeline.dtype, pipeline.device.type) == (torch.float32, "cpu")
    full = images_of(pipeline)
    half = images_of(pipeline.to(torch.bfloat16))
    assert all(parameter.dtype == torch.bfloat16 for parameter in pipeline.experts.parameters())
    assert half.dtype == torch.float32
    assert not torch.equal(half, full)
    assert (half - full).abs().mean() < 0.1
