"""A transformer through the whole method: ``tdc-ray prune``, and a run with all that follows."""

import json
import subprocess
import sys
from pathlib import Path
from shutil import copytree

import numpy as np
import pytest
from diffusers import DDIMScheduler, DiTTransformer2DModel

from tdc_ray.cli.main import run_command
from tdc_ray.diffusion.pipeline import ProgressivePipeline
from tdc_ray.errors import CheckpointError
from tdc_ray.models.denoiser import count_params
from tdc_ray.models.families import save_network
from tdc_ray.models.saved_expert import load_expert
from tdc_ray.pruning.space import space_of
from tdc_ray.runs.pretrained.sources import resolve_base
from tdc_ray.storage.files import write_json
from tests.small import TINY_DIT, random_dit

FEW = ("--prune.num-images", "32", "--prune.num-refit-images", "32", "--prune.num-levels", "1")
FEW += ("--prune.num-rounds", "2", "--prune.num-candidates", "2")


def prune(model: Path, out: Path, *arguments: str) -> dict:
    command = ["prune", str(model), "--out", str(out), "--data", "digits", *FEW, *arguments]
    assert run_command(command) == 0
    return json.loads((out / "report.json").read_text())


@pytest.fixture(scope="module")
def pipeline_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like a DiTPipeline's without a VAE."""
    folder = tmp_path_factory.mktemp("pipeline")
    save_network(random_dit(), folder / "transformer")
    DDIMScheduler().save_pretrained(folder / "scheduler")
    parts = {
        "transformer": ["diffusers", "DiTTransformer2DModel"],
        "scheduler": ["diffusers", "DDIMScheduler"],
    }
    write_json(folder / "model_index.json", {"_class_name": "DiTPipeline", **parts})
    return folder


def test_a_pipeline_with_a_dit_is_a_base(pipeline_folder, tmp_path):
    base = resolve_base(str(pipeline_folder))
    assert base.folder == pipeline_folder / "transformer"
    assert base.settings.diffusion.beta_schedule == "linear"
    copytree(pipeline_folder, tmp_path / "p")
    (tmp_path / "p/transformer/config.json").unlink()
    with pytest.raises(CheckpointError, match=r"p is incomplete: .*p/transformer, which has its"):
        resolve_base(str(tmp_path / "p"))


@pytest.mark.slow
def test_whole_blocks_go_where_no_width_would_meet_the_limit(pipeline_folder, tmp_path):
    arguments = ("--macs", "0.1", "--prune.space", "depth", "--prune.sensitivity", "measured")
    report = prune(pipeline_folder, tmp_path, *arguments)
    least = space_of(TINY_DIT).macs(space_of(TINY_DIT).smallest)
    assert report["macs"] <= report["macs_limit"] < least
    assert 0 in report["widths"].values()
    pruned = load_expert(tmp_path)
    assert count_params(pruned) == report["num_params"] < report["num_params_base"]


@pytest.mark.parametrize("method", ["offline", "taylor"])
def test_a_dit_is_pruned_to_a_share_of_its_macs(pipeline_folder, tmp_path, method):
    report = prune(pipeline_folder, tmp_path, "--macs", "0.7", "--method", method)
    assert report["macs"] <= report["macs_limit"] == int(0.7 * report["macs_base"])
    assert report["widths"].keys() == {
        f"transformer_blocks.{block}.{part}" for block in (0, 1) for part in ("attn1", "ff")
    }
    pruned = load_expert(tmp_path)
    assert isinstance(pruned, DiTTransformer2DModel)
    assert [block.attn1.heads for block in pruned.transformer_blocks] == [
        report["widths"][f"transformer_blocks.{block}.attn1"] for block in (0, 1)
    ]


def test_its_stream_cannot_be_pruned(pipeline_folder, tmp_path, capsys):
    command = ["prune", str(pipeline_folder), "--out", str(tmp_path / "out"), "--data", "digits"]
    assert run_command([*command, "--prune.space", "full"]) != 0
    assert "set prune.space to inner" in capsys.readouterr().err


PLAINLY = """
import sys
sys.modules["tdc_ray"] = sys.modules["ray"] = None
import numpy
from diffusers import DiffusionPipeline
pipeline = DiffusionPipeline.from_pretrained({0!r}, custom_pipeline={0!r}, trust_remote_code=True)
pipeline.set_progress_bar_config(disable=True)
numpy.save({1!r}, pipeline(3, seed=5, output_type="np").images)
"""


@pytest.mark.ray
@pytest.mark.slow
def test_a_dit_goes_through_the_whole_method(ray_cluster, cache_dir, tmp_path):
    """Base, plan, prune, refit, fine-tune, sample, evaluate; export, save, load; prune again."""
    write_json(tmp_path / "dit_config.json", TINY_DIT)
    run = tmp_path / "run"
    arguments = ("--model.config", str(tmp_path / "dit_config.json"))
    arguments += ("--conditioning.num-classes", "10", "--conditioning.label-dropout", "0.1")
    arguments += ("--sampler.guidance-scale", "1.5", "--evaluate.cache-dir", str(cache_dir))
    arguments += ("--base.num-steps", "200")  # before, there is no prediction to keep
    command = ["run", "--preset", "digits-smoke", *arguments, "--run-dir", str(run)]
    assert run_command(command) == 0
    results = json.loads((run / "results.json").read_text())
    for group in results["groups"][:-1]:
        assert group["loss_refit"] < group["loss_cut"]
    assert results["tdc"]["macs"] < results["base"]["macs"]

    pipeline = ProgressivePipeline.from_pretrained(run)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(3, seed=5, output_type="np").images
    pipeline.save_pretrained(tmp_path / "saved")
    again = ProgressivePipeline.from_pretrained(tmp_path / "saved")
    again.set_progress_bar_config(disable=True)
    assert np.array_equal(again(3, seed=5, output_type="np").images, images)
    assert run_command(["export", str(run), str(tmp_path / "export")]) == 0
    code = PLAINLY.format(str(tmp_path / "export"), str(tmp_path / "images.npy"))
    subprocess.run([sys.executable, "-c", code], check=True)
    assert np.array_equal(np.load(tmp_path / "images.npy"), images)
    assert run_command(["report", str(run)]) == 0

    report = prune(run, tmp_path / "pruned", "--macs", "0.6")
    assert report["loss_refit"] < report["loss_cut"]


def test_a_dit_needs_classes(tmp_path, capsys):
    write_json(tmp_path / "dit_config.json", TINY_DIT)
    command = ["plan", "--preset", "digits-smoke", "--out-dir", str(tmp_path / "plan")]
    command += ["--model.config", str(tmp_path / "dit_config.json")]
    assert run_command([*command]) == 0
    command = ["run", "--preset", "digits-smoke", "--dry-run", "--run-dir", str(tmp_path / "run")]
    command += ["--model.config", str(tmp_path / "dit_config.json")]
    assert run_command(command) != 0
    assert "conditioning.num_classes must be 11" in capsys.readouterr().err
