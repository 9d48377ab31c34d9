import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tdc_ray.config.run import RunConfig
from tdc_ray.config.sweep import SweepConfig
from tdc_ray.errors import ConfigError
from tdc_ray.runs.choices import with_choices
from tdc_ray.runs.sweep.results import SettingSummary, pareto
from tdc_ray.runs.sweep.space import (
    Choices,
    Range,
    check_space,
    grid,
    parse_space,
    setting_name,
    trial_name,
    value_of,
    with_params,
)
from tests.small import TINY, small_config

CONFIG = RunConfig()


@pytest.mark.parametrize(
    "varied", ["diffusion.beta_schedule=linear,squaredcos_cap_v2", "sampler.sampler=ddim,ddpm"]
)
def test_losses_of_different_noise_processes_or_samplers_are_no_objective(varied):
    config = small_config(evaluate={"features": "none"})
    space = parse_space([varied], config)
    with pytest.raises(ConfigError, match=rf"without score .* {varied.partition('=')[0]} varied"):
        check_space(space, config, SweepConfig())
    check_space(space, config, SweepConfig(objectives=("macs",)))
    check_space(parse_space(["k=0.5,0.7"], config), config, SweepConfig())


def test_fields_are_varied_by_name_over_values_and_ranges():
    texts = [
        "plan.min_macs_share=0.3,0.5",
        "plan.schedule=snr,constant",
        "base.learning_rate=1e-4..1e-2:log",
        "N=2..8",
        "base.max_grad_norm=none,1",
        "proxy=offline,none",
        "finetune.micro_batch_size=1..16",
    ]
    assert parse_space(texts, CONFIG) == {
        "plan.min_macs_share": Choices((0.3, 0.5)),
        "plan.schedule": Choices(("snr", "constant")),
        "base.learning_rate": Range(1e-4, 1e-2, log=True),
        "plan.num_groups": Range(2, 8, whole=True),
        "base.max_grad_norm": Choices((None, 1)),
        "prune.method": Choices(("offline", "none")),
        "finetune.micro_batch_size": Range(1, 16, whole=True),
    }
    assert setting_name({"prune.method": "none"}) == "proxy=none"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("plan.min_mac_share=0.3", r"Did you mean plan\.min_macs_share"),
        ("min_macs_share=0.3", r"Did you mean plan\.min_macs_share\?"),
        ("plan=0.3", "no setting is called 'plan'"),
        ("seed=1,2", "use the sweep's seeds"),
        ("budget.hours=1,2", r"budget\.hours cannot be varied: .* Vary base\.num_steps"),
        ("plan.min_macs_share", "must be NAME=VALUE"),
        ("plan.min_macs_share=0.3..0.5", "a grid needs values"),
        ("plan.min_macs_share=0.3,1.5", r"min_macs_share must be at most 1, got 1\.5"),
        ("plan.num_groups=two", "plan.num_groups must be a valid integer"),
        ("plan.num_groups=2,2", "no value may be given twice"),
        ("plan.min_macs_share=1,1.0", "no value may be given twice"),
        ("plan.num_groups=2.5..4", "must be whole numbers"),
        ("plan.num_groups=2..many", "must be LOW..HIGH"),
    ],
)
def test_wrong_names_and_values_are_refused_with_what_would_be_right(text, message):
    with pytest.raises(ConfigError, match=message):
        check_space(parse_space([text], CONFIG), CONFIG, SweepConfig())


def test_a_field_given_twice_is_refused():
    with pytest.raises(ConfigError, match=r"plan\.num_groups may be given once"):
        parse_space(["plan.num_groups=2", "N=4"], CONFIG)


@pytest.mark.parametrize(
    ("how", "text", "message"),
    [
        ({"search": "tpe"}, "base.learning_rate=0..1:log", "must be above 0"),
        ({"search": "tpe"}, "plan.min_macs_share=0.9..0.1", "must rise"),
        ({"search": "tpe"}, "plan.min_macs_share=0.5..2", r"must be at most 1, got 2"),
        ({"stop_early": True}, "plan.num_groups=2,4", "fields of base or model"),
        ({"stop_early": True}, "base.loss_weight=p2,constant", "none of base.loss_weight"),
    ],
)
def test_what_the_search_cannot_use_is_refused(how, text, message):
    with pytest.raises(ConfigError, match=message):
        check_space(parse_space([text], CONFIG), CONFIG, SweepConfig(**how))


def test_a_grid_has_every_combination():
    space = {"plan.num_groups": Choices((2, 4)), "plan.schedule": Choices(("snr", "constant"))}
    assert [setting_name(params) for params in grid(space)] == [
        "N=2,schedule=snr",
        "N=2,schedule=constant",
        "N=4,schedule=snr",
        "N=4,schedule=constant",
    ]


@given(st.lists(st.floats(1e-6, 1.0), min_size=2, max_size=2, unique=True), st.integers(0, 3))
def test_names_tell_settings_and_seeds_apart_and_are_fit_for_folders(rates, seed):
    names = {trial_name({"base.learning_rate": rate}, seed) for rate in rates}
    names.add(trial_name({"base.learning_rate": rates[0]}, seed + 1))
    assert len(names) == 3
    assert all("/" not in name and len(name) < 140 for name in names)


def test_names_are_short_where_they_can_be():
    both = {"base.learning_rate": 0.001, "finetune.learning_rate": 0.0005}
    name = "base.learning_rate=0.001,finetune.learning_rate=0.0005,seed=1"
    assert trial_name(both, 1) == name
    assert trial_name({"plan.min_macs_share": 0.3, "prune.method": "llm"}, 0) == (
        "k=0.3,proxy=llm,seed=0"
    )


def test_a_trial_has_the_values_and_the_seed():
    config = with_params(CONFIG, {"plan.num_groups": 3, "base.max_grad_norm": None}, 7)
    assert (config.plan.num_groups, config.base.max_grad_norm, config.seed) == (3, None, 7)
    assert value_of(config, "plan.num_groups") == 3


def test_trials_of_other_files_have_other_networks(tmp_path):
    paths = []
    for layers in (1, 2):
        paths.append(str(tmp_path / f"{layers}.json"))
        Path(paths[-1]).write_text(json.dumps({**TINY, "layers_per_block": layers}))
    config = with_choices(small_config(model={"config": paths[0]}))
    for number, path in enumerate(paths):
        trial = with_choices(with_params(config, {"model.config": path}, 0))
        assert trial.model.network["layers_per_block"] == number + 1
    assert with_params(config, {"plan.num_groups": 3}, 0).model == config.model


points = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=8)


@given(points)
def test_the_front_is_what_nothing_dominates(found):
    settings = [
        SettingSummary(
            name=str(number),
            params={},
            num_done=1,
            mean={"score": float(score), "macs": float(macs)},
            spread={},
            pareto=False,
        )
        for number, (score, macs) in enumerate(found)
    ]
    front = pareto(settings, ("score", "macs"))
    for number, (score, macs) in enumerate(found):
        beaten = any(x <= score and y <= macs and (x, y) != (score, macs) for x, y in found)
        assert (str(number) in front) == (not beaten)
    unfinished = SettingSummary(
        name="cut", params={}, num_done=0, mean={"score": -math.inf}, spread={}, pareto=False
    )
    assert pareto([*settings, unfinished], ("score", "macs")) == front
