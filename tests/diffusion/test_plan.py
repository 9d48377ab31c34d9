import dataclasses
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tdc_ray.config.diffusion import DiffusionConfig
from tdc_ray.config.plan import PlanConfig
from tdc_ray.config.presets import preset
from tdc_ray.config.sampler import SamplerConfig
from tdc_ray.diffusion.plan import (
    AFTER_STAGE_1,
    difficulty,
    limit_shares,
    plan_groups,
    to_json,
    with_limits,
)
from tdc_ray.diffusion.schedule import NoiseProcess
from tdc_ray.errors import ConfigError, ScheduleError
from tdc_ray.models.structure import network_structure
from tdc_ray.models.unet2d.architectures import architecture

LINEAR = DiffusionConfig()
LDM = DiffusionConfig(beta_schedule="scaled_linear", beta_start=0.0015, beta_end=0.0195)
COSINE = DiffusionConfig(num_train_timesteps=4000, beta_schedule="squaredcos_cap_v2")
SMALL_COSINE = DiffusionConfig(num_train_timesteps=200, beta_schedule="squaredcos_cap_v2")
DDIM_100 = SamplerConfig(num_inference_steps=100)
DIVISORS = [1, 2, 4, 5, 8, 10, 20, 25, 40, 50, 100]
"""Of 200 and 1000 timesteps."""

FLOPS_SCHEDULES = ["snr", "constant", "uni-increasing", "uni-decreasing"]
LINEAR_SIZES = [4, 13, 35, 87, 164, 190, 160, 132, 114, 101]


def sizes(plan):
    return [len(group.timesteps) for group in plan.groups]


def limits(plan):
    return [group.limit_share for group in plan.groups]


# --- the numbers of the paper's settings -----------------------------------------------------


@pytest.mark.parametrize(
    ("diffusion", "expected"),
    [
        pytest.param(LINEAR, LINEAR_SIZES, id="linear"),
        pytest.param(COSINE, [22, 192, 996, 1936, 693, 131, 24, 5, 1], id="cosine"),
    ],
)
def test_group_sizes_are_those_of_the_specification(diffusion, expected):
    assert sizes(plan_groups(diffusion, PlanConfig(), DDIM_100)) == expected


def test_groups_of_latent_diffusion_follow_equation_5():
    # A second, literal reading of Eq. 3 to 5: z-score, min-max, then compare with the limits.
    k, num_groups = 0.5, 10
    snr = NoiseProcess.of(LDM).snr_db
    z_score = (-snr - np.mean(-snr)) / np.std(-snr)
    budget = (z_score - z_score.min()) / (z_score.max() - z_score.min()) * (1 - k) + k
    upper = [(i + 1) / num_groups + (num_groups - i - 1) / num_groups * k for i in range(10)]
    lower = [0.0, *upper[:-1]]
    upper[-1] = math.inf  # the hardest timestep's budget is 1 but for rounding
    expected = [
        int(np.sum((low < budget) & (budget <= high)))
        for low, high in zip(lower, upper, strict=True)
    ]
    plan = plan_groups(LDM, PlanConfig(num_groups=num_groups, min_macs_share=k), DDIM_100)
    assert sizes(plan) == expected
    assert expected[-1] == 83  # what the paper's unshifted Eq. 4 leaves in no group


@pytest.mark.parametrize(
    ("name", "mean_share", "giga_macs"),
    [
        ("cifar10", 0.8305, 6.76),
        ("imagenet64", 0.8305, 32.68),
        ("ffhq256-ldm", 0.81275, 78.0),
        ("cifar10-cosine", 0.6935, 5.64),
    ],
)
def test_presets_have_the_mean_limits_of_the_specification(name, mean_share, giga_macs):
    config = preset(name)
    plan = plan_groups(config.diffusion, config.plan, config.sampler)
    assert plan.mean_limit_share == pytest.approx(mean_share, abs=1e-9)
    macs_base = network_structure(architecture(config.model.architecture)).macs
    assert plan.mean_limit_share * macs_base / 1e9 == pytest.approx(giga_macs, abs=0.05)
    by_hand = [plan.group_of(step).limit_share for step in plan.sampling_timesteps]
    assert plan.mean_limit_share == pytest.approx(sum(by_hand) / len(by_hand))


