"""Calls functions on every node of the cluster, and lets the nodes talk to each other."""

import socket
import time
from collections import Counter
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, TypeVar

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

T = TypeVar("T")

SECONDS_TO_ANSWER = 120.0
"""Longest time of a call: a worker process starts, and imports what it calls."""

SECONDS_TO_MEET = 60.0
"""Longest time until all processes of a group have found each other."""


def node_names() -> dict[str, str]:
    """Return the addresses of the nodes that are alive, by their ids."""
    return {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}


def node_gpus() -> dict[str, int]:
    """Return how many GPUs Ray knows of, by the nodes' ids; 0 for a node that is gone."""
    return Counter(
        {
            node["NodeID"]: int(node["Resources"].get("GPU", 0))
            for node in ray.nodes()
            if node["Alive"]
        }
    )


def on_nodes(
    function: Callable[..., T],
    arguments: Mapping[str, tuple[Any, ...]],
    num_gpus: Mapping[str, int] | None = None,
) -> dict[str, T | str]:
    """Call a function on nodes, side by side; return what it returned, or the text of an error.

    Args:
        function: A module-level function.
        arguments: Its arguments, by the nodes' ids.
        num_gpus: GPUs that the calls take, by the nodes' ids; without them they see none.
    """
    calls = {}
    for node, given in arguments.items():
        remote: Any = ray.remote(
            num_cpus=0, num_gpus=(num_gpus or {}).get(node, 0), max_retries=0
        )(function)
        here = NodeAffinitySchedulingStrategy(node, soft=False)
        calls[node] = remote.options(scheduling_strategy=here).remote(*given)
    ray.wait(list(calls.values()), num_returns=len(calls), timeout=SECONDS_TO_ANSWER)
    return {node: _answer(call) for node, call in calls.items()}


def _answer(call: Any) -> Any:
    try:
        return ray.get(call, timeout=0)
    except GetTimeoutError:
        ray.cancel(call, force=True)
        return f"no answer within {SECONDS_TO_ANSWER:g} s"
    except RayError as error:
        cause = error.cause if isinstance(error, RayTaskError) else error
        return f"{type(cause).__name__}: {cause}".strip().splitlines()[0]


def clock_differences() -> dict[str, float]:
    """Return by how many seconds each node's clock at least differs from this machine's.

    By the nodes' ids; those that do not answer are left out.
    """
    found = {}
    on_nodes(_clock, dict.fromkeys(node_names(), ()))  # their processes start
    for node in node_names():
        before = time.time()
        answer = on_nodes(_clock, {node: ()})[node]
        after = time.time()
        if isinstance(answer, float):
            found[node] = max(0.0, before - answer, answer - after)
    return found


def _clock() -> float:
    return time.time()  # Ray takes no builtins


def address_here() -> str:
    """Return an address at which other nodes reach this process, on a port that is free."""
    with socket.socket() as listener:
        listener.bind(("", 0))
        return f"{ray.util.get_node_ip_address()}:{listener.getsockname()[1]}"


def sum_of_ranks(rank: int, world_size: int, address: str, backend: str) -> float:
    """Sum the ranks of a group of processes over their network; every process calls this.

    Args:
        rank: This one's.
        world_size: How many there are.
        address: Where the first of them listens.
        backend: ``nccl`` or ``gloo``.
    """
    import torch
    from torch import distributed

    distributed.init_process_group(
        backend,
        init_method=f"tcp://{address}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=SECONDS_TO_MEET),
    )
    try:
        total = torch.tensor(float(rank), device="cuda" if backend == "nccl" else "cpu")
        distributed.all_reduce(total)
        return float(total)
    finally:
        distributed.destroy_process_group()
