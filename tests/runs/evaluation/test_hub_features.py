"""CLIP's and DINOv2's features, on tiny random networks; skipped without transformers."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tdc_ray.cli.main import run_command
from tdc_ray.config.data import DataConfig
from tdc_ray.config.evaluate import EvaluateConfig
from tdc_ray.errors import ConfigError, EvaluationError
from tdc_ray.runs.evaluation.features import check_features, find_features, load_extractor
from tdc_ray.runs.evaluation.hub_features import FILES, hub_extractor_name
from tests.images import random_pixels
from tests.small import small_config

KINDS = ("clip", "dinov2")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """A folder for each kind of network."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("networks")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    clip = transformers.CLIPVisionConfig(
        **sizes, intermediate_size=32, image_size=28, patch_size=14, projection_dim=12
    )
    transformers.CLIPVisionModelWithProjection(clip).save_pretrained(folder / "clip")
    dinov2 = transformers.Dinov2Config(**sizes, image_size=28, patch_size=14)
    transformers.Dinov2Model(dinov2).save_pretrained(folder / "dinov2")
    return folder


def evaluate_by(kind, folder, cache_dir):
    evaluate = {"features": kind, "features_model": str(folder), "cache_dir": str(cache_dir)}
    return small_config(evaluate=evaluate)


@pytest.mark.parametrize(("kind", "width"), [("clip", 12), ("dinov2", 16)])
def test_features_are_the_networks_of_colour_images_as_it_was_trained_on(
    networks, tmp_path, kind, width
):
    import transformers

    config = evaluate_by(kind, networks / kind, tmp_path)
    spec = find_features(config.data, config.evaluate, kind)
    assert spec.metric == f"fd_{kind}"
    assert spec.name_of("kd") == f"kd_{kind}"
    level = 100
    grey = torch.full((2, 1, 8, 8), level, dtype=torch.uint8)
    features = load_extractor(spec, 1, CPU)(grey)
    assert (features.shape, features.dtype) == ((2, width), np.float64)
    classes = {"clip": transformers.CLIPImageProcessor, "dinov2": transformers.BitImageProcessor}
    size = 28 if kind == "clip" else 224
    crop = {"height": size, "width": size}
    statistics = {}
    if kind == "dinov2":
        statistics = {"image_mean": (0.485, 0.456, 0.406), "image_std": (0.229, 0.224, 0.225)}
    processor = classes[kind](size={"shortest_edge": size}, crop_size=crop, **statistics)
    image = np.full((8, 8, 3), level, np.uint8)
    pixels = processor(images=[image], return_tensors="pt").pixel_values
    loaders = {
        "clip": transformers.CLIPVisionModelWithProjection,
        "dinov2": transformers.Dinov2Model,
    }
    with torch.inference_mode():
        output = loaders[kind].from_pretrained(networks / kind).eval()(pixel_values=pixels)
    expected = output.image_embeds if kind == "clip" else output.last_hidden_state[:, 0]
    np.testing.assert_allclose(features[0], expected[0], atol=1e-4)


def test_other_weights_have_other_names_and_other_files(networks, tmp_path):
    shutil.copytree(networks / "dinov2", tmp_path / "other")
    weights = load_file(tmp_path / "other" / "model.safetensors")
    save_file({n: w + 1 for n, w in weights.items()}, tmp_path / "other" / "model.safetensors")
    specs = []
    for folder in (networks / "dinov2", tmp_path / "other"):
        config = evaluate_by("dinov2", folder, tmp_path)
        specs.append(find_features(config.data, config.evaluate, "dinov2"))
    for name in ("extractor", "moments_path", "features_path"):
        assert getattr(specs[0], name) != getattr(specs[1], name)


def test_the_same_weights_in_another_network_have_another_name(tmp_path):
    names = set()
    for function in ("gelu", "relu"):
        folder = tmp_path / function / "dinov2"
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(b"the same")
        (folder / "config.json").write_text(json.dumps({"hidden_act": function}))
        names.add(hub_extractor_name("dinov2", folder))
    assert len(names) == 2


