"""The increase of the loss with cuts to second order, from a few backward passes.

Cutting units, the layers that read them solved anew, changes the weights of these layers by
``dW``. By Gauss and Newton the loss of an image, a mean of squares over ``D`` values, then
increases by::

    |J dW|^2 / D = E_v (sum over units of <dW_unit, d(v . output) / dW_unit>)^2 / D

``J`` being the output's Jacobian and ``v`` a standard normal probe (Hutchinson, 1990). No gradient
of weights is formed: it is ``sum(gradient of the layer's output * layer with dW(its input))``, so
that every probe takes a backward pass to activations alone and serves all units and widths. The
products of these numbers predict the increase of any joint scheme, what cuts do to each other
included.

The term of first order, ``<dW, dL / dW>``, is left out: its estimate is noise where training has
converged, and schemes chosen without it had lower losses on fresh noise (digits base, 0.7 F).
What is predicted is that of the layers solved one by one; a refit, in which later layers make up
for earlier cuts too, leaves less, and other interactions between units.
"""

from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import Tensor

from tdc_ray.diffusion.process import NoisedBatch, NoiseSchedule
from tdc_ray.execution.device import exact_products
from tdc_ray.models.denoiser import Denoiser
from tdc_ray.models.families import steps_of
from tdc_ray.models.forward import max_batch_size, swapped_weights
from tdc_ray.models.step import run
from tdc_ray.pruning.noised import first_state
from tdc_ray.pruning.quadratic_model import QuadraticModel
from tdc_ray.pruning.refit.least_squares import ActivationHook, ReadLayer
from tdc_ray.pruning.sensitivity import Solutions, Weights, reader_layers
from tdc_ray.seeds import derive_seed


@exact_products()
def quadratic_model(
    base: Denoiser,
    solutions: Solutions,
    batches: Sequence[NoisedBatch],
    schedule: NoiseSchedule,
    num_probes: int,
) -> QuadraticModel:
    """Model the increase of the loss with some cuts and all that lie between them.

    Args:
        base: The base, in eval mode; its weights are changed and put back.
        solutions: The cuts: for every unit and width the weights behind it.
        batches: Noised images of the group's timesteps.
        schedule: The noise schedule, on the device of the base.
        num_probes: Directions of each image.
    """
    generator = torch.Generator().manual_seed(derive_seed("probes"))
    directions = [
        torch.randn(num_probes, *batch.x_0.shape, generator=generator) for batch in batches
    ]
    responses = cut_responses(base, solutions, batches, schedule, directions)
    products = responses.T @ responses / len(responses)
    levels = {name: tuple(by_width) for name, by_width in solutions.items()}
    return QuadraticModel(levels, tuple(tuple(row) for row in products.tolist()))


def cut_responses(
    base: Denoiser,
    solutions: Solutions,
    batches: Sequence[NoisedBatch],
    schedule: NoiseSchedule,
    directions: Sequence[Tensor],
) -> Tensor:
    """Compute how much each cut alone moves the prediction along directions.

    Args:
        base: The base, in eval mode; its weights are changed and put back.
        solutions: The cuts: for every unit and width the weights behind it.
        batches: Noised images of the group's timesteps.
        schedule: The noise schedule, on the device of the base.
        directions: Some for every image of every batch, ``(P, B, C, H, W)``.

    Returns:
        ``(P * images, cuts)``, float64, batch by batch. Where directions are standard normal the
        mean square of a cut's column is that of the prediction's change, the loss's increase.
    """
    layers, size = reader_layers(steps_of(base)), max_batch_size(base, gradients=True)
    changes = [
        [
            _changes(layer, of_layer)
            for layer, *of_layer in zip(layers[name].values(), *cuts.values(), strict=True)
        ]
        for name, cuts in solutions.items()
        if cuts
    ]
    rows = []
    for batch, all_along in zip(batches, directions, strict=True):
        parts = zip(batch.split(size), all_along.to(base.device).split(size, 1), strict=True)
        rows += [_responses(base, changes, part, schedule, along) for part, along in parts]
    return torch.cat(rows).div(batches[0].x_0[0].numel() ** 0.5)


def _changes(layer: ReadLayer, cuts: Sequence[Weights]) -> tuple[ReadLayer, Weights]:
    """Return a layer with what its cuts add to its weights, one below the other."""
    weights = torch.cat([weight - layer.weight.detach() for weight, _ in cuts])
    if layer.bias is None:
        return layer, (weights, None)
    before = layer.bias.detach()
    return layer, (weights, torch.cat([bias - before for _, bias in cuts if bias is not None]))


def _responses(
    base: Denoiser,
    changes: Sequence[Sequence[tuple[ReadLayer, Weights]]],
    batch: NoisedBatch,
    schedule: NoiseSchedule,
    directions: Tensor,
) -> Tensor:
    """Return those of a batch along directions ``(P, B, C, H, W)``: ``(P * B, cuts)``.

    ``changes`` are, for every unit, those of each layer that reads it.
    """
    readers = [reader for of_unit in changes for reader in of_unit]
    with ExitStack() as stack, torch.enable_grad():
        hooks = [stack.enter_context(ActivationHook(layer)) for layer, _ in readers]
        output = run(steps_of(base), first_state(base, batch, schedule)).hidden
        predicted = output[:, : batch.x_0.shape[1]]  # without the variances, where it has them
        along = [(predicted * direction).sum() for direction in directions]
    outputs, columns = [hook.output for hook in hooks], []
    by_probe = [torch.autograd.grad(one, outputs, retain_graph=True) for one in along]
    gradients = zip(*by_probe, strict=True)
    for hook, (layer, weights), of_probes in zip(hooks, readers, gradients, strict=True):
        with swapped_weights(layer, *weights), torch.no_grad():
            changed = layer(hook.input)  # (B, cuts * M, H, W), or (B, N, cuts * M)
        axis = 1 if changed.ndim == 4 else 2
        by_cut = changed.unflatten(axis, (-1, len(layer.weight))).movedim(axis, 1).flatten(2)
        gradient = torch.stack(of_probes).flatten(2)
        columns.append(torch.einsum("bcv,pbv->pbc", by_cut, gradient).flatten(0, 1))
    of_readers = iter(columns)
    by_unit = [torch.stack([next(of_readers) for _ in of_unit]).sum(0) for of_unit in changes]
    return torch.cat(by_unit, dim=1).double()
