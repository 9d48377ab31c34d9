"""State dicts of other projects' checkpoints: loaded without unpickling objects, and checked."""

import logging
import pickle
import re
import struct
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


class _LeftOut:
    """Replaces whatever a checkpoint names beside tensors; it takes any arguments and state.

    PyTorch's restricted unpickler creates it in place of the file's own classes and functions:
    none of them is looked up, let alone called. Made without arguments it is an empty dict, which
    the unpickler fills, as it does subclasses of dict.
    """

    def __new__(cls, *args: Any, **_kwargs: Any) -> Any:
        if args:
            return super().__new__(cls)  # can be a key, as numbers, enums and paths are
        empty: Counter[Any] = Counter()
        empty.__setstate__ = _ignore  # type: ignore[attr-defined]
        return empty

    def __setstate__(self, state: object) -> None:
        """Ignore it."""


def _ignore(_state: object) -> None:
    """Ignore the state of an object that is left out."""


_CONTAINERS = {
    "collections.defaultdict": lambda *_args: Counter[Any](),
    "collections.deque": lambda *_args: list[Any](),
}
"""Containers that are made with arguments and filled afterwards."""

UNREADABLE = (
    pickle.UnpicklingError,
    struct.error,
    zipfile.BadZipFile,
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""Errors of PyTorch's restricted unpickler."""


def load_state_dict(path: Path) -> StateDict:
    """Load a checkpoint's tensors on the CPU; they stay on the disk until they are used.

    Of a file with tensors under ``state_dict`` (Lightning's, such as CompVis's) that part is
    loaded; objects beside it are left out without being unpickled.

    Raises:
        CheckpointError: There is no such file, or it holds no tensors by name.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist.")
    objects: list[str] = []
    try:
        mapped = zipfile.is_zipfile(path)
        objects = sorted(get_unsafe_globals_in_checkpoint(path)) if mapped else []
        if objects:
            logger.info("%s: left out what is no tensor (%s)", path, ", ".join(objects))
        with safe_globals([(_CONTAINERS.get(name, _LeftOut), name) for name in objects]):
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except UNREADABLE as error:
        _, _, reason = str(error).rpartition("WeightsUnpickler error:")  # advice precedes it
        raise CheckpointError(
            f"{path} is no checkpoint of PyTorch whose tensors can be read without running code "
            f"of its own{_named(objects)}: "
            f"{re.split(_ADVICE, reason)[0].strip().rstrip('.')}. {_WAY_OUT}"
        ) from error
    state = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else loaded
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise CheckpointError(
            f"{path} must hold tensors by name (a state dict), and {_content(state)}. {_WAY_OUT}"
        )
    for name, tensor in state.items():
        is_plain = tensor.layout == torch.strided and not (tensor.is_meta or tensor.is_quantized)
        if not is_plain or tensor.is_complex() or not isinstance(name, str):
            raise CheckpointError(
                f"{path} must hold plain tensors of real numbers by name, and {name} is a "
                f"{tensor.layout} {tensor.dtype} on {tensor.device}. {_WAY_OUT}"
            )
    return state


_ADVICE = "Check the documentation|Please use"
"""Where PyTorch's own advice begins, which is to load the objects, too."""

_WAY_OUT = (
    "Where you trust the file, write its weights alone by torch.save(torch.load(FILE, "
    "weights_only=False)[NAME OF THE WEIGHTS], OTHER, pickle_protocol=2), and give that file."
)


def _named(objects: list[str]) -> str:
    return f", having {listed(objects)} in it" if objects else ""


def _content(loaded: object) -> str:
    """Describe what is in a checkpoint in place of tensors by name."""
    if not isinstance(loaded, dict):
        return f"holds a {type(loaded).__name__}"
    states = [
        str(name)
        for name, value in loaded.items()
        if isinstance(value, dict) and any(isinstance(v, Tensor) for v in value.values())
    ]
    if states:
        return f"has such under {listed(states)}"
    other = next(name for name, value in loaded.items() if not isinstance(value, Tensor))
    return f"holds something else as {other}"


def check_tensors(state: StateDict, expected: Shapes) -> None:
    """Check that a state dict holds the tensors expected and no others.

    Raises:
        CheckpointError: One is missing, has another shape or no floats, or is too many.
    """
    if missing := [name for name in expected if name not in state]:
        shapes = listed([f"{name} {expected[name]}" for name in missing])
        raise CheckpointError(f"it lacks {shapes}, expected of this architecture.")
    for name, shape in expected.items():
        if (actual := tuple(state[name].shape)) != shape:
            raise CheckpointError(f"{name} has the shape {actual}, expected {shape}.")
        if shape and not state[name].is_floating_point():  # counters have no dimensions
            raise CheckpointError(f"{name} is {state[name].dtype}, expected floats.")
    if extra := [name for name in state if name not in expected]:
        shapes = listed([f"{name} {tuple(state[name].shape)}" for name in extra])
        raise CheckpointError(f"it holds {shapes}, unknown in this architecture.")


def shape_of(state: StateDict, name: str, dims: int) -> tuple[int, ...]:
    """Return the shape of a tensor of so many dimensions.

    Raises:
        CheckpointError: There is no such tensor.
    """
    if name not in state:
        raise CheckpointError(f"it lacks {name}; it holds {listed(list(state))}.")
    shape = tuple(state[name].shape)
    if len(shape) != dims:
        raise CheckpointError(f"{name} has the shape {shape}, expected {dims} dimensions.")
    return shape


def listed(names: list[str]) -> str:
    """Return the first of some names, and how many more there are."""
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return ", ".join(names[:MAX_NAMED]) + more or "nothing"
