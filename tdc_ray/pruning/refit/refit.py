"""The refit after a cut: what lies behind it learns, by least squares, to make up for it.

Block by block in forward order, the weights that read what was cut, and those that close the
blocks behind it, are solved for so that on noised images of the group's timesteps the block gives
out what the base's does. No gradient step is taken.
"""

import tempfile
import weakref
from collections.abc import Mapping, Sequence

import torch
from diffusers import UNet2DModel
from torch import Tensor, nn

from tdc_ray.diffusion.process import NoisedBatch, NoiseSchedule
from tdc_ray.execution.device import exact_products
from tdc_ray.models.step import State, Step, is_cut
from tdc_ray.models.unet2d.steps import steps
from tdc_ray.pruning.noised import first_state
from tdc_ray.pruning.refit.error_weights import ErrorWeights
from tdc_ray.pruning.refit.least_squares import ActivationHook, LeastSquares, ReadLayer
from tdc_ray.seeds import derive_seed

BYTES_IN_MEMORY = 2 * 2**30
"""Of the images' activations between two blocks."""


@exact_products()
@torch.no_grad()
def refit(
    base: UNet2DModel,
    pruned: UNet2DModel,
    kept_outputs: Mapping[str, Tensor],
    batches: Sequence[NoisedBatch],
    schedule: NoiseSchedule,
    weights: ErrorWeights,
) -> int:
    """Solve for the weights behind the cuts, in place.

    Both networks run through the images one block at a time, so every activation is computed once.
    Those between two blocks are kept meanwhile: up to :data:`BYTES_IN_MEMORY` where they are, more
    in nameless files below ``TMPDIR``, so that memory does not grow with the images.

    Args:
        base: The uncut UNet, in eval mode.
        pruned: The same, cut, on the same device.
        kept_outputs: For every layer of ``pruned`` whose outputs were cut, which are kept.
        batches: Noised images of the group's timesteps.
        schedule: The noise schedule, on the device of the networks.
        weights: How much every image counts in every step.

    Returns:
        Macs that the statistics took, forward passes not counted.
    """
    macs = 0
    pruned.eval()
    keep = {pruned.get_submodule(name): index for name, index in kept_outputs.items()}
    store, device = SpillBuffer(), base.device
    true = [store.keep(first_state(base, batch, schedule)) for batch in batches]
    ours, cut_before = true, False
    for base_step, step in zip(steps(base), steps(pruned), strict=True):
        after = [store.keep(_after(base_step, state, device)) for state in true]
        for name in _to_solve(base_step, step, cut_before=cut_before):
            layer = step.module.get_submodule(name)
            assert isinstance(layer, ReadLayer)
            wanted = after if name == step.output_layer else None
            macs += _solve(
                layer,
                name,
                base_step,
                step,
                true,
                ours,
                wanted,
                keep.get(layer),
                weights[step.name],
            )
        cut_before = cut_before or is_cut(base_step, step)
        ours = [store.keep(_after(step, state, device)) for state in ours] if cut_before else after
        true = after
    return macs


class SpillBuffer:
    """Keeps states; what does not fit into memory lies in files that the system may write out."""

    def __init__(self) -> None:
        self._held: dict[int, int] = {}

    def keep(self, state: State) -> State:
        """Give a state with its newest tensor, which alone may be new, kept."""
        hidden = state.hidden
        size = hidden.numel() * hidden.element_size()
        if sum(self._held.values()) + size > BYTES_IN_MEMORY:
            kept = _in_file(hidden)
            skips = tuple(kept if skip is hidden else skip for skip in state.skips)
            return State(kept, state.embedding, skips)
        self._held[id(hidden)] = size
        weakref.finalize(hidden, self._held.pop, id(hidden), None)
        return state


def _on(state: State, device: torch.device) -> State:
    """Bring back what was kept elsewhere."""
    skips = tuple(skip.to(device) for skip in state.skips)
    return State(state.hidden.to(device), state.embedding, skips)


def _after(step: Step, state: State, device: torch.device) -> State:
    """Run a step; the skips that it leaves alone stay where they were kept."""
    here = _on(state, device)
    after = step(here)
    kept = {id(skip): own for skip, own in zip(here.skips, state.skips, strict=True)}
    skips = tuple(kept.get(id(skip), skip) for skip in after.skips)
    return State(after.hidden, after.embedding, skips)


def _in_file(tensor: Tensor) -> Tensor:
    """Copy a tensor into a file that has no name and goes with the tensor.

    Raises:
        OSError: The disk is full.
    """
    with tempfile.NamedTemporaryFile() as file:
        # written and not copied into the map: a disk that is full then is an error and no signal
        file.write(tensor.cpu().contiguous().view(torch.uint8).numpy().data)
        file.flush()
        kept = torch.from_file(file.name, shared=True, size=tensor.numel(), dtype=tensor.dtype)
    return kept.view(tensor.shape)


def _solve(
    layer: ReadLayer,
    name: str,
    base_step: Step,
    step: Step,
    true: Sequence[State],
    ours: Sequence[State],
    after: Sequence[State] | None,
    keep: Tensor | None,
    weights: Sequence[Tensor],
) -> int:
    """Solve for one layer's weights; give the macs of the statistics.

    Args:
        layer: The layer of the cut network.
        name: Its name within the step.
        base_step: The step of the base.
        step: That of the cut network.
        true: What goes into the one.
        ours: What goes into the other.
        after: What comes out of the base's, where the layer closes the step: the step's output is
            fitted then, so that whatever else is off in it is made up for. None: the layer's is.
        keep: Which of the base's outputs the layer has; None: all.
        weights: How much every image of each batch counts.
    """
    num_images, device = sum(len(state.hidden) for state in true), layer.weight.device
    squares: LeastSquares | None = None
    for index, state in enumerate(ours):
        with ActivationHook(layer) as tap:
            found = step(_on(state, device)).hidden
        is_linear = isinstance(layer, nn.Linear)
        if after is None:
            with ActivationHook(base_step.module.get_submodule(name)) as base_tap:
                base_step(_on(true[index], device))
            wanted = _select(base_tap.output, keep, dim=2 if is_linear else 1)
        else:
            own = _select(after[index].hidden.to(device), keep, dim=1)
            missing = (own - found) * step.residual_scale
            if is_linear:
                missing = missing.flatten(2).transpose(1, 2)  # (B, C, H, W) -> (B, N, C)
            wanted = tap.output + missing
        if squares is None:
            num_places = wanted[0].numel() // len(layer.weight)
            seed = derive_seed(step.name, name)
            squares = LeastSquares(layer, num_rows=num_images * num_places, seed=seed)
        squares.add(tap.input, wanted, weights[index])
    assert squares is not None
    weight, bias = squares.solve()
    layer.weight.copy_(weight)
    if layer.bias is not None:
        layer.bias.copy_(bias)
    return squares.macs


def _to_solve(base: Step, step: Step, *, cut_before: bool) -> list[str]:
    """Name the layers of a step that read what was cut, its output layer last."""
    whole, last = _layers(base.module), step.output_layer
    shrunk = [
        name
        for name, layer in _layers(step.module).items()
        if layer.weight.shape[1] < whole[name].weight.shape[1]
    ]
    closes = [last] if cut_before or last in shrunk else []
    return [name for name in shrunk if name != last] + closes


def _layers(module: nn.Module) -> dict[str, ReadLayer]:
    return {name: m for name, m in module.named_modules() if isinstance(m, ReadLayer)}


def _select(values: Tensor, keep: Tensor | None, *, dim: int) -> Tensor:
    return values if keep is None else values.index_select(dim, keep.to(values.device))
