"""What a machine has that a run needs: packages, room on its disks, open files, GPUs."""

import resource
import shutil
import socket
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tdc_ray.storage.provenance import versions

SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """What was found."""

    host: str
    versions: Mapping[str, str]
    """Of Python and packages, by name."""

    temp_dir: str
    temp_free: int
    """Bytes."""

    shared_memory_free: int | None
    """Bytes; None where there is no such file system, as on macOS."""

    max_open_files: int
    """What a process may raise its limit to."""

    num_nvidia_devices: int
    missing_paths: tuple[str, ...]


def look_at_machine(paths: Sequence[str] = ()) -> Machine:
    """Look at the machine of this process, and for paths on it."""
    temp = tempfile.gettempdir()
    has_shared = SHARED_MEMORY.exists()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return Machine(
        host=socket.gethostname(),
        versions=versions(),
        temp_dir=temp,
        temp_free=shutil.disk_usage(temp).free,
        shared_memory_free=shutil.disk_usage(SHARED_MEMORY).free if has_shared else None,
        max_open_files=2**31 if hard == resource.RLIM_INFINITY else hard,
        num_nvidia_devices=len(list(Path("/dev").glob("nvidia[0-9]*"))),
        missing_paths=tuple(path for path in paths if not Path(path).exists()),
    )


def try_gpus() -> list[str]:
    """Compute on every GPU that this process sees; return their names.

    Raises:
        RuntimeError: One does not compute.
    """
    import torch  # the driver does without

    names = []
    for index in range(torch.cuda.device_count()):
        ones = torch.ones(64, 64, device=f"cuda:{index}")
        if float((ones @ ones).sum()) != 64.0**3:
            raise RuntimeError(f"GPU {index} computes wrong products.")
        names.append(torch.cuda.get_device_name(index))
    return names
