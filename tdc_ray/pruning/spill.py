"""What is kept of noised images between two uses: in memory, or in files where it is much."""

import tempfile
import weakref
from dataclasses import replace

import torch
from torch import Tensor

from tdc_ray.models.step import State

BYTES_IN_MEMORY = 2 * 2**30
"""Most bytes in memory of what one buffer keeps."""


class SpillBuffer:
    """Keeps tensors of noised images: up to :data:`BYTES_IN_MEMORY` in memory, more in files.

    These are nameless ones below ``TMPDIR``, so that memory does not grow with the images.
    """

    def __init__(self) -> None:
        self._bytes: dict[int, int] = {}
        """Bytes in memory of tensors that are kept, by their identity; 0 for those in files."""

    def keep(self, state: State) -> State:
        """Return a state whose hidden and context, the only tensors that may be new, are kept."""
        hidden, context = self.keep_tensor(state.hidden), state.context
        if context is not None:
            context = self.keep_tensor(context)
        skips = tuple(hidden if skip is state.hidden else skip for skip in state.skips)
        return replace(state, hidden=hidden, context=context, skips=skips)

    def keep_tensor(self, tensor: Tensor) -> Tensor:
        """Return a tensor of the same values that is kept."""
        if id(tensor) in self._bytes:
            return tensor
        size = tensor.numel() * tensor.element_size()
        if sum(self._bytes.values()) + size > BYTES_IN_MEMORY:
            tensor, size = _in_file(tensor), 0
        self._bytes[id(tensor)] = size
        weakref.finalize(tensor, self._bytes.pop, id(tensor), None)
        return tensor


def _in_file(tensor: Tensor) -> Tensor:
    """Copy a tensor into a file that has no name and is freed with the tensor.

    Raises:
        OSError: The disk is full.
    """
    with tempfile.NamedTemporaryFile() as file:
        # written, not copied into the map: a full disk is then an error and no signal
        file.write(tensor.cpu().contiguous().view(torch.uint8).numpy().data)
        file.flush()
        kept = torch.from_file(file.name, shared=True, size=tensor.numel(), dtype=tensor.dtype)
    return kept.view(tensor.shape)
