"""A denoiser that torch.compile compiles for sampling, for one number of images at a time."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from tdc_ray.models.denoiser import Denoiser
from tdc_ray.models.labels import Labels, conditions, map_labels


class CompiledDenoiser:
    """A denoiser whose forward pass is compiled when it is first called.

    A batch that is smaller than the largest before, as the last one is, is filled up with copies
    of its last image: every other number of images would be compiled anew, for minutes.
    """

    def __init__(self, network: Denoiser, mode: str) -> None:
        """Prepare a denoiser, which itself stays as it is, for torch.compile's ``mode``."""
        self.network = network
        self._num_images = 0

        def forward(x_t: Tensor, timesteps: Tensor, named: dict[str, Any]) -> Tensor:
            return network(x_t, timestep=timesteps, **named).sample

        # What is compiled is kept by its code, at most 8 variants of each: every expert, whose
        # widths are its own, has a copy.
        forward.__code__ = forward.__code__.replace()
        self._forward = torch.compile(forward, mode=mode, dynamic=False)

    def __call__(self, x_t: Tensor, timesteps: Tensor, labels: Labels) -> Tensor:
        """Return the network's output, ``(B, C, H, W)``, for what the network takes."""
        count = len(x_t)
        self._num_images = max(self._num_images, count)
        fill = partial(_filled, missing=self._num_images - count)
        named = conditions(map_labels(fill, labels))
        output = self._forward(fill(x_t), fill(timesteps), named)
        return output[:count].clone()  # a CUDA graph's output is where its next one will be


def _filled(whole: Tensor, missing: int) -> Tensor:
    """Append copies of the last row."""
    if not missing:
        return whole
    return torch.cat([whole, whole[-1:].expand(missing, *whole.shape[1:])])