def test_limits_of_ten_groups_rise_by_a_twentieth_from_055_to_1():
    plan = plan_groups(LINEAR, PlanConfig(), DDIM_100)
    np.testing.assert_allclose(limits(plan), np.arange(0.55, 1.01, 0.05))
    np.testing.assert_allclose(limit_shares(4, 0.2), [0.4, 0.6, 0.8, 1.0])


def test_difficulty_runs_from_0_to_1_against_the_snr():
    np.testing.assert_allclose(difficulty(np.array([30.0, 20.0, -10.0])), [0, 0.25, 1])


def test_max_macs_round_down_and_keep_the_base_whole():
    last = plan_groups(LINEAR, PlanConfig(), DDIM_100).groups[-1]
    assert last.limit(8_137_015_296) == 8_137_015_296
    half = dataclasses.replace(last, limit_share=0.5)
    assert half.limit(7) == 3


@given(st.integers(10**11, 3 * 10**11), st.floats(0.1, 1))
def test_a_limit_that_is_the_cost_of_a_model_holds_that_model(base, share):
    cost = int(share * base)
    group = plan_groups(LINEAR, PlanConfig(), DDIM_100).groups[0]
    assert dataclasses.replace(group, limit_share=cost / base).limit(base) == cost


def test_snr_at_the_ends_of_a_group_is_the_schedules():
    snr = NoiseProcess.of(LINEAR).snr_db
    for group in plan_groups(LINEAR, PlanConfig(), DDIM_100).groups:
        assert group.snr_db_first == snr[group.first]
        assert group.snr_db_last == snr[group.last]


# --- rules that hold for every plan ----------------------------------------------------------


@st.composite
def plan_inputs(draw):
    schedule = draw(st.sampled_from(FLOPS_SCHEDULES))
    diffusion = draw(st.sampled_from([LINEAR, LDM, SMALL_COSINE]))
    config = PlanConfig(
        num_groups=draw(st.integers(1, 40)),
        min_macs_share=draw(st.floats(0.01, 1.0)),
        schedule=schedule,
        min_group_size=draw(st.integers(1, 60)),
    )
    sampler = SamplerConfig(
        num_inference_steps=draw(st.sampled_from(DIVISORS)), steps_offset=draw(st.integers(0, 1))
    )
    return diffusion, config, sampler


@given(plan_inputs())
def test_every_timestep_is_in_exactly_one_group(inputs):
    diffusion, config, sampler = inputs
    plan = plan_groups(diffusion, config, sampler)
    timesteps = [timestep for group in plan.groups for timestep in group.timesteps]
    assert timesteps == list(range(diffusion.num_train_timesteps))  # so groups are contiguous
    assert all(group.timesteps for group in plan.groups)


