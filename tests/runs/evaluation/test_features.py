import dataclasses
import tempfile
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from tdc_ray.cli.main import run_command
from tdc_ray.config.data import DataConfig
from tdc_ray.config.evaluate import EvaluateConfig
from tdc_ray.config.run import RunConfig
from tdc_ray.data.batches import to_minus_one_one
from tdc_ray.data.dataset import ImageDataset
from tdc_ray.data.load import load_dataset
from tdc_ray.errors import ConfigError, EvaluationError
from tdc_ray.runs.evaluation.features import (
    INCEPTION_FILE,
    NUM_FEATURES,
    Classifier,
    FeatureSpec,
    check_features,
    choose_features,
    find_features,
    load_extractor,
    ready_statistics,
    train_classifier,
)
from tdc_ray.runs.evaluation.metrics import Moments, distance, moments_of
from tdc_ray.runs.preflight import check
from tdc_ray.storage.files import write_json
from tests.small import assert_same, small_config

CPU = torch.device("cpu")


def normal(seed: int, count: int = 50, width: int = 6) -> np.ndarray:
    draw = np.random.default_rng(seed)
    return draw.normal(size=(count, width)) @ draw.normal(size=(width, width)) + 3.0


@pytest.fixture
def without_network(monkeypatch) -> None:
    """Every download is refused at once."""
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)


def digits(cache_dir: Path, **evaluate: str) -> RunConfig:
    return small_config(evaluate={"cache_dir": str(cache_dir), **evaluate})


def npz_of(path: Path, *, labels: bool, channels: int = 1) -> DataConfig:
    draw = np.random.default_rng(0)
    arrays = {"images": draw.integers(0, 256, (20, 8, 8, channels), dtype=np.uint8)}
    if labels:
        arrays["labels"] = np.arange(20) % 3
    np.savez(path, **arrays)
    return DataConfig(source="npz", path=str(path), num_channels=channels)


def choose(config: RunConfig) -> FeatureSpec | None:
    with tempfile.TemporaryDirectory() as folder:
        return choose_features(config.data, config.evaluate, Path(folder) / "features.json")


@pytest.mark.parametrize("seed", range(3))
def test_the_distance_of_gaussians_with_diagonal_covariances_has_a_closed_form(seed):
    draw = np.random.default_rng(seed)
    means, variances = draw.normal(size=(2, 5)), draw.uniform(0.1, 4.0, size=(2, 5))
    one, other = ((m, np.diag(v)) for m, v in zip(means, variances, strict=True))
    deviations = np.sqrt(variances)
    expected = ((means[0] - means[1]) ** 2 + (deviations[0] - deviations[1]) ** 2).sum()
    assert distance(one, other) == pytest.approx(expected, rel=1e-6)
    assert distance(other, one) == pytest.approx(expected, rel=1e-6)


def test_the_distance_of_equal_gaussians_is_0():
    one = moments_of(normal(0)).mean_and_covariance()
    assert distance(one, one) == pytest.approx(0, abs=1e-6)


def test_moving_the_mean_alone_gives_the_squared_move():
    mean, covariance = moments_of(normal(0)).mean_and_covariance()
    assert distance((mean + 2.0, covariance), (mean, covariance)) == pytest.approx(24, rel=1e-6)


def test_the_distance_does_not_depend_on_the_basis():
    one, other = normal(0), normal(1)
    turn, _ = np.linalg.qr(np.random.default_rng(2).normal(size=(6, 6)))
    plain, turned = (
        distance(moments_of(a).mean_and_covariance(), moments_of(b).mean_and_covariance())
        for a, b in ((one, other), (one @ turn, other @ turn))
    )
    assert turned == pytest.approx(plain, rel=1e-6)


@pytest.mark.parametrize("cuts", [[], [10], [1, 2, 30], [25, 25]])
def test_moments_of_shards_add_up_to_those_of_the_whole(cuts):
    features = normal(0)
    first, *rest = (moments_of(part) for part in np.split(features, cuts))
    total = sum(rest, first)
    mean, covariance = total.mean_and_covariance()
    assert total.count == 50
    np.testing.assert_allclose(mean, features.mean(0), rtol=1e-12)
    np.testing.assert_allclose(covariance, np.cov(features.T), rtol=1e-9)


