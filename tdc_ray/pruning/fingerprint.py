"""What all work on a group's timesteps follows from, as part of a cache key."""

from dataclasses import asdict

from tdc_ray.data.fingerprint import data_key, without
from tdc_ray.diffusion.plan import TimestepGroup
from tdc_ray.execution.item import Inputs
from tdc_ray.models.fingerprint import weights_digest
from tdc_ray.pruning.context import PruningContext

SEARCH_FIELDS = (
    "method",
    "channel_multiple",
    "objective",
    "latency_batch_size",
    "memory",
    "num_rounds",
    "num_candidates",
    "rivals",
    "held_out_of_base",
    "halving_steps",
    "sensitivity",
    "num_probes",
    "num_passes",
    "num_levels",
)
"""Settings of pruning that decide which measurements are made, not their results."""


IMAGES_VERSION = 2
"""Changes whenever other images are measured on: all that rests on them is measured again."""


def group_key(context: PruningContext, group: TimestepGroup) -> Inputs:
    """Return what a refit and the losses of one model on a group's timesteps follow from."""
    return {
        "base": weights_digest(context.run_dir.base_unet),
        **data_key(
            context.data,
            seed=context.seed,
            diffusion=context.diffusion,
            conditioning=context.conditioning,
            tf32=context.tf32,
        ),
        "timesteps": [group.first, group.last],
        "images_version": IMAGES_VERSION,
        "measuring": without(asdict(context.prune), SEARCH_FIELDS),
    }
