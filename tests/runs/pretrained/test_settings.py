"""Bases that are given: what each kind of source tells, what is refused, and the import."""

import hashlib
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    ScoreSdeVeScheduler,
    UNet2DModel,
    UniPCMultistepScheduler,
    VQModel,
)
from diffusers.models.unets.unet_2d import UNet2DOutput
from diffusers.pipelines.deprecated import LDMPipeline  # as hub repositories of 2022 have it
from huggingface_hub.utils import filter_repo_objects

from tdc_ray.cli.main import run_command
from tdc_ray.cli.parse import parse
from tdc_ray.config.model import FILE_KINDS
from tdc_ray.config.presets import preset
from tdc_ray.config.prune import PruneConfig
from tdc_ray.config.run import from_json, to_json
from tdc_ray.diffusion.samplers import make_scheduler
from tdc_ray.diffusion.schedule import betas
from tdc_ray.errors import (
    CheckpointError,
    ConfigError,
    StorageFailedError,
    UnsupportedModelError,
)
from tdc_ray.models.first_stage import copy_first_stage, load_first_stage
from tdc_ray.models.unet2d.unet import load_unet, save_unet
from tdc_ray.runs.preflight import check
from tdc_ray.runs.pretrained.importer import (
    check_compatible,
    check_weights,
    import_base,
    with_first_stage,
)
from tdc_ray.runs.pretrained.notes import base_notes
from tdc_ray.runs.pretrained.prediction import prediction_doubt
from tdc_ray.runs.pretrained.settings import apply_settings, missing_settings, with_base
from tdc_ray.runs.pretrained.sources import FILES, resolve_base
from tdc_ray.storage.files import read_json, write_json
from tdc_ray.storage.object_store import resolve_path
from tdc_ray.storage.run_dir import RunDir
from tests.models.checkpoints.openai_reference import (
    FirstStageKL,
    FirstStageVQ,
    OpenAIUNet,
    compvis_checkpoint,
    randomise,
)
from tests.small import (
    TINY,
    assert_same,
    make_first_stage,
    make_run_dir,
    output_of,
    random_unet,
    small_config,
)

CONFIG = small_config()
LDM = {"beta_schedule": "scaled_linear", "beta_start": 0.0015, "beta_end": 0.0195}


def save_pipeline(folder: Path, scheduler=None, kind=DDPMPipeline, unet=None) -> str:
    scheduler = scheduler or DDPMScheduler(500, beta_end=0.03)
    kind(unet=unet or random_unet(), scheduler=scheduler).save_pretrained(folder)
    return str(folder)


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def openai_file(folder: Path, **changes: object) -> str:
    torch.manual_seed(0)
    path = folder / "model.pt"
    torch.save(randomise(OpenAIUNet(**changes), 0).state_dict(), path)
    return f"openai:{path}"


def with_heads(config=CONFIG, *, heads: int = 4, size: int = 16):
    """Settings that say what an openai file does not tell."""
    model = replace(config.model, base="given", num_heads=heads)
    return replace(config, model=model, data=replace(config.data, image_size=size))


# --- diffusers folders -----------------------------------------------------------------------


def test_a_pipeline_tells_its_noise_process_and_resolution(tmp_path):
    scheduler = DDIMScheduler(  # the pipeline copies it, and would lose positional arguments
        num_train_timesteps=500, beta_end=0.03, clip_sample=False, steps_offset=1
    )
    base = resolve_base(save_pipeline(tmp_path / "p", scheduler, DDIMPipeline))
    assert missing_settings(base.settings) == []
    config = apply_settings(base.settings, CONFIG, with_data=True)
    diffusion, sampler = config.diffusion, config.sampler
    assert (diffusion.num_train_timesteps, diffusion.beta_schedule) == (500, "linear")
    assert (diffusion.beta_start, diffusion.beta_end) == (1e-4, 0.03)
    assert not diffusion.rescale_timesteps
    assert (sampler.clip_sample, sampler.steps_offset, sampler.set_alpha_to_one) == (
        False,
        1,
        True,
    )
    assert check_compatible(base, config)["block_out_channels"] == [16, 32]


@pytest.mark.parametrize(
    ("scheduler", "schedule"),
    [
        (DDPMScheduler(1000, beta_schedule="squaredcos_cap_v2"), "squaredcos_cap_v2"),
        (DDPMScheduler(1000, **LDM), "scaled_linear"),
        (EulerDiscreteScheduler(100), "linear"),
        (
            DDPMScheduler(
                4000,
                trained_betas=betas(
                    "squaredcos_cap_v2", 4000, beta_start=0.1, beta_end=0.1
                ).tolist(),
            ),
            "squaredcos_cap_v2",
        ),
    ],
)
def test_known_schedules_come_along_whatever_the_scheduler(tmp_path, scheduler, schedule):
    base = resolve_base(save_pipeline(tmp_path / "p", scheduler))
    assert base.settings.diffusion.beta_schedule == schedule
    timesteps = scheduler.config["num_train_timesteps"]
    assert base.settings.diffusion.num_train_timesteps == timesteps
    assert missing_settings(base.settings) == []
    check_compatible(base, apply_settings(base.settings, CONFIG, with_data=True))


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_what_a_base_predicts_comes_along_and_stays_when_it_is_imported(tmp_path, kind):
    base = resolve_base(save_pipeline(tmp_path / "p", DDPMScheduler(prediction_type=kind)))
    config = apply_settings(base.settings, CONFIG, with_data=True)
    assert config.diffusion.prediction_type == kind
    import_base(base, config, tmp_path / "base")
    assert resolve_base(str(tmp_path / "base")).settings.diffusion.prediction_type == kind
    document = json.loads((tmp_path / "base/base.json").read_text())
    del document["diffusion"]["prediction_type"]  # as 0.1.0 wrote it
    (tmp_path / "base/base.json").write_text(json.dumps(document))
    assert resolve_base(str(tmp_path / "base")).settings.diffusion.prediction_type == "epsilon"


@pytest.mark.parametrize(
    ("scheduler", "words"),
    [
        (
            DDPMScheduler(prediction_type="sample"),
            "prediction_type sample: .* by --diffusion.prediction-type sample",
        ),
        (DDPMScheduler(beta_schedule="sigmoid"), "beta_schedule sigmoid.*linear, scaled_linear"),
        (DDPMScheduler(3, trained_betas=[0.1, 0.5, 0.2]), "betas of its own, 0.1 to 0.2 in 3"),
        (UniPCMultistepScheduler(use_flow_sigmas=True), "use_flow_sigmas True and .* epsilon"),
        (DDPMScheduler(variance_type="learned"), "variance_type learned: only learned_range"),
        (ScoreSdeVeScheduler(), "beta_schedule None in its ScoreSdeVeScheduler"),
    ],
)
def test_a_scheduler_that_is_not_supported_is_refused_by_name(tmp_path, scheduler, words):
    with pytest.raises(ConfigError, match=words):
        resolve_base(save_pipeline(tmp_path / "p", scheduler))


