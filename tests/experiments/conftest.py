"""The experiments share one storage, and so one base and all that they compute alike."""

import sys
from pathlib import Path

import pytest

from tdc_ray.storage.files import locked

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


@pytest.fixture(scope="session")
def shared_storage(ray_cluster, common_dir) -> Path:
    """The storage, with the base of digits-smoke; of all processes of a test run."""
    sys.path.insert(0, str(EXPERIMENTS))
    try:
        from common import SMOKE_PRESET, Flags, base_of

        flags = Flags(preset=SMOKE_PRESET, storage=common_dir / "experiments")
        with locked(common_dir / "experiments.lock"):
            base_of(flags, 0)
    finally:
        sys.path.remove(str(EXPERIMENTS))
    return flags.storage


@pytest.fixture
def storage(shared_storage, importable) -> Path:
    """The storage, for a test that imports experiments."""
    return shared_storage
