"""A transformer through the whole method: ``tdc-ray prune``, and a run with all that follows."""

import json
from pathlib import Path

import pytest
from diffusers import DDIMScheduler, DiTTransformer2DModel

from tdc_ray.cli.main import run_command
from tdc_ray.models.families import save_network
from tdc_ray.models.saved_expert import load_expert
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
    save_network(random_dit(), folder / "transformer", TINY_DIT)
    DDIMScheduler().save_pretrained(folder / "scheduler")
    parts = {
        "transformer": ["diffusers", "DiTTransformer2DModel"],
        "scheduler": ["diffusers", "DDIMScheduler"],
    }
    write_json(folder / "model_index.json", {"_class_name": "DiTPipeline", **parts})
    return folder


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
