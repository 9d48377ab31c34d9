"""State dicts of other projects' checkpoints: loaded without unpickling objects, and checked."""

import logging
import pickle
import zipfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from tdc_ray.errors import CheckpointError

StateDict = Mapping[str, Tensor]

Shapes = Mapping[str, tuple[int, ...]]
"""Tensors by name."""

MAX_NAMED = 3
"""Most tensors that one error names."""

logger = logging.getLogger(__name__)


class _Placeholder:
    """Replaces whatever a checkpoint names beside tensors: calling it returns an empty dict.

    PyTorch's restricted unpickler then fills it with the state that the file names; none of the
    file's own classes and functions is looked up, let alone called.
    """

    def __new__(cls, *_args: Any, **_kwargs: Any) -> Any:
        return Counter()


def load_state_dict(path: Path) -> StateDict:
    """Load a checkpoint's tensors on the CPU; they stay on the disk until they are used.

    Of a file with tensors under ``state_dict`` (Lightning's, such as CompVis's) that part is
    loaded; objects beside it are left out without being unpickled.

    Raises:
        CheckpointError: There is no such file, or it holds no tensors by name.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist.")
    try:
        mapped = zipfile.is_zipfile(path)
        objects = get_unsafe_globals_in_checkpoint(path) if mapped else []
        if objects:
            logger.info("%s: left out what is no tensor (%s)", path, ", ".join(sorted(objects)))
        with safe_globals([(_Placeholder, name) for name in objects]):
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError, OSError) as error:
        _, _, reason = str(error).rpartition("WeightsUnpickler error:")  # advice precedes it
        raise CheckpointError(
            f"{path} is no checkpoint of PyTorch whose tensors can be read without running code "
            f"of its own: {reason.partition('Check the documentation')[0].strip()}"
        ) from error
    state = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else loaded
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise CheckpointError(f"{path} must hold tensors by name (a state dict), and does not.")
    return state


def check_tensors(state: StateDict, expected: Shapes) -> None:
    """Check that a state dict holds the tensors expected and no others.

    Raises:
        CheckpointError: One is missing, has another shape, or is too many; it is named.
    """
    if missing := [name for name in expected if name not in state]:
        shapes = _listed([f"{name} {expected[name]}" for name in missing])
        raise CheckpointError(f"it lacks {shapes}, expected of this architecture.")
    for name, shape in expected.items():
        if (actual := tuple(state[name].shape)) != shape:
            raise CheckpointError(f"{name} has the shape {actual}, expected {shape}.")
    if extra := [name for name in state if name not in expected]:
        shapes = _listed([f"{name} {tuple(state[name].shape)}" for name in extra])
        raise CheckpointError(f"it holds {shapes}, unknown in this architecture.")


def shape_of(state: StateDict, name: str) -> tuple[int, ...]:
    """Return the shape of a tensor.

    Raises:
        CheckpointError: There is no such tensor.
    """
    if name not in state:
        raise CheckpointError(f"it lacks {name}; it holds {_listed(list(state))}.")
    return tuple(state[name].shape)


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return ", ".join(names[:MAX_NAMED]) + more
