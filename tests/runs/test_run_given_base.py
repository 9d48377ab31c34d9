"""``tdc-ray run --base`` and ``tdc-ray import``, as a user types them."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler

from tdc_ray.cli.commands.import_base import ImportCommand
from tdc_ray.cli.commands.plan import PlanCommand
from tdc_ray.cli.commands.run import RunCommand
from tdc_ray.cli.main import run_command
from tdc_ray.cli.parse import parse
from tdc_ray.config.run import to_json
from tdc_ray.diffusion.pipeline import ProgressivePipeline
from tdc_ray.errors import ConfigError, StorageError
from tdc_ray.models.unet2d.unet import load_unet, save_unet
from tdc_ray.runs.pretrained.sources import resolve_base
from tdc_ray.runs.results import comparable, load_results
from tdc_ray.storage.files import write_json
from tdc_ray.storage.run_dir import RunDir
from tests.models.checkpoints.openai_reference import OpenAIUNet, randomise
from tests.small import TINY, assert_same, make_run_dir, random_unet, sizes, small_config

FEW = ["--finetune.num-steps", "2", "--finetune.batch-size", "8", "--plan.num-groups", "2"]
FEW += ["--prune.method", "magnitude", "--prune.refit", "none", "--prune.num-images", "16"]
FEW += ["--evaluate.num-images", "20", "--sampler.num-inference-steps", "4"]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline") / "ddpm-digits"
    scheduler = DDPMScheduler(600, beta_end=0.03)
    DDPMPipeline(unet=random_unet(), scheduler=scheduler).save_pretrained(folder)
    return folder


def test_how_a_pipeline_samples_is_said_before_a_run(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scheduler = DDPMScheduler(600, timestep_spacing="trailing", variance_type="fixed_large")
    DDPMPipeline(unet=random_unet(), scheduler=scheduler).save_pretrained("p")
    settings = ["--preset", "digits-smoke", "--diffusion.num-train-timesteps", "600"]
    for command in (
        ["import", "p", "out", *settings],
        ["plan", "--base", "p", *settings],
        ["run", "--base", "p", "--dry-run", *settings],
    ):
        assert run_command(command) == 0
        printed = capsys.readouterr().out
        said = (
            r"note: the pipeline of (\S+/)?p samples by DDPMScheduler \(variance_type fixed_large"
        )
        assert re.search(said, printed)


def parsed(*arguments: object):
    command = parse([str(argument) for argument in arguments], checks_paths=False)
    assert isinstance(command, RunCommand | PlanCommand | ImportCommand)
    return command.config


@pytest.mark.ray
def test_a_run_from_a_pipeline_trains_no_base_and_says_where_it_came_from(
    ray_cluster, cache_dir, pipeline, tmp_path, capsys
):
    out = tmp_path / "run"
    command = ["run", "--preset", "digits-smoke", *FEW, "--run-dir", str(out)]
    command += ["--compare", "equal-macs", "--compare.num-images", "90"]
    command += ["--evaluate.cache-dir", str(cache_dir), "--base", str(pipeline)]
    assert run_command(command) == 0
    printed = capsys.readouterr().out
    assert "from its averaged weights alone, for no optimizer state is left" in printed
    assert f"The base was given ({pipeline})" in printed
    run_dir, results = RunDir(out), load_results(out / "results.json")
    (file,) = (pipeline / "unet").glob("*.safetensors")
    assert results.given_base.source == str(pipeline)
    assert list(results.given_base.files) == [str(file)]
    assert (results.base.train_steps, results.base.train_macs) == (0, 0.0)
    assert results.tdc.train_steps == 2 * len(results.groups)
    assert (results.base.num_params, results.base.macs) == sizes(TINY)
    assert results.evaluation.weights == "as given (base), EMA (experts)"
    compared, spent = results.comparison, results.tdc.train_macs + results.prune.search_macs
    assert not compared.continued
    assert compared.train_macs >= spent > 0
    assert compared.steps == compared.train_macs / (3 * results.base.macs * 32)
    assert not run_dir.base_training.exists()
    assert_same(load_unet(run_dir.base_unet).state_dict(), random_unet().state_dict())
    experts = ProgressivePipeline.from_pretrained(out)
    assert experts.scheduler.config["num_train_timesteps"] == 600
    assert results.groups[-1].timesteps[1] == 599

    written = run_dir.results.stat().st_mtime_ns
    assert run_command(command) == 0
    assert run_dir.results.stat().st_mtime_ns == written
    other = tmp_path / "other"
    pipeline.rename(other)
    try:
        assert run_command([*command[:-1], str(other)]) == 1
    finally:
        other.rename(pipeline)
    assert f"model.base {pipeline} -> {other}" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.ray
def test_a_run_from_a_base_of_classes_asks_how_many_and_its_experts_are_told_them(
    ray_cluster, cache_dir, tmp_path, capsys
):
    unet, folder, out = (
        random_unet({**TINY, "num_class_embeds": 11}),
        tmp_path / "p",
        tmp_path / "r",
    )
    DDPMPipeline(unet=unet, scheduler=DDPMScheduler(600)).save_pretrained(folder)
    command = ["run", "--preset", "digits-smoke", *FEW, "--run-dir", str(out)]
    command += ["--evaluate.cache-dir", str(cache_dir), "--base", str(folder)]
    assert run_command(command) == 1
    error = capsys.readouterr().err
    assert "conditioning.num_classes must be 11 for this base, or 10 if the last" in error
    assert "got None. Set --conditioning.num-classes" in error
    assert not out.exists()

    command += ["--conditioning.num-classes", "10", "--conditioning.label-dropout", "0.5"]
    command += ["--sampler.guidance-scale", "2"]
    assert run_command(command) == 0
    results = load_results(out / "results.json")
    assert (results.evaluation.num_classes, results.evaluation.guidance_scale) == (10, 2.0)
    assert np.isfinite([results.base.score, results.tdc.score]).all()
    assert_same(load_unet(RunDir(out).base_unet).state_dict(), unet.state_dict())
    experts = ProgressivePipeline.from_pretrained(out)
    experts.set_progress_bar_config(disable=True)
    one, other = (experts(1, seed=0, class_labels=[label], output_type="np") for label in (3, 7))
    assert (one.images != other.images).any()
    config = parsed("plan", "--preset", "digits-smoke", "--base", out)
    assert config.conditioning.num_classes is None  # an imported base does not tell
    assert parsed("plan", "--base", out).conditioning.num_classes == 10


@pytest.mark.slow
@pytest.mark.ray
def test_a_pipeline_becomes_progressive_without_its_data_set(ray_cluster, tmp_path, capsys):
    folder, out, cache = (tmp_path / name for name in ("p", "run", "cache"))
    unet = random_unet({**TINY, "num_class_embeds": 10})
    DDPMPipeline(unet=unet, scheduler=DDPMScheduler(600)).save_pretrained(folder)
    command = ["run", "--preset", "digits-smoke", *FEW[4:], "--run-dir", str(out)]
    command += ["--evaluate.cache-dir", str(cache), "--base", str(folder), "--data", "base"]
    command += ["--finetune.num-steps", "0", "--conditioning.num-classes", "10"]
    command += ["--plan.num-groups", "2", "--sampler.scheduler", "base"]
    command += ["--data.num-images", "100", "--evaluate.features", "classifier"]
    assert run_command(command) == 0
    printed = capsys.readouterr().out
    assert "against 100 samples of the base, no data set" in printed
    assert "of it to draw images from the base in place of a data set" in printed
    assert "No data set was used: scores say how near the images are to the base's own" in printed
    results = load_results(out / "results.json")
    assert results.metric == "fd_base_samples_cnn"
    assert results.dataset == "base_samples"
    assert results.prune.drawing_macs == 100 * 4 * results.base.macs < results.prune.search_macs
    assert results.images.num_images == 100
    assert not RunDir(out).real_images.exists()
    drawn = next(cache.glob("base_samples/*"))
    before = {path: path.stat().st_mtime_ns for path in drawn.iterdir()}
    assert run_command(command) == 0  # is finished
    again = [str(tmp_path / "again") if one == str(out) else one for one in command]
    assert run_command(again) == 0
    assert {path: path.stat().st_mtime_ns for path in drawn.iterdir()} == before
    other = load_results(tmp_path / "again" / "results.json")
    assert comparable(other) == comparable(results)


def test_import_says_how_many_classes_a_base_embeds(tmp_path, capsys):
    unet = random_unet({**TINY, "num_class_embeds": 11})
    DDPMPipeline(unet=unet, scheduler=DDPMScheduler(600)).save_pretrained(tmp_path / "p")
    assert run_command(["import", str(tmp_path / "p"), str(tmp_path / "base")]) == 0
    printed = capsys.readouterr().out
    assert "it embeds 11 classes: run it with --conditioning.num-classes 11, or 10 if" in printed


def test_the_classes_of_a_run_come_along_whatever_the_preset(tmp_path):
    config, run_dir = small_config(conditioning={"num_classes": 10}), RunDir(tmp_path / "run")
    save_unet(random_unet({**TINY, "num_class_embeds": 10}), run_dir.base_unet)
    write_json(run_dir.config, to_json(config))
    write_json(run_dir.base_result, {})
    command = ("plan", "--preset", "digits-smoke", "--base", tmp_path / "run")
    assert parsed(*command).conditioning.num_classes == 10


def test_what_the_base_tells_comes_along_and_a_flag_that_disagrees_is_refused(
    pipeline, tmp_path, capsys
):
    command = ["run", "--preset", "digits-smoke", "--base", str(pipeline), "--dry-run"]
    assert run_command(command) == 0
    printed = capsys.readouterr().out
    assert "diffusion.num_train_timesteps 1000 -> 600\n" in printed
    assert "base 4.04 M macs" in printed
    for flags, words in (
        (["--diffusion.num-train-timesteps", "500"], "num_train_timesteps must be 600"),
        (["--diffusion.beta-schedule", "scaled_linear"], "beta_schedule must be linear"),
        (["--data.image-size", "16"], "data.image_size must be 8, as was found in the base"),
        (["--model.num-heads", "2"], "model.num_heads goes with openai: and compvis: alone"),
    ):
        assert run_command([*command, *flags]) == 1
        assert words in capsys.readouterr().err
    assert run_command([*command, "--sampler.no-clip-sample"]) == 0


def test_the_resolution_comes_along_unless_a_preset_says_another(pipeline, capsys):
    config = parsed("run", "--base", pipeline, "--data.source", "npz", "--data.path", "x.npz")
    assert (config.data.image_size, config.data.num_channels) == (8, 1)
    assert config.model.base == str(pipeline)
    arguments = ["plan", "--preset", "cifar10", f"--base={pipeline}"]
    assert run_command(arguments) == 1
    assert "data.num_channels must be 1" in capsys.readouterr().err


def test_a_unet_alone_asks_for_its_noise_process_by_name(tmp_path):
    save_unet(random_unet(), tmp_path / "unet")
    with pytest.raises(ConfigError, match=r"does not say diffusion\.num_train_timesteps.*preset"):
        parsed("run", "--base", tmp_path / "unet")
    named = parsed("run", "--base", tmp_path / "unet", "--preset", "digits-smoke")
    assert named.diffusion.num_train_timesteps == 1000
    flags = ("--diffusion.num-train-timesteps", "700")
    flags += ("--data.source", "digits")
    assert parsed("run", "--base", tmp_path / "unet", *flags).diffusion.num_train_timesteps == 700


def test_a_pipeline_without_a_preset_asks_for_the_data(tmp_path):
    DDPMPipeline(random_unet(), DDPMScheduler()).save_pretrained(tmp_path / "p")
    with pytest.raises(ConfigError, match=r"does not say what it was trained on.*by --data, or"):
        parsed("run", "--base", tmp_path / "p")
    assert parsed("run", "--base", tmp_path / "p", "--data.source", "digits").data.path is None


def test_of_a_run_directory_all_settings_come_along(tmp_path):
    config = small_config(diffusion={"beta_end": 0.01}, plan={"num_groups": 3}, seed=7)
    run_dir = make_run_dir(tmp_path / "run")
    write_json(run_dir.config, to_json(config))
    write_json(run_dir.base_result, {})
    found = parsed("run", "--base", tmp_path / "run")
    assert (found.seed, found.plan.num_groups, found.diffusion.beta_end) == (7, 3, 0.01)
    assert found.model.base == str(tmp_path / "run")


def test_import_converts_and_prints_what_the_file_does_not_tell(tmp_path, capsys):
    torch.manual_seed(0)
    torch.save(randomise(OpenAIUNet(), 0).state_dict(), tmp_path / "model.pt")
    source, out = f"openai:{tmp_path / 'model.pt'}", tmp_path / "base"
    command = ["import", source, str(out), "--preset", "cifar10-cosine"]
    assert run_command(command) == 1
    assert "is not of model.architecture iddpm-cifar10: found" in capsys.readouterr().err
    assert not out.exists()
    command += ["--model.num-heads", "4", "--data.image-size", "16"]
    assert run_command(command) == 0
    printed = capsys.readouterr().out
    assert "diffusion.beta_schedule squaredcos_cap_v2" in printed
    assert "diffusion.rescale_timesteps True" in printed
    base = resolve_base(str(out))
    assert base.settings.diffusion.num_train_timesteps == 4000
    assert base.settings.diffusion.rescale_timesteps is True
    assert json.loads((out / "base.json").read_text())["source"] == source
    assert run_command(command) == 1
    assert "must be a new or an empty folder" in capsys.readouterr().err


def test_import_takes_the_source_wherever_it_stands(pipeline, tmp_path):
    found = parsed("import", "--preset", "digits-smoke", pipeline, tmp_path / "base")
    assert found.diffusion.num_train_timesteps == 600


def test_other_settings_of_a_run_directory_name_the_base(pipeline, tmp_path):
    from tdc_ray.runs.run import run

    write_json(RunDir(tmp_path).config, to_json(small_config()))
    with pytest.raises(StorageError, match=r"model\.base None -> "):
        run(small_config(model={"base": str(pipeline)}), tmp_path)
