"""The refit after pruning: later weights are solved for, by least squares, to compensate for it.

Block by block in forward order, the weights that read what was pruned, and the output layers of
later blocks, are solved for so that on noised images of the group's timesteps the block outputs
what the base's does. No gradient step is taken.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tdc_ray.diffusion.process import NoisedBatch, NoiseSchedule
from tdc_ray.execution.device import exact_products
from tdc_ray.models.denoiser import Denoiser
from tdc_ray.models.families import steps_of
from tdc_ray.models.step import State, Step, Stream, is_cut
from tdc_ray.pruning.noised import first_state
from tdc_ray.pruning.refit.error_weights import ErrorWeights
from tdc_ray.pruning.refit.least_squares import ActivationHook, LeastSquares, ReadLayer
from tdc_ray.pruning.spill import SpillBuffer
from tdc_ray.seeds import derive_seed

GATE_RIDGE = 0.1
"""Least squared gate of a channel, as a share of its mean over the images, that is divided by."""


@exact_products()
@torch.no_grad()
def refit(
    base: Denoiser,
    pruned: Denoiser,
    kept_outputs: Mapping[str, Tensor],
    batches: Sequence[NoisedBatch],
    schedule: NoiseSchedule,
    weights: ErrorWeights,
) -> int:
    """Solve for the weights after pruned units, in place.

    Both networks run through the images one block at a time, so every activation is computed once.
    Those between two blocks are kept meanwhile, what does not fit into memory in files
    (:class:`SpillBuffer`).

    Args:
        base: The base, in eval mode.
        pruned: The same, pruned, on the same device.
        kept_outputs: For every layer of ``pruned`` whose outputs were pruned, those that are kept.
        batches: Noised images of the group's timesteps.
        schedule: The noise schedule, on the device of the networks.
        weights: How much every image counts in every step.

    Returns:
        Macs of the statistics, without forward passes.
    """
    macs = 0
    pruned.eval()
    kept_of = {pruned.get_submodule(name): index for name, index in kept_outputs.items()}
    buffer, device = SpillBuffer(), base.device
    base_states = [buffer.keep(first_state(base, batch, schedule)) for batch in batches]
    pruned_states, cut_before = base_states, False
    for base_step, step in zip(steps_of(base), steps_of(pruned), strict=True):
        base_after = [buffer.keep(_after(base_step, state, device)) for state in base_states]
        streams = {name: stream for stream, name in step.output_layers.items()}
        for name in _to_solve(base_step, step, cut_before=cut_before):
            layer = step.module.get_submodule(name)
            assert isinstance(layer, ReadLayer)
            stream = streams.get(name, next(iter(step.output_layers)))
            macs += _solve(
                layer,
                name,
                base_step,
                step,
                stream,
                base_states,
                pruned_states,
                base_after if name in streams else None,
                kept_of.get(layer),
                weights.images[step.key(stream)],
            )
        cut_before = cut_before or is_cut(base_step, step)
        pruned_states = (
            [buffer.keep(_after(step, state, device)) for state in pruned_states]
            if cut_before
            else base_after
        )
        base_states = base_after
    return macs


def _on(state: State, device: torch.device) -> State:
    """Copy a state to a device."""
    skips = tuple(skip.to(device) for skip in state.skips)
    context = None if state.context is None else state.context.to(device)
    return replace(state, hidden=state.hidden.to(device), context=context, skips=skips)


def _after(step: Step, state: State, device: torch.device) -> State:
    """Run a step; what it passes on stays where it is kept."""
    copied = _on(state, device)
    after = step(copied)
    copies = (copied.hidden, copied.context, *copied.skips)
    originals = (state.hidden, state.context, *state.skips)
    kept: dict[int, Any] = dict(zip(map(id, copies), originals, strict=True))

    def original(tensor: Any) -> Any:
        return kept.get(id(tensor), tensor)

    return replace(
        after,
        hidden=original(after.hidden),
        context=original(after.context),
        skips=tuple(map(original, after.skips)),
    )


def _solve(
    layer: ReadLayer,
    name: str,
    base_step: Step,
    step: Step,
    stream: Stream,
    base_states: Sequence[State],
    pruned_states: Sequence[State],
    base_after: Sequence[State] | None,
    kept: Tensor | None,
    weights: Sequence[Tensor],
) -> int:
    """Solve for one layer's weights; return the macs of the statistics.

    Args:
        layer: The layer of the pruned network.
        name: Its name within the step.
        base_step: The step of the base.
        step: That of the pruned network.
        stream: What an output layer adds to.
        base_states: Input of the base's step.
        pruned_states: Input of the pruned one.
        base_after: Output of the base's step, where the layer is the step's output layer: the
            step's output is fitted then, so that its other errors are compensated too. None means
            that the layer's own output is. A gated layer's own output is, and errors of the
            step's input are compensated.
        kept: Which of the base's outputs the layer has; None means all.
        weights: Weight of every image of each batch.
    """
    num_images, device = sum(len(state.hidden) for state in base_states), layer.weight.device
    is_linear, squares = isinstance(layer, nn.Linear), None
    for index, state in enumerate(pruned_states):
        with ActivationHook(layer) as hook:
            output = getattr(step(_on(state, device)), stream)
        gate = None if base_after is None else step.gate(state, stream)
        if base_after is None or gate is not None:
            with ActivationHook(base_step.module.get_submodule(name)) as base_hook:
                base_step(_on(base_states[index], device))
            target = _select(base_hook.output, kept, dim=2 if is_linear else 1)
            if gate is not None:
                of_base, of_pruned = (getattr(s, stream) for s in (base_states[index], state))
                before = of_base.to(device) - of_pruned.to(device)
                target = target + _ungated(step.in_layer(before, stream), gate)
        else:
            base_output = _select(getattr(base_after[index], stream).to(device), kept, dim=1)
            target = hook.output + step.in_layer(base_output - output, stream)
        if squares is None:
            num_rows = num_images * (target[0].numel() // len(layer.weight))
            squares = LeastSquares(layer, num_rows=num_rows, seed=derive_seed(step.name, name))
        squares.add(hook.input, target, weights[index])
    assert squares is not None
    weight, bias = squares.solve()
    layer.weight.copy_(weight)
    if layer.bias is not None and bias is not None:
        layer.bias.copy_(bias)
    return squares.macs


def _ungated(missing: Tensor, gate: Tensor) -> Tensor:
    """Return what added to a gated layer's output makes up for an error behind the gate.

    Where an image's gate nearly shuts a channel, which is open for other images, it is less.

    Args:
        missing: The error, ``(B, N, C)`` or ``(B, C, H, W)``.
        gate: ``(B, C)``
    """
    square = gate.square()
    floor = (GATE_RIDGE * square.mean(0)).clamp(min=torch.finfo(gate.dtype).tiny)
    factor = gate / (square + floor)
    return missing * (factor[:, None] if missing.ndim == 3 else factor[:, :, None, None])


def _to_solve(base: Step, step: Step, *, cut_before: bool) -> list[str]:
    """Return a step's layers that read what was pruned, by name, its output layers last."""
    whole, last = _layers(base.module), [*step.output_layers.values()]
    shrunk = [
        name
        for name, layer in _layers(step.module).items()
        if layer.weight.shape[1] < whole[name].weight.shape[1]
    ]
    outputs = [name for name in last if cut_before or name in shrunk]
    return [name for name in shrunk if name not in last] + outputs


def _layers(module: nn.Module) -> dict[str, ReadLayer]:
    return {name: m for name, m in module.named_modules() if isinstance(m, ReadLayer)}


def _select(values: Tensor, kept: Tensor | None, *, dim: int) -> Tensor:
    return values if kept is None else values.index_select(dim, kept.to(values.device))
