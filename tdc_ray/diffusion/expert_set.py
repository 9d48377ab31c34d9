"""The denoisers of a pipeline, each for a range of timesteps: all in memory, or two at a time."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from diffusers import UNet2DModel
from torch import nn

from tdc_ray.errors import ConfigError
from tdc_ray.models.saved_expert import load_expert

Span = tuple[float, float]
"""First and last timestep, both included."""


class ExpertSet(nn.ModuleList):
    """Denoisers, each for a range of timesteps; together they serve every timestep."""

    def __init__(self, unets: Sequence[UNet2DModel], spans: Sequence[Span]) -> None:
        """Wrap UNets with one span each, in order."""
        super().__init__(unets)
        self.spans = tuple(spans)

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the weights."""
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    def for_timestep(self, timestep: float) -> UNet2DModel:
        """Return the expert that serves a timestep, or the nearest one to a fraction.

        Raises:
            ConfigError: None does.
        """
        return self[_index_of(self.spans, timestep)]


def load_each_once(folders: Sequence[Path]) -> list[UNet2DModel]:
    """Load the expert of every folder; one that serves several ranges is in memory once."""
    loaded = {folder: load_expert(folder) for folder in dict.fromkeys(folders)}
    return [loaded[folder] for folder in folders]


class OffloadedExperts(nn.Module):
    """The same, read from disk when their timesteps are sampled: at most two are in memory.

    While one denoises, a thread reads the next, and copies it to the GPU on a stream of its own.
    """

    def __init__(
        self, folders: Sequence[Path], spans: Sequence[Span], timestep_scale: float = 1.0
    ) -> None:
        """Remember the folder (``models.saved_expert``) and the span of each expert, in order.

        Args:
            folders: Of the experts.
            spans: First and last timestep of each.
            timestep_scale: What a timestep is multiplied with before an expert sees it.
        """
        super().__init__()
        self.spans, self._folders = tuple(spans), tuple(folders)
        self.timestep_scale = timestep_scale
        # A parameterless module has no device: .to() moves this, and the experts follow it.
        self.register_buffer("_anchor", torch.zeros(()), persistent=False)
        self._stream: torch.cuda.Stream | None = None
        self._thread = ThreadPoolExecutor(1, "next-expert")
        self._loading: dict[tuple[int, torch.device, torch.dtype], Future[UNet2DModel]] = {}

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the weights."""
        return self.get_buffer("_anchor").dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.get_buffer("_anchor").device

    def for_timestep(self, timestep: float) -> UNet2DModel:
        """Return the expert that serves a timestep, and start to read the one below it.

        Raises:
            ConfigError: None does.
            CheckpointError: It cannot be read.
        """
        index = _index_of(self.spans, timestep)
        following = (index - 1) % len(self.spans)  # after the last one comes another batch
        wanted = [(index, self.device, self.dtype), (following, self.device, self.dtype)]
        if self.device.type == "cuda" and not set(self._loading) <= set(wanted):
            # An expert is about to be freed: wait until the kernels that read it are done.
            torch.cuda.current_stream(self.device).synchronize()
        before = self._loading
        self._loading = {
            key: before.get(key) or self._thread.submit(self._read, *key) for key in wanted
        }
        return self._loading[wanted[0]].result()

    def _read(self, index: int, device: torch.device, dtype: torch.dtype) -> UNet2DModel:
        unet = load_expert(self._folders[index])
        if device.type == "cuda":
            if self._stream is None or self._stream.device != device:
                # One for all experts: the allocator reuses freed memory only within a stream.
                self._stream = torch.cuda.Stream(device)
            with torch.cuda.stream(self._stream):
                nn.Module.to(unet, device, dtype)
            self._stream.synchronize()
            return unet
        nn.Module.to(unet, dtype=dtype)
        # This reads the mapped file now, not in the first step, to aligned addresses: sums of
        # numbers at others may differ by rounding from those of experts that are in memory.
        for tensor in (*unet.parameters(), *unet.buffers()):
            tensor.data = tensor.data.clone()
        return unet


def _index_of(spans: Sequence[Span], timestep: float) -> int:
    """Return the place of the span that is nearest to a timestep; of two, the noisier one.

    Of a plan's spans that one holds ``schedule.nearest_timestep``. Fractions may also lie outside
    of all, by 1 or by a hundredth of the timesteps' range if that is less (EDM's is 3): flow
    matching counts to T, and half precision rounds to it.
    """
    edges = [edge for span in spans for edge in span]
    tolerance = 0 if isinstance(timestep, int) else min(1, (max(edges) - min(edges)) / 100)
    distance, place = min(
        (max(first - timestep, timestep - last, 0), -i) for i, (first, last) in enumerate(spans)
    )
    if not distance <= tolerance:  # NaN, too
        raise ConfigError(
            f"no expert serves timestep {timestep}: the experts' timesteps are {tuple(spans)}. "
            "Use a scheduler with the number of timesteps that the experts were trained for."
        )
    return -place
