"""What a measurement of a search follows from, as part of its cache key."""

from dataclasses import asdict

from tdc_ray.config.prune import PruneConfig
from tdc_ray.data.fingerprint import without
from tdc_ray.diffusion.plan import TimestepGroup
from tdc_ray.execution.item import Inputs

SEARCH_FIELDS = (
    "method",
    "channel_multiple",
    "objective",
    "latency_batch_size",
    "memory",
    "num_rounds",
    "num_candidates",
    "halving_steps",
    "num_passes",
    "num_levels",
)
"""Of pruning's settings: they decide what is measured, not what is found."""


def timesteps_key(group: TimestepGroup) -> Inputs:
    """Give what the work on a group's timesteps follows from."""
    return {"timesteps": [group.first, group.last]}


def measuring_key(config: PruneConfig) -> Inputs:
    """Give what a refit and the losses of one model follow from."""
    return {"measuring": without(asdict(config), SEARCH_FIELDS)}
