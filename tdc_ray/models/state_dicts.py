"""State dicts of other projects' checkpoints: loaded without unpickling objects, and checked."""

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint

from tdc_ray.errors import CheckpointError

StateDict = Mapping[str, Tensor]

Shapes = Mapping[str, tuple[int, ...]]
"""Of tensors, by name."""

_NAMED = 3
"""Most tensors that one error names."""

_SAVE_TENSORS = (
    "import torch, collections, torch.serialization as s; f = '{path}'; "
    "empty = type('', (), {{'__new__': lambda *_: collections.Counter()}}); "
    "s.add_safe_globals([(empty, g) for g in s.get_unsafe_globals_in_checkpoint(f)]); "
    "torch.save({{'state_dict': torch.load(f, 'cpu', weights_only=True)['state_dict']}}, "
    "'weights.ckpt')"
)
"""Puts an empty counter in the place of every object: PyTorch then fills in what belongs to it."""


def load_state_dict(path: Path) -> StateDict:
    """Load a checkpoint's tensors on the CPU; they stay on the disk until they are used.

    A file that holds more than tensors under ``state_dict`` (Lightning's) gives that part.

    Raises:
        CheckpointError: There is no such file, it holds objects that only unpickling could load,
            or it holds no tensors by name.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist.")
    try:
        mapped = zipfile.is_zipfile(path)
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        objects = get_unsafe_globals_in_checkpoint(path) if mapped else []
        if not objects:
            raise CheckpointError(f"{path} is no checkpoint of PyTorch: {error}") from error
        raise CheckpointError(
            f"{path} holds objects beside its tensors ({', '.join(sorted(objects))}), as "
            "Lightning's checkpoints do. Loading those can run any code, so it is not done. Save "
            "its tensors alone, which needs none of these packages and runs none of their code: "
            f'python -c "{_SAVE_TENSORS.format(path=path)}", and name weights.ckpt in its place.'
        ) from error
    except (RuntimeError, ValueError, EOFError, OSError) as error:
        raise CheckpointError(f"{path} is no checkpoint of PyTorch: {error}") from error
    state = found.get("state_dict", found) if isinstance(found, dict) else found
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise CheckpointError(f"{path} must hold tensors by name (a state dict), and does not.")
    return state


def check_tensors(state: StateDict, expected: Shapes) -> None:
    """Make sure that a state dict holds the tensors expected and no others.

    Raises:
        CheckpointError: One is missing, has another shape, or is too many; it is named.
    """
    if missing := [name for name in expected if name not in state]:
        wanted = [f"{name} {expected[name]}" for name in missing]
        raise CheckpointError(f"it lacks {_listed(wanted)}, expected of this architecture.")
    for name, shape in expected.items():
        if tuple(state[name].shape) != shape:
            found = tuple(state[name].shape)
            raise CheckpointError(f"{name} has the shape {found}, expected {shape}.")
    if extra := [name for name in state if name not in expected]:
        found_too = [f"{name} {tuple(state[name].shape)}" for name in extra]
        raise CheckpointError(f"it holds {_listed(found_too)}, unknown in this architecture.")


def shape_of(state: StateDict, name: str) -> tuple[int, ...]:
    """Give the shape of a tensor.

    Raises:
        CheckpointError: There is no such tensor.
    """
    if name not in state:
        raise CheckpointError(f"it lacks {name}; it holds {_listed(list(state))}.")
    return tuple(state[name].shape)


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
