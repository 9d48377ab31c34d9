"""A whole run on images that are no squares, from their folder to experts that others sample."""

import json
import subprocess
import sys

import numpy as np
import pytest
from diffusers import DiffusionPipeline
from PIL import Image

from tdc_ray.cli.main import run_command
from tests.images import random_pixels
from tests.runs.test_newcomer import TINY_STEPS, save

# A command after another: on a machine busy with others more than ten minutes.
pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1800)]


def test_images_keep_their_shape_from_the_folder_to_the_export_and_the_score(
    ray_cluster, tmp_path, monkeypatch, capsys, cache_dir
):
    monkeypatch.chdir(tmp_path)
    for index in range(20):
        save(tmp_path / f"wide/{'ab'[index % 2]}/{index}.png", random_pixels(8, 16, 3, seed=index))
    cache = ["--evaluate.cache-dir", str(cache_dir)]
    assert run_command(["run", "--data", "wide", *TINY_STEPS, *cache, "--run-dir", "run"]) == 0
    printed = capsys.readouterr().out
    assert "learnt as 8x16 in colour" in printed
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert results["images"]["shape"] == [3, 8, 16]
    assert results["images"]["changed"] == {}
    assert np.isfinite(results["tdc"]["score"])
    settings = json.loads((tmp_path / "run/config.json").read_text())
    assert settings["data"]["image_size"] == [8, 16]
    with Image.open(tmp_path / "run/samples-tdc.png") as grid:
        assert grid.width > 1.5 * grid.height  # four rows of images of 8x16

    drawn = ["sample", "run", "--num-images", "20", "--num-inference-steps", "2"]
    assert run_command([*drawn, "--out-dir", "drawn"]) == 0
    with np.load("drawn/samples.npz") as file:
        assert file["arr_0"].shape == (20, 8, 16, 3)
    assert run_command(["score", "drawn/samples.npz", "--reference", "run", *cache]) == 0
    assert f"{results['metric']} " in capsys.readouterr().out
    assert run_command(["report", "run", "--out", "report"]) == 0

    assert run_command(["export", "run", "exported"]) == 0
    example = [sys.executable, "exported/example.py", "--steps", "2", "--num-images", "1"]
    subprocess.run(example, check=True, cwd=tmp_path)
    with Image.open("images.png") as image:
        assert image.size == (16, 8)
    custom = {"custom_pipeline": "./exported", "trust_remote_code": True}
    pipeline = DiffusionPipeline.from_pretrained("./exported", **custom)
    images = pipeline(2, num_inference_steps=2, output_type="np").images
    assert images.shape == (2, 8, 16, 3)

    prune = ["prune", "run/base/unet", "--data", "wide", "--method", "magnitude", "--out", "cut"]
    assert run_command([*prune, "--macs", "0.8"]) == 0
    assert json.loads((tmp_path / "cut/report.json").read_text())["macs"]
