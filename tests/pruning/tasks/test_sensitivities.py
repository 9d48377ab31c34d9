import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from tdc_ray.config.run import RunConfig
from tdc_ray.diffusion.process import noise_schedule
from tdc_ray.execution.item import ItemResult, load_result
from tdc_ray.models.structure import network_structure
from tdc_ray.models.unet2d.units import units_of
from tdc_ray.models.units import keep_everything
from tdc_ray.pruning.criteria.scores import select_top
from tdc_ray.pruning.loaded_base import load_base, prune_and_refit
from tdc_ray.pruning.noised import noised_batches, run_all
from tdc_ray.pruning.sensitivity import levels
from tdc_ray.pruning.space import space_of
from tdc_ray.pruning.tasks.scores import ScoreJob, score_units
from tdc_ray.pruning.tasks.sensitivities import (
    SensitivityJob,
    SensitivityResult,
    StreamJob,
    _measuring_macs,
    measure_sensitivities,
    measure_stream,
)
from tdc_ray.storage.run_dir import RunDir
from tests.small import (
    TINY,
    TINY_DIT,
    context_of,
    group_of,
    make_run_dir,
    small_config,
)

UNITS = units_of(TINY)


def choice_loss_of(unet, config, group) -> float:
    """The loss on the images and noise that choices are made by."""
    context = context_of(RunDir(Path("/nonexistent")), config)
    schedule = noise_schedule(config.diffusion)
    batches = noised_batches(context, group, unet, purpose="choice")
    return float(run_all([unet], batches, schedule, "fp32").losses[0].mean())


def config_of(**prune) -> RunConfig:
    few = {"num_images": 32, "num_refit_images": 16, "num_levels": 2}
    return small_config(prune={**few, **prune})


CONFIG = config_of()


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> RunDir:
    return make_run_dir(tmp_path_factory.mktemp("run"))


def ignore(_metrics, _step):
    pass


def taylor_of(run_dir, config) -> dict:
    job = ScoreJob(context_of(run_dir, config), group_of(config, 0), "taylor")
    return score_units(job, ignore).scores


def sensitivities_of(run_dir, config, *names, kept=None, scores=None):
    if scores is None:
        scores = taylor_of(run_dir, config) if config.prune.refit == "none" else {}
    kept = kept or keep_everything(units_of(TINY, config.prune.space))
    job = SensitivityJob(context_of(run_dir, config), group_of(config, 0), names, kept, scores)
    return measure_sensitivities(job, ignore)


@pytest.mark.parametrize("refit", ["least-squares", "none"])
def test_the_units_asked_for_are_ranked_and_measured_at_their_levels(run_dir, refit):
    config, chosen = config_of(refit=refit), UNITS[::4]
    result = sensitivities_of(run_dir, config, *(unit.name for unit in chosen))
    assert result.scores.keys() == result.sensitivities.keys()
    assert set(result.scores) == {unit.name for unit in chosen}
    for unit in chosen:
        assert len(result.scores[unit.name]) == unit.width
        grown = result.sensitivities[unit.name]
        assert sorted(grown) == levels(unit, 2)
        assert all(math.isfinite(growth) for growth in grown.values())
    assert result.macs > 0


@pytest.mark.parametrize("refit", ["least-squares", "none"])
def test_units_are_measured_alike_in_any_company(run_dir, refit):
    config = config_of(refit=refit)
    together = sensitivities_of(run_dir, config, *(unit.name for unit in UNITS))
    for unit in UNITS[3], UNITS[-1]:
        alone = sensitivities_of(run_dir, config, unit.name)
        assert alone.scores[unit.name] == together.scores[unit.name]
        assert alone.sensitivities[unit.name] == together.sensitivities[unit.name]


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("refit", ["least-squares", "none"])
def test_the_sensitivity_of_a_stream_is_the_growth_of_its_candidates_loss(run_dir, refit, half):
    config, units = config_of(refit=refit, space="full"), units_of(TINY, "full")
    group, scores = group_of(config, 0), taylor_of(run_dir, config)
    widths = {u.name: max(1, u.width // 2) if half else u.width for u in units}
    kept = select_top(units, scores, widths)
    base = load_base(context_of(run_dir, config), group_of(config, 0))
    loss = choice_loss_of(prune_and_refit(base, kept).network, config, group)
    unit = next(u for u in units if u.kind == "stream" and widths[u.name] > 1)
    job = StreamJob(context_of(run_dir, config), group, unit.name, kept, scores, loss)
    found = measure_stream(job, ignore).sensitivities
    assert found.keys() == {unit.name}
    assert sorted(found[unit.name]) == levels(replace(unit, width=widths[unit.name]), 2)
    for width, grown in found[unit.name].items():
        best = sorted(range(unit.width), key=lambda step: -scores[unit.name][step])[:width]
        narrower = {**kept, unit.name: tuple(sorted(best))}
        pruned = prune_and_refit(base, narrower).network
        assert grown == choice_loss_of(pruned, config, group) - loss


@pytest.mark.parametrize("refit", ["least-squares", "none"])
def test_a_cut_model_is_measured_from_its_own_loss_and_keeps_the_ranking(run_dir, refit):
    config, group = config_of(refit=refit), group_of(CONFIG, 0)
    scores = taylor_of(run_dir, config)
    half = {unit.name: max(1, unit.width // 2) for unit in UNITS}
    kept = select_top(UNITS, scores, half)
    chosen = [unit for unit in UNITS if half[unit.name] > 1]
    names = [unit.name for unit in chosen]
    result = sensitivities_of(run_dir, config, *names, kept=kept, scores=scores)
    base = load_base(context_of(run_dir, config), group_of(config, 0))
    before = choice_loss_of(prune_and_refit(base, kept).network, config, group)
    for unit in chosen:
        assert result.scores[unit.name] == [scores[unit.name][step] for step in kept[unit.name]]
        grown = result.sensitivities[unit.name]
        assert sorted(grown) == levels(replace(unit, width=half[unit.name]), 2)
        if refit == "none":
            for width, growth in grown.items():
                further = select_top(UNITS, scores, half | {unit.name: width})
                pruned = prune_and_refit(base, further).network
                after = choice_loss_of(pruned, config, group)
                assert growth == pytest.approx(after - before, abs=1e-6)


def test_sensitivities_survive_their_file_with_widths_as_text(run_dir, tmp_path):
    result = sensitivities_of(run_dir, CONFIG, UNITS[0].name)
    ItemResult(result).save(tmp_path / "result.json")
    assert load_result(tmp_path / "result.json", SensitivityResult).value == result


@pytest.mark.parametrize(("unit", "first"), [("attn1", "attn1.to_q"), ("ff", "ff.net.0.proj")])
def test_macs_behind_a_transformers_unit_are_those_from_its_first_layer_on(unit, first):
    layers, space = network_structure(TINY_DIT).layers, space_of(TINY_DIT)
    base, block = SimpleNamespace(layers=layers, space=space), "transformer_blocks.1"
    place = [layer.name for layer in layers].index(f"{block}.{first}")
    found = _measuring_macs(base, space.full, {f"{block}.{unit}": {1: [], 2: []}})
    assert found == 2 * sum(layer.macs for layer in layers[place:])
