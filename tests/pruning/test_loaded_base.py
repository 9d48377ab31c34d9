import pytest

from tdc_ray.config.run import RunConfig
from tdc_ray.models.unet2d.units import units_of
from tdc_ray.models.units import keep_everything
from tdc_ray.pruning.loaded_base import LoadedBase, load_base, prune_and_refit
from tdc_ray.storage.run_dir import RunDir
from tests.small import (
    TINY,
    assert_same,
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
UNFITTED = config_of(refit="none")


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> RunDir:
    return make_run_dir(tmp_path_factory.mktemp("run"))


def ignore(_metrics, _step):
    pass


def loaded(run_dir: RunDir, config: RunConfig) -> LoadedBase:
    return load_base(context_of(run_dir, config), group_of(config, 0))


def test_a_refit_of_nothing_cut_is_the_base(run_dir):
    base = loaded(run_dir, CONFIG)
    pruned = prune_and_refit(base, keep_everything(UNITS)).network
    assert_same(pruned.state_dict(), base.network.state_dict())
