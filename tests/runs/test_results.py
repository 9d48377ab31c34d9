import json
from dataclasses import replace

import pytest

from tdc_ray.errors import StorageError
from tdc_ray.runs.results import (
    EvaluationResult,
    GroupResult,
    ModelResult,
    PlanResult,
    PretrainedBaseResult,
    PruneResult,
    Results,
    StageSeconds,
    comparable,
    load_results,
    save_results,
)

MODEL = ModelResult(
    score=4.08,
    macs=8_137_015_296.0,
    num_params=52_546_438.0,
    train_steps=500_000,
    train_macs=1.5e18,
    images_per_second=12.5,
)
RESULTS = Results(
    preset="cifar10",
    seed=3,
    dataset="cifar10",
    metric="fid",
    base=MODEL,
    tdc=replace(MODEL, score=3.76, macs=6.56e9, num_params=48.7e6),
    plan=PlanResult(
        k=0.5,
        num_groups=10,
        schedule="snr",
        mean_macs_limit=6.76e9,
        notes=("of 10 groups, number 8 (from 0) is empty and vanishes",),
    ),
    groups=tuple(
        GroupResult(
            index=index,
            timesteps=(first, last),
            macs_limit=4_475_358_412,
            macs=4_400_000_000,
            num_params=30_000_000,
            widths={"down_blocks.0.resnets.0": 12, "mid_block.attentions.0": 3},
            loss_base=0.03,
            loss_cut=0.05,
            loss_refit=refit,
            loss_finetuned=0.029,
            source="offline",
        )
        for index, (first, last, refit) in enumerate([(0, 3, None), (4, 16, 0.04)])
    ),
    prune=PruneResult(
        method="taylor",
        rounds=3,
        candidates=6,
        seconds=78.0,
        search_macs=1e12,
        prompt_tokens=0,
        completion_tokens=0,
        proxy_seconds=3.5,
        refit="least-squares",
        space="full",
        notes=("group-00, round 1: the language model was given up: no answer",),
    ),
    evaluation=EvaluationResult(
        sampler="ddim",
        num_inference_steps=100,
        eta=0.0,
        seed=0,
        num_images=50_000,
        reference="the 50000 training images",
        features="inception",
        weights="ema",
    ),
    seconds=StageSeconds(base=1.0, prune=2.0, finetune=3.0, evaluate=4.0, wall=5.0),
    versions={"torch": "2.8.0"},
    commit="a2e27d0",
    given_base=PretrainedBaseResult(
        source="openai:model.pt", files={"/data/model.pt": "0" * 64}, weights="as given"
    ),
)


@pytest.fixture
def path(tmp_path):
    save_results(tmp_path / "results.json", RESULTS)
    return tmp_path / "results.json"


def edit(path, change):
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def test_results_read_back_as_they_were_written(path):
    assert load_results(path) == RESULTS


def test_a_run_outside_of_a_repository_has_no_commit(path):
    save_results(path, replace(RESULTS, commit=None))
    assert load_results(path).commit is None


@pytest.mark.parametrize(
    ("change", "setting"),
    [
        (lambda d: d.update(fid=3.5), "fid"),
        (lambda d: d["tdc"].update(fid=3.5), r"tdc\.fid"),
        (lambda d: d["groups"][1].update(note="x"), r"groups\.1\.note"),
    ],
)
def test_unknown_keys_are_refused_by_name(path, change, setting):
    edit(path, change)
    with pytest.raises(StorageError, match=rf"^{path} is no results\.json[\s\S]*{setting}\n"):
        load_results(path)


@pytest.mark.parametrize(
    ("change", "setting"),
    [
        (lambda d: d.pop("metric"), "metric"),
        (lambda d: d["base"].pop("score"), r"base\.score"),
        (lambda d: d["base"].update(score="good"), r"base\.score"),
        (lambda d: d["groups"][0].update(timesteps=[1, 2, 3]), r"groups\.0\.timesteps"),
    ],
)
def test_missing_keys_and_other_types_are_refused_by_name(path, change, setting):
    edit(path, change)
    with pytest.raises(StorageError, match=rf"^{path} is no results\.json[\s\S]*{setting}\n"):
        load_results(path)


def test_another_version_of_the_schema_is_refused(path):
    edit(path, lambda document: document.update(version=2))
    with pytest.raises(StorageError, match="version"):
        load_results(path)


def test_missing_results_are_named(tmp_path):
    with pytest.raises(StorageError, match=r"results\.json does not exist"):
        load_results(tmp_path / "results.json")


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"base": replace(MODEL, images_per_second=1.0)}, id="base's rate"),
        pytest.param({"tdc": replace(RESULTS.tdc, images_per_second=1.0)}, id="tdc's rate"),
        pytest.param({"prune": replace(RESULTS.prune, seconds=1.0)}, id="search time"),
        pytest.param({"prune": replace(RESULTS.prune, proxy_seconds=1.0)}, id="proxy time"),
        pytest.param({"seconds": replace(RESULTS.seconds, wall=99.0)}, id="times"),
        pytest.param({"versions": {"torch": "9"}}, id="versions"),
        pytest.param({"commit": None}, id="commit"),
    ],
)
def test_times_rates_versions_and_commit_may_differ_between_runs(change):
    other = replace(RESULTS, **change)
    assert other != RESULTS
    assert comparable(other) == comparable(RESULTS)


@pytest.mark.parametrize(
    "change",
    [
        {"preset": "digits"},
        {"seed": 4},
        {"dataset": "digits"},
        {"metric": "classifier"},
        {"base": replace(MODEL, score=4.09)},
        {"base": replace(MODEL, train_macs=1.0)},
        {"tdc": replace(RESULTS.tdc, macs=1.0)},
        {"tdc": replace(RESULTS.tdc, num_params=1.0)},
        {"plan": replace(RESULTS.plan, notes=())},
        {"groups": RESULTS.groups[:1]},
        {"groups": (RESULTS.groups[0], replace(RESULTS.groups[1], loss_finetuned=0.1))},
        {"groups": (RESULTS.groups[0], replace(RESULTS.groups[1], source="llm"))},
        {"prune": replace(RESULTS.prune, search_macs=1.0)},
        {"prune": replace(RESULTS.prune, completion_tokens=1)},
        {"prune": replace(RESULTS.prune, refit="none")},
        {"prune": replace(RESULTS.prune, space="inner")},
        {"prune": replace(RESULTS.prune, notes=())},
        {"evaluation": replace(RESULTS.evaluation, num_images=2)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_nothing_else_may_differ_between_runs(change):
    assert comparable(replace(RESULTS, **change)) != comparable(RESULTS)
