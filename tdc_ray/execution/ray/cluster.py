"""Connects to Ray, lists its nodes, and starts actors on the driver's node."""

import contextlib
import logging
import math
import os
import socket
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from tdc_ray.config.compute import ComputeConfig
from tdc_ray.errors import ClusterError
from tdc_ray.execution.interrupts import (
    child_processes,
    interrupts_deferred,
    kill_trees,
    received_signal,
)
from tdc_ray.execution.scheduler import num_fitting

logger = logging.getLogger(__name__)

OBJECT_STORE_BYTES = 256 * 1024**2
"""Bytes of a local Ray's object store; items carry paths and small values, so little is in it."""

KIND = "accelerator_type:"
"""How Ray's resources that name a node's kind of GPU begin."""

LOCAL = "tdc-ray-local"
"""Ray's namespace of a local Ray."""

MAX_SOCKET_BYTES = 103 if sys.platform == "darwin" else 107
"""Longest path of a socket, by macOS and by Linux."""

NO_CLUSTER = (
    "no Ray cluster answers at {}: start one by ray start --head, give the address of another, or "
    "use local."
)

SECONDS_TO_ANSWER = 2.0
"""Longest time in which a node that is alive accepts a connection."""


@contextlib.contextmanager
def connected(
    num_cpus: int | None = None, *, dashboard: bool = False, address: str | None = None
) -> Iterator[None]:
    """Use the cluster already joined, or that of an address or ``RAY_ADDRESS``, or a local one.

    Args:
        num_cpus: Logical CPUs of a local Ray; None means as many as the machine has.
        dashboard: Whether a local Ray has one, on loopback: without it Ray Train never finds out
            that the process which leads a training was killed, and keeps its CPUs.
        address: Of the cluster, ``auto`` for the one that runs here, or ``local``; None means that
            ``RAY_ADDRESS`` decides.

    Raises:
        ClusterError: No cluster answers, or a local Ray cannot make its sockets.
    """
    if ray.is_initialized():
        _check_joined(address)
        yield
        return
    address = address or os.environ.get("RAY_ADDRESS", "local")
    if address == "local":
        check_local_ray()
    else:
        _check_answers(address)
    # Ray Train's controller looks at its workers this often; a report waits for the next look.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    quiet: dict[str, Any] = {
        "log_to_driver": False,
        "logging_level": logging.ERROR,
        "configure_logging": False,
    }
    try:
        try:
            with interrupts_deferred():
                if address == "local":
                    _start_local_ray(
                        num_cpus=num_cpus,
                        include_dashboard=dashboard,
                        namespace=LOCAL,
                        object_store_memory=OBJECT_STORE_BYTES,
                        **quiet,
                    )
                else:
                    ray.init(address=address, **quiet)
        except ConnectionError as error:
            raise ClusterError(NO_CLUSTER.format(address)) from error
        except RuntimeError as error:  # the cluster has another version of Ray or of Python
            raise ClusterError(f"Ray cannot be used at {address}: {error}") from error
        except Exception as error:
            if not _is_too_slow(error):
                raise
            raise ClusterError(
                f"Ray did not start, as happens on a busy machine: {error} Run the same command "
                "again."
            ) from error
        yield
    finally:
        with interrupts_deferred():
            ray.shutdown()


def _start_local_ray(**options: Any) -> None:
    """Start a local Ray: once more if its parts took too long, as they do on a busy machine."""
    try:
        _init_local_ray(**options)
    except Exception as error:
        if not _is_too_slow(error) or received_signal() is not None:
            raise  # it would fail again, or nobody waits any more
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        logger.warning("Ray did not start and is started once more: %s", reason)
        _init_local_ray(**options)


def _init_local_ray(**options: Any) -> None:
    """Start a local Ray, or end what was half started: ``ray.shutdown`` knows nothing of that."""
    driver = os.getpid()
    others = child_processes(driver)
    try:
        ray.init(address="local", **options)
    except Exception:
        ray.shutdown()
        kill_trees(filter(_is_rays, child_processes(driver) - others))
        raise


def _is_too_slow(error: Exception) -> bool:
    """Whether Ray gave up a node that started too slowly; all its other errors have types."""
    return type(error) is Exception


def _is_rays(pid: int) -> bool:
    """Whether a process runs a program of Ray's, not what another thread started meanwhile."""
    try:
        line = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:  # it is gone
        return False
    return os.fsencode(Path(ray.__file__).parent) + b"/" in line


def _check_joined(address: str | None) -> None:
    """Refuse the address of another cluster than the one that this process joined."""
    joined = ray.get_runtime_context().gcs_address
    if address not in (None, "auto", "local", joined):
        raise ClusterError(
            f"this process uses the Ray cluster at {joined} already, got {address}: call "
            "ray.shutdown() first, or use auto."
        )


