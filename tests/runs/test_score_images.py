import json

import numpy as np
import pytest
from PIL import Image

from tdc_ray.cli.main import run_command
from tdc_ray.config.data import DataConfig
from tdc_ray.config.run import RunConfig, to_json
from tdc_ray.runs.score_images import open_images
from tdc_ray.storage.files import write_json
from tests.images import random_pixels


def samples_of(run, which="tdc"):
    paths = sorted((run / "evaluation" / which).glob("[0-9]*[0-9].npz"))
    return np.concatenate([np.load(path)["arr_0"] for path in paths])


@pytest.mark.ray
def test_a_runs_own_images_get_the_runs_own_score(finished_run, tmp_path, capsys):
    results = json.loads((finished_run / "results.json").read_text())
    images, scored = samples_of(finished_run), {}
    np.savez(tmp_path / "images.npz", arr_0=images)
    (tmp_path / "png").mkdir()
    for number, image in enumerate(images[..., 0]):
        Image.fromarray(image).save(tmp_path / "png" / f"{number:05d}.png")
    for name in ("images.npz", "png"):
        arguments = ["score", str(tmp_path / name), "--reference", str(finished_run)]
        assert run_command([*arguments, "--out", str(tmp_path / "score.json")]) == 0
        scored[name] = json.loads((tmp_path / "score.json").read_text())
    for score in scored.values():
        assert score["score"] == pytest.approx(results["tdc"]["score"], rel=1e-6)
        assert score["metric"] == results["metric"]
        assert score["metrics"] == pytest.approx(results["tdc"]["metrics"], rel=1e-4)
        assert score["num_images"] == len(images) == results["evaluation"]["num_images"]
        assert score["reference"] == results["evaluation"]["reference"]
        assert score["features"] == results["evaluation"]["features"]
        assert score["notes"] == []
    assert f"{results['metric']} {results['tdc']['score']:.4g}" in capsys.readouterr().out
    np.savez(tmp_path / "few.npz", arr_0=images[:50])
    assert run_command(["score", str(tmp_path / "few.npz"), "--reference", str(finished_run)]) == 0
    printed = capsys.readouterr().out
    assert "50 images are too few for the covariance of 64 features" in printed
    assert f"the run's own scores are of {len(images)} images, this one of 50" in printed


def test_a_runs_samples_are_named_by_their_folder(tmp_path, capsys):
    write_json(tmp_path / "config.json", to_json(RunConfig()))
    (tmp_path / "timeline.jsonl").touch()
    arguments = ["score", str(tmp_path), "--reference", "digits"]
    assert run_command(arguments) == 1
    assert f"{tmp_path} is a run: finish it, or name others" in capsys.readouterr().err
    for which in ("base", "tdc"):
        (tmp_path / "evaluation" / which).mkdir(parents=True)
        write(tmp_path / "evaluation" / which / "0000000.npz", 9, 8, 8, 1)
    folder = tmp_path / "evaluation"
    np.savez(folder / "tdc" / "0000000.features.npz", features=np.zeros((9, 64)))
    assert run_command(arguments) == 1
    assert f"name the samples of one, {folder}/base or {folder}/tdc." in capsys.readouterr().err
    assert len(open_images(folder / "tdc", DataConfig())) == 9


def test_training_images_alone_are_a_reference_and_are_at_no_distance_from_themselves(
    cache_dir, capsys
):
    own = ["--evaluate.cache-dir", str(cache_dir), "--evaluate.features", "classifier"]
    assert run_command(["score", "digits", "--reference", "digits", *own]) == 0
    words = capsys.readouterr().out.split()
    assert words[0] == "fd_digits_cnn"
    assert float(words[1]) == pytest.approx(0, abs=1e-6)


@pytest.mark.slow
def test_without_further_metrics_the_distance_is_all(tmp_path, capsys):
    write(tmp_path / "images.npz", 20, 8, 8, 1)
    own = ["--evaluate.cache-dir", str(tmp_path / "cache"), "--evaluate.features", "classifier"]
    out = tmp_path / "score.json"
    arguments = [str(tmp_path / "images.npz"), "--reference", "digits", *own, "--out", str(out)]
    assert run_command(["score", *arguments, "--evaluate.metrics"]) == 0
    score = json.loads(out.read_text())
    assert (score["metric"], score["metrics"]) == ("fd_digits_cnn", {})


def write(path, *shape):
    np.savez(path, images=random_pixels(*shape))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: None, ["IMAGES", "images.npz does not exist"]),
        (lambda path: write(path, 9, 16, 16, 1), ["images.npz", "(1, 8, 8), got (1, 16, 16)"]),
        (lambda path: write(path, 9, 8, 8, 3), ["images.npz", "(1, 8, 8), got (3, 8, 8)"]),
        (lambda path: write(path, 0, 8, 8, 1), ["holds no image"]),
        (lambda path: write(path, 1, 8, 8, 1), ["at least 2 images, got 1"]),
    ],
    ids=["missing", "size", "colours", "none", "one"],
)
def test_images_that_cannot_be_scored_are_one_error_before_any_work(
    make, words, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("tdc_ray.runs.score_images.find_features", None)  # work would call it
    make(tmp_path / "images.npz")
    assert run_command(["score", str(tmp_path / "images.npz"), "--reference", "digits"]) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    assert all(word in line for word in words)


def test_a_file_that_is_no_image_or_of_another_size_is_named(tmp_path, capsys):
    for number in range(3):
        Image.fromarray(random_pixels(8, 8)).save(tmp_path / f"{number}.png")
    (tmp_path / "1.png").write_bytes((tmp_path / "1.png").read_bytes()[:-30])
    assert run_command(["score", str(tmp_path), "--reference", "digits"]) == 1
    assert f"{tmp_path / '1.png'} is no readable image" in capsys.readouterr().err
    Image.fromarray(random_pixels(9, 8)).save(tmp_path / "1.png")
    assert run_command(["score", str(tmp_path), "--reference", "digits"]) == 1
    assert f"{tmp_path / '1.png'} must have" in capsys.readouterr().err


def test_what_a_run_has_decided_is_refused(tmp_path, capsys):
    write_json(tmp_path / "config.json", to_json(RunConfig()))
    arguments = ["score", "digits", "--reference", str(tmp_path), "--data.image-size", "16"]
    assert run_command(arguments) == 1
    assert "--data.image-size must be left out where the reference is a run, got 16" in (
        capsys.readouterr().err
    )