def test_moments_survive_the_file(tmp_path):
    moments = moments_of(normal(0))
    moments.save(tmp_path / "cache" / "moments.npz")
    loaded = Moments.load(tmp_path / "cache" / "moments.npz")
    assert loaded.count == moments.count
    np.testing.assert_array_equal(loaded.total, moments.total)
    np.testing.assert_array_equal(loaded.outer, moments.outer)


def test_a_classifiers_metric_is_named_after_the_data_and_never_fid(tmp_path):
    spec = choose(digits(tmp_path))
    assert spec.metric == "fd_digits_cnn"
    assert spec.num_classes == 10
    config = dataclasses.replace(
        digits(tmp_path), data=npz_of(tmp_path / "my-fid.npz", labels=True)
    )
    assert choose(config).metric == "fd_my_fid_cnn"
    assert choose(config).num_classes == 3


def test_data_of_other_content_has_a_classifier_and_moments_of_its_own(tmp_path):
    specs = [choose(digits(tmp_path))]
    for data in (npz_of(tmp_path / "a.npz", labels=True), DataConfig(image_size=16)):
        specs.append(choose(dataclasses.replace(digits(tmp_path), data=data)))
    assert len({spec.path for spec in specs}) == 3
    assert len({spec.moments_path for spec in specs}) == 3
    assert choose(digits(tmp_path)) == specs[0]


def test_without_labels_there_is_no_classifier(tmp_path):
    data = npz_of(tmp_path / "a.npz", labels=False)
    config = dataclasses.replace(digits(tmp_path, features="classifier"), data=data)
    message = (
        r"evaluate\.features must not be classifier .* got classifier \(data\.source npz\).*none"
    )
    with pytest.raises(ConfigError, match=message):
        choose(config)
    with pytest.raises(ConfigError, match=message):
        check(config)


def test_inceptions_folder_beside_a_classifier_is_refused():
    with pytest.raises(
        ConfigError, match=r"evaluate\.inception_path must be left out, .*got here"
    ):
        EvaluateConfig(features="classifier", inception_path="here")


@pytest.mark.parametrize("features", ["auto", "inception"])
def test_a_folder_without_inception_is_an_error_that_names_it(tmp_path, features):
    config = digits(tmp_path, features=features, inception_path=str(tmp_path))
    with pytest.raises(EvaluationError, match=rf"{tmp_path} must be a folder .*{INCEPTION_FILE}"):
        choose(config)


@pytest.mark.usefixtures("without_network")
def test_auto_falls_back_to_the_classifier_where_inception_is_not_to_be_had(tmp_path):
    assert choose(digits(tmp_path, features="auto")) == choose(digits(tmp_path))
    assert not (tmp_path / INCEPTION_FILE).exists()


@pytest.mark.usefixtures("without_network")
def test_inception_that_is_asked_for_and_not_to_be_had_is_an_error(tmp_path):
    with pytest.raises(EvaluationError, match=f"{INCEPTION_FILE} is neither in {tmp_path}"):
        choose(digits(tmp_path, features="inception"))


@pytest.mark.usefixtures("without_network")
def test_auto_scores_nothing_where_there_is_neither_inception_nor_a_label(tmp_path, caplog):
    data = npz_of(tmp_path / "a.npz", labels=False)
    config = dataclasses.replace(digits(tmp_path, features="auto"), data=data)
    check_features(config.data, config.evaluate)
    assert "no image will be scored" in caplog.text
    assert "--evaluate.inception-path" in caplog.text
    decided = tmp_path / "features.json"
    assert choose_features(config.data, config.evaluate, decided) is None
    assert caplog.text.count("cannot be downloaded") == 1  # a download that fails may take long
    evaluate = dataclasses.replace(config.evaluate, features="classifier")
    assert choose_features(config.data, evaluate, decided) is None  # once, as all features
    with pytest.raises(
        EvaluationError, match=f"Download https://.*{INCEPTION_FILE}.*inception-path"
    ):
        find_features(config.data, config.evaluate, "auto")