def _check_answers(address: str) -> None:
    """Refuse an address where nobody listens, which Ray would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if port.isdecimal():
        try:
            socket.create_connection((host, int(port)), timeout=SECONDS_TO_ANSWER).close()
        except OSError as error:
            raise ClusterError(NO_CLUSTER.format(address)) from error


def check_local_ray() -> None:
    """Check that a local Ray can make its sockets; without effect where Ray runs already.

    Raises:
        ClusterError: Its temporary folder has too long a name.
    """
    if ray.is_initialized() or "RAY_ADDRESS" in os.environ:
        return
    folder = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or tempfile.gettempdir()
    session = f"session_2026-01-01_00-00-00_000000_{os.getpid()}"
    most = MAX_SOCKET_BYTES - len(f"/ray/{session}/sockets/plasma_store")
    if len(os.fsencode(folder)) > most:
        raise ClusterError(
            f"the temporary folder {folder} must have a path of at most {most} bytes for the "
            f"sockets of Ray, got {len(os.fsencode(folder))}: set RAY_TMPDIR to a shorter one, "
            "such as /tmp."
        )


def node_resources() -> list[dict[str, float]]:
    """Return the resources of every node that is alive, in use or not."""
    return [dict(node["Resources"]) for node in ray.nodes() if node["Alive"]]


def with_gpus(compute: ComputeConfig) -> ComputeConfig:
    """Return settings that say how many GPUs workers have, by what is there; log what they use.

    Where it is not said workers have one each, if there are enough for those that work together.
    """
    nodes = node_resources()
    num_gpus = sum(math.floor(node.get("GPU", 0.0)) for node in nodes)
    base, actor = compute.gpus_per_base_worker, compute.gpus_per_actor
    if base is None:
        base = float(num_gpus >= compute.num_base_workers)
    if actor is None:
        actor = float(num_gpus >= compute.workers_per_finetune)
    kinds = {name[len(KIND) :] for node in nodes for name in node if name.startswith(KIND)}
    logger.info(
        "devices: %d GPUs%s; a base worker takes %s, an actor %s",
        num_gpus,
        f" ({', '.join(sorted(kinds))})" if kinds else "",
        _device_text(base, compute.cpus_per_base_worker),
        _device_text(actor, compute.cpus_per_actor),
    )
    return replace(compute, gpus_per_base_worker=base, gpus_per_actor=actor)


def _device_text(gpus: float, cpus: int) -> str:
    threads = f"{cpus} CPU thread{'s' if cpus > 1 else ''}"
    return f"{gpus:g} GPU and {threads}" if gpus else f"{threads} and no GPU"


def check_room(number: int, needed: Mapping[str, float], settings: str, most: int = 0) -> bool:
    """Whether processes fit on the nodes at once; on a cluster that may grow they need not.

    Args:
        number: How many.
        needed: Resources of each.
        settings: What asks for them.
        most: How many are allowed; 0 means any number.

    Raises:
        ClusterError: They do not fit, and no node will join.
    """
    nodes = node_resources()
    fits = num_fitting(nodes, needed)
    has_room = min(fits, most or fits) >= number
    if not has_room and is_local():
        raise ClusterError(
            f"{number} workers of {dict(needed)} are needed at once, of which {fits} fit on the "
            f"nodes {nodes}{f' and {most} are allowed' if most else ''}. Change {settings}, or "
            "use a larger cluster."
        )
    return has_room


def is_alive(node_id: str) -> bool:
    """Whether a node accepts a connection: Ray notices its end only after many seconds."""
    for node in ray.nodes():
        if node["NodeID"] == node_id and node["Alive"]:
            address = (node["NodeManagerAddress"], node["NodeManagerPort"])
            with contextlib.suppress(OSError):
                socket.create_connection(address, timeout=SECONDS_TO_ANSWER).close()
                return True
    return False


def is_local() -> bool:
    """Whether the cluster is one that this process started for itself: no node will join it.

    A trial of a sweep is an actor, and shares the cluster with others.
    """
    context = ray.get_runtime_context()
    return bool(context.namespace == LOCAL) and context.get_actor_id() is None


def actor_here(actor_class: type, *, soft: bool = True, **options: Any) -> Any:
    """Return an actor class whose actor takes no CPU and is restarted whenever it dies.

    Args:
        actor_class: Its class; ``remote(...)`` of what is returned takes the arguments.
        soft: Whether it may be on another node than this one, where this one has gone.
        options: Further options of Ray.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=soft)
    remote: Any = ray.remote(num_cpus=0, max_restarts=-1)(actor_class)
    return remote.options(scheduling_strategy=here, **options)
