"""AdamW's moments of a base's training as those that the training of its sub-model begins with."""

import copy
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from tdc_ray.diffusion.train import TrainState, reading_checkpoint
from tdc_ray.models.denoiser import Denoiser
from tdc_ray.storage.files import fetch

MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's names of the averages of the gradients and of their squares."""


def adopt_moments(
    state: TrainState, path: Path, base: Denoiser, cut: Callable[[Denoiser], Denoiser]
) -> None:
    """Copy moments and counts of steps of a base's optimizer into that of its sub-model.

    Those of a weight that was cut are left out, others are the base's, bit for bit.

    Args:
        state: The training of the sub-model, before its first step.
        path: The last checkpoint of the base's training.
        base: The base, with the averaged weights of that checkpoint.
        cut: Makes a narrower copy of a network like the base, as the sub-model was made.

    Raises:
        CheckpointError: The checkpoint cannot be read, or is of another base.
    """
    names, parameters = zip(*base.named_parameters(), strict=True)
    with reading_checkpoint(path):
        saved = torch.load(fetch(path), map_location="cpu", weights_only=True)
        averaged, moments = saved["ema"]["shadow_params"], saved["optimizer"]["state"]
        for parameter, value in zip(parameters, averaged, strict=True):
            if not torch.equal(parameter.detach().cpu(), value):
                raise ValueError("its averaged weights are not the base's.")
        if len(moments) != len(parameters):
            raise ValueError(f"it has moments of {len(moments)} of {len(parameters)} parameters.")
        by_parameter = [moments[number] for number in range(len(parameters))]
        steps = {name: one["step"] for name, one in zip(names, by_parameter, strict=True)}
        cuts = {
            moment: _cut_values([one[moment] for one in by_parameter], base, cut)
            for moment in MOMENTS
        }
    for name, parameter in state.unet.named_parameters():  # fewer where branches were removed
        state.optimizer.state[parameter] = {
            "step": steps[name].to(parameter.device, copy=True),
            # in the parameter's layout, which fused kernels count on
            **{
                moment: torch.empty_like(parameter, requires_grad=False).copy_(values[name])
                for moment, values in cuts.items()
            },
        }


def _cut_values(
    values: Sequence[Tensor], base: Denoiser, cut: Callable[[Denoiser], Denoiser]
) -> dict[str, Tensor]:
    """Cut tensors that are shaped like a base's parameters, in their order; they go by name."""
    holder = copy.deepcopy(base)
    with torch.no_grad():
        for parameter, value in zip(holder.parameters(), values, strict=True):
            parameter.copy_(value)
    return {name: parameter.detach() for name, parameter in cut(holder).named_parameters()}