def test_images_are_scored_by_them_under_their_names(networks, tmp_path, capsys):
    np.savez(tmp_path / "images.npz", images=random_pixels(30, 8, 8, 1))
    np.savez(tmp_path / "training.npz", images=random_pixels(40, 8, 8, 1))
    arguments = ["score", str(tmp_path / "images.npz"), "--evaluate.features", "clip"]
    arguments += ["--reference", str(tmp_path / "training.npz")]
    arguments += ["--evaluate.features-model", str(networks / "clip")]
    arguments += ["--evaluate.cache-dir", str(tmp_path / "cache"), "--out"]
    assert run_command([*arguments, str(tmp_path / "score.json")]) == 0
    score = json.loads((tmp_path / "score.json").read_text())
    assert score["metric"] == "fd_clip"
    assert set(score["metrics"]) == {"kd_clip", "precision_clip", "recall_clip"}
    assert "recall_clip" in capsys.readouterr().out
    before = sorted((tmp_path / "cache").rglob("*"))
    assert run_command([*arguments, str(tmp_path / "again.json")]) == 0
    assert json.loads((tmp_path / "again.json").read_text()) == score
    assert sorted((tmp_path / "cache").rglob("*")) == before


@pytest.mark.parametrize("file", FILES)
def test_a_folder_that_lacks_a_file_is_refused_by_it(networks, tmp_path, file):
    shutil.copytree(networks / "clip", tmp_path / "clip")
    (tmp_path / "clip" / file).unlink()
    with pytest.raises(EvaluationError, match=f"has no {file}"):
        check_features(DataConfig(), evaluate_by("clip", tmp_path / "clip", tmp_path).evaluate)


def test_another_kind_of_network_is_refused(networks, tmp_path):
    with pytest.raises(EvaluationError, match=r"of model_type dinov2 .* got clip_vision_model"):
        check_features(DataConfig(), evaluate_by("dinov2", networks / "clip", tmp_path).evaluate)


def test_a_name_that_the_hub_has_not_is_one_error(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError("no network.\nmore")

    monkeypatch.setattr("tdc_ray.runs.evaluation.hub_features.snapshot_download", refuse)
    config = evaluate_by("clip", "nobody/nothing", tmp_path)
    with pytest.raises(EvaluationError, match=r"nobody/nothing is neither .*: no network. Name"):
        find_features(config.data, config.evaluate, "clip")


def test_a_name_on_the_hub_is_downloaded_into_the_cache_once(networks, tmp_path, monkeypatch):
    asked = []

    def download(name, allow_patterns):
        asked.append(name)
        return str(networks / "dinov2")

    monkeypatch.setattr("tdc_ray.runs.evaluation.hub_features.snapshot_download", download)
    config = small_config(evaluate={"features": "dinov2", "cache_dir": str(tmp_path)})
    for _ in range(2):
        spec = find_features(config.data, config.evaluate, "dinov2")
        assert spec.path == tmp_path / "networks" / "facebook--dinov2-large"
    assert asked == ["facebook/dinov2-large"]


@pytest.mark.parametrize("kind", KINDS)
def test_without_transformers_these_features_are_refused_by_the_extra(kind, capsys, monkeypatch):
    monkeypatch.setattr("tdc_ray.cli.paths.find_spec", lambda _: None)
    assert run_command(["run", "--evaluate.features", kind]) == 1
    assert "pip install 'tdc-ray[features]'" in capsys.readouterr().err


def test_a_network_that_nobody_reads_is_refused():
    with pytest.raises(ConfigError, match=r"evaluate.features_model must be left out"):
        EvaluateConfig(features="inception", features_model="x/y")
    evaluate = EvaluateConfig(features="clip", features_model="x/y")
    with pytest.raises(ConfigError, match=r"evaluate.inception_path must be left out"):
        dataclasses.replace(evaluate, inception_path=".")
