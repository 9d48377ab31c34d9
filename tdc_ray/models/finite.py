"""Refuses weights that are no numbers: a network that has one computes nothing else."""

import functools
import logging
from collections.abc import Iterable
from pathlib import Path

from safetensors import SafetensorError, safe_open

from tdc_ray.errors import CheckpointError
from tdc_ray.models.checkpoints.state_dicts import StateDict, load_state_dict
from tdc_ray.models.diffusers_folder import weight_files
from tdc_ray.storage.files import fetch
from tdc_ray.storage.object_store import display_path

logger = logging.getLogger(__name__)

_LFS = b"version https://git-lfs"
"""How a file begins that Git LFS has not fetched."""


def check_finite(paths: Iterable[Path]) -> None:
    """Check that weights are numbers, and log a variant that is taken.

    A file that has not changed is read once.

    Args:
        paths: Folders of diffusers, or checkpoint files.

    Raises:
        CheckpointError: A tensor holds NaN or infinity, or a file is missing, damaged or of one of
            several variants.
    """
    for path in paths:
        variant, files = weight_files(path) if fetch(path).is_dir() else (None, [path])
        if variant is not None:
            _log_variant(path, variant)
        for file in files:
            if not fetch(file).exists():
                raise CheckpointError(f"{display_path(file)} does not exist.")
            state = file.stat()
            if (name := _first_not_finite(file, state.st_size, state.st_mtime_ns)) is not None:
                raise CheckpointError(
                    f"{name} of {display_path(file)} holds NaN or infinity: its training "
                    "diverged, or the file is damaged. Give another."
                )


@functools.cache  # of a run, what is checked and what is imported are the same
def _log_variant(folder: Path, variant: str) -> None:
    logger.warning(
        "%s holds only the variant %s of its weights: it is taken, in float32",
        display_path(folder),
        variant,
    )


@functools.cache
def _first_not_finite(file: Path, _size: int, _mtime_ns: int) -> str | None:
    """Return the name of the first tensor that holds something else than numbers."""
    if file.suffix != ".safetensors":
        return _not_finite(load_state_dict(file))
    try:
        with safe_open(file, framework="pt") as tensors:  # one tensor in memory at a time
            names = (name for name in tensors.keys())  # noqa: SIM118
            return next((n for n in names if _not_finite({n: tensors.get_tensor(n)})), None)
    except SafetensorError as error:
        with file.open("rb") as opened:
            is_pointer = opened.read(len(_LFS)) == _LFS
        reason = "a pointer of Git LFS: fetch it by git lfs pull" if is_pointer else "damaged"
        raise CheckpointError(f"{display_path(file)} is {reason} ({error}).") from error


def _not_finite(state: StateDict) -> str | None:
    return next(
        (n for n, tensor in state.items() if not tensor.isfinite().all().item()),
        None,
    )