def test_a_learned_variance_is_told_by_the_unet_and_must_be_so_by_the_scheduler(tmp_path):
    learned = DDPMScheduler(variance_type="learned_range")
    twice = random_unet({**TINY, "out_channels": 2})
    base = resolve_base(save_pipeline(tmp_path / "p", learned, unet=twice))
    assert base.settings.diffusion.learned_sigma is True
    with pytest.raises(
        ConfigError, match=r"learned_range in its scheduler.*1 channels: expected 2"
    ):
        resolve_base(save_pipeline(tmp_path / "q", learned))


@pytest.mark.parametrize(
    ("kind", "flags", "predicts"),
    [
        ("openai", [], "epsilon"),
        ("openai", ["--preset", "images"], "epsilon"),
        ("compvis", [], "epsilon"),
        ("openai", ["--diffusion.prediction-type", "sample"], "sample"),
        ("compvis", ["--diffusion.prediction-type", "v_prediction"], "v_prediction"),
        ("unet", [], "epsilon"),
        ("unet", ["--preset", "images"], "v_prediction"),
        ("unet", ["--diffusion.prediction-type", "v_prediction"], "v_prediction"),
    ],
)
def test_a_base_that_does_not_say_predicts_epsilon_with_images_of_ones_own(
    tmp_path, kind, flags, predicts
):
    save_unet(random_unet(), tmp_path / "unet")
    np.savez(tmp_path / "data.npz", images=np.zeros((4, 8, 8, 1), np.uint8))
    base = {
        "openai": lambda: openai_file(tmp_path),
        "compvis": lambda: compvis_file(tmp_path),
        "unet": lambda: str(tmp_path / "unet"),
    }[kind]()
    command = ["run", "--base", base, "--data", str(tmp_path / "data.npz"), *flags]
    config = parse([*command, "--diffusion.num-train-timesteps", "1000"]).config
    assert config.diffusion.prediction_type == predicts


@pytest.mark.parametrize("command", ["import", "prune", "plan"])
def test_a_base_that_says_it_predicts_the_image_is_taken_where_that_is_said_again(
    tmp_path, capsys, command
):
    DDPMScheduler(500, prediction_type="sample").save_pretrained(tmp_path / "scheduler")
    save_unet(random_unet(), tmp_path / "unet")
    source, out = str(tmp_path / "unet"), str(tmp_path / "out")
    words = {
        "import": ["import", source, out],
        "prune": ["prune", source, "--data", "digits", "--out", out],
        "plan": ["plan", "--base", source, "--data", "digits", "--out-dir", out],
    }[command]
    with pytest.raises(ConfigError, match=r"scheduler_config\.json\) has prediction_type sample"):
        parse(words)
    said = ["--diffusion.prediction-type", "sample"]
    assert parse([*words, *said]).config.diffusion.prediction_type == "sample"
    with pytest.raises(ConfigError, match="has prediction_type sample"):
        parse([*words, "--diffusion.prediction-type", "v_prediction"])
    if command == "import":
        assert run_command([*words, *said]) == 0
        base = resolve_base(out)  # needs no word any more
        assert base.settings.diffusion.prediction_type == "sample"


