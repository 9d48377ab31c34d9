"""What every stage of a run follows from, as part of a cache key."""

from tdc_ray.config.compute import ComputeConfig
from tdc_ray.config.run import RunConfig
from tdc_ray.data.fingerprint import data_key
from tdc_ray.data.latents import training_data
from tdc_ray.execution.item import Inputs


def run_data_key(config: RunConfig) -> Inputs:
    """Return what all that a run trains or measures follows from; see :func:`data_key`."""
    return data_key(
        training_data(config.data, config.evaluate.cache_dir),
        seed=config.seed,
        diffusion=config.diffusion,
        conditioning=config.conditioning,
        tf32=config.compute.tf32,
    )


def base_workers_key(compute: ComputeConfig) -> Inputs:
    """Return what a base's training follows from of its workers.

    That they share it a key holds only where they do: keys are older than the choice.
    """
    shared = {} if compute.sharding == "none" else {"sharding": compute.sharding}
    key = {"workers": compute.num_base_workers, "cpus": compute.cpus_per_base_worker}
    return key | shared
