"""The workers of a run: ``--compute.*``."""

from typing import Literal

from tdc_ray.config.validation import NonNegativeFloat, PositiveInt, settings

Sharding = Literal["none", "full"]

RESULT_FIELDS = (
    "num_base_workers",
    "sharding",
    "cpus_per_base_worker",
    "workers_per_finetune",
    "tf32",
)
"""Those of these settings that change the results, and so the run directory."""


@settings("compute")
class ComputeConfig:
    """The workers of a run, and what each takes of the cluster.

    Of these, the workers of the base and of a fine-tune (each draws noise of its own), the CPUs
    of a base worker (the last bits of sums), sharding and TF32 change what is computed.
    """

    num_base_workers: PositiveInt = 1
    """Ray Train workers of stage 1 (data parallel)."""

    sharding: Sharding = "none"
    """What each of these holds of weights, gradients, Adam's moments and averages: all (none, that
    is DDP), or a share, and the weights of a block while that computes (full, that is FSDP2)."""

    cpus_per_base_worker: PositiveInt = 1
    """CPUs, and so threads, of a base worker."""

    num_actors: PositiveInt | None = None
    """Most actors that prune, fine-tune and sample, as nodes come and go; None means as many as
    fit, at most 64. A cluster that scales by itself adds nodes for no more than are asked for
    here."""

    cpus_per_actor: PositiveInt = 1
    """CPUs, and so threads, of an actor."""

    gpus_per_base_worker: NonNegativeFloat | None = None
    """GPUs of a base worker; None means one where there are as many, else none."""

    gpus_per_actor: NonNegativeFloat | None = None
    """GPUs of an actor, fractions share one; None means one where there is any, else none."""

    gpus_per_measurement: NonNegativeFloat | None = None
    """GPUs of an actor that measures, samples or encodes but trains nothing; None means as many as
    of those that train."""

    tf32: bool = True
    """Let GPUs round the inputs of fp32 convolutions and products to TF32's 10 bits of mantissa:
    several times as fast."""

    workers_per_finetune: PositiveInt = 1
    """Actors that fine-tune one expert together (data parallel): for more GPUs than groups."""

    max_attempts: PositiveInt = 3
    """How often an item is started whose actor dies under it or that fails for reasons outside of
    it, and the base whose worker dies; a node that goes away counts for the base alone."""
