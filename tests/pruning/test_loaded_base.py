import json
import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from tdc_ray.config.run import RunConfig
from tdc_ray.models.unet2d.steps import steps
from tdc_ray.models.unet2d.surgery import cut
from tdc_ray.models.unet2d.unet import load_unet
from tdc_ray.models.unet2d.units import units_of
from tdc_ray.models.units import keep_everything
from tdc_ray.pruning.criteria.magnitude import magnitude_scores
from tdc_ray.pruning.criteria.scores import select_top
from tdc_ray.pruning.jobs import MeasureJob, ScoreJob, SensitivityJob, StreamJob
from tdc_ray.pruning.loaded_base import (
    load_base,
    measure_candidate,
    measure_sensitivities,
    measure_stream,
    pruned_unet,
    score_units,
)
from tdc_ray.pruning.noised import held_out_loss
from tdc_ray.pruning.sensitivity import levels
from tdc_ray.storage.run_dir import RunDir
from tests.small import (
    TINY,
    assert_same,
    group_of,
    make_run_dir,
    random_kept,
    small_config,
    widths_of,
)

UNITS = units_of(TINY)


def config_of(**prune) -> RunConfig:
    few = {"num_images": 32, "num_refit_images": 16, "num_levels": 2}
    return small_config(prune={**few, **prune})


CONFIG = config_of()
UNFITTED = config_of(refit="none")


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> RunDir:
    return make_run_dir(tmp_path_factory.mktemp("run"))


def ignore(_metrics, _step):
    pass


def measured(run_dir, config, index, kept, number=1):
    return measure_candidate(
        MeasureJob(run_dir, config, group_of(config, index), kept, number), ignore
    )


def timeless(result):
    return {name: value for name, value in result.items() if name != "seconds"}


# --- candidates ------------------------------------------------------------------------------


def test_the_same_candidate_has_the_same_losses_twice(run_dir):
    torch.manual_seed(1)
    first = measured(run_dir, CONFIG, 0, random_kept(UNITS, seed=0))
    torch.manual_seed(2)
    assert timeless(measured(run_dir, CONFIG, 0, random_kept(UNITS, seed=0))) == timeless(first)
    for name in ("loss_cut", "loss_refit"):
        assert math.isfinite(first[name])
        assert first[name] > 0


def test_another_candidate_and_another_group_have_other_losses(run_dir):
    found = [
        measured(run_dir, CONFIG, index, random_kept(UNITS, seed))
        for index in (0, 3)
        for seed in (0, 1)
    ]
    losses = [result[name] for result in found for name in ("loss_cut", "loss_refit")]
    assert len(set(losses)) == 8


@pytest.mark.parametrize("config", [CONFIG, UNFITTED], ids=["refit", "no refit"])
def test_a_candidate_that_keeps_everything_has_the_loss_of_the_base(run_dir, config):
    result = measured(run_dir, config, 2, keep_everything(UNITS))
    assert result["loss_cut"] == held_out_loss(
        load_unet(run_dir.base_unet), config, group_of(config, 2)
    )
    assert result["loss_refit"] == (None if config is UNFITTED else result["loss_cut"])


@pytest.mark.parametrize("space", ["inner", "full"])
def test_the_losses_are_those_of_the_cut_and_of_the_refitted_unet(run_dir, space):
    config = config_of(space=space)
    group, base = group_of(config, 0), load_base(run_dir, config)
    kept = random_kept(base.space.units, seed=3)
    result = measured(run_dir, config, 0, kept)
    pruned = cut(base.unet, base.space.units, kept)
    assert result["loss_cut"] == held_out_loss(pruned, config, group)
    refitted = pruned_unet(base, kept, config, group)
    assert result["loss_refit"] == held_out_loss(refitted, config, group)
    assert result["loss_refit"] != result["loss_cut"]


def test_without_a_refit_the_pruned_unet_is_the_cut_base(run_dir):
    base, kept = load_base(run_dir, UNFITTED), random_kept(UNITS, seed=0)
    pruned = pruned_unet(base, kept, UNFITTED, group_of(UNFITTED, 0))
    assert_same(pruned.state_dict(), cut(base.unet, UNITS, kept).state_dict())
    result = measured(run_dir, UNFITTED, 0, kept)
    assert result["loss_refit"] is None
    assert result["loss_cut"] == held_out_loss(pruned, UNFITTED, group_of(UNFITTED, 0))


