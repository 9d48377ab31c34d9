"""How much an error in a block's output changes the network's: weights of the refit's images."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from diffusers import UNet2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from tdc_ray.diffusion import NoiseSchedule
from tdc_ray.models.steps import steps
from tdc_ray.prune.noised import NoisedBatch
from tdc_ray.seeds import derive_seed
from tdc_ray.storage import atomic_path, fetch

ErrorWeights = Mapping[str, Sequence[Tensor]]
"""For every step of the network a tensor ``(B,)`` for each batch; their mean over all is 1."""


@torch.no_grad()
def error_weights(
    base: UNet2DModel, batches: Sequence[NoisedBatch], schedule: NoiseSchedule
) -> ErrorWeights:
    """Tell how much a small error in a step's output changes the network's, for every image.

    The squared norm of the network's Jacobian, estimated with one random direction (Hutchinson):
    noisy for one value, but summed over all of a step's. At timesteps whose noise is easy to
    predict errors matter less, and the loss hardly heeds them.

    Args:
        base: The base, in eval mode.
        batches: Noised images of the group's timesteps.
        schedule: The noise schedule, on the device of the base.
    """
    generator = torch.Generator().manual_seed(derive_seed("error weights"))
    found: dict[str, list[Tensor]] = {}
    all_steps = steps(base)
    for batch in batches:
        with torch.enable_grad():
            state, hidden = batch.start(base, schedule), []
            for step in all_steps:
                state = step(state)
                hidden.append(state.hidden)
            direction = torch.randn(state.hidden.shape, generator=generator)
            total = (state.hidden * direction.to(state.hidden.device)).sum()
            gradients = torch.autograd.grad(total, hidden)
        for step, gradient in zip(all_steps, gradients, strict=True):
            found.setdefault(step.name, []).append(gradient.flatten(1).square().mean(1))
    for parts in found.values():
        mean = torch.cat(parts).mean()
        parts[:] = [part / mean if mean > 0 else torch.ones_like(part) for part in parts]
    return found


def save_weights(path: Path, weights: ErrorWeights) -> None:
    """Keep weights in a file; it appears when it is whole."""
    tensors = {name: torch.cat(list(parts)).contiguous() for name, parts in weights.items()}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary)


def load_weights(path: Path, batches: Sequence[NoisedBatch], device: torch.device) -> ErrorWeights:
    """Read what :func:`save_weights` kept, for the same batches."""
    sizes = [len(batch.x_0) for batch in batches]
    found = load_file(fetch(path), device=str(device))
    return {name: weights.split(sizes) for name, weights in found.items()}