@given(plan_inputs())
def test_group_of_agrees_with_the_groups(inputs):
    plan = plan_groups(*inputs)
    assert [group.index for group in plan.groups] == list(range(len(plan.groups)))
    for group in plan.groups:
        for timestep in (group.first, group.last, (group.first + group.last) // 2):
            assert plan.group_of(timestep) is group


@given(plan_inputs())
def test_limits_are_shares_of_the_base(inputs):
    plan = plan_groups(*inputs)
    assert all(0 < share <= 1 for share in limits(plan))
    assert min(limits(plan)) - 1e-9 <= plan.mean_limit_share <= max(limits(plan)) + 1e-9


@given(plan_inputs())
def test_every_sampling_step_is_counted_in_its_group(inputs):
    plan = plan_groups(*inputs)
    for group in plan.groups:
        inside = [step for step in plan.sampling_timesteps if step in group.timesteps]
        assert group.num_sampling_steps == len(inside)


@given(plan_inputs())
def test_groups_have_the_size_that_was_asked_for_unless_there_is_only_one(inputs):
    plan = plan_groups(*inputs)
    if len(plan.groups) > 1:
        assert min(sizes(plan)) >= inputs[1].min_group_size


@given(
    st.sampled_from([LINEAR, LDM, SMALL_COSINE]),
    st.integers(1, 30),
    st.floats(0.01, 1.0),
    st.floats(0.01, 1.0),
)
def test_membership_does_not_depend_on_k(diffusion, num_groups, k, other_k):
    plans = [
        plan_groups(diffusion, PlanConfig(num_groups=num_groups, min_macs_share=share), DDIM_100)
        for share in (k, other_k)
    ]
    assert [g.timesteps for g in plans[0].groups] == [g.timesteps for g in plans[1].groups]


# --- the other schedules of Table II ---------------------------------------------------------


def test_snr_limits_rise_to_the_base():
    shares = limits(plan_groups(COSINE, PlanConfig(num_groups=7, min_macs_share=0.3), DDIM_100))
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


def test_constant_gives_the_snr_groups_their_mean_limit():
    plan = plan_groups(LINEAR, PlanConfig(schedule="constant"), DDIM_100)
    assert sizes(plan) == LINEAR_SIZES
    assert limits(plan) == pytest.approx([0.8305] * 10)
    assert plan.mean_limit_share == pytest.approx(0.8305)


@pytest.mark.parametrize(("share", "mean"), [(None, 0.8305), (0.6, 0.6)])
def test_measured_limits_are_their_mean_until_they_are_known(share, mean):
    config = PlanConfig(schedule="measured", mean_macs_share=share)
    plan = plan_groups(LINEAR, config, DDIM_100)
    assert sizes(plan) == LINEAR_SIZES
    assert limits(plan) == pytest.approx([mean] * 10)
    assert plan.notes == (AFTER_STAGE_1,)

    known = with_limits(plan, [0.1 * number for number in range(1, 11)])
    assert limits(known) == pytest.approx([0.1 * number for number in range(1, 11)])
    steps = [group.num_sampling_steps for group in known.groups]
    of_steps = sum(0.1 * number * count for number, count in enumerate(steps, start=1))
    assert known.mean_limit_share == pytest.approx(of_steps / 100)
    assert known.notes == ()


@pytest.mark.parametrize("schedule", ["uni-increasing", "uni-decreasing"])
def test_uniform_schedules_split_the_timesteps_equally_with_a_mean_of_0775(schedule):
    plan = plan_groups(LINEAR, PlanConfig(schedule=schedule), DDIM_100)
    assert sizes(plan) == [100] * 10
    assert plan.mean_limit_share == pytest.approx(0.775)
    rising = np.arange(0.55, 1.01, 0.05)
    expected = rising if schedule == "uni-increasing" else rising[::-1]
    np.testing.assert_allclose(limits(plan), expected)


def test_uniform_groups_differ_by_one_timestep_at_most():
    plan = plan_groups(LINEAR, PlanConfig(schedule="uni-increasing", num_groups=7), DDIM_100)
    assert set(sizes(plan)) == {142, 143}


@given(
    st.sampled_from([LINEAR, LDM]),
    st.sampled_from(["uni-increasing", "uni-decreasing"]),
    st.integers(2, 30),
    st.floats(0.05, 1.0),
    st.sampled_from([20, 25, 40, 50, 100, 125, 200]),
)
def test_match_snr_mean_reaches_the_mean_of_the_snr_schedule(
    diffusion, schedule, num_groups, k, num_steps
):
    config = PlanConfig(num_groups=num_groups, min_macs_share=k)
    sampler = SamplerConfig(num_inference_steps=num_steps)
    by_snr = plan_groups(diffusion, config, sampler)
    matching = dataclasses.replace(config, schedule=schedule, match_snr_mean=True)
    plan = plan_groups(diffusion, matching, sampler)
    assert plan.mean_limit_share == pytest.approx(by_snr.mean_limit_share, abs=1e-9)
    assert max(limits(plan)) == 1.0
    assert len(plan.groups) == num_groups


def test_a_mean_that_no_k_can_reach_is_refused_with_what_to_change():
    config = PlanConfig(schedule="uni-increasing", min_macs_share=0.05, match_snr_mean=True)
    with pytest.raises(ConfigError, match=r"needs plan\.min_macs_share in \(0, 1\].*Raise"):
        plan_groups(COSINE, config, DDIM_100)


def test_one_group_has_the_snr_mean_already():
    config = PlanConfig(num_groups=1, schedule="uni-increasing", match_snr_mean=True)
    assert plan_groups(LINEAR, config, DDIM_100).mean_limit_share == 1.0


def test_match_snr_mean_holds_for_groups_that_were_joined():
    config = PlanConfig(min_group_size=150)
    by_snr = plan_groups(LINEAR, config, DDIM_100)
    matching = dataclasses.replace(config, schedule="uni-increasing", match_snr_mean=True)
    plan = plan_groups(LINEAR, matching, DDIM_100)
    assert plan.mean_limit_share == pytest.approx(by_snr.mean_limit_share)


# --- empty, small and idle groups ------------------------------------------------------------


def test_empty_groups_vanish_with_a_note():
    plan = plan_groups(COSINE, PlanConfig(), DDIM_100)
    assert len(plan.groups) == 9
    assert plan.groups[-1].limit_share == 1.0  # the vanished one was number 8 of 0 to 9
    assert plan.groups[-2].limit_share == pytest.approx(0.9)
    assert any("of 10 groups, number 8" in note and "empty" in note for note in plan.notes)


@pytest.mark.parametrize("schedule", ["uni-increasing", "uni-decreasing"])
def test_equal_runs_have_no_note_about_groups_of_the_snr_schedule(schedule):
    plan = plan_groups(COSINE, PlanConfig(schedule=schedule), DDIM_100)
    assert sizes(plan) == [400] * 10
    assert plan.notes == ()


def test_a_plan_without_surprises_has_no_notes():
    assert plan_groups(LINEAR, PlanConfig(), DDIM_100).notes == ()


def test_small_groups_join_the_next_one_and_take_its_limit():
    plan = plan_groups(LINEAR, PlanConfig(min_group_size=20), DDIM_100)
    assert sizes(plan) == [4 + 13 + 35, *LINEAR_SIZES[3:]]
    np.testing.assert_allclose(limits(plan), np.arange(0.65, 1.01, 0.05))
    assert any("2 group(s) under 20 timesteps joined" in note for note in plan.notes)


def test_the_last_group_joins_the_one_before_it_when_it_is_small():
    plan = plan_groups(COSINE, PlanConfig(min_group_size=10), DDIM_100)
    assert sizes(plan) == [22, 192, 996, 1936, 693, 131, 24 + 5 + 1]
    assert plan.groups[-1].limit_share == pytest.approx(0.85)  # the limit of the 24


def test_a_minimum_above_all_timesteps_leaves_one_group_at_the_full_limit():
    plan = plan_groups(LINEAR, PlanConfig(min_group_size=5000), DDIM_100)
    assert sizes(plan) == [1000]
    assert limits(plan) == [1.0]


def test_groups_that_no_sampling_step_enters_are_noted():
    plan = plan_groups(COSINE, PlanConfig(), DDIM_100)
    assert [group.num_sampling_steps for group in plan.groups[-3:]] == [0, 0, 0]
    assert any("no sampling step enters group 6, 7, 8 (100 steps" in n for n in plan.notes)
    assert sum(group.num_sampling_steps for group in plan.groups) == 100


# --- the steps of the sampler ----------------------------------------------------------------


def test_an_offset_that_steps_past_the_last_timestep_is_refused():
    every_step = SamplerConfig(num_inference_steps=1000, steps_offset=1)
    with pytest.raises(
        ConfigError, match=r"sampler\.steps_offset 1 .* past the last timestep 999"
    ):
        plan_groups(LINEAR, PlanConfig(), every_step)


@pytest.mark.parametrize("timestep", [-1, 1000])
def test_a_timestep_of_no_group_is_refused(timestep):
    plan = plan_groups(LINEAR, PlanConfig(), DDIM_100)
    with pytest.raises(ConfigError, match=rf"in \[0, 1000\), got {timestep}"):
        plan.group_of(timestep)


def test_betas_that_use_up_the_signal_are_no_plan():
    hopeless = DiffusionConfig(num_train_timesteps=4000, beta_start=0.5, beta_end=0.9)
    with pytest.raises(ScheduleError, match="alphas_cumprod"):
        plan_groups(hopeless, PlanConfig(), DDIM_100)


def test_a_plan_is_written_as_plain_json():
    plan = plan_groups(COSINE, PlanConfig(), DDIM_100)
    document = json.loads(json.dumps(to_json(plan)))
    assert document["num_train_timesteps"] == 4000
    assert [(g["first"], g["last"]) for g in document["groups"]] == [
        (group.first, group.last) for group in plan.groups
    ]
    assert document["notes"] == list(plan.notes)