def test_a_refit_of_nothing_cut_is_the_base(run_dir):
    base = load_base(run_dir, CONFIG)
    pruned = pruned_unet(base, keep_everything(UNITS), CONFIG, group_of(CONFIG, 0))
    assert_same(pruned.state_dict(), base.unet.state_dict())


def test_a_measurement_is_reported_at_its_place_in_the_search(run_dir):
    seen = []
    kept = random_kept(UNITS, seed=0)
    job = MeasureJob(run_dir, CONFIG, group_of(CONFIG, 0), kept, 5)
    result = measure_candidate(job, lambda metrics, step: seen.append((dict(metrics), step)))
    losses = {name: result[name] for name in ("loss_cut", "loss_refit")}
    assert seen == [(losses, 5)]
    assert result["seconds"] > 0


def test_measuring_costs_a_forward_pass_per_image_and_the_refit_at_least_three(run_dir):
    kept = random_kept(UNITS, seed=0)
    space = load_base(run_dir, CONFIG).space
    macs = space.macs(widths_of(kept))
    assert measured(run_dir, UNFITTED, 0, kept)["macs"] == 32 * macs
    passes = 2 * 32 * macs + 16 * (space.macs_base + 2 * macs)
    assert measured(run_dir, CONFIG, 0, kept)["macs"] > passes


def test_what_the_base_leaves_spares_the_refits_a_look_back_and_changes_no_loss(tmp_path):
    run_dir, group = make_run_dir(tmp_path), group_of(CONFIG, 0)
    kept, space = random_kept(UNITS, seed=0), load_base(run_dir, CONFIG).space
    alone = measured(run_dir, CONFIG, 0, kept)
    job = MeasureJob(run_dir, CONFIG, group, keep_everything(UNITS), 0, leaves_weights=True)
    base = measure_candidate(job, ignore)
    assert base["macs"] == (32 + 3 * 16) * space.macs_base
    after = measured(run_dir, CONFIG, 0, kept)
    assert after["macs"] == alone["macs"] - 3 * 16 * space.macs_base
    assert [after[name] for name in ("loss_cut", "loss_refit")] == [
        alone[name] for name in ("loss_cut", "loss_refit")
    ]
    assert load_file(run_dir.error_weights(0)).keys() == {
        step.name for step in steps(load_unet(run_dir.base_unet))
    }


# --- scores ----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["taylor", "diff-pruning"])
def test_scores_do_not_depend_on_the_batches_that_a_device_takes(run_dir, method):
    found = []
    for size in (40, 7):  # Diff-Pruning takes 32 of the 40 images
        settings = {"num_images": 40, "batch_size": size}
        config = small_config(prune=settings, plan={"num_groups": 100, "min_group_size": 1})
        job = ScoreJob(run_dir, config, group_of(config, 50), method)
        found.append(score_units(job, ignore))
    whole, parts = found
    assert parts["macs"] == whole["macs"]
    for name, values in whole["scores"].items():
        assert parts["scores"][name] == pytest.approx(values, rel=1e-3)


@pytest.mark.parametrize("space", ["inner", "full"])
@pytest.mark.parametrize("method", ["random", "magnitude", "taylor", "diff-pruning"])
def test_units_are_scored_by_the_method_that_is_asked_for(run_dir, method, space):
    config = small_config(
        prune={"num_images": 8, "space": space}, plan={"num_groups": 50, "min_group_size": 1}
    )
    units = units_of(TINY, space)
    found = [
        score_units(ScoreJob(run_dir, config, group_of(config, index), method), ignore)
        for index in (2, 2, 3)
    ]
    scores = [result["scores"] for result in found]
    assert {name: len(values) for name, values in scores[0].items()} == {
        unit.name: unit.width for unit in units
    }
    assert scores[0] == scores[1]
    if method == "magnitude":  # knows nothing of timesteps
        assert scores[0] == scores[2] == magnitude_scores(load_unet(run_dir.base_unet), units)
    else:
        assert scores[0] != scores[2]
    macs = load_base(run_dir, config).space.macs_base
    timesteps = len(group_of(config, 2).timesteps)
    passes = {"taylor": 3 * 8, "diff-pruning": 3 * 8 * timesteps}.get(method, 0)
    assert found[0]["macs"] == passes * macs


# --- sensitivities ---------------------------------------------------------------------------


def taylor_of(run_dir, config) -> dict:
    job = ScoreJob(run_dir, config, group_of(config, 0), "taylor")
    return score_units(job, ignore)["scores"]