@pytest.mark.parametrize(
    "scheduler",
    [
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_a_base_of_rectified_flow_comes_with_its_scheduler(tmp_path, scheduler):
    source, out = save_pipeline(tmp_path / "p", scheduler), str(tmp_path / "base")
    assert run_command(["import", source, out]) == 0
    for named in (source, out):
        assert missing_settings(resolve_base(named).settings) == []
        config = parse(["plan", "--base", named, "--data", "digits"]).config
        assert config.diffusion.prediction_type == "flow_prediction"
        made = make_scheduler(config.diffusion, config.sampler)
        assert type(made) is type(scheduler)
        name = "shift" if hasattr(scheduler, "shift") else "flow_shift"
        assert made.config[name] == 3.0


@pytest.mark.parametrize(
    "scheduler",
    [
        EDMEulerScheduler(sigma_data=1.0, sigma_max=50.0, prediction_type="v_prediction", rho=5.0),
        EDMDPMSolverMultistepScheduler(sigma_min=0.01, solver_order=3),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_a_base_of_edm_comes_with_its_scheduler(tmp_path, scheduler):
    source, out = save_pipeline(tmp_path / "p", scheduler), str(tmp_path / "base")
    assert run_command(["import", source, out]) == 0
    for named in (source, out):
        assert missing_settings(resolve_base(named).settings) == []
        config = parse(["plan", "--base", named, "--data", "digits"]).config
        made = make_scheduler(config.diffusion, config.sampler)
        assert type(made) is type(scheduler)
        assert all(made.config[name] == scheduler.config[name] for name in made.config)
        other = replace(config, diffusion=replace(config.diffusion, sigma_data=0.7))
        with pytest.raises(ConfigError, match=r"diffusion\.sigma_data must be .* as was found"):
            check_compatible(resolve_base(named), other)


def test_a_base_of_betas_is_none_of_edm(tmp_path):
    base = resolve_base(save_pipeline(tmp_path / "p"))
    config = apply_settings(base.settings, CONFIG, with_data=True)
    edm = replace(config, diffusion=replace(config.diffusion, sigma_data=0.5))
    with pytest.raises(ConfigError, match=r"diffusion\.sigma_data must be None, as was found"):
        check_compatible(base, edm)


def test_a_base_without_signal_at_the_end_is_imported_as_such(tmp_path):
    noise = DDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    base = resolve_base(save_pipeline(tmp_path / "p", noise, DDIMPipeline))
    config = apply_settings(base.settings, CONFIG, with_data=True)
    assert config.diffusion.rescale_betas_zero_snr
    with pytest.raises(ConfigError, match="rescale_betas_zero_snr must be True, as was found"):
        check_compatible(
            base,
            replace(config, diffusion=replace(config.diffusion, rescale_betas_zero_snr=False)),
        )
    import_base(base, config, tmp_path / "base")
    again = apply_settings(resolve_base(str(tmp_path / "base")).settings, CONFIG, with_data=True)
    assert again.diffusion == config.diffusion
    epsilon = save_pipeline(tmp_path / "q", DDIMScheduler(rescale_betas_zero_snr=True))
    with pytest.raises(ConfigError, match="v_prediction or sample with"):
        apply_settings(resolve_base(epsilon).settings, CONFIG, with_data=True)


def test_values_of_another_type_are_refused_by_name(tmp_path):
    source = save_pipeline(tmp_path / "p")
    edit(tmp_path / "p/unet/config.json", sample_size="large")
    with pytest.raises(ConfigError, match=r"data\.image_size must be .*got 'large'"):
        resolve_base(source)


def test_a_pipeline_without_its_schedulers_file_is_incomplete(tmp_path):
    source = save_pipeline(tmp_path / "p")
    (tmp_path / "p/scheduler/scheduler_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"scheduler_config\.json.*is missing"):
        resolve_base(source)


def test_a_pipeline_without_its_unet_is_incomplete(tmp_path):
    source = save_pipeline(tmp_path / "p")
    (tmp_path / "p/unet").rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"p is incomplete: .*p/unet, which has its network"):
        resolve_base(source)


@pytest.mark.parametrize(
    ("part", "changes", "words"),
    [
        ("unet/config", {"norm_num_groups": 0}, "ZeroDivisionError"),
        ("unet/config", {"layers_per_block": 2.5}, "diffusers can build no UNet2DModel"),
        ("unet/config", {"block_out_channels": "x"}, "diffusers can build no UNet2DModel"),
        ("unet/config", {"down_block_types": ["DownBlock2D"]}, "can build no UNet2DModel"),
        ("scheduler/scheduler_config", {"num_train_timesteps": -5}, "cannot be used"),
        ("scheduler/scheduler_config", {"trained_betas": []}, "no list of numbers"),
        ("scheduler/scheduler_config", {"trained_betas": ["a"]}, "has|no list of numbers"),
        ("scheduler/scheduler_config", {"_class_name": ["x"]}, "no scheduler of diffusers"),
    ],
)
def test_malformed_files_get_one_clear_error(tmp_path, part, changes, words):
    source = save_pipeline(tmp_path / "p")
    edit(tmp_path / "p" / f"{part}.json", **changes)
    with pytest.raises((CheckpointError, ConfigError), match=words):
        resolve_base(source)


def test_a_setting_that_is_not_written_down_has_its_classes_default(tmp_path):
    source = save_pipeline(tmp_path / "p")
    document = {"_class_name": "DDPMScheduler", "beta_end": 0.02}
    (tmp_path / "p/scheduler/scheduler_config.json").write_text(json.dumps(document))
    settings = resolve_base(source).settings
    assert settings.diffusion.num_train_timesteps == 1000
    assert settings.sampler.clip_sample is True


def test_a_pipeline_all_in_one_folder_is_read_as_the_hub_has_it(tmp_path):
    save_pipeline(tmp_path / "p")
    flat = tmp_path / "flat"  # google/ddpm-cifar10-32
    flat.mkdir()
    for path in [*(tmp_path / "p").rglob("*.json"), *(tmp_path / "p").rglob("*.safetensors")]:
        path.rename(flat / path.name)
    base = resolve_base(str(flat))
    assert base.settings.diffusion.num_train_timesteps == 500
    config = apply_settings(base.settings, CONFIG, with_data=True)
    import_base(base, config, tmp_path / "base")
    assert_same(output_of(load_unet(tmp_path / "base/unet")), output_of(random_unet()))


def test_a_unet_alone_tells_all_but_its_noise_process(tmp_path):
    save_unet(random_unet(), tmp_path / "alone")
    base = resolve_base(str(tmp_path / "alone"))
    assert base.settings.by_name() == {
        "diffusion.learned_sigma": False,
        "data.image_size": 8,
        "data.num_channels": 1,
    }
    assert missing_settings(base.settings)[0] == "diffusion.num_train_timesteps"
    assert len(missing_settings(base.settings)) == 5


@pytest.mark.parametrize("place", ["p/unet", "p/unet_ema", "p/checkpoint-5/unet"])
def test_a_unet_that_is_named_is_used_with_the_settings_of_its_pipeline(tmp_path, place):
    save_pipeline(tmp_path / "p")
    named = random_unet(seed=7)
    save_unet(named, tmp_path / place)
    base = resolve_base(str(tmp_path / place))
    assert base.settings.diffusion.num_train_timesteps == 500
    import_base(base, apply_settings(base.settings, CONFIG, with_data=True), tmp_path / "base")
    assert_same(output_of(load_unet(tmp_path / "base/unet")), output_of(named))


def test_a_link_to_a_unet_has_the_noise_process_of_where_it_leads_to(tmp_path):
    save_pipeline(tmp_path / "p")
    (tmp_path / "link").symlink_to(tmp_path / "p/unet")
    base = resolve_base(f"{tmp_path / 'link'}/")
    assert base.settings.diffusion.num_train_timesteps == 500


@pytest.mark.parametrize("place", ["checkpoint-5/unet", "unet"])
def test_a_scheduler_beside_or_above_a_unet_tells_that_it_cannot_be_used(tmp_path, place):
    DDPMScheduler(prediction_type="sample").save_pretrained(tmp_path / "scheduler")
    save_unet(random_unet(), tmp_path / place)  # without a model_index.json
    with pytest.raises(ConfigError, match=r"scheduler_config\.json\) has prediction_type sample"):
        resolve_base(str(tmp_path / place))


def test_a_unet_in_a_run_or_an_import_has_its_noise_process(tmp_path):
    run_dir = make_run_dir(tmp_path / "run")
    config = small_config(
        diffusion={"num_train_timesteps": 50}, sampler={"num_inference_steps": 5}
    )
    write_json(run_dir.config, to_json(config))
    write_json(run_dir.base_result, {})
    save_unet(random_unet(seed=7), run_dir.longer_base)
    write_json(run_dir.longer_base.parent / "base.json", {"steps": 4, "macs_spent": 1.0})
    for unet in (run_dir.base_unet, run_dir.longer_base):
        assert resolve_base(str(unet)).settings.diffusion.num_train_timesteps == 50
    base = resolve_base(save_pipeline(tmp_path / "p"))
    import_base(base, apply_settings(base.settings, CONFIG, with_data=True), tmp_path / "base")
    assert resolve_base(str(tmp_path / "base/unet")).settings.diffusion.num_train_timesteps == 500


def test_a_folder_of_unets_names_them(tmp_path):
    save_unet(random_unet(), tmp_path / "checkpoint-5/unet_ema")
    with pytest.raises(CheckpointError, match="Below it are the UNets unet_ema: name"):
        resolve_base(str(tmp_path / "checkpoint-5"))


# --- how the base's own pipeline samples -----------------------------------------------------


@pytest.mark.parametrize(
    ("scheduler", "words"),
    [
        (
            DDIMScheduler(timestep_spacing="trailing"),
            r"\(timestep_spacing trailing\), a run by ddim",
        ),
        (DDIMScheduler(thresholding=True), r"DDIMScheduler \(thresholding True\), a run by ddim"),
        (DDIMScheduler(clip_sample_range=2.0), r"clip_sample_range 2\.0"),
        (DDPMScheduler(variance_type="fixed_large"), r"DDPMScheduler \(variance_type fixed_large"),
        (
            DPMSolverMultistepScheduler(use_karras_sigmas=True),
            r"DPMSolverMultistepScheduler \(.*use_karras_sigmas True.*\), a run by ddim \(.*"
            r"timestep_spacing leading.*clip_sample True\)",
        ),
    ],
)
def test_what_a_run_samples_otherwise_than_the_pipeline_is_said(tmp_path, scheduler, words):
    base = resolve_base(save_pipeline(tmp_path / "p", scheduler))
    config = apply_settings(base.settings, CONFIG, with_data=True)
    (note,) = base_notes(base, config.diffusion, config.sampler)
    assert re.search(words, note)
    import_base(base, config, tmp_path / "base")
    imported = resolve_base(str(tmp_path / "base"))
    (again,) = base_notes(imported, config.diffusion, config.sampler)
    assert again == note.replace(str(tmp_path / "p"), str(tmp_path / "base"))


@pytest.mark.parametrize(
    "scheduler",
    [
        DDIMScheduler(timestep_spacing="trailing", clip_sample=False),
        DDPMScheduler(variance_type="fixed_large"),
        DPMSolverMultistepScheduler(use_karras_sigmas=True, solver_order=3),
        EulerDiscreteScheduler(),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_a_run_samples_by_the_scheduler_of_the_base_where_that_is_asked_for(tmp_path, scheduler):
    base = resolve_base(save_pipeline(tmp_path / "p", scheduler))
    import_base(base, apply_settings(base.settings, CONFIG, with_data=True), tmp_path / "base")
    for found in (base, resolve_base(str(tmp_path / "base"))):
        config = apply_settings(found.settings, CONFIG, with_data=True)
        how = replace(config.sampler, scheduler="base")
        ours = make_scheduler(config.diffusion, how)
        assert type(ours) is type(scheduler)
        noise = {"trained_betas", "beta_schedule", "beta_start", "beta_end"}
        for name in scheduler.config.keys() - noise:
            if name[0] != "_":
                assert ours.config[name] == scheduler.config[name], name
        assert base_notes(found, config.diffusion, how) == []
    assert from_json(to_json(config)) == config


def test_nothing_is_said_where_a_run_samples_as_the_pipeline(tmp_path):
    source = save_pipeline(tmp_path / "p", DDIMScheduler(clip_sample=False))
    edit(tmp_path / "p/scheduler/scheduler_config.json", skip_prk_steps=True)  # as on the hub
    base = resolve_base(source)
    config = apply_settings(base.settings, CONFIG, with_data=True)
    assert base_notes(base, config.diffusion, config.sampler) == []
    large = resolve_base(save_pipeline(tmp_path / "q", DDPMScheduler(variance_type="fixed_large")))
    ddpm = replace(CONFIG.sampler, sampler="ddpm")
    (note,) = base_notes(large, CONFIG.diffusion, ddpm)
    assert "a run by ddpm (variance_type fixed_small)" in note
    clipping = resolve_base(save_pipeline(tmp_path / "c", DDIMScheduler()))
    config = apply_settings(clipping.settings, CONFIG, with_data=True)
    (note,) = base_notes(clipping, config.diffusion, config.sampler)
    assert "samples by DDIMScheduler, a run by ddim (use_clipped_model_output True): its" in note
    as_theirs = replace(config.sampler, use_clipped_model_output=False)
    assert base_notes(clipping, config.diffusion, as_theirs) == []
    plain = resolve_base(save_pipeline(tmp_path / "r", DDPMScheduler(clip_sample=False)))
    config = apply_settings(plain.settings, CONFIG, with_data=True)
    (note,) = base_notes(plain, config.diffusion, config.sampler)
    assert "samples by DDPMScheduler, a run by ddim: its scores" in note


def test_that_nothing_says_what_a_unet_predicts_is_said(tmp_path):
    save_unet(random_unet(), tmp_path / "alone")
    base = resolve_base(str(tmp_path / "alone"))
    (note,) = base_notes(base, CONFIG.diffusion, CONFIG.sampler)
    assert note.endswith("alone does not say what it predicts: epsilon is taken")


# --- weights ---------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused_by_tensor_and_file(tmp_path, value):
    unet = random_unet()
    unet.conv_in.weight.data[0, 0, 0, 0] = value
    base = resolve_base(save_pipeline(tmp_path / "p", unet=unet))
    config = apply_settings(base.settings, CONFIG, with_data=True)
    words = (
        r"conv_in\.weight of .*p/unet/diffusion_pytorch_model\.safetensors holds NaN or infinity"
    )
    with pytest.raises(CheckpointError, match=words):
        import_base(base, config, tmp_path / "base")
    assert not (tmp_path / "base").exists()
    with pytest.raises(CheckpointError, match=words):
        check(replace(config, model=replace(config.model, base=base.source)), base)


def test_weights_that_are_no_numbers_in_a_checkpoint_file_are_refused(tmp_path):
    source = openai_file(tmp_path)
    state = torch.load(tmp_path / "model.pt", weights_only=True)
    state["out.0.bias"][3] = torch.nan
    torch.save(state, tmp_path / "model.pt")
    base = resolve_base(source)
    config = apply_settings(base.settings, with_heads(), with_data=True)
    with pytest.raises(CheckpointError, match=r"out\.0\.bias of .*model\.pt holds NaN"):
        import_base(base, config, tmp_path / "base")


def test_weights_that_are_cut_short_are_refused_by_file(tmp_path):
    source = save_pipeline(tmp_path / "p")
    file = tmp_path / "p/unet/diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    base = resolve_base(source)
    with pytest.raises(CheckpointError, match=rf"{file} is damaged"):
        import_base(base, apply_settings(base.settings, CONFIG, with_data=True), tmp_path / "base")


@pytest.mark.parametrize("size", ["1GB", "100KB"])
def test_weights_of_a_variant_alone_are_taken_in_float32_and_the_variant_is_named(
    tmp_path, caplog, size
):
    source, unet = save_pipeline(tmp_path / "p"), random_unet().half()
    (tmp_path / "p/unet/diffusion_pytorch_model.safetensors").unlink()
    unet.save_pretrained(tmp_path / "p/unet", variant="fp16", max_shard_size=size)
    base = resolve_base(source)
    import_base(base, apply_settings(base.settings, CONFIG, with_data=True), tmp_path / "base")
    assert_same(output_of(load_unet(tmp_path / "base/unet")), output_of(unet.float()))
    assert "p/unet holds only the variant fp16 of its weights: it is taken" in caplog.text
    caplog.clear()
    unet.save_pretrained(tmp_path / "p/unet")  # without a variant, as diffusers prefers it
    check_weights(base)
    assert not caplog.records


def test_several_variants_alone_are_refused_with_how_to_choose(tmp_path):
    source = save_pipeline(tmp_path / "p")
    file = tmp_path / "p/unet/diffusion_pytorch_model.safetensors"
    shutil.copy(file, file.with_suffix(".non_ema.safetensors"))
    file.rename(file.with_suffix(".ema.safetensors"))
    base = resolve_base(source)
    with pytest.raises(CheckpointError, match=r'variants .*, ema, non_ema: .*variant="ema"'):
        import_base(base, apply_settings(base.settings, CONFIG, with_data=True), tmp_path / "base")


def test_variants_are_downloaded_of_networks_that_have_nothing_else(tmp_path, monkeypatch):
    save_pipeline(tmp_path / "remote")
    weights = "diffusion_pytorch_model.fp16.safetensors"
    (tmp_path / "remote/unet/diffusion_pytorch_model.safetensors").rename(
        tmp_path / "remote/unet" / weights
    )
    make_first_stage(tmp_path / "remote/vae")
    (tmp_path / "remote/vae" / weights).touch()
    (tmp_path / "remote/v1-5-pruned.safetensors").touch()  # the whole pipeline in one file

    def download(_name, *, revision, **patterns):
        assert revision in {None, "local"}
        files = [file for file in (tmp_path / "remote").rglob("*") if file.is_file()]
        names = [file.relative_to(tmp_path / "remote").as_posix() for file in files]
        for name in filter_repo_objects(names, **patterns):
            (tmp_path / "local" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(tmp_path / "remote" / name, tmp_path / "local" / name)
        return str(tmp_path / "local")

    monkeypatch.setattr("tdc_ray.runs.pretrained.sources.snapshot_download", download)
    check_weights(resolve_base("owner/name"))
    assert not (tmp_path / "local/vae" / weights).exists()
    assert not (tmp_path / "local/v1-5-pruned.safetensors").exists()


def test_a_size_that_the_levels_cannot_halve_is_refused_before_work(tmp_path):
    unet = random_unet({**TINY, "sample_size": 9})
    base = resolve_base(save_pipeline(tmp_path / "p", unet=unet))
    config = apply_settings(base.settings, CONFIG, with_data=True)
    with pytest.raises(UnsupportedModelError, match=r"sample_size of 9 cannot be halved.*8 or 10"):
        import_base(base, config, tmp_path / "base")
    assert not (tmp_path / "base").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"_class_name": "UNet3DConditionModel"}, "holds a UNet3DConditionModel: only"),
        ({"in_channels": 6}, "found 6 in and 1 out"),
        ({"in_channels": 4, "out_channels": 4}, "1 or 3 channels, got 4"),
    ],
)
def test_other_unets_are_refused(tmp_path, changes, words):
    source = save_pipeline(tmp_path / "p")
    edit(tmp_path / "p/unet/config.json", **changes)
    with pytest.raises(ConfigError, match=words):
        resolve_base(source)


def test_other_pipelines_are_refused_with_what_they_consist_of(tmp_path):
    source = save_pipeline(tmp_path / "p")
    edit(tmp_path / "p/model_index.json", unet=[None, None], transformer=["diffusers", "X"])
    with pytest.raises(ConfigError, match="a DDPMPipeline of scheduler, transformer"):
        resolve_base(source)


def test_an_import_of_a_pipeline_is_the_pipelines_unet_with_its_origin(tmp_path):
    unet = random_unet({**TINY, "num_heads": 4})
    save_pipeline(tmp_path / "p", unet=unet)
    write_json(tmp_path / "p/unet/tdc_heads.json", {"num_heads": 4})
    base = resolve_base(str(tmp_path / "p"))
    config = apply_settings(base.settings, small_config(model={"dropout": 0.25}), with_data=True)
    import_base(base, config, tmp_path / "base")
    loaded = load_unet(tmp_path / "base/unet")
    assert_same(output_of(loaded), output_of(unet))
    assert loaded.mid_block.resnets[0].dropout.p == 0.25
    document = read_json(tmp_path / "base/base.json")
    (file,) = (tmp_path / "p/unet").glob("*.safetensors")
    assert document["files"] == {str(file): hashlib.sha256(file.read_bytes()).hexdigest()}
    assert document["source"] == str(tmp_path / "p")
    assert document["diffusion"]["num_train_timesteps"] == 500
    assert document["first_stage"] is None


def test_an_imported_base_is_a_base_that_remembers_its_origin(tmp_path):
    first = resolve_base(save_pipeline(tmp_path / "p"))
    config = apply_settings(first.settings, CONFIG, with_data=True)
    import_base(first, config, tmp_path / "one")
    second = resolve_base(str(tmp_path / "one"))
    assert second.settings.by_name() == first.settings.by_name() | {
        "sampler.set_alpha_to_one": True
    }
    import_base(second, config, tmp_path / "two")
    document = read_json(tmp_path / "two/base.json")
    assert document["origin"]["source"] == str(tmp_path / "p")
    assert_same(output_of(load_unet(tmp_path / "two/unet")), output_of(random_unet()))


def test_a_run_directory_tells_all_settings_of_its_run(tmp_path):
    config = small_config(diffusion={"num_train_timesteps": 600, "beta_end": 0.01})
    run_dir = make_run_dir(tmp_path)
    write_json(run_dir.config, to_json(config))
    with pytest.raises(CheckpointError, match="holds no base"):
        resolve_base(str(tmp_path))  # its stage 1 was cut
    write_json(run_dir.base_result, {})
    base = resolve_base(str(tmp_path))
    assert base.settings.diffusion.num_train_timesteps == 600
    assert base.settings.diffusion.beta_end == 0.01
    assert (missing_settings(base.settings), base.weights) == ([], "EMA")


def test_a_run_on_latents_brings_its_first_stage_and_another_may_be_named(tmp_path):
    stage = make_first_stage(tmp_path / "stage")
    config = small_config(
        sampler={"clip_sample": False}, data={"first_stage": str(stage), "image_size": 16}
    )
    run_dir = make_run_dir(tmp_path / "run")
    write_json(run_dir.config, to_json(config))
    write_json(run_dir.base_result, {})
    copy_first_stage(stage, run_dir.experts / "first_stage")
    base = resolve_base(str(tmp_path / "run"))
    found = apply_settings(base.settings, config, with_data=True)
    assert found.data.first_stage == str(run_dir.experts / "first_stage")
    assert not found.sampler.clip_sample
    other = make_first_stage(tmp_path / "other", seed=1)
    named = replace(found, data=replace(found.data, first_stage=str(other)))
    for settings, source in ((found, stage), (named, other)):
        import_base(base, settings, tmp_path / source.name / "base")
        copied = tmp_path / source.name / "base" / "first_stage"
        assert_same(load_first_stage(copied).state_dict(), load_first_stage(source).state_dict())


def test_settings_that_disagree_with_the_base_are_refused_with_both_values(tmp_path):
    base = resolve_base(save_pipeline(tmp_path / "p"))
    config = apply_settings(base.settings, CONFIG, with_data=True)
    for stage, change, words in (
        ("diffusion", {"num_train_timesteps": 400}, "num_train_timesteps must be 500.*got 400"),
        ("diffusion", {"beta_end": 0.02}, "beta_end must be 0.03.*got 0.02"),
        ("diffusion", {"rescale_timesteps": True}, "rescale_timesteps must be False.*got True"),
        ("diffusion", {"learned_sigma": True}, "learned_sigma must be False.*got True"),
        ("data", {"image_size": 16}, "data.image_size must be 8.*got 16.*--data.image-size"),
        ("data", {"image_size": (8, 16)}, "data.image_size must be 8.*got 8x16"),
        ("data", {"num_channels": 3}, "data.num_channels must be 1.*got 3"),
    ):
        changed = replace(config, **{stage: replace(getattr(config, stage), **change)})
        with pytest.raises(ConfigError, match=words):
            check_compatible(base, changed)
    both = replace(config, data=replace(config.data, image_size=16, num_channels=3))
    with pytest.raises(ConfigError, match=r"(?s)2 errors.*num_channels must.*image_size must"):
        check_compatible(base, both)
    otherwise = replace(config, sampler=replace(config.sampler, clip_sample=False))
    check_compatible(base, otherwise)  # how to sample is the user's


def test_fewer_timesteps_than_steps_or_groups_lower_these(tmp_path):
    base = resolve_base(save_pipeline(tmp_path / "p", DDPMScheduler(3)))
    config = apply_settings(base.settings, CONFIG, with_data=True)
    assert (config.sampler.num_inference_steps, config.plan.num_groups) == (3, 3)


# --- latents ---------------------------------------------------------------------------------


def vq_model() -> VQModel:
    torch.manual_seed(0)
    return VQModel(
        block_out_channels=(32, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        num_vq_embeddings=16,
        scaling_factor=0.5,
    ).eval()


def save_latent_pipeline(folder: Path) -> str:
    unet = random_unet({**TINY, "in_channels": 4, "out_channels": 4})
    LDMPipeline(vqvae=vq_model(), unet=unet, scheduler=DDIMScheduler(**LDM)).save_pretrained(
        folder
    )
    return str(folder)


@pytest.mark.parametrize("has_scale", [True, False])
def test_the_first_stage_comes_along(tmp_path, has_scale):
    source = save_latent_pipeline(tmp_path / "p")
    config_path = tmp_path / "p/vqvae/config.json"
    if not has_scale:  # saved before diffusers had the setting
        document = json.loads(config_path.read_text())
        del document["scaling_factor"]
        config_path.write_text(json.dumps(document))
    base = resolve_base(source)
    assert "data.image_size" not in base.settings.by_name()
    import_base(base, apply_settings(base.settings, CONFIG, with_data=True), tmp_path / "base")
    loaded = VQModel.from_pretrained(tmp_path / "base/first_stage", use_safetensors=True)
    assert_same(loaded.state_dict(), vq_model().state_dict())
    assert loaded.config["scaling_factor"] == (0.5 if has_scale else 1.0)
    assert read_json(tmp_path / "base/base.json")["first_stage"] == "first_stage"
    assert len(read_json(tmp_path / "base/base.json")["files"]) == 2
    assert resolve_base(str(tmp_path / "base")).first_stage == tmp_path / "base/first_stage"


def test_an_autoencoder_kl_comes_along_and_others_are_refused(tmp_path):
    source = save_latent_pipeline(tmp_path / "p")
    autoencoder = AutoencoderKL(latent_channels=4, norm_num_groups=32, block_out_channels=(32,))
    autoencoder.save_pretrained(tmp_path / "p/vqvae")
    base = resolve_base(source)
    config = apply_settings(base.settings, CONFIG, with_data=True)
    import_base(base, config, tmp_path / "base")
    AutoencoderKL.from_pretrained(tmp_path / "base/first_stage", use_safetensors=True)
    edit(tmp_path / "p/vqvae/config.json", _class_name="AutoencoderTiny")
    with pytest.raises(
        CheckpointError, match="one of VQModel, AutoencoderKL, AutoencoderDC, got AutoencoderTiny"
    ):
        import_base(base, config, tmp_path / "other")
    assert not (tmp_path / "other/base.json").exists()


def compvis_unets() -> list[OpenAIUNet]:
    """With plain and with averaged weights."""
    torch.manual_seed(0)
    settings = {"scale_shift": False, "out_channels": 3, "heads": 2}
    return [randomise(OpenAIUNet(**settings), seed) for seed in (0, 1)]


def compvis_file(folder: Path, *, averaged: bool = True, first_stage=FirstStageVQ) -> str:
    plain, ema = compvis_unets()
    values = betas("scaled_linear", 1000, beta_start=0.0015, beta_end=0.0195)
    saved = compvis_checkpoint(
        plain,
        ema if averaged else None,
        randomise(first_stage(), 2),
        torch.tensor(values, dtype=torch.float32),
    )
    torch.save(saved | {"epoch": 3, "global_step": 7}, folder / "model.ckpt")
    return f"compvis:{folder / 'model.ckpt'}"


@torch.inference_mode()
def test_a_compvis_checkpoint_is_imported_with_ema_first_stage_and_betas(tmp_path):
    base = resolve_base(compvis_file(tmp_path))
    assert (missing_settings(base.settings), base.weights) == ([], "EMA")
    config = apply_settings(base.settings, with_heads(heads=2, size=32), with_data=True)
    assert (config.diffusion.beta_start, config.diffusion.beta_end) == (0.0015, 0.0195)
    assert config.sampler.steps_offset == 1
    assert (config.sampler.clip_sample, config.sampler.set_alpha_to_one) == (False, False)
    import_base(base, config, tmp_path / "base")
    unet = load_unet(tmp_path / "base/unet")
    assert unet.config["sample_size"] == 16  # of latents of images of 32
    x, timesteps = torch.randn(2, 3, 16, 16), torch.tensor([3, 900])
    plain, averaged = (original(x, timesteps) for original in compvis_unets())
    assert (unet(x, timesteps).sample - averaged).abs().max() < 1e-4
    assert (unet(x, timesteps).sample - plain).abs().max() > 1e-2
    stage = VQModel.from_pretrained(tmp_path / "base/first_stage", use_safetensors=True)
    assert (stage.config["scaling_factor"], stage.config["sample_size"]) == (1.0, 32)


def test_a_kl_first_stage_of_a_compvis_checkpoint_comes_along(tmp_path):
    base = resolve_base(compvis_file(tmp_path, first_stage=FirstStageKL))
    config = apply_settings(base.settings, with_heads(heads=2, size=32), with_data=True)
    import_base(base, config, tmp_path / "base")
    stage = load_first_stage(tmp_path / "base/first_stage")
    assert isinstance(stage.model, AutoencoderKL)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = randomise(FirstStageKL(), 2).encode(images)
    assert expected.shape == stage.encode(images).shape


def test_the_first_stage_of_a_compvis_checkpoint_is_taken_out_once(tmp_path):
    source = compvis_file(tmp_path)
    config = apply_settings(
        resolve_base(source).settings, with_heads(heads=2, size=32), with_data=True
    )
    config = replace(
        config,
        model=replace(config.model, base=source),
        evaluate=replace(config.evaluate, cache_dir=str(tmp_path / "cache")),
    )
    base = resolve_base(source)
    folder = Path(with_first_stage(config, base).data.first_stage)
    written = (folder / "config.json").stat().st_mtime_ns
    VQModel.from_pretrained(folder, use_safetensors=True)
    again = with_first_stage(config, base)
    assert again.data.first_stage == str(folder)
    assert (folder / "config.json").stat().st_mtime_ns == written
    assert with_first_stage(again, base) is again


def test_a_compvis_checkpoint_with_other_betas_than_the_settings_is_refused(tmp_path):
    base = resolve_base(compvis_file(tmp_path, averaged=False))
    assert base.weights == "without EMA"
    with pytest.raises(ConfigError, match=r"beta_schedule must be scaled_linear.*got linear"):
        check_compatible(base, with_heads(heads=2, size=32))


# --- openai ----------------------------------------------------------------------------------


def test_an_openai_file_tells_its_shapes_and_asks_for_the_rest(tmp_path):
    base = resolve_base(openai_file(tmp_path, num_classes=3))
    assert base.settings.by_name() == {
        "diffusion.prediction_type": "epsilon",
        "diffusion.learned_sigma": True,
        "data.num_channels": 3,
    }
    assert base.unet["num_class_embeds"] == 3
    assert len(missing_settings(base.settings)) == 5
    config = apply_settings(base.settings, CONFIG, with_data=True)
    with pytest.raises(ConfigError) as error:
        check_compatible(base, config)
    for words in (
        "is not of model.architecture tiny",
        "found block_out_channels (32, 64), expected (16, 32)",
        "--preset",
        "--model.num-heads",
    ):
        assert words in str(error.value)


def test_a_mismatch_with_the_preset_names_the_architecture_that_fits(tmp_path):
    wide = {"channels": (128, 256, 256, 256), "layers": 3, "attention_at": (1, 2)}
    base = resolve_base(openai_file(tmp_path, **wide))
    with pytest.raises(ConfigError, match=r"\(iddpm-cifar10 is like it\)"):
        check_compatible(
            base, apply_settings(base.settings, preset("imagenet64-cosine"), with_data=False)
        )
    config = preset("cifar10-cosine")
    settings = check_compatible(base, apply_settings(base.settings, config, with_data=False))
    assert (settings["sample_size"], settings["attention_head_dim"]) == (32, 64)


@pytest.mark.parametrize(
    "changes", [{}, {"resblock_updown": True, "timestep_channels": 64}], ids=["iddpm", "adm-512"]
)
@torch.inference_mode()
def test_an_openai_file_is_imported_with_the_heads_that_are_named(tmp_path, changes):
    base = resolve_base(openai_file(tmp_path, **changes))
    config = apply_settings(base.settings, with_heads(), with_data=True)
    import_base(base, config, tmp_path / "base")
    unet = load_unet(tmp_path / "base/unet")
    torch.manual_seed(0)
    original = randomise(OpenAIUNet(**changes), 0)
    x, timesteps = torch.randn(2, 3, 16, 16), torch.tensor([0.25, 999.75])
    assert (unet(x, timesteps).sample - original(x, timesteps)).abs().max() < 1e-4
    document = read_json(tmp_path / "base/base.json")
    told = ["data.num_channels", "diffusion.learned_sigma", "diffusion.prediction_type"]
    assert document["told"] == told
    assert list(document["files"]) == [str(tmp_path / "model.pt")]


@torch.inference_mode()
def test_the_flags_of_an_openai_file_reach_its_import(tmp_path):
    wide = {"channels": (32, 64, 96), "layers": 1, "attention_at": (1, 2), "new_order": True}
    for number, heads in enumerate(({"head_channels": 32}, {"heads": 2, "heads_upsample": 4})):
        base = resolve_base(openai_file(tmp_path, **wide, **heads))
        said = {
            "num_heads": heads.get("heads"),
            "num_head_channels": heads.get("head_channels"),
            "num_heads_upsample": heads.get("heads_upsample"),
            "use_new_attention_order": True,
        }
        config = with_heads()
        config = replace(config, model=replace(config.model, **said))
        config = apply_settings(base.settings, config, with_data=True)
        import_base(base, config, tmp_path / f"base{number}")
        unet = load_unet(tmp_path / f"base{number}/unet")
        torch.manual_seed(0)
        original = randomise(OpenAIUNet(**wide, **heads), 0)
        x, timesteps = torch.randn(2, 3, 16, 16), torch.tensor([0.25, 999.75])
        assert (unet(x, timesteps).sample - original(x, timesteps)).abs().max() < 1e-4
        (note,) = base_notes(base, config.diffusion, config.sampler)
        assert "does not say what it predicts (epsilon is taken, unless --diffusion" in note


def test_heads_are_refused_for_a_base_that_tells_its_own(tmp_path):
    base = resolve_base(save_pipeline(tmp_path / "p"))
    config = apply_settings(base.settings, with_heads(size=8), with_data=True)
    with pytest.raises(ConfigError, match=r"model\.num_heads goes with openai.*got 4"):
        check_compatible(base, config)


def test_a_wrong_tensor_is_named_with_the_file(tmp_path):
    source = openai_file(tmp_path)
    state = torch.load(tmp_path / "model.pt", weights_only=True)
    del state["out.0.bias"]
    torch.save(state, tmp_path / "model.pt")
    words = r"model\.pt is no such checkpoint: it lacks out\.0\.bias \(32,\)"
    with pytest.raises(CheckpointError, match=words):
        resolve_base(source)


def test_an_import_that_fails_leaves_nothing_behind(tmp_path, monkeypatch):
    base = resolve_base(save_latent_pipeline(tmp_path / "p"))
    config = apply_settings(base.settings, CONFIG, with_data=True)

    def no_space(*_args: object, **_options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(VQModel, "save_pretrained", no_space)  # the unet is saved before
    with pytest.raises(StorageFailedError):
        import_base(base, config, tmp_path / "base")
    assert [path.name for path in tmp_path.iterdir()] == ["p"]


def test_an_import_into_a_store_is_a_base_there(tmp_path, bucket):
    base = resolve_base(save_pipeline(tmp_path / "p"))
    config = apply_settings(base.settings, CONFIG, with_data=True)
    import_base(base, config, resolve_path(f"{bucket}/base"))
    there = resolve_base(f"{bucket}/base")
    assert there.settings.diffusion == base.settings.diffusion
    assert_same(there.load_weights(there.unet, False), base.load_weights(base.unet, False))


@torch.inference_mode()
def test_a_base_that_predicts_something_else_than_it_says_is_doubted():
    unet = random_unet()
    unet.conv_out.weight.zero_()  # its output is noise of its own, as far as the input goes
    doubt = prediction_doubt(unet, CONFIG.diffusion)
    assert re.search(
        r"at timestep 999 correlates .* by (?:nan|0\.00), and .* epsilon this is near 1", doubt
    )
    velocity = replace(CONFIG.diffusion, prediction_type="v_prediction")
    assert prediction_doubt(unet, velocity) is None

    unet.forward = lambda x, timestep: UNet2DOutput(sample=0.9 * x)
    assert prediction_doubt(unet, CONFIG.diffusion) is None
    assert "by 1.00, and" in prediction_doubt(unet, velocity)


# --- nothing there ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("nowhere", "nowhere does not exist, and is no name on the hub"),
        ("openai:nowhere.pt", "nowhere.pt does not exist"),
        (".", "holds no base: it has no model_index.json"),
    ],
)
def test_a_source_that_is_none_is_one_clear_error(tmp_path, monkeypatch, source, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=words):
        resolve_base(source)


def test_the_hub_is_asked_and_out_of_reach_is_one_clear_error(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(CheckpointError, match=r"^google/ddpm-x is neither a folder here nor"):
        resolve_base("google/ddpm-x")


def test_an_imported_base_that_is_torn_is_named(tmp_path):
    base = resolve_base(save_pipeline(tmp_path / "p"))
    import_base(base, apply_settings(base.settings, CONFIG, with_data=True), tmp_path / "base")
    edit(tmp_path / "base/base.json", scheduler=["DDIMScheduler"])
    with pytest.raises(CheckpointError, match=r"base\.json is malformed"):
        resolve_base(str(tmp_path / "base"))
    edit(tmp_path / "base/base.json", diffusion={})
    with pytest.raises(CheckpointError, match=r"base\.json is malformed"):
        resolve_base(str(tmp_path / "base"))
    edit(tmp_path / "base/base.json", format=2)
    with pytest.raises(CheckpointError, match="has format 2, expected 1"):
        resolve_base(str(tmp_path / "base"))


def test_a_base_never_comes_from_a_pickle(tmp_path):
    source = save_pipeline(tmp_path / "p")
    for file in (tmp_path / "p").rglob("*.safetensors"):
        file.rename(file.with_suffix(".bin"))
    base = resolve_base(source)
    config = apply_settings(base.settings, CONFIG, with_data=True)
    for work in (
        lambda: import_base(base, config, tmp_path / "base"),
        lambda: check(config, base),
    ):
        with pytest.raises(CheckpointError, match=r"no model in safetensors.*\.bin file that you"):
            work()


def test_a_run_directory_whose_base_is_not_trained_is_none(tmp_path):
    write_json(RunDir(tmp_path).config, to_json(CONFIG))
    with pytest.raises(CheckpointError, match="a run directory whose base is trained"):
        resolve_base(str(tmp_path))


def test_what_is_imported_loads_in_diffusers(tmp_path):
    base = resolve_base(openai_file(tmp_path))
    import_base(
        base, apply_settings(base.settings, with_heads(), with_data=True), tmp_path / "base"
    )
    unet = UNet2DModel.from_pretrained(tmp_path / "base/unet", low_cpu_mem_usage=False).eval()
    assert_same(output_of(unet), output_of(load_unet(tmp_path / "base/unet")))


def test_the_kinds_of_checkpoint_files_are_those_that_the_settings_name():
    assert tuple(FILES) == FILE_KINDS


def test_a_run_that_held_images_out_of_its_base_can_be_a_base():
    trained = replace(preset("digits"), prune=PruneConfig(held_out_of_base=True))
    assert with_base(trained, "run").prune == PruneConfig()
    with pytest.raises(
        ConfigError, match=r"prune\.held_out_of_base must be False with model\.base"
    ):
        replace(trained, model=replace(trained.model, base="run"))
