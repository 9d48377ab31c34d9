import dataclasses
from functools import reduce
from operator import add
from pathlib import Path

import numpy as np
import pytest
import torch

from tdc_ray.config.run import RunConfig
from tdc_ray.data.load import load_dataset
from tdc_ray.diffusion.plan import plan_groups
from tdc_ray.diffusion.sampling import image_generators
from tdc_ray.execution.chain import run_chain
from tdc_ray.execution.item import WorkItem, finished
from tdc_ray.models.saved_expert import save_expert
from tdc_ray.models.unet2d.surgery import cut
from tdc_ray.models.unet2d.unet import load_unet
from tdc_ray.models.unet2d.units import units_of
from tdc_ray.models.units import KeptIndices, keep_everything
from tdc_ray.runs.evaluation import metrics
from tdc_ray.runs.evaluation.evaluate import (
    SampleJob,
    Score,
    Which,
    evaluate,
    load_features,
    load_pipeline,
    named_metrics,
    prepare_features,
    sample_inputs,
    save_real_images,
    score,
    train_classifier_item,
)
from tdc_ray.runs.evaluation.features import FeatureSpec, choose_features, load_extractor
from tdc_ray.runs.evaluation.metrics import Moments, distance, moments_of
from tdc_ray.runs.pipelines import pipeline_index
from tdc_ray.storage.files import write_json
from tdc_ray.storage.run_dir import RunDir
from tests.small import TINY, make_run_dir, random_kept, reporting_to, small_config

UNITS = units_of(TINY)


@pytest.fixture(scope="module")
def config(cache_dir) -> RunConfig:
    """44 images of each model in three shares, the last a short one."""
    small = {"num_images": 44, "batch_size": 20, "cache_dir": str(cache_dir)}
    return small_config(evaluate=small, sampler={"num_inference_steps": 4})


@pytest.fixture(scope="module")
def spec(config, tmp_path_factory) -> FeatureSpec:
    """The features of digits, made ready by the chain that a run makes them ready by."""
    ready = RunDir(tmp_path_factory.mktemp("ready"))
    spec = choose_features(config.data, config.evaluate, ready.features)
    where = run_chain(prepare_features(ready, config.data, config.evaluate, spec))
    assert where == "the 1797 training images"
    return spec


def save_experts(run_dir: RunDir, config: RunConfig, kept: KeptIndices) -> None:
    """Let every expert be the base, cut to what is kept."""
    groups = plan_groups(config.diffusion, config.plan, config.sampler).groups
    names = [f"expert-{group.index:02d}" for group in groups]
    expert = cut(load_unet(run_dir.base_unet), UNITS, kept)
    for name in names:
        save_expert(run_dir.experts / name, expert, TINY, kept)
    pipeline_index(config, dict(zip(names, groups, strict=True))).save(run_dir.experts)


def score_of(run_dir: RunDir, config: RunConfig, spec: FeatureSpec, which: Which) -> Score:
    chains = evaluate(run_dir, config, spec, which, macs=1.0)
    results = [run_chain(chain) for chain in chains.values()]
    run_chain(prepare_features(run_dir, config.data, config.evaluate, spec))
    return score(run_dir, results, spec, config.evaluate.metrics)