def sensitivities_of(run_dir, config, *names, kept=None, scores=None):
    if scores is None:
        scores = taylor_of(run_dir, config) if config.prune.refit == "none" else {}
    kept = kept or keep_everything(units_of(TINY, config.prune.space))
    job = SensitivityJob(run_dir, config, group_of(config, 0), names, kept, scores)
    return measure_sensitivities(job, ignore)


@pytest.mark.parametrize("refit", ["least-squares", "none"])
def test_the_units_asked_for_are_ranked_and_measured_at_their_levels(run_dir, refit):
    config, chosen = config_of(refit=refit), UNITS[::4]
    result = sensitivities_of(run_dir, config, *(unit.name for unit in chosen))
    assert result["scores"].keys() == result["sensitivities"].keys()
    assert set(result["scores"]) == {unit.name for unit in chosen}
    for unit in chosen:
        assert len(result["scores"][unit.name]) == unit.width
        grown = result["sensitivities"][unit.name]
        assert sorted(grown) == levels(unit, 2)
        assert all(math.isfinite(growth) for growth in grown.values())
    assert result["macs"] > 0


@pytest.mark.parametrize("refit", ["least-squares", "none"])
def test_units_are_measured_alike_in_any_company(run_dir, refit):
    config = config_of(refit=refit)
    together = sensitivities_of(run_dir, config, *(unit.name for unit in UNITS))
    for unit in UNITS[3], UNITS[-1]:
        alone = sensitivities_of(run_dir, config, unit.name)
        assert alone["scores"][unit.name] == together["scores"][unit.name]
        assert alone["sensitivities"][unit.name] == together["sensitivities"][unit.name]


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("refit", ["least-squares", "none"])
def test_the_sensitivity_of_a_stream_is_the_growth_of_its_candidates_loss(run_dir, refit, half):
    config, units = config_of(refit=refit, space="full"), units_of(TINY, "full")
    group, scores = group_of(config, 0), taylor_of(run_dir, config)
    widths = {u.name: max(1, u.width // 2) if half else u.width for u in units}
    kept = select_top(units, scores, widths)
    base = load_base(run_dir, config)
    loss = held_out_loss(pruned_unet(base, kept, config, group), config, group)
    unit = next(u for u in units if u.kind == "stream" and widths[u.name] > 1)
    job = StreamJob(run_dir, config, group, unit.name, kept, scores, loss)
    found = measure_stream(job, ignore)["sensitivities"]
    assert found.keys() == {unit.name}
    assert sorted(found[unit.name]) == levels(replace(unit, width=widths[unit.name]), 2)
    for width, grown in found[unit.name].items():
        best = sorted(range(unit.width), key=lambda step: -scores[unit.name][step])[:width]
        narrower = {**kept, unit.name: tuple(sorted(best))}
        pruned = pruned_unet(base, narrower, config, group)
        assert grown == held_out_loss(pruned, config, group) - loss


@pytest.mark.parametrize("refit", ["least-squares", "none"])
def test_a_cut_model_is_measured_from_its_own_loss_and_keeps_the_ranking(run_dir, refit):
    config, group = config_of(refit=refit), group_of(CONFIG, 0)
    scores = taylor_of(run_dir, config)
    half = {unit.name: max(1, unit.width // 2) for unit in UNITS}
    kept = select_top(UNITS, scores, half)
    chosen = [unit for unit in UNITS if half[unit.name] > 1]
    names = [unit.name for unit in chosen]
    result = sensitivities_of(run_dir, config, *names, kept=kept, scores=scores)
    base = load_base(run_dir, config)
    before = held_out_loss(pruned_unet(base, kept, config, group), config, group)
    for unit in chosen:
        assert result["scores"][unit.name] == [scores[unit.name][step] for step in kept[unit.name]]
        grown = result["sensitivities"][unit.name]
        assert sorted(grown) == levels(replace(unit, width=half[unit.name]), 2)
        if refit == "none":
            for width, growth in grown.items():
                further = select_top(UNITS, scores, half | {unit.name: width})
                pruned = pruned_unet(base, further, config, group)
                after = held_out_loss(pruned, config, group)
                assert growth == pytest.approx(after - before, abs=1e-6)


def test_sensitivities_survive_their_file_with_widths_as_text(run_dir):
    name = UNITS[0].name
    result = sensitivities_of(run_dir, CONFIG, name)
    read = json.loads(json.dumps(result))
    grown = {int(width): growth for width, growth in read["sensitivities"][name].items()}
    assert grown == result["sensitivities"][name]
    assert read["scores"] == result["scores"]
