"""A base's moments in the optimizer of its sub-model: which values, and what is refused."""

import copy
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DModel
from torch import Tensor

from tdc_ray.config.train import TrainConfig
from tdc_ray.diffusion.moments import MOMENTS, adopt_moments
from tdc_ray.diffusion.train import TrainState, start_state, update
from tdc_ray.errors import CheckpointError
from tdc_ray.models.denoiser import Denoiser
from tdc_ray.models.families import family_of
from tdc_ray.models.unet2d.surgery import cut
from tdc_ray.models.units import KeptIndices, Unit, keep_everything
from tdc_ray.pruning.space import space_of
from tests.small import TINY, TINY_DIT, random_dit, random_kept, random_unet

NUM_STEPS = 3


def trained(seed: int = 0, network: Denoiser | None = None) -> TrainState:
    """A base after three steps on gradients drawn at random."""
    state = start_state(network or random_unet(seed=seed), TrainConfig(ema_decay=0.5))
    for _ in range(NUM_STEPS):
        for parameter in state.unet.parameters():
            parameter.grad = torch.randn_like(parameter)
        update(state, TrainConfig())
    return state


def averaged(state: TrainState) -> UNet2DModel:
    with state.ema_weights() as unet:
        return copy.deepcopy(unet)


def moments_of(state: TrainState, name: str) -> list[Tensor]:
    return [state.optimizer.state[parameter][name] for parameter in state.unet.parameters()]


def adopted(
    path: Path, base: UNet2DModel, units: list[Unit], kept: KeptIndices, precision="fp32"
) -> TrainState:
    state = start_state(cut(base, units, kept), TrainConfig(precision=precision))
    adopt_moments(state, path, base, partial(cut, units=units, kept=kept))
    return state


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("space", ["inner", "full"])
def test_what_is_kept_has_the_moments_that_it_had_in_the_base(tmp_path, space, precision):
    before = trained()
    before.save(tmp_path / "base.pt")
    base, units = averaged(before), list(space_of(TINY, space).units)
    kept = random_kept(units, seed=1)
    state = adopted(tmp_path / "base.pt", base, units, kept, precision)
    numbered, first = copy.deepcopy(base), 0  # every weight's place, which the cut carries along
    with torch.no_grad():
        for parameter in numbered.parameters():
            parameter.copy_(torch.arange(first, first + parameter.numel()).view_as(parameter))
            first += parameter.numel()
    assert first < 2**24  # exact in float32
    places = [parameter.long() for parameter in cut(numbered, units, kept).parameters()]
    assert sum(map(Tensor.numel, places)) < first
    for name in MOMENTS:
        values = torch.cat([value.flatten() for value in moments_of(before, name)])
        for found, place in zip(moments_of(state, name), places, strict=True):
            assert torch.equal(found, values[place])
    assert all(bool((value >= 0).all()) for value in moments_of(state, "exp_avg_sq"))
    assert {float(step) for step in moments_of(state, "step")} == {NUM_STEPS}
    for parameter in state.unet.parameters():  # fused kernels count on one layout
        for name in MOMENTS:
            assert state.optimizer.state[parameter][name].stride() == parameter.stride()


def test_of_a_narrower_block_the_rows_and_columns_of_its_channels_are_kept(tmp_path):
    before = trained()
    before.save(tmp_path / "base.pt")
    base, units = averaged(before), list(space_of(TINY, "inner").units)
    unit = next(one for one in units if one.name.startswith("mid_block.resnets"))
    kept = keep_everything(units) | {unit.name: (1, 3)}
    channels = torch.tensor(unit.channel_indices((1, 3)))
    state = adopted(tmp_path / "base.pt", base, units, kept)
    own, blocks = state.optimizer.state, [state.unet, before.unet]
    block, whole = (unet.get_submodule(unit.name) for unet in blocks)
    for name in MOMENTS:
        of = before.optimizer.state
        rows = own[block.conv1.weight][name], of[whole.conv1.weight][name][channels]
        columns = own[block.conv2.weight][name], of[whole.conv2.weight][name][:, channels]
        untouched = own[block.norm1.weight][name], of[whole.norm1.weight][name]
        for found, expected in (rows, columns, untouched):
            assert torch.equal(found, expected)


def test_without_a_branch_every_weight_has_the_moments_of_its_name(tmp_path):
    before = trained(network=random_dit())
    before.save(tmp_path / "base.pt")
    base, units = averaged(before), space_of(TINY_DIT, "depth").units
    kept = {**keep_everything(units), "transformer_blocks.0.attn1": ()}
    narrow = partial(family_of(base).cut, units=units, kept=kept)
    state = start_state(narrow(base), TrainConfig())
    adopt_moments(state, tmp_path / "base.pt", base, narrow)
    weights = dict(before.unet.named_parameters())
    own = dict(state.unet.named_parameters())
    assert len(own) < len(weights)
    modulation = "transformer_blocks.0.norm1.linear."  # its last half is the feed-forward's
    for name, weight in own.items():
        for moment in MOMENTS:
            found = state.optimizer.state[weight][moment]
            expected = before.optimizer.state[weights[name]][moment]
            if name.startswith(modulation):
                expected = expected.chunk(2)[1]
            assert torch.equal(found, expected)


def of_another_base(path: Path) -> None:
    trained(seed=1).save(path)


def without_a_step(path: Path) -> None:
    state = torch.load(path, weights_only=True)
    state["optimizer"]["state"].clear()
    torch.save(state, path)


def torn(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (of_another_base, "averaged weights are not the base's"),
        (without_a_step, r"moments of 0 of \d+ parameters"),
        (torn, ""),
        (Path.unlink, "No such file"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_an_error_that_names_it(tmp_path, harm, reason):
    before, path = trained(), tmp_path / "base.pt"
    before.save(path)
    harm(path)
    units = list(space_of(TINY, "inner").units)
    with pytest.raises(
        CheckpointError, match=rf"{path} is no checkpoint of this model: .*{reason}"
    ):
        adopted(path, averaged(before), units, keep_everything(units))