def written(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def scored(config, spec, tmp_path_factory) -> tuple[RunDir, Score]:
    """A run directory whose experts are copies of its base, and the score of the base."""
    run_dir = make_run_dir(tmp_path_factory.mktemp("scored"))
    save_experts(run_dir, config, keep_everything(UNITS))
    return run_dir, score_of(run_dir, config, spec, "base")


def test_experts_that_are_copies_of_the_base_have_its_score_exactly(scored, config, spec):
    run_dir, base = scored
    tdc = score_of(run_dir, config, spec, "tdc")
    assert tdc.score == base.score > 0
    assert tdc.images_per_second > 0
    assert tdc.seconds > 0


def test_other_experts_have_another_score(scored, config, spec, tmp_path):
    run_dir, base = make_run_dir(tmp_path), scored[1]
    save_experts(run_dir, config, random_kept(UNITS, seed=0))
    assert score_of(run_dir, config, spec, "tdc").score != base.score


def samples_of(run_dir: RunDir, which: Which) -> np.ndarray:
    paths = sorted((run_dir.samples / which).glob("[0-9]*[0-9].npz"))
    return np.concatenate([np.load(path)["arr_0"] for path in paths])


def test_the_samples_are_all_images_of_the_evaluations_seed_in_order(scored, config):
    run_dir, _ = scored
    pixels = samples_of(run_dir, "base")
    assert (pixels.shape, pixels.dtype) == ((44, 8, 8, 1), np.uint8)
    pipeline = load_pipeline(run_dir, config, "base")
    pipeline.set_progress_bar_config(disable=True)
    shares = [(0, 20), (20, 20), (40, 4)]
    expected = [
        pipeline(count, image_generators(0, first, count), output_type="np").images
        for first, count in shares
    ]
    np.testing.assert_array_equal(pixels, np.concatenate(expected))
    assert len(np.unique(pixels, axis=0)) > 1


def test_in_bf16_the_images_are_a_little_others_and_their_key_is_another(scored, config):
    run_dir, _ = scored
    evaluation = dataclasses.replace(config.evaluate, precision="bf16")
    low = dataclasses.replace(config, evaluate=evaluation)
    pipelines = [load_pipeline(run_dir, one, "base") for one in (config, low)]
    assert [pipeline.experts.dtype for pipeline in pipelines] == [torch.float32, torch.bfloat16]
    jobs = [SampleJob(run_dir, one, "base", 0, 4) for one in (config, low)]
    for pipeline in pipelines:
        pipeline.set_progress_bar_config(disable=True)
    exact, found = (pipeline(4, output_type="pt").images for pipeline in pipelines)
    assert not torch.equal(found, exact)
    assert (found - exact).abs().mean() < 0.02
    assert sample_inputs(jobs[0]) != sample_inputs(jobs[1])


def test_the_score_is_the_distance_of_the_samples_to_the_training_images(scored, config, spec):
    run_dir, base = scored
    extractor = load_extractor(spec, 1, torch.device("cpu"))
    images = torch.from_numpy(samples_of(run_dir, "base")).permute(0, 3, 1, 2)
    training, _ = load_dataset(config.data).__getitems__(range(1797))
    found, reference = (
        moments_of(extractor(part)).mean_and_covariance() for part in (images, training)
    )
    # 44 images leave the covariance of 64 features singular, and its root inexact.
    assert base.score == pytest.approx(distance(found, reference), rel=1e-3)


def test_moments_of_the_training_images_are_kept_in_the_cache(config, spec):
    assert spec.moments_path.is_relative_to(config.evaluate.cache_dir)
    assert Moments.load(spec.moments_path).count == 1797


def test_another_run_uses_the_classifier_and_moments_of_the_cache(config, spec, tmp_path):
    kept = written(Path(config.evaluate.cache_dir))
    assert (
        run_chain(prepare_features(RunDir(tmp_path), config.data, config.evaluate, spec))
        == "the 1797 training images"
    )
    assert written(Path(config.evaluate.cache_dir)) == kept
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [RunDir(tmp_path).reference]


def test_a_classifier_that_went_missing_from_the_cache_is_trained_again(config, tmp_path):
    evaluate_config = dataclasses.replace(config.evaluate, cache_dir=str(tmp_path / "cache"))
    fresh = dataclasses.replace(config, evaluate=evaluate_config)
    spec = choose_features(fresh.data, fresh.evaluate, tmp_path / "features.json")
    write_json(spec.path.with_suffix(".json"), {"accuracy": 0.99})  # all that is left of it
    (item,) = next(prepare_features(RunDir(tmp_path / "run"), fresh.data, fresh.evaluate, spec))
    assert item.function is train_classifier_item
    assert finished(item) is None


def test_a_finished_evaluation_is_not_done_again(scored, config, spec):
    run_dir, base = scored
    before = written(run_dir.samples / "base")
    assert score_of(run_dir, config, spec, "base") == base
    assert written(run_dir.samples / "base") == before


@pytest.mark.parametrize("pattern", ["0000020*", "0000020.json", "*.features.*"])
def test_what_was_lost_is_made_again_and_the_score_stays(scored, config, spec, tmp_path, pattern):
    run_dir = RunDir(tmp_path)
    run_dir.base_unet.parent.mkdir(parents=True)
    run_dir.base_unet.symlink_to(scored[0].base_unet)
    score_of(run_dir, config, spec, "base")
    before, folder = written(run_dir.samples), run_dir.samples / "base"
    lost = list(folder.glob(pattern))
    for path in lost:
        path.unlink()
    assert score_of(run_dir, config, spec, "base").score == scored[1].score
    after = written(run_dir.samples)
    assert after.keys() == before.keys()
    changed = {path for path in after if after[path] != before[path]}
    assert changed >= set(lost)
    assert all(path.name.startswith("0000020") or pattern == "*.features.*" for path in changed)


def items_of(chain) -> list[WorkItem]:
    return list(next(chain))


@pytest.mark.parametrize(
    ("num_images", "batch_size", "num_shares"),
    [(44, 20, 3), (40, 20, 2), (10, 20, 1), (50_000, 250, 50), (100_000, 100, 63)],
)
def test_the_shares_cover_every_image_once(
    config, spec, tmp_path, num_images, batch_size, num_shares
):
    sizes = {"num_images": num_images, "batch_size": batch_size}
    large = dataclasses.replace(config, evaluate=dataclasses.replace(config.evaluate, **sizes))
    chains = evaluate(RunDir(tmp_path), large, spec, "tdc", macs=2.0)
    items = [item for chain in chains.values() for item in items_of(chain)]
    numbers = [n for item in items for n in range(item.job.first, item.job.first + item.job.count)]
    assert numbers == list(range(num_images))
    assert len(items) == len({item.result_path for item in items}) == num_shares
    assert sum(item.cost for item in items) == 2.0 * 4 * num_images
    assert all(item.num_steps == item.job.count for item in items)


def test_moments_of_the_shares_are_those_of_all_samples(scored, spec):
    run_dir, _ = scored
    paths = (run_dir.samples / "base").glob("*.moments.npz")
    total = reduce(add, [Moments.load(path) for path in paths])
    extractor = load_extractor(spec, 1, torch.device("cpu"))
    images = torch.from_numpy(samples_of(run_dir, "base")).permute(0, 3, 1, 2)
    whole = moments_of(extractor(images))
    assert total.count == whole.count == 44
    np.testing.assert_allclose(total.total, whole.total, rtol=1e-5)
    np.testing.assert_allclose(total.outer, whole.outer, rtol=1e-5, atol=1e-6)


def test_features_of_the_shares_are_those_of_all_samples(scored, config, spec):
    run_dir, base = scored
    paths = sorted((run_dir.samples / "base").glob("*.features.npz"))
    kept = np.concatenate([load_features(path) for path in paths])
    extractor = load_extractor(spec, 1, torch.device("cpu"))
    images = torch.from_numpy(samples_of(run_dir, "base")).permute(0, 3, 1, 2)
    np.testing.assert_allclose(kept, extractor(images), rtol=1e-4, atol=1e-4)
    training, _ = load_dataset(config.data).__getitems__(range(1797))
    whole = extractor(training).astype(np.float32)
    np.testing.assert_allclose(load_features(spec.features_path), whole, rtol=1e-4, atol=1e-4)
    names = {f"{name}_digits_cnn" for name in ("kd", "precision", "recall")}
    assert set(base.metrics) == names
    assert named_metrics(kept, spec, ("kid",)) == {"kd_digits_cnn": base.metrics["kd_digits_cnn"]}


def test_of_many_images_a_random_few_are_kept_whatever_the_shares(
    scored, config, spec, tmp_path, monkeypatch
):
    monkeypatch.setattr(metrics, "MAX_FEATURES", 20)
    few = RunDir(tmp_path)
    few.base_unet.parent.mkdir(parents=True)
    few.base_unet.symlink_to(scored[0].base_unet)
    score_of(few, config, spec, "base")
    for run_dir, places in ((few, metrics.drawn(44)), (scored[0], range(44))):
        paths = sorted((run_dir.samples / "base").glob("*.features.npz"))
        kept = np.concatenate([load_features(path) for path in paths])
        if run_dir is few:
            found, chosen = kept, np.array(places)
    assert len(set(chosen)) == 20
    assert chosen.tolist() == sorted(chosen)
    np.testing.assert_allclose(found, kept[chosen], rtol=1e-5, atol=1e-5)


def test_shares_whose_moments_alone_are_known_are_measured_again(scored, config, spec, tmp_path):
    """As a run of an older version left them, and as one is that asks for no other score."""
    run_dir = RunDir(tmp_path)
    run_dir.base_unet.parent.mkdir(parents=True)
    run_dir.base_unet.symlink_to(scored[0].base_unet)
    plain = dataclasses.replace(config, evaluate=dataclasses.replace(config.evaluate, metrics=()))
    first = score_of(run_dir, plain, spec, "base")
    assert first.metrics == {}
    assert not list(run_dir.samples.rglob("*.features.*"))
    samples = written(run_dir.samples / "base")
    again = score_of(run_dir, config, spec, "base")
    assert (again.score, again.metrics) == (scored[1].score, scored[1].metrics)
    after = written(run_dir.samples / "base")
    assert all(after[path] == at for path, at in samples.items() if "moments" not in path.name)


def test_real_images_are_some_of_the_training_images_as_samples_are_kept(config, tmp_path):
    save_real_images(tmp_path / "evaluation" / "real.npz", config.data)
    images = np.load(tmp_path / "evaluation" / "real.npz")["arr_0"]
    assert (images.shape, images.dtype) == ((64, 8, 8, 1), np.uint8)
    training, _ = load_dataset(config.data).__getitems__(range(1797))
    known = {image.tobytes() for image in training.permute(0, 2, 3, 1).numpy()}
    assert {image.tobytes() for image in images} <= known


def test_progress_is_reported_in_images(config, spec, tmp_path):
    run_dir, seen = make_run_dir(tmp_path), []
    (chain, *_) = evaluate(run_dir, config, spec, "base", macs=1.0).values()
    watch = reporting_to(lambda metrics, step: seen.append((dict(metrics), step)))
    sampled, *_ = run_chain(chain, watch)
    assert seen == [({}, 20), ({}, 1)]  # a share's images, then its features
    assert sampled.num_images == 20
    assert sampled.seconds > 0
