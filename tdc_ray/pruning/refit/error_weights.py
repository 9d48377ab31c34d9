"""How much an error in a block's output changes the network's: weights of images and channels."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tdc_ray.diffusion.process import NoisedBatch, NoiseSchedule
from tdc_ray.models.denoiser import Denoiser
from tdc_ray.models.families import steps_of
from tdc_ray.models.forward import max_batch_size
from tdc_ray.models.step import Step, Stream
from tdc_ray.pruning.noised import first_state
from tdc_ray.seeds import derive_seed
from tdc_ray.storage.files import atomic_path, fetch

CHANNELS = "|channels"
"""Follows a step's name in the key of its channels' products in a file."""


@dataclass(frozen=True, slots=True)
class ErrorWeights:
    """How much an error in an output of a step, before its gate, changes the network's.

    Outputs go by their keys (:meth:`Step.key`).
    """

    images: Mapping[str, Sequence[Tensor]]
    """For every output a tensor ``(B,)`` for each batch; their mean over all is 1."""

    channels: Mapping[str, Tensor]
    """For outputs of steps with inner units ``(M, M)``: how much errors in two channels do
    together, the sum over images and positions, up to a factor that all share."""


@torch.no_grad()
def error_weights(
    base: Denoiser,
    batches: Sequence[NoisedBatch],
    schedule: NoiseSchedule,
    units: Collection[str] = (),
) -> ErrorWeights:
    """Estimate how much a small error in a step's output changes the network's.

    For every image the squared norm of the network's Jacobian, estimated with one random direction
    (Hutchinson): noisy for one value, but summed over all of a step's. At timesteps whose noise is
    easy to predict errors matter less, and the loss hardly depends on them. For every two channels
    the mean product of the same gradients: the output's factor in K-FAC (arXiv:1503.05671).

    Args:
        base: The base, in eval mode.
        batches: Noised images of the group's timesteps.
        schedule: The noise schedule, on the device of the base.
        units: Names of the steps whose channels are wanted, too.
    """
    generator = torch.Generator().manual_seed(derive_seed("error weights"))
    weights: dict[str, list[Tensor]] = {}
    channels: dict[str, Tensor] = {}
    all_steps, size = steps_of(base), max_batch_size(base, gradients=True)
    for batch in batches:
        shape = (len(batch.x_0), base.config["out_channels"], *batch.x_0.shape[2:])
        directions = torch.randn(shape, generator=generator).to(base.device).split(size)
        norms: dict[str, list[Tensor]] = {}
        for part, direction in zip(batch.split(size), directions, strict=True):
            with torch.enable_grad():
                state = first_state(base, part, schedule)
                outputs: list[tuple[Step, Stream, Tensor]] = []
                for step in all_steps:
                    state = step(state)
                    outputs += [(step, s, getattr(state, s)) for s in step.output_layers]
                values = [value for *_, value in outputs]
                gradients = torch.autograd.grad(
                    (state.hidden * direction).sum(),
                    values,
                    allow_unused=True,  # a caption's stream after the last joint attention left
                    materialize_grads=True,
                )
            for (step, stream, _), of_output in zip(outputs, gradients, strict=True):
                key, gate = step.key(stream), step.gate(state, stream)
                gradient = of_output if stream == "hidden" else of_output.transpose(1, 2)
                gradient = gradient.flatten(2)  # (B, M, positions)
                if gate is not None:
                    gradient = gradient * gate[:, :, None]
                norms.setdefault(key, []).append(gradient.flatten(1).square().mean(1))
                if step.name in units:
                    of_channels = gradient.movedim(1, 0).flatten(1)  # (M, images * positions)
                    products = of_channels @ of_channels.T
                    channels[key] = channels.get(key, 0.0) + products
        for name, parts in norms.items():
            weights.setdefault(name, []).append(torch.cat(parts))
    for of_step in weights.values():
        mean = torch.cat(of_step).mean()
        of_step[:] = [norms / mean if mean > 0 else torch.ones_like(norms) for norms in of_step]
    return ErrorWeights(weights, channels)


def save_weights(path: Path, weights: ErrorWeights) -> None:
    """Save weights to a file, which appears when it is whole."""
    tensors = {name: torch.cat(list(parts)).contiguous() for name, parts in weights.images.items()}
    tensors |= {f"{name}{CHANNELS}": products for name, products in weights.channels.items()}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary)


def load_weights(path: Path, batches: Sequence[NoisedBatch], device: torch.device) -> ErrorWeights:
    """Load what :func:`save_weights` wrote, for the same images or the first of them."""
    sizes = [len(batch.x_0) for batch in batches]
    tensors = load_file(fetch(path), device=str(device))
    channels = {name for name in tensors if name.endswith(CHANNELS)}
    return ErrorWeights(
        {name: tensors[name][: sum(sizes)].split(sizes) for name in tensors.keys() - channels},
        {name.removesuffix(CHANNELS): tensors[name] for name in channels},
    )
