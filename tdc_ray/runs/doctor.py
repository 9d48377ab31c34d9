"""What may go wrong on this machine, on the nodes of a cluster and with a storage: tried out."""

import os
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from tdc_ray.errors import ClusterError, StorageError
from tdc_ray.execution.machine import Machine, look_at_machine, try_gpus
from tdc_ray.execution.ray.cluster import OBJECT_STORE_BYTES, check_local_ray, connected
from tdc_ray.execution.ray.each_node import (
    address_here,
    clock_differences,
    node_gpus,
    node_names,
    on_nodes,
    sum_of_ranks,
)
from tdc_ray.storage.files import remove, write_text
from tdc_ray.storage.object_store import resolve_path
from tdc_ray.storage.probe import SHARED_FILE, probe_storage

LEAST_TEMP_BYTES = 2 * 10**9
LEAST_OPEN_FILES = 4096
MOST_SECONDS_APART = 5.0
"""Clocks that differ by more mix up logs and timelines; S3 refuses requests from 15 minutes on."""

STORAGE_REMEDIES = {
    "write": "check its path or URI, permissions, quota and credentials",
    "create once": "start one driver only on it, or use a disk, NFS, S3 or GCS",
    "see what another node wrote": "use a path or URI that leads every node to the same storage",
}
OTHER_REMEDY = "try another storage"

THIS = "this machine"


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at."""

    where: str
    """``this machine``, or a node's address."""

    what: str
    """What is so."""

    remedy: str | None = None
    """What to do about it; None means that it is as it should be."""


def diagnose(
    address: str | None = None, storage: str | None = None, paths: Sequence[str] = ()
) -> Iterator[Check]:
    """Look at this machine, every node of the cluster, and the storage as they see it.

    Args:
        address: Of the cluster, as ``execution.ray.cluster.connected`` takes it.
        storage: A path or URI.
        paths: What every node must have.
    """
    here = look_at_machine(paths)
    yield from _checks_of(THIS, here, here)
    if storage is not None:
        yield from _storage_checks(THIS, probe_storage(storage))
    try:
        if address in (None, "local"):
            check_local_ray()
        with connected(num_cpus=os.cpu_count(), address=address):
            yield from _cluster_checks(here, storage, paths)
    except ClusterError as error:
        yield Check(THIS, str(error), "put this right first: it hides all that Ray would tell")


def _cluster_checks(here: Machine, storage: str | None, paths: Sequence[str]) -> Iterator[Check]:
    names = node_names()
    yield Check(THIS, f"Ray answers, with {len(names)} node{'s' * (len(names) != 1)}")
    machines = on_nodes(look_at_machine, {node: (tuple(paths),) for node in names})
    alive = []
    for node, machine in machines.items():
        if isinstance(machine, str):
            yield Check(
                names[node],
                f"runs no function of this package: {machine}",
                "install the same version of it there, for the same Python",
            )
            continue
        alive.append(node)
        yield from _checks_of(names[node], machine, here)
    for node, seconds in clock_differences().items():
        if seconds > MOST_SECONDS_APART and node in names:  # not one that joined since
            text = f"its clock differs from this machine's by {seconds:.0f} s or more"
            yield Check(names[node], text, "synchronize the clocks (chrony, ntpd)")
    yield from _gpu_checks(names, alive, machines)
    if len(alive) > 1:
        yield from _network_checks(names, alive)
    if storage is not None:
        yield from _shared_storage_checks(names, alive, storage)


