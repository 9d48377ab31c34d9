import pytest

from tdc_ray.config.run import RunConfig
from tdc_ray.models.unet2d.unet import load_unet
from tdc_ray.models.unet2d.units import units_of
from tdc_ray.pruning.criteria.lamp import lamp_scores
from tdc_ray.pruning.criteria.magnitude import magnitude_scores
from tdc_ray.pruning.criteria.registry import CRITERIA
from tdc_ray.pruning.loaded_base import load_base
from tdc_ray.pruning.tasks.scores import ScoreJob, score_units
from tdc_ray.storage.run_dir import RunDir
from tests.small import (
    TINY,
    context_of,
    group_of,
    make_run_dir,
    small_config,
)

UNITS = units_of(TINY)


def config_of(**prune) -> RunConfig:
    few = {"num_images": 32, "num_refit_images": 16, "num_levels": 2}
    return small_config(prune={**few, **prune})


CONFIG = config_of()


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> RunDir:
    return make_run_dir(tmp_path_factory.mktemp("run"))


def ignore(_metrics, _step):
    pass


@pytest.mark.parametrize("method", ["taylor", "diff-pruning"])
def test_scores_do_not_depend_on_the_batches_that_a_device_takes(run_dir, method):
    found = []
    for size in (40, 7):  # Diff-Pruning takes 32 of the 40 images
        settings = {"num_images": 40, "batch_size": size}
        config = small_config(prune=settings, plan={"num_groups": 100, "min_group_size": 1})
        job = ScoreJob(context_of(run_dir, config), group_of(config, 50), method)
        found.append(score_units(job, ignore))
    whole, parts = found
    assert parts.macs == whole.macs
    for name, values in whole.scores.items():
        assert parts.scores[name] == pytest.approx(values, rel=1e-3)


@pytest.mark.parametrize("space", ["inner", "full"])
@pytest.mark.parametrize("method", CRITERIA)
def test_units_are_scored_by_the_method_that_is_asked_for(run_dir, method, space):
    config = small_config(
        prune={"num_images": 8, "space": space}, plan={"num_groups": 50, "min_group_size": 1}
    )
    units = units_of(TINY, space)
    found = [
        score_units(ScoreJob(context_of(run_dir, config), group_of(config, index), method), ignore)
        for index in (2, 2, 3)
    ]
    scores = [result.scores for result in found]
    assert {name: len(values) for name, values in scores[0].items()} == {
        unit.name: unit.width for unit in units
    }
    assert scores[0] == scores[1]
    weights_alone = {"magnitude": magnitude_scores, "lamp": lamp_scores}  # whatever the timesteps
    if method in weights_alone:
        own = weights_alone[method](load_unet(run_dir.base_unet), units)
        assert scores[0] == scores[2] == own
    else:
        assert scores[0] != scores[2]
    macs = load_base(context_of(run_dir, config), group_of(config, 0)).space.macs_base
    timesteps = len(group_of(config, 2).timesteps)
    passes = {"taylor": 3 * 8, "diff-pruning": 3 * 8 * timesteps}.get(method, 0)
    assert found[0].macs == passes * macs
