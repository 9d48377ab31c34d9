"""The denoisers of a pipeline, each for a run of timesteps: all in memory, or two at a time."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DModel
from torch import nn

from tdc_ray.errors import ConfigError
from tdc_ray.models.saved_expert import load_expert

Span = tuple[int, int]
"""First and last timestep, both included."""


class ExpertSet(nn.ModuleList):
    """Denoisers, each for a run of timesteps; together they serve every timestep."""

    def __init__(self, unets: Sequence[UNet2DModel], spans: Sequence[Span]) -> None:
        """Take one span per UNet, in order."""
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

    @property
    def num_class_embeds(self) -> int | None:
        """Classes that each expert embeds; None: they are unconditional."""
        return _num_class_embeds(self[0])

    def for_timestep(self, timestep: int) -> nn.Module:
        """Give the expert that serves a timestep.

        Raises:
            ConfigError: None does.
        """
        unet: nn.Module = self[_place(self.spans, timestep)]
        return unet


class OffloadedExperts(nn.Module):
    """The same, read from disk when their timesteps come: at most two are in memory.

    While one denoises, a thread reads the next, and copies it to the GPU on a stream of its own.
    """

    def __init__(self, folders: Sequence[Path], spans: Sequence[Span]) -> None:
        """Take a folder of ``models.experts`` and a span per expert, in order."""
        super().__init__()
        self.spans, self._folders = tuple(spans), tuple(folders)
        self.register_buffer("_anchor", torch.zeros(()), persistent=False)  # which .to() moves
        self._stream: torch.cuda.Stream | None = None
        self._thread = ThreadPoolExecutor(1, "next-expert")
        self._asked: dict[tuple[int, torch.device, torch.dtype], Future[UNet2DModel]] = {}

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the weights."""
        return self.get_buffer("_anchor").dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.get_buffer("_anchor").device

    @property
    def num_class_embeds(self) -> int | None:
        """Classes that each expert embeds; None: they are unconditional."""
        return _num_class_embeds(self.for_timestep(self.spans[-1][1]))

    def for_timestep(self, timestep: int) -> nn.Module:
        """Give the expert that serves a timestep, and have the one of the timesteps below read.

        Raises:
            ConfigError: None does.
            CheckpointError: It cannot be read.
        """
        place = _place(self.spans, timestep)
        following = (place - 1) % len(self.spans)  # after the last one comes another batch
        wanted = [(place, self.device, self.dtype), (following, self.device, self.dtype)]
        if self.device.type == "cuda" and not set(self._asked) <= set(wanted):
            torch.cuda.current_stream(self.device).synchronize()  # what goes is in use no more
        found = self._asked
        self._asked = {
            key: found.get(key) or self._thread.submit(self._read, *key) for key in wanted
        }
        unet: nn.Module = self._asked[wanted[0]].result()
        return unet

    def _read(self, place: int, device: torch.device, dtype: torch.dtype) -> UNet2DModel:
        unet = load_expert(self._folders[place])
        if device.type == "cuda":
            if self._stream is None or self._stream.device != device:
                self._stream = torch.cuda.Stream(device)  # memory is reused within a stream
            with torch.cuda.stream(self._stream):
                nn.Module.to(unet, device, dtype)
            self._stream.synchronize()
            return unet
        nn.Module.to(unet, dtype=dtype)
        for parameter in unet.parameters():
            parameter.sum()  # brings its pages in
        return unet


def _place(spans: Sequence[Span], timestep: int) -> int:
    for place, (first, last) in enumerate(spans):
        if first <= timestep <= last:
            return place
    raise ConfigError(
        f"no expert serves timestep {timestep}: the experts' timesteps are {tuple(spans)}. "
        "Use a scheduler with the number of timesteps that the experts were trained for."
    )


def _num_class_embeds(unet: Any) -> int | None:
    embeds: int | None = unet.config["num_class_embeds"]
    return embeds
