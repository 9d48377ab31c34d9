import logging
import time
from dataclasses import replace

import pytest

from tdc_ray.cli.parse import parse
from tdc_ray.config.budget import BudgetConfig
from tdc_ray.config.presets import preset
from tdc_ray.config.run import default_run_dir, differences, from_json, to_json
from tdc_ray.data.latents import TrainingData
from tdc_ray.errors import ConfigError
from tdc_ray.models.structure import network_structure
from tdc_ray.models.timing import StepTimes
from tdc_ray.models.unet2d.architectures import base_unet
from tdc_ray.runs.budget import (
    IMAGES_SHARE,
    LEAST_BASE_STEPS,
    MARGIN,
    Timing,
    has_room,
    makespan,
    mean_limit,
    steps_by_count,
    steps_by_time,
    timing_of,
    training_macs,
    with_time_left,
)
from tdc_ray.runs.choices import with_choices
from tdc_ray.runs.evaluation.features import find_features
from tdc_ray.runs.preflight import check, space_and_plan
from tdc_ray.runs.run import _within_hours
from tdc_ray.runs.stages import step_times
from tdc_ray.runs.stages.step_times import StepTimesJob, StepTimesResult, measure_steps
from tdc_ray.storage.files import write_json
from tdc_ray.storage.run_dir import RunDir
from tests.small import TINY, small_config


def counted(config):
    network = base_unet(config.model, config.conditioning)
    _, plan = space_and_plan(config, network)
    return steps_by_count(config, plan, network_structure(network).macs)


def with_budget(name="digits", **budget):
    return replace(preset(name), budget=BudgetConfig(**budget))


# --- epochs and macs -----------------------------------------------------------------------------


def test_without_a_budget_steps_are_as_they_are_set():
    assert counted(preset("digits")) == preset("digits")


