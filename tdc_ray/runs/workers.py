"""Who runs the chains of a job: this process, or the workers of a Ray cluster."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tdc_ray.config.run import RunConfig
from tdc_ray.errors import ConfigError
from tdc_ray.execution.chain import Chain, run_chains
from tdc_ray.execution.device import allow_tf32
from tdc_ray.execution.events import EventSink, listening

RunChains = Callable[[Mapping[str, Chain[Any]]], dict[str, Any]]
"""Runs chains side by side; returns what each returned, by its name."""


@contextmanager
def workers(
    config: RunConfig,
    sinks: Sequence[EventSink] = (),
    cluster: str | None = None,
    only_here: Path | None = None,
) -> Iterator[RunChains]:
    """Yield the function that runs chains, while the block runs.

    In this process they leave torch's random numbers as they were.

    Args:
        config: Says what workers take of a cluster, and how GPUs compute.
        sinks: Called with the events of the work.
        cluster: Address of a Ray cluster, ``auto`` for the one that runs here, or ``local`` to
            start one. None means this process, without Ray.
        only_here: A folder that is used and that other machines do not see, if there is one.

    Raises:
        ConfigError: Workers would not see the folder.
        ClusterError: The cluster cannot be used.
    """
    if cluster is None:
        allow_tf32(allowed=config.compute.tf32)
        with listening(sinks) as events, torch.random.fork_rng():
            yield partial(run_chains, sink=events)
        return
    from tdc_ray.execution.ray.cluster import connected, node_resources, with_gpus
    from tdc_ray.execution.ray.event_collector import collecting
    from tdc_ray.execution.ray.pool import Pool
    from tdc_ray.runs.run import local_cpus, services_of

    with connected(local_cpus(config.compute), address=cluster):
        if only_here is not None and len(node_resources()) > 1:
            raise ConfigError(
                f"folder must be one that all nodes of the cluster {cluster} see, got a temporary "
                f"one, {only_here}: name it by folder=."
            )
        with (
            collecting(sinks) as collector,
            Pool(with_gpus(config.compute), collector, services=services_of(config)) as pool,
        ):
            yield pool.run
