from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tdc_ray.config.train import FinetuneConfig
from tdc_ray.data.fingerprint import training_key
from tdc_ray.diffusion.plan import plan_groups
from tdc_ray.errors import LimitError
from tdc_ray.execution.chain import run_chain
from tdc_ray.pruning.space import space_of
from tdc_ray.runs.preflight import check_limits
from tdc_ray.runs.stages.budgets import finetunes, finetunes_by_excess, measured_plan
from tests.small import TINY, make_run_dir, small_config, task_of

CONFIG = small_config(
    plan={"num_groups": 3, "min_macs_share": 0.3},
    prune={"num_images": 16, "num_refit_images": 16, "num_levels": 2},
)
GROUPS = plan_groups(CONFIG.diffusion, CONFIG.plan, CONFIG.sampler).groups


@given(st.integers(0, 10**6))
def test_steps_are_shared_to_the_last_by_the_number_of_timesteps(num_steps):
    train = FinetuneConfig(num_steps=num_steps, allocation="timesteps")
    steps = [one.num_steps for one in finetunes(train, GROUPS)]
    total, sizes = num_steps * len(GROUPS), [len(group.timesteps) for group in GROUPS]
    assert sum(steps) == total
    for count, size in zip(steps, sizes, strict=True):
        assert abs(count - total * size / sum(sizes)) < 1


def test_equal_steps_are_those_of_the_settings_and_keys_know_steps_alone():
    train = FinetuneConfig(num_steps=7)
    assert finetunes(train, GROUPS) == [train] * len(GROUPS)
    by_size = finetunes(replace(train, allocation="timesteps"), GROUPS)
    alone = replace(train, num_steps=by_size[0].num_steps)
    assert training_key(by_size[0]) == training_key(alone)


@pytest.fixture(scope="module")
def searches(tmp_path_factory):
    run_dir = make_run_dir(tmp_path_factory.mktemp("budgets"))
    return [task_of(run_dir, CONFIG, index) for index in range(len(GROUPS))]


def test_steps_go_where_a_limit_costs_and_none_to_a_group_without_one(searches):
    train = FinetuneConfig(num_steps=100, allocation="excess")
    steps = [one.num_steps for one in run_chain(finetunes_by_excess(train, searches))]
    assert sum(steps) == 300
    assert steps[-1] == 0  # its limit is the base
    assert min(steps[:-1]) > 0
    whole = [replace(search, group=replace(search.group, limit_share=1.0)) for search in searches]
    equal = run_chain(finetunes_by_excess(train, whole))
    assert [one.num_steps for one in equal] == [100, 100, 100]


def test_a_measured_plan_has_the_budget_as_its_mean(searches):
    config = replace(CONFIG, plan=replace(CONFIG.plan, schedule="measured", mean_macs_share=0.6))
    plan = plan_groups(config.diffusion, config.plan, config.sampler)
    measured = run_chain(measured_plan(plan, searches))
    assert measured.mean_limit_share == pytest.approx(0.6)
    assert len({group.limit_share for group in measured.groups}) > 1
    assert [group.timesteps for group in measured.groups] == [g.timesteps for g in GROUPS]


def test_a_budget_below_the_smallest_models_is_refused_with_the_setting_to_raise():
    plan = replace(CONFIG.plan, schedule="measured", mean_macs_share=0.05)
    config = replace(CONFIG, plan=plan)
    measured = plan_groups(config.diffusion, config.plan, config.sampler)
    with pytest.raises(LimitError, match=r"group 0 is limited .* Raise plan\.mean_macs_share\."):
        check_limits(config.prune, space_of(TINY, "inner"), measured)