def test_none_needs_no_network_and_cannot_score(tmp_path, caplog):
    config = digits(tmp_path, features="none")
    check_features(config.data, config.evaluate)
    assert choose(config) is None
    assert not caplog.text
    with pytest.raises(EvaluationError, match=r"be scored with evaluate\.features none"):
        find_features(config.data, config.evaluate, "none")
    with pytest.raises(ConfigError, match=r"evaluate\.reference must be left out .*got cifar10"):
        EvaluateConfig(features="none", reference="cifar10")


@pytest.mark.usefixtures("without_network")
def test_a_dry_run_and_a_run_without_the_features_they_ask_for_are_refused_before_work(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "img").mkdir()
    for number in range(8):
        Image.new("RGB", (8, 8)).save(tmp_path / "img" / f"{number}.png")
    for more in (["--dry-run"], []):
        own = ["--data", "img", "--evaluate.cache-dir", "cache", *more]
        assert run_command(["run", *own, "--evaluate.features", "inception"]) == 1
        printed = capsys.readouterr()
        assert "--evaluate.features none" in printed.err
        assert "would run" not in printed.out
        written = [path.name for path in Path("runs").rglob("*.*")]
        assert written == ([] if more else ["run.log"])  # the log alone


@pytest.mark.usefixtures("without_network")
def test_statistics_that_are_not_to_be_had_are_none():
    assert ready_statistics("no_such_dataset", 32) is None


@pytest.fixture(scope="module")
def dataset() -> ImageDataset:
    return load_dataset(DataConfig())


@pytest.fixture(scope="module")
def trained(cache_dir, dataset) -> tuple[FeatureSpec, float]:
    """The classifier of digits, and its accuracy."""
    spec = choose(digits(cache_dir))
    return spec, train_classifier(dataset, 1, 10, spec.path)


def test_the_classifier_learns_the_digits(trained, dataset):
    spec, accuracy = trained
    assert 0.9 < accuracy <= 1
    classifier = Classifier(1, 10)
    classifier.load_state_dict(load_file(spec.path))
    images, labels = dataset.__getitems__(range(len(dataset)))
    with torch.inference_mode():
        found = classifier.eval()(to_minus_one_one(images)).argmax(1)
    assert (found == labels).float().mean() > 0.9


@pytest.mark.slow
def test_the_classifier_is_the_same_every_time(trained, dataset, tmp_path):
    spec, accuracy = trained
    torch.manual_seed(77)
    assert train_classifier(dataset, 1, 10, tmp_path / "again.safetensors") == accuracy
    assert_same(load_file(tmp_path / "again.safetensors"), load_file(spec.path))


def test_a_classifiers_features_are_those_before_its_head(trained, dataset):
    spec, _ = trained
    extractor = load_extractor(spec, 1, CPU)
    images, _ = dataset.__getitems__(range(7))
    features = extractor(images)
    assert (features.shape, features.dtype) == ((7, NUM_FEATURES), np.float64)
    classifier = Classifier(1, 10)
    classifier.load_state_dict(load_file(spec.path))
    with torch.inference_mode():
        head = torch.from_numpy(features).float() @ classifier.head.weight.T + classifier.head.bias
        expected = classifier(to_minus_one_one(images))
    torch.testing.assert_close(head, expected, rtol=1e-4, atol=1e-4)