def _checks_of(where: str, machine: Machine, here: Machine) -> Iterator[Check]:
    """Judge what a machine has, beside this one."""
    check = partial(Check, where)
    other = [
        f"{name} {version} (here {here.versions[name]})"
        for name, version in machine.versions.items()
        if version != here.versions[name]
    ]
    if other:
        remedy = "install the same everywhere: pip install -c constraints.txt -e ."
        yield check(f"has {', '.join(other)}", remedy)
    else:
        shown = ", ".join(
            f"{name} {machine.versions[name]}" for name in ("python", "torch", "ray")
        )
        yield check(f"{machine.host}: {shown}")
    free = f"{machine.temp_free / 1e9:.1f} GB are free in {machine.temp_dir}"
    full = machine.temp_free < LEAST_TEMP_BYTES
    yield check(free, "make room there, or set TMPDIR to another disk" if full else None)
    if machine.shared_memory_free is not None:
        full = machine.shared_memory_free < OBJECT_STORE_BYTES
        yield check(
            f"{machine.shared_memory_free / 1e6:.0f} MB are free in /dev/shm",
            "remove what is in it; start a container with --shm-size=2g" if full else None,
        )
    few = machine.max_open_files < LEAST_OPEN_FILES
    yield check(
        f"a process may open {machine.max_open_files} files",
        f"raise the limit to {LEAST_OPEN_FILES} or more (ulimit -n)" if few else None,
    )
    for path in machine.missing_paths:
        yield check(f"{path} does not exist", "mount or copy it there, by the same path")


def _storage_checks(where: str, failed: dict[str, str] | str) -> Iterator[Check]:
    if isinstance(failed, str):
        yield Check(where, f"storage: {failed}", OTHER_REMEDY)
        return
    for what, why in failed.items():
        remedy = STORAGE_REMEDIES.get(what, OTHER_REMEDY)
        yield Check(where, f"storage: {what}: {why}", remedy)
    if not failed:
        yield Check(where, "storage: files are written, read, listed, replaced and removed whole")


def _shared_storage_checks(
    names: dict[str, str], alive: Sequence[str], storage: str
) -> Iterator[Check]:
    shared, path = secrets.token_hex(8), resolve_path(storage) / SHARED_FILE
    try:
        write_text(path, shared)
    except StorageError:  # told of this machine before
        return
    for node, failed in on_nodes(probe_storage, dict.fromkeys(alive, (storage, shared))).items():
        yield from _storage_checks(names[node], failed)
    remove(path)


def _gpu_checks(
    names: dict[str, str], alive: Sequence[str], machines: dict[str, Machine | str]
) -> Iterator[Check]:
    gpus = node_gpus()
    with_gpus = [node for node in alive if gpus[node]]
    for node in alive:
        machine = machines[node]
        if isinstance(machine, Machine) and machine.num_nvidia_devices > gpus[node]:
            yield Check(
                names[node],
                f"has {machine.num_nvidia_devices} GPUs, of which Ray knows {gpus[node]}",
                "start Ray there with --num-gpus, and see whether nvidia-smi works",
            )
    for node, found in on_nodes(try_gpus, dict.fromkeys(with_gpus, ()), gpus).items():
        if isinstance(found, str) or len(found) < gpus[node]:
            text = found if isinstance(found, str) else f"torch sees {len(found)} GPUs"
            yield Check(
                names[node],
                f"of {gpus[node]} GPUs: {text}",
                "wait until they are free; install a torch that fits the driver (nvidia-smi)",
            )
        else:
            yield Check(names[node], f"computes on {', '.join(found)}")


def _network_checks(names: dict[str, str], alive: Sequence[str]) -> Iterator[Check]:
    """Let nodes sum numbers together: those with GPUs by NCCL, otherwise all by gloo."""
    gpus = node_gpus()
    with_gpus = [node for node in alive if gpus[node]]
    nodes, backend = (with_gpus, "nccl") if len(with_gpus) > 1 else (list(alive), "gloo")
    address = on_nodes(address_here, {nodes[0]: ()})[nodes[0]]
    arguments = {node: (rank, len(nodes), address, backend) for rank, node in enumerate(nodes)}
    one_each = dict.fromkeys(nodes, 1) if backend == "nccl" else None
    sums = on_nodes(sum_of_ranks, arguments, one_each)
    for node, found in sums.items():
        if isinstance(found, str):
            yield Check(
                names[node],
                f"{backend} between the nodes: {found}",
                "let all ports between the nodes be open; name their network interface by "
                "NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME",
            )
    if not any(isinstance(found, str) for found in sums.values()):
        yield Check(THIS, f"{len(nodes)} nodes reach each other by {backend}")
