"""One command on a folder as people have them: experts, a grid, scores; in Python, the same."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

import tdc_ray as tdc
from tdc_ray.cli.main import run_command
from tdc_ray.data.load import images_fingerprint, load_dataset
from tdc_ray.data.survey import cached_survey, images_summary
from tdc_ray.diffusion.pipeline import ProgressivePipeline
from tdc_ray.runs.results import comparable, load_results
from tdc_ray.storage.run_dir import RunDir
from tests.images import random_pixels

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1800)]

TINY_STEPS = """--base.num-steps 4 --base.num-warmup-steps 1 --base.precision fp32
--finetune.num-steps 2 --finetune.num-warmup-steps 1 --finetune.precision fp32
--prune.num-images 16 --prune.num-refit-images 16 --prune.num-candidates 1 --plan.num-groups 2
--sampler.num-inference-steps 4 --evaluate.num-images 20 --evaluate.batch-size 20
--compute.num-actors 1""".split()  # noqa: SIM905  # as one types


def save(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def folder(tmp_path):
    """Images of two classes, of many kinds and sizes, among other files."""
    root = tmp_path / "my images"
    for name in ("cat", "dog"):
        for index in range(6):
            save(root / name / f"{index}.png", random_pixels(20 + index, 24, 3, seed=index))
        save(root / name / "grey.png", random_pixels(18, 18))
        save(root / name / "colour.jpg", random_pixels(30, 18, 3))
        save(root / name / "transparent.png", random_pixels(18, 18, 4))
        deep = random_pixels(18, 18).astype(np.uint16) * 257
        save(root / name / "sixteen bits.png", deep)
    (root / "cat/damaged.jpg").write_bytes(b"no image")
    (root / ".DS_Store").write_bytes(b"hidden")
    (root / "notes.txt").write_text("words")
    return root


def test_a_folder_of_mixed_images_becomes_experts_a_grid_and_scores(
    ray_cluster, folder, tmp_path, monkeypatch, capsys, cache_dir
):
    monkeypatch.chdir(tmp_path)
    arguments = ["run", "--data", folder.name, *TINY_STEPS, "--evaluate.features", "classifier"]
    arguments += ["--evaluate.cache-dir", str(cache_dir)]
    assert run_command(arguments) == 0
    printed = capsys.readouterr().out
    (root,) = (tmp_path / "runs").iterdir()
    assert root.name.startswith("images-seed0-")
    results = json.loads((root / "results.json").read_text())
    assert np.isfinite([results["base"]["score"], results["tdc"]["score"]]).all()
    assert results["metric"] == "fd_my_images_cnn"

    images = results["images"]
    size = images["shape"][1]
    assert images["shape"] == [3, size, size]
    assert (images["num_images"], images["num_classes"]) == (21, 2)
    assert images["left_out"] == {".txt": 1, "hidden": 1}
    assert images["unreadable"] == ["cat/damaged.jpg"]
    changed = images["changed"]
    expected = {"grey made colour": 4, "scaled to 8 bits": 2, "put on white": 2}
    assert expected.items() <= changed.items()
    assert {"cropped to the middle", "reduced"} <= changed.keys()
    for line in (
        f"21 images of 2 classes in {folder}, read as folder, learnt as {size}x{size} in colour",
        "left out: 1 hidden, 1 .txt",
        "the next one takes an image's place: 1, cat/damaged.jpg",
        "4 grey made colour",
    ):
        assert line in printed

    for model in ("base", "tdc"):
        with Image.open(root / f"samples-{model}.png") as grid:
            assert max(grid.size) >= 512
            assert grid.mode == "RGB"
    pipeline = ProgressivePipeline.from_pretrained(RunDir(root).experts)
    drawn = pipeline(2, class_labels=[0, 1], num_inference_steps=2, output_type="np").images
    assert drawn.shape == (2, size, size, 3)

    # In Python, the same folder comes to experts that draw the same images, of equal score.
    base = tdc.load_base(root)
    plan = tdc.plan_groups(base.scheduler, num_groups=2, schedule="measured")
    experts = tdc.finetune(tdc.prune(base, plan, folder), folder, num_steps=2)
    drawn = experts.to_pipeline()(20, class_labels=[0, 1] * 10, output_type="np").images
    with np.load(root / "evaluation/tdc/0000000.npz") as file:
        assert (file["arr_0"] == drawn).all()
    np.savez("drawn.npz", arr_0=drawn)
    score = ["score", "drawn.npz", "--reference", str(root), "--out", "score.json"]
    assert run_command(score) == 0
    found = json.loads((tmp_path / "score.json").read_text())
    assert found["score"] == pytest.approx(results["tdc"]["score"], rel=1e-6)

    # An image that is added is noticed, and the same command remains the same run.
    save(folder / "dog/new.png", random_pixels(90, 90, 3))
    for function in (load_dataset, images_fingerprint, images_summary, cached_survey):
        function.cache_clear()  # as in a later process
    assert run_command(arguments) == 0
    printed = capsys.readouterr().out
    assert "are not those at the first start: 21 images of 2 classes then, 22 images" in printed
    assert [one.name for one in (tmp_path / "runs").iterdir()] == [root.name]


def test_images_without_labels_or_network_become_experts_that_are_compared_by_losses(
    ray_cluster, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    download = "tdc_ray.runs.evaluation.features.check_download_inception"
    monkeypatch.setattr(download, None)  # calling it is an error
    for index in range(24):
        save(tmp_path / f"pictures/{index}.png", random_pixels(8, 8, 3, seed=index))
    arguments = ["run", "--data", "pictures", *TINY_STEPS, "--evaluate.features", "none"]
    arguments += ["--evaluate.cache-dir", str(tmp_path), "--run-dir", "a"]
    assert run_command(arguments) == 1
    assert "which of 24 holds out 2. Raise --prune.held-out-share, or" in capsys.readouterr().err
    arguments += ["--prune.held-out-share", "0.25"]
    assert run_command(arguments) == 0
    printed, results = capsys.readouterr().out, load_results(tmp_path / "a/results.json")
    assert "No image was scored" in printed
    assert f"held_out_loss {results.tdc.score:#.4g}" in printed
    losses, evaluation = results.losses, results.evaluation
    assert (results.base.score, results.tdc.score) == (losses.loss_base, losses.loss_tdc)
    assert 0 < results.tdc.score < 2
    assert (evaluation.features, evaluation.num_images) == ("none", 20)
    assert results.tdc.images_per_second > 0
    for model in ("base", "tdc"):
        assert (tmp_path / f"a/samples-{model}.png").is_file()
    assert not list(tmp_path.rglob("*features.npz"))

    comparison = ["--compare", "equal-macs", "--compare.swaps", "--compare.num-images", "20"]
    assert run_command([*arguments, *comparison]) == 0
    compared = load_results(tmp_path / "a/results.json")
    assert comparable(replace(compared, comparison=None)) == comparable(results)
    longer = compared.comparison
    assert longer.score != compared.base.score
    for swap in longer.swaps:
        assert swap.score != longer.score
    assert run_command(arguments) == 0
    assert load_results(tmp_path / "a/results.json") == compared

    shutil.copytree("a", "b")
    capsys.readouterr()
    score = f"{compared.tdc.score:#.4g}"
    for command in (["ls", "."], ["compare", "a", "b"], ["status", "a"]):
        assert run_command(command) == 0
        assert score in capsys.readouterr().out
    assert run_command(["report", "a", "--out", "page"]) == 0
    assert score in (tmp_path / "page/report.md").read_text()
    assert run_command(["export", "a", "out"]) == 0
    assert score in (tmp_path / "out/README.md").read_text()
    assert run_command(["schedule", "a", "--score", "--macs", "0.9"]) == 1
    assert "cannot be scored with evaluate.features none" in capsys.readouterr().err
    score = ["score", "pictures", "--reference", "a", "--evaluate.features", "classifier"]
    assert run_command(score) == 1
    assert "must not be classifier where not all images have labels" in capsys.readouterr().err