def test_classifier_features_tell_digits_from_noise(trained, dataset):
    extractor = load_extractor(trained[0], 1, CPU)
    images, _ = dataset.__getitems__(range(1200))
    noise = torch.randint(
        0, 256, (600, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    one, other, third = (
        moments_of(extractor(part)).mean_and_covariance()
        for part in (images[:600], images[600:], noise)
    )
    assert distance(one, third) > 10 * distance(one, other) > 0


class MeanOfPatches(nn.Module):
    """Stands for Inception's layers: 2,048 means of patches."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool2d(x, 32).flatten(1)[:, :2048]


class StandIn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = MeanOfPatches()

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


@pytest.fixture(scope="module")
def inception(tmp_path_factory) -> Path:
    """A folder with a TorchScript file where Inception's would be."""
    folder = tmp_path_factory.mktemp("inception")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # TorchScript is on its way out
        torch.jit.script(StandIn()).save(str(folder / INCEPTION_FILE))
    return folder


def test_inception_is_taken_from_the_given_folder_and_called_fid(inception, tmp_path):
    config = digits(tmp_path, features="auto", inception_path=str(inception))
    spec = choose(config)
    assert (spec.metric, spec.path, spec.kind) == ("fid", inception, "inception")
    assert choose(digits(tmp_path, features="inception", inception_path=str(inception))) == spec


def test_inception_is_taken_from_the_cache_before_the_network(inception):
    assert choose(digits(inception, features="auto")).path == inception


@pytest.mark.parametrize("channels", [1, 3])
def test_inception_sees_cleanly_resized_colour_images(inception, tmp_path, channels):
    config = dataclasses.replace(
        digits(tmp_path, inception_path=str(inception), features="inception"),
        data=npz_of(tmp_path / "a.npz", labels=False, channels=channels),
    )
    spec = choose(config)
    extractor = load_extractor(spec, channels, CPU)
    levels = torch.tensor([0, 100, 255], dtype=torch.uint8)
    flat = levels.reshape(-1, 1, 1, 1).expand(-1, channels, 8, 8)
    features = extractor(flat)
    assert (features.shape, features.dtype) == ((3, 2048), np.float64)
    expected = (levels.double()[:, None].expand(3, 2048) - 128) / 128
    np.testing.assert_allclose(features, expected, atol=1e-5)


def test_resized_images_keep_their_places_and_colours(inception, tmp_path):
    spec = choose(digits(tmp_path, inception_path=str(inception), features="inception"))
    images = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    images[0, 0, :4] = 255  # the upper half is red
    features = load_extractor(spec, 3, CPU)(images)[0]
    red, green = features[: 32 * 32].reshape(32, 32), features[32 * 32 :].reshape(32, 32)
    np.testing.assert_allclose(red[:12], (255 - 128) / 128, atol=0.05)
    np.testing.assert_allclose(red[20:], -1, atol=0.05)
    np.testing.assert_allclose(green, -1, atol=1e-6)


@pytest.mark.parametrize("place", ["inception_path", "cache_dir"])
def test_inception_that_is_cut_short_is_refused_by_its_file(inception, tmp_path, place):
    whole = (inception / INCEPTION_FILE).read_bytes()
    (tmp_path / INCEPTION_FILE).write_bytes(whole[: len(whole) // 2])
    evaluate = digits(tmp_path / "none", features="auto").evaluate
    evaluate = dataclasses.replace(evaluate, **{place: str(tmp_path)})
    with pytest.raises(EvaluationError, match=rf"{tmp_path}/{INCEPTION_FILE} is damaged or cut"):
        check_features(DataConfig(), evaluate)
    (tmp_path / INCEPTION_FILE).write_bytes(whole)
    check_features(DataConfig(), evaluate)


def test_the_features_of_a_run_are_decided_once(inception, tmp_path, cache_dir):
    """With "auto", what a later attempt finds in the cache or the network changes nothing."""
    evaluate = {"features": "auto", "inception_path": str(inception), "cache_dir": str(cache_dir)}
    config = small_config(evaluate=evaluate)
    decided = tmp_path / "features.json"
    assert choose_features(config.data, config.evaluate, decided).metric == "fid"
    write_json(decided, {"features": "classifier"})  # as an attempt without Inception left it
    again = choose_features(config.data, config.evaluate, decided)
    assert again.metric == "fd_digits_cnn"
