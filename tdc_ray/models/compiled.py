"""A denoiser that torch.compile compiles for sampling, for one number of images at a time."""

from collections.abc import Mapping

import torch
from torch import Tensor

from tdc_ray.models.denoiser import Denoiser


class CompiledDenoiser:
    """A denoiser whose forward pass is compiled when it is first called.

    A batch that is smaller than the largest before, as the last one is, is filled up with copies
    of its last image: every other number of images would be compiled anew, for minutes.
    """

    def __init__(self, network: Denoiser, mode: str) -> None:
        """Prepare a denoiser, which itself stays as it is, for torch.compile's ``mode``."""
        self.network = network
        self._num_images = 0

        def forward(x_t: Tensor, timesteps: Tensor, conditions: Mapping[str, Tensor]) -> Tensor:
            return network(x_t, timesteps, **conditions).sample

        # What is compiled is kept by its code, at most 8 variants of each: every expert, whose
        # widths are its own, has a copy.
        forward.__code__ = forward.__code__.replace()
        self._forward = torch.compile(forward, mode=mode, dynamic=False)

    def __call__(self, x_t: Tensor, timesteps: Tensor, conditions: Mapping[str, Tensor]) -> Tensor:
        """Return the network's output, ``(B, C, H, W)``, for what the network takes."""
        count = len(x_t)
        self._num_images = max(self._num_images, count)
        missing = self._num_images - count
        filled = {name: _filled(whole, missing) for name, whole in conditions.items()}
        output = self._forward(_filled(x_t, missing), _filled(timesteps, missing), filled)
        return output[:count].clone()  # a CUDA graph's output is where its next one will be


def _filled(whole: Tensor, missing: int) -> Tensor:
    """Append copies of the last row."""
    if not missing:
        return whole
    return torch.cat([whole, whole[-1:].expand(missing, *whole.shape[1:])])
