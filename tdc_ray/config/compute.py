"""The settings of where a run computes."""

from dataclasses import dataclass

from tdc_ray.config.validation import at_least

RESULT_FIELDS = ("num_base_workers", "cpus_per_base_worker", "workers_per_finetune", "tf32")
"""Of these settings, the ones that change what is computed, and so what a run directory is for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ComputeConfig:
    """What the run takes of the cluster.

    Of these, the workers of the base and of a fine-tune (each draws noise of its own), the CPUs
    of a base worker (the last bits of sums) and TF32 change what is computed.
    """

    num_base_workers: int = 1
    """Ray Train workers of stage 1; each holds the whole model (data parallel)."""

    cpus_per_base_worker: int = 1
    """CPUs, and so threads, of a base worker."""

    num_actors: int | None = None
    """Most actors that prune, fine-tune and sample, as nodes come and go; None: as many as fit, at
    most 64. A cluster that scales by itself adds nodes for no more than are asked for here."""

    cpus_per_actor: int = 1
    """CPUs, and so threads, of an actor."""

    gpus_per_base_worker: float = 0.0
    """GPUs of a base worker."""

    gpus_per_actor: float = 0.0
    """GPUs of an actor; fractions share one."""

    gpus_per_measurement: float | None = None
    """GPUs of an actor that measures, samples or encodes but trains nothing; None: as many as of
    those that train."""

    tf32: bool = True
    """Let GPUs round the inputs of fp32 convolutions and products to TF32's 10 bits of mantissa:
    several times as fast."""

    workers_per_finetune: int = 1
    """Actors that fine-tune one expert together (data parallel): for more GPUs than groups."""

    max_attempts: int = 3
    """How often an item is started whose actor dies under it or that fails for reasons outside of
    it, and the base whose worker dies; a node that goes away counts for the base alone."""

    def __post_init__(self) -> None:
        counts = ("num_base_workers", "cpus_per_base_worker", "num_actors", "cpus_per_actor")
        at_least(1, "compute", self, *counts, "workers_per_finetune", "max_attempts")
        gpus = ("gpus_per_base_worker", "gpus_per_actor", "gpus_per_measurement")
        at_least(0, "compute", self, *gpus)