def test_epochs_are_those_of_the_base_and_fine_tunes_keep_the_ratio():
    config = counted(with_budget(epochs=50))
    assert config.base.num_steps == -(-50 * 1797 // 64)
    assert config.finetune.num_steps == round(config.base.num_steps / 5)
    assert counted(with_budget(epochs=1e-6)).base.num_steps == 1
    budgeted = with_budget(epochs=50)
    held_out = replace(budgeted.prune, held_out_of_base=True, held_out_share=0.5)
    halved = counted(replace(budgeted, prune=held_out))
    assert halved.base.num_steps == -(-50 * 899 // 64)  # 898 images are held out


def test_macs_are_spent_on_base_and_fine_tunes():
    config = counted(with_budget(train_macs=1e14))
    network = base_unet(config.model, config.conditioning)
    _, plan = space_and_plan(config, network)
    macs = training_macs(config, plan, network_structure(network).macs)
    assert macs == pytest.approx(1e14, rel=1e-3)
    assert config.finetune.num_steps == pytest.approx(config.base.num_steps / 5, abs=1)


def test_no_fine_tune_stays_none():
    none = replace(preset("digits").finetune, num_steps=0)
    config = counted(replace(with_budget(train_macs=1e14), finetune=none))
    assert config.finetune.num_steps == 0
    each = 3 * network_structure(base_unet(config.model, config.conditioning)).macs
    assert config.base.num_steps * config.base.batch_size * each == pytest.approx(1e14, rel=1e-3)


def test_of_a_base_that_is_given_all_macs_are_the_fine_tunes():
    config = with_budget(train_macs=1e14)
    config = replace(config, model=replace(config.model, base="somewhere"))
    found = counted(config)
    assert found.base == config.base
    assert found.finetune.num_steps > counted(with_budget(train_macs=1e14)).finetune.num_steps
    with pytest.raises(ConfigError, match=r"--epochs counts those of the base, which --base"):
        counted(replace(config, budget=BudgetConfig(epochs=1)))


def test_few_steps_have_a_short_warm_up_and_an_average_that_keeps_up():
    full, config = preset("ddpm-cifar10"), with_budget("ddpm-cifar10", train_macs=1e15)
    found = counted(config)
    assert found.base.num_steps < 1000
    assert found.base.num_warmup_steps == -(-found.base.num_steps // 10)
    assert (full.base.ema_warmup, found.base.ema_warmup) == (False, True)
    assert found.base.checkpoint_every == found.base.num_steps // 10
    longer = counted(replace(config, budget=BudgetConfig(train_macs=1e25)))
    assert longer.base.num_steps > full.base.num_steps
    assert longer.base == replace(full.base, num_steps=longer.base.num_steps)


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({"hours": 0}, r"budget\.hours must be greater than 0, got 0"),
        ({"epochs": -1}, r"budget\.epochs must be greater than 0"),
        (
            {"hours": 1, "epochs": 2},
            r"only one of --hours, --train-macs and --epochs may be given, got --hours and --ep",
        ),
    ],
)
def test_what_is_no_budget_is_refused(budget, message):
    with pytest.raises(ConfigError, match=message):
        BudgetConfig(**budget)


def test_too_few_macs_for_a_step_are_refused_with_the_least():
    with pytest.raises(ConfigError, match=r"--train-macs must be at least .*, got 1000"):
        counted(with_budget(train_macs=1e3))


# --- hours ---------------------------------------------------------------------------------------

TIMING = Timing(
    base=600.0,
    finetunes=300.0,
    comparison=100.0,
    search=30.0,
    evaluation=40.0,
    reference=0.0,
    starts=20.0,
    other=10.0,
)


def test_the_rest_of_the_hours_is_for_training(caplog):
    caplog.set_level(logging.INFO)
    config = with_budget(hours=2)
    found, taken = steps_by_time(config, TIMING, elapsed=20.0)
    room = (1 - MARGIN) * 7200 - 120
    assert found.base.num_steps == round(config.base.num_steps * room / 1000)
    assert found.finetune.num_steps == round(config.finetune.num_steps * room / 1000)
    assert found.evaluate == config.evaluate
    assert found.prune == config.prune
    assert taken.training + taken.rest + 20 == pytest.approx((1 - MARGIN) * 7200)
    assert f"base.num_steps {found.base.num_steps}" in caplog.text
    assert f"finetune.num_steps {found.finetune.num_steps}" in caplog.text
    assert caplog.messages[0] == (
        "--hours 2 is 120.0 minutes: until here 0.3, base 60.0, search 0.5, fine-tunes 30.0, "
        "comparison 10.0, sampling and scores 0.7, starting workers and so on 0.5, in reserve 18.0"
    )


@pytest.mark.parametrize("hours", [0.02, 0.1, 0.5])
def test_there_is_room_for_a_network_where_a_thousand_steps_of_its_base_are_left(hours):
    config = with_budget(hours=hours)
    for share in (1.0, 0.5, 0.25, 0.1, 0.03):
        try:
            found, _ = steps_by_time(config, TIMING.of_smaller(share), 20.0)
        except ConfigError:
            steps = 0
        else:
            steps = found.base.num_steps
        assert has_room(config, TIMING, 20.0, share) == (steps >= LEAST_BASE_STEPS)
    assert TIMING.of_smaller(0.5).starts == TIMING.starts
    assert TIMING.of_smaller(0.5).training == TIMING.training / 2


class Workers:
    """Say that a step of the base takes 60 seconds, then 6, and one of an expert 2."""

    def __init__(self):
        self.seconds = {
            "base": iter([60.0, 6.0]),
            "expert-0": iter([2.0]),
            "expert-1": iter([2.0]),
        }

    def num_workers(self, _):
        return 2

    def run(self, chains, _):
        steps = {name: next(self.seconds[name]) for name in chains}
        return {name: StepTimesResult(step, step / 1e4, 1.0) for name, step in steps.items()}


def test_a_network_that_hours_cannot_train_makes_way_for_a_smaller_one_that_a_resume_keeps(
    tmp_path,
):
    asked = small_config(model={"architecture": "auto"}, budget={"hours": 0.5})
    config, run_dir = with_choices(asked), RunDir(tmp_path)
    began = time.perf_counter()
    found, (network, space, _), timing = _within_hours(
        run_dir, config, check(config), None, Workers(), 1.0, began
    )
    assert network == found.model.network != config.model.network
    assert space.macs_base == network_structure(network).macs
    assert found.base.num_steps * 6 == pytest.approx(timing.base, rel=0.1)
    write_json(run_dir.config, to_json(found))
    resumed = with_choices(asked, run_dir.config)
    assert (resumed.model, resumed.base) == (found.model, found.base)


def test_so_few_steps_that_no_image_will_be_seen_are_warned_of(caplog):
    found, _ = steps_by_time(with_budget(hours=0.1), TIMING, elapsed=20.0)
    assert f"room for {found.base.num_steps} steps of the base, which will hardly" in caplog.text
    caplog.clear()
    steps_by_time(with_budget(hours=1), TIMING, elapsed=20.0)
    assert caplog.text == ""


def test_few_hours_lower_the_images_of_search_and_evaluation_where_no_flag_set_them(caplog):
    caplog.set_level(logging.INFO)
    config, slow = with_budget(hours=0.1), replace(TIMING, search=200.0, evaluation=600.0)
    found, taken = steps_by_time(config, slow, elapsed=20.0)
    room = (1 - MARGIN) * 360 - 20 - slow.starts - slow.other
    assert taken.evaluation == pytest.approx(IMAGES_SHARE * room * 600 / 800, rel=0.01)
    share = found.evaluate.num_images / config.evaluate.num_images
    assert taken.evaluation == pytest.approx(600 * share)
    assert found.prune.num_images == found.prune.num_refit_images == 32  # the least
    assert taken.search == pytest.approx(200 * 32 / 180)
    assert f"evaluate.num_images {found.evaluate.num_images} in place of 2000" in caplog.text
    assert "prune.num_images 32 in place of 180" in caplog.text
    asked = replace(config, evaluate=replace(config.evaluate, num_images=1000))
    kept, _ = steps_by_time(asked, replace(slow, evaluation=100.0), elapsed=20.0)
    assert kept.evaluate.num_images == 1000


def test_stage_1_that_took_longer_than_planned_leaves_fewer_steps_of_fine_tunes(caplog):
    config, timing = steps_by_time(with_budget(hours=1), TIMING, elapsed=20.0)
    stage_1 = timing.stage_1
    assert with_time_left(config, timing, stage_1, 20.0 + stage_1) == config
    fewer = with_time_left(config, timing, 1.2 * stage_1, 20.0 + 1.2 * stage_1)
    rest = 1.2 * (timing.search + timing.evaluation + 0.4 * timing.starts)
    training = 1.2 * (timing.finetunes + timing.comparison)
    scale = fewer.finetune.num_steps / config.finetune.num_steps
    ends = 20 + 1.2 * stage_1 + rest + scale * training
    assert ends == pytest.approx((1 - MARGIN) * 3600, rel=0.01)
    assert replace(fewer, finetune=config.finetune) == config
    assert "stage 1 took 1.2 times as long as planned: finetune.num_steps" in caplog.text
    much_later = with_time_left(config, timing, 3 * stage_1, 3600.0)
    assert much_later.finetune.num_steps == 1
    none = replace(config, finetune=replace(config.finetune, num_steps=0))
    assert with_time_left(none, timing, 3 * stage_1, 3600.0) == none


def test_hours_that_search_and_evaluation_take_are_refused_with_the_least():
    message = (
        r"--hours must be at least 0\.0\d+ here, got 0\.01: all but training takes about 1\.0 "
        r"minutes \(until here 0\.3, search 0\.\d, sampling and scores 0\.\d, starting"
    )
    with pytest.raises(ConfigError, match=message):
        steps_by_time(with_budget(hours=0.01), TIMING, elapsed=20.0)
    steps_by_time(with_budget(hours=0.05), TIMING, elapsed=20.0)


@pytest.mark.parametrize(("workers", "seconds"), [(1, 10.0), (2, 6.0), (3, 4.0), (9, 4.0)])
def test_work_is_shared_by_the_workers(workers, seconds):
    assert makespan([1.0, 4.0, 3.0, 2.0], workers) == pytest.approx(max(seconds, 4.0), abs=1.0)


def timing(config, *, workers=2, step=0.1, features="classifier"):
    network = base_unet(config.model, config.conditioning)
    space, plan = space_and_plan(config, network)
    one = StepTimesResult(step_seconds=step, pass_seconds=1e-4, seconds=6.0)
    spec = None
    if features != "none":
        spec = find_features(config.data, config.evaluate, features)
    return timing_of(config, network, plan, spec, one, [one] * workers, space.macs_base, 5.0)


def test_training_takes_the_steps_of_base_and_fine_tunes():
    config = small_config()
    found, twice = timing(config), timing(config, step=0.2)
    grids = 60 / 20 * 16 * 10 * 1e-4
    _, plan = space_and_plan(config, TINY)
    shares = [group.limit_share / mean_limit(config, plan) for group in plan.groups]
    experts = makespan([20 * 0.1 * share for share in shares], 2)
    assert found.training == pytest.approx(60 * 0.1 + grids + experts)
    assert twice.training - found.training == pytest.approx(6.0 + experts)
    assert timing(config, workers=4).training < found.training


def test_search_and_evaluation_are_allowed_for():
    config = small_config()
    found = timing(config)
    assert found.evaluation == pytest.approx(200 * 10 * 2e-4 / 2)
    more = small_config(evaluate={"num_images": 400})
    assert timing(more).evaluation == pytest.approx(2 * found.evaluation)
    unpruned = small_config(prune={"method": "none"})
    assert timing(unpruned).search < found.search
    given = small_config(model={"base": "somewhere"})
    saved = 10 * 16 * network_structure(TINY).num_params / 1e8
    grids = 10 * 16 * 10 * 1e-4
    assert found.other - timing(given).other == pytest.approx(grids + saved)


def test_a_classifier_that_is_not_in_the_cache_is_allowed_for(tmp_path):
    config = small_config(evaluate={"cache_dir": str(tmp_path)})
    fresh = timing(config).reference
    spec = find_features(config.data, config.evaluate, "classifier")
    spec.path.parent.mkdir(parents=True)
    spec.path.touch()
    _, plan = space_and_plan(config, TINY)
    macs_per_second = mean_limit(config, plan) * network_structure(TINY).macs / 1e-4
    macs = 3 * 600 * 64 * 9 * 32 * (1 + 64) * 8 * 8
    assert fresh == pytest.approx(macs / macs_per_second)
    assert timing(config).reference == 0


def test_where_no_image_is_scored_losses_and_a_few_samples_are_allowed_for():
    found = timing(small_config(), features="none")
    assert found.evaluation == pytest.approx(200 * 4 * 2e-4 / 2)  # of two models, on four groups
    samples = 64 * 10 * 2e-4 / 2
    assert found.other - timing(small_config()).other == pytest.approx(samples)
    assert found.reference == 0
    compared = timing(small_config(compare={"kind": "equal-macs"}), features="none")
    assert compared.evaluation == pytest.approx(2 * found.evaluation)


def test_what_a_comparison_trains_on_is_allowed_for():
    config = small_config()
    compared = small_config(compare={"kind": "equal-macs"})
    assert timing(compared).comparison > timing(config).comparison == 0
    assert timing(compared).evaluation > timing(config).evaluation
    assert timing(compared).other > timing(config).other


@pytest.mark.parametrize("share", [pytest.param(None, marks=pytest.mark.slow), 0.6])
def test_steps_are_timed_on_the_data_and_the_network_of_the_run(share, cache_dir):
    config = small_config(evaluate={"cache_dir": str(cache_dir)})
    found = measure_steps(StepTimesJob(config, TINY, share), lambda *_: None)
    assert 0 < found.step_seconds < 5
    assert 0 < found.pass_seconds < 1
    assert found.seconds > 4 * found.step_seconds


def test_steps_are_timed_with_the_dropout_of_captions(cache_dir, monkeypatch):
    dropout, told = {"caption_dropout": 0.5}, {}
    config = small_config(evaluate={"cache_dir": str(cache_dir)}, conditioning=dropout)

    def train(*_, report, **others):
        told.update(others)
        report({}, 1)

    monkeypatch.setattr(step_times, "train", train)
    monkeypatch.setattr(TrainingData, "caption_dropout", lambda _, share: share)
    measure_steps(StepTimesJob(config, TINY, None), lambda *_: None)
    assert told["caption_dropout"] == 0.5


@pytest.mark.parametrize(("hours", "fewest", "images"), [(1e-9, 1, 1), (1.0, 3, 64)])
def test_timing_itself_takes_a_share_of_the_hours(hours, fewest, images, cache_dir, monkeypatch):
    cached = small_config(evaluate={"cache_dir": str(cache_dir), "batch_size": 64})
    config = replace(cached, budget=BudgetConfig(hours=hours))
    steps, passes = [], []

    def train(*arguments, report, **others):
        def noted(metrics, step):
            steps.append(step)
            report(metrics, step)

        step_times_train(*arguments, report=noted, **others)

    def time_passes(_, batch_size, **__):
        passes.append(batch_size)
        return [StepTimes(1.0, {})]

    step_times_train = step_times.train
    monkeypatch.setattr(step_times, "train", train)
    monkeypatch.setattr(step_times, "time_passes", time_passes)
    monkeypatch.setattr(step_times, "MAX_SECONDS", 0.0)
    found = measure_steps(StepTimesJob(config, TINY, None), lambda *_: None)
    assert len(steps) == fewest
    assert passes == [images]
    assert found.step_seconds > 0


# --- what a later call keeps ---------------------------------------------------------------------


def test_a_resumed_run_keeps_the_steps_that_its_budget_bought(tmp_path):
    path, asked = tmp_path / "config.json", with_budget(hours=2)
    first, _ = steps_by_time(asked, TIMING, elapsed=0.0)
    write_json(path, to_json(first))
    again = with_choices(asked, path)
    assert differences(first, again) == []
    assert again.base.num_steps == first.base.num_steps != asked.base.num_steps
    fewer = with_budget(hours=0.05)
    bought, _ = steps_by_time(fewer, replace(TIMING, evaluation=300.0), elapsed=0.0)
    assert bought.evaluate.num_images < fewer.evaluate.num_images
    write_json(path, to_json(bought))
    assert with_choices(fewer, path) == bought
    assert bought.base.checkpoint_every < fewer.base.checkpoint_every
    write_json(path, to_json(first))
    assert default_run_dir(again) != default_run_dir(preset("digits"))
    longer = with_choices(with_budget(hours=3), path)
    assert "budget.hours 2.0 -> 3.0" in differences(first, longer)
    none = replace(asked, finetune=replace(asked.finetune, num_steps=0))
    changed = differences(first, with_choices(none, path))
    assert any("finetune.num_steps" in text for text in changed)


def test_settings_from_before_there_were_budgets_have_none():
    document = to_json(preset("digits"))
    del document["budget"]
    assert differences(from_json(document), preset("digits")) == []


# --- the command line ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--hours", "2"], BudgetConfig(hours=2)),
        (["--budget.hours=2"], BudgetConfig(hours=2)),
        (["--train-macs", "1e15"], BudgetConfig(train_macs=1e15)),
        (["--epochs", "50", "--finetune.num-steps", "0"], BudgetConfig(epochs=50)),
    ],
)
def test_a_budget_is_a_flag_of_run(flags, expected):
    assert parse(["run", *flags]).config.budget == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["run", "--hours", "2", "--base.num-steps", "9"],
            r"--hours sets the steps of base and fine-tunes: leave out --base\.num-steps",
        ),
        (["run", "--epochs=2", "--base.num_steps=9"], r"--epochs sets the steps"),
        (
            ["run", "--train-macs", "1", "--finetune.num-steps", "9"],
            r"--train-macs sets the steps",
        ),
        (["run", "--hours", "2", "--epochs", "9"], r"only one of --hours"),
        (
            ["run", "--hours", "2", "--sampler.compile", "default"],
            r"sampler\.compile must be none with --hours, .* got default\. Leave one of them out",
        ),
        (["plan", "--hours", "2"], r"--hours goes with tdc-ray run alone"),
        (["simulate", "--budget.epochs", "2"], r"--epochs goes with tdc-ray run alone"),
    ],
)
def test_a_budget_beside_steps_or_elsewhere_is_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        parse(arguments)
