from typing import Any

import pytest
import torch
from diffusers import UNet2DModel
from torch import Tensor, nn

from tdc_ray.config.diffusion import DiffusionConfig
from tdc_ray.diffusion.loss import loss_per_image
from tdc_ray.diffusion.process import NoisedBatch, noise_schedule
from tdc_ray.models.network_config import NetworkConfig, image_size
from tdc_ray.models.step import State
from tdc_ray.models.surgery import kept_outputs
from tdc_ray.models.unet2d.blocks import output_layer
from tdc_ray.models.unet2d.steps import steps
from tdc_ray.models.unet2d.surgery import cut
from tdc_ray.models.unet2d.units import units_of
from tdc_ray.models.units import KeptIndices, SpaceKind, Unit, keep_everything
from tdc_ray.pruning.noised import first_state
from tdc_ray.pruning.refit.error_weights import error_weights
from tdc_ray.pruning.refit.refit import _after, refit
from tests.models.configs import CONFIGS, random_config
from tests.small import TINY, assert_same, random_kept, random_unet

SCHEDULE = noise_schedule(DiffusionConfig())


def noised(config: NetworkConfig, *sizes: int, seed: int = 0) -> list[NoisedBatch]:
    generator = torch.Generator().manual_seed(seed)

    def batch(size: int) -> NoisedBatch:
        shape = (size, config["in_channels"], *image_size(config))
        x_0 = torch.rand(shape, generator=generator) * 2 - 1
        epsilon = torch.randn(shape, generator=generator)
        timesteps = torch.randint(0, 1000, (size,), generator=generator)
        labels = torch.randint(0, 10, (size,), generator=generator)
        conditioned = config.get("num_class_embeds") is not None
        return NoisedBatch(x_0, epsilon, timesteps, labels if conditioned else None)

    return [batch(size) for size in sizes]


@torch.no_grad()
def outputs_of(unet: UNet2DModel, batches: list[NoisedBatch]) -> Tensor:
    return torch.cat([batch.predict(unet, SCHEDULE) for batch in batches])


def weighed(base: UNet2DModel, batches: list[NoisedBatch]) -> tuple[Any, ...]:
    """What a refit takes beside the networks."""
    return batches, SCHEDULE, error_weights(base, batches, SCHEDULE)


def cut_and_refit(
    base: UNet2DModel, units: tuple[Unit, ...], kept: KeptIndices, batches: list[NoisedBatch]
) -> tuple[UNet2DModel, UNet2DModel]:
    """The base after the cut, and after the refit."""
    pruned, refitted = cut(base, units, kept), cut(base, units, kept)
    refit(base, refitted, kept_outputs(base, units, kept), *weighed(base, batches))
    return pruned, refitted


def off_by(unet: UNet2DModel, base: UNet2DModel, batches: list[NoisedBatch]) -> float:
    """Mean squared difference of the outputs, as a share of the base's variance."""
    wanted = outputs_of(base, batches)
    return float((outputs_of(unet, batches) - wanted).square().mean() / wanted.var())


def cut_only(units: tuple[Unit, ...], **kept: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Everything but of some units, named with ``__`` for dots."""
    return keep_everything(units) | {
        name.replace("__", "."): places for name, places in kept.items()
    }


# --- its results -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["inner", "full"])
def test_where_nothing_is_cut_nothing_changes(kind):
    base, units = random_unet(), units_of(TINY, kind)
    same = cut(base, units, keep_everything(units))
    assert refit(base, same, {}, *weighed(base, noised(TINY, 8))) == 0
    assert_same(same.state_dict(), base.state_dict())


@pytest.mark.parametrize("kind", ["inner", "full"])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_refit_brings_the_output_nearer_to_the_bases(name, kind):
    config = CONFIGS[name]
    base, units = random_unet(config), units_of(config, kind)
    assert_nearer(base, units, random_kept(units, len(name)), noised(config, 16))


@pytest.mark.parametrize("seed", range(8))
def test_the_refit_brings_the_output_of_any_unet_nearer(seed):
    config = random_config(seed)
    base, units = random_unet(config, seed=seed), units_of(config, "full")
    assert_nearer(base, units, random_kept(units, seed), noised(config, 16))


def assert_nearer(
    base: UNet2DModel, units: tuple[Unit, ...], kept: KeptIndices, batches: list[NoisedBatch]
) -> None:
    pruned, refitted = cut_and_refit(base, units, kept, batches)
    assert off_by(refitted, base, batches) <= off_by(pruned, base, batches)


@pytest.mark.parametrize("name", ["scale-shift", "time-added", "attention-everywhere"])
def test_it_is_nearer_on_other_images_too(name):
    config = CONFIGS[name]
    base, units = random_unet(config), units_of(config)
    pruned, refitted = cut_and_refit(base, units, random_kept(units, 5), noised(config, 64))
    others = noised(config, 64, seed=1)
    assert off_by(refitted, base, others) < off_by(pruned, base, others)


# --- what can be made up for wholly ----------------------------------------------------------


@torch.no_grad()
def copy_first_steps(unet: UNet2DModel, unit: Unit) -> None:
    """Set the second half of a unit's groups or heads to copies of the first."""
    block, half = unet.get_submodule(unit.name), unit.width * unit.channels // 2
    if unit.kind == "residual":
        made_by = [block.conv1, block.time_emb_proj, block.norm2]
    else:
        made_by = [block.to_q, block.to_k, block.to_v]
    for layer in made_by:
        for parameter in (layer.weight, layer.bias):
            for start in range(0, len(parameter), 2 * half):  # scale and shift
                parameter[start + half : start + 2 * half] = parameter[start : start + half]


@pytest.mark.parametrize("name", ["scale-shift", "time-added", "resampled-by-residual-blocks"])
def test_what_was_a_copy_of_what_is_left_is_made_up_for(name):
    config = {**CONFIGS[name], "attention_head_dim": 8}  # two heads or more
    base, units, batches = random_unet(config), units_of(config), noised(config, 40)
    for unit in units:
        copy_first_steps(base, unit)
    kept = {unit.name: tuple(range(unit.width // 2)) for unit in units}
    pruned, refitted = cut_and_refit(base, units, kept, batches)
    others = noised(config, 20, seed=1)
    assert off_by(pruned, base, others) > 0.1
    assert off_by(refitted, base, others) < 1e-3


@torch.no_grad()
def test_what_nothing_read_is_not_missed():
    base, units, batches = random_unet(), units_of(TINY), noised(TINY, 40)
    kept = {unit.name: tuple(range(1, unit.width)) for unit in units}
    for unit in units:
        block = base.get_submodule(unit.name)
        block.get_submodule(output_layer(block)).weight[:, : unit.channels] = 0.0
    _, refitted = cut_and_refit(base, units, kept, batches)
    assert off_by(refitted, base, batches) < 1e-8


@pytest.mark.parametrize(
    "name", ["down_blocks.0.resnets.0", "mid_block.attentions.0", "up_blocks.1.resnets.0"]
)
def test_a_block_alone_is_fitted_as_least_squares_fits_its_output(name):
    base, units, batches = random_unet(), units_of(TINY), noised(TINY, 24)
    (unit,) = (unit for unit in units if unit.name == name)
    kept = keep_everything(units) | {name: tuple(range(0, unit.width, 2))}
    _, refitted = cut_and_refit(base, units, kept, batches)

    def errors(layer: nn.Module) -> float:
        """Squared error of the block's output, other weights aside."""
        ours, theirs = states_after(refitted, name, batches), states_after(base, name, batches)
        return float((ours - theirs).square().sum())

    block = refitted.get_submodule(name)
    layer = block.get_submodule(output_layer(block))
    least = errors(layer)
    for seed in range(5):  # whatever else the weights could be is worse
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            change = 0.02 * torch.randn(layer.weight.shape, generator=generator)
            layer.weight += change
            assert errors(layer) > least
            layer.weight -= change


@torch.no_grad()
def states_after(unet: UNet2DModel, name: str, batches: list[NoisedBatch]) -> Tensor:
    """What flows behind a step."""
    found = []
    for batch in batches:
        state = first_state(unet, batch, SCHEDULE)
        for step in steps(unet):
            state = step(state)
            if step.name == name:
                found.append(state.hidden)
                break
    return torch.cat(found)


# --- what it leaves alone --------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["inner", "full"])
def test_the_base_is_left_as_it_was(kind):
    base, units = random_unet(), units_of(TINY, kind)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    cut_and_refit(base, units, random_kept(units, 0), noised(TINY, 8))
    assert_same(base.state_dict(), before)
    assert not base.training
    assert not any(module._forward_hooks for module in base.modules())
    assert all(parameter.grad is None for parameter in base.parameters())


def changed(one: UNet2DModel, other: UNet2DModel) -> set[str]:
    """Names of the layers whose weights differ."""
    pairs = zip(one.named_parameters(), other.parameters(), strict=True)
    return {name.rpartition(".")[0] for (name, a), b in pairs if not torch.equal(a, b)}


def test_in_the_inner_space_the_layers_that_close_the_blocks_from_the_first_cut_on_change():
    base, units = random_unet(), units_of(TINY)
    kept = cut_only(units, mid_block__attentions__0=(1,))
    pruned, refitted = cut_and_refit(base, units, kept, noised(TINY, 8))
    names = [step.name for step in steps(base)]
    behind = names[names.index("mid_block.attentions.0") :]
    modules = {step.name: step.module for step in steps(base)}
    expected = {f"{name}.{output_layer(modules[name])}" for name in behind if name != "conv_out"}
    assert changed(pruned, refitted) == expected | {"conv_out"}
    assert "mid_block.attentions.0.to_out.0" in expected
    assert "up_blocks.0.upsamplers.0.conv" in expected


def test_a_cut_at_the_end_changes_nothing_before_it():
    base, units = random_unet(), units_of(TINY)
    kept = cut_only(units, up_blocks__1__resnets__1=(0, 3))
    pruned, refitted = cut_and_refit(base, units, kept, noised(TINY, 8))
    assert changed(pruned, refitted) == {"up_blocks.1.resnets.1.conv2", "conv_out"}


def test_in_the_full_space_whatever_reads_the_stream_is_fitted_too():
    base, units = random_unet(), units_of(TINY, "full")
    kept = keep_everything(units) | {"stream:down_blocks.1.resnets.0": (0, 2)}
    pruned, refitted = cut_and_refit(base, units, kept, noised(TINY, 8))
    assert {
        "mid_block.resnets.0.conv1",
        "mid_block.attentions.0.to_q",
        "mid_block.attentions.0.to_k",
        "mid_block.attentions.0.to_v",
        "up_blocks.0.resnets.0.conv_shortcut",
        "conv_out",
    } <= changed(pruned, refitted)
    assert "conv_in" not in changed(pruned, refitted)


# --- how it is done --------------------------------------------------------------------------


def test_the_refit_is_the_same_however_the_images_are_batched():
    base, units = random_unet(), units_of(TINY, "full")
    (whole,) = noised(TINY, 9)
    names = ("x_0", "epsilon", "timesteps")
    parts = [
        NoisedBatch(*(getattr(whole, name)[part] for name in names))
        for part in (slice(0, 4), slice(4, 5), slice(5, 9))
    ]
    kept = random_kept(units, 2)
    outputs = [
        outputs_of(cut_and_refit(base, units, kept, batches)[1], [whole])
        for batches in ([whole], parts)
    ]
    torch.testing.assert_close(*outputs, atol=1e-3, rtol=1e-3)


def test_a_refit_can_be_repeated():
    base, units = random_unet(), units_of(TINY, "full")
    kept = random_kept(units, 2)
    one, other = (
        cut_and_refit(base, units, kept, noised(TINY, 70))[1] for _ in range(2)
    )  # enough that places are drawn
    assert_same(one.state_dict(), other.state_dict())


@pytest.mark.parametrize("held", [0, 40_000])
def test_it_is_the_same_where_activations_do_not_fit_into_memory(held, monkeypatch):
    base, units = random_unet(), units_of(TINY, "full")
    kept, images = random_kept(units, 2), noised(TINY, 8, 8)
    _, wanted = cut_and_refit(base, units, kept, images)
    monkeypatch.setattr("tdc_ray.pruning.spill.BYTES_IN_MEMORY", held)
    _, found = cut_and_refit(base, units, kept, images)
    close = outputs_of(found, images), outputs_of(wanted, images)
    torch.testing.assert_close(*close, rtol=1e-3, atol=1e-3)  # alignment moves the last bits


@torch.no_grad()
def test_skips_that_a_step_leaves_alone_stay_where_they_are_kept(monkeypatch):
    """As on a GPU, where what a step is given are copies."""

    def copied(state: State, _: torch.device) -> State:
        skips = tuple(skip.clone() for skip in state.skips)
        return State(state.hidden.clone(), state.embedding, skips)

    monkeypatch.setattr("tdc_ray.pruning.refit.refit._on", copied)
    base = random_unet()
    state, most = first_state(base, noised(TINY, 2)[0], SCHEDULE), 0
    for step in steps(base):
        after = _after(step, state, base.device)
        known = {id(tensor) for tensor in (*state.skips, after.hidden)}
        assert {id(skip) for skip in after.skips} <= known
        state, most = after, max(most, len(after.skips))
    assert most > 2
    assert state.skips == ()


def test_statistics_of_twice_the_images_take_twice_the_macs():
    base, units = random_unet(), units_of(TINY)
    kept = random_kept(units, 0)
    outputs = kept_outputs(base, units, kept)

    def macs(size: int) -> int:
        return refit(base, cut(base, units, kept), outputs, *weighed(base, noised(TINY, size)))

    assert macs(4) == 2 * macs(2) > 0


@pytest.mark.parametrize("kind", ["inner", "full"])
def test_the_refitted_unet_trains(kind: SpaceKind):
    base, units, (batch,) = random_unet(), units_of(TINY, kind), noised(TINY, 4)
    _, refitted = cut_and_refit(base, units, random_kept(units, 1), [batch])
    loss_per_image(SCHEDULE, batch.predict(refitted.train(), SCHEDULE), batch).mean().backward()
    assert all(parameter.requires_grad for parameter in refitted.parameters())
    assert all(torch.isfinite(p.grad).all() for p in refitted.parameters() if p.grad is not None)


# --- how much an image counts ----------------------------------------------------------------


def test_images_count_by_what_an_error_does_to_the_output():
    base, batches = random_unet(), noised(TINY, 5, 3)
    weights = error_weights(base, batches, SCHEDULE)
    assert list(weights.images) == [step.name for step in steps(base)]
    for parts in weights.images.values():
        assert [len(part) for part in parts] == [5, 3]
        assert float(torch.cat(parts).mean()) == pytest.approx(1.0, abs=1e-5)
    with torch.no_grad():  # an output that depends on nothing: no image counts more than another
        base.conv_out.weight.zero_()
    silent = error_weights(base, batches, SCHEDULE)
    assert all(bool((part == 1).all()) for part in silent.images["conv_in"])


def test_images_whose_gradients_do_not_fit_at_once_count_alike(monkeypatch):
    base, batches = random_unet(), noised(TINY, 5, 3)
    names = [unit.name for unit in units_of(TINY)]
    whole = error_weights(base, batches, SCHEDULE, names)
    monkeypatch.setattr("tdc_ray.pruning.refit.error_weights.max_batch_size", lambda *_, **__: 2)
    found = error_weights(base, batches, SCHEDULE, names)
    for name, parts in found.images.items():
        for part, expected in zip(parts, whole.images[name], strict=True):
            torch.testing.assert_close(part, expected)
    assert list(found.channels) == names
    for name in names:
        torch.testing.assert_close(found.channels[name], whole.channels[name])


def test_channels_count_by_what_errors_in_them_do_to_the_output():
    base, batches = random_unet(), noised(TINY, 4)
    last = [step.name for step in steps(base)][-2]  # which conv_out reads, after a norm and SiLU
    found = error_weights(base, batches, SCHEDULE, [last]).channels[last]
    size = len(found)
    assert found.shape == (size, size)
    torch.testing.assert_close(found, found.T)
    assert float(torch.linalg.eigvalsh(found.double())[0]) > -1e-6 * float(found.trace())
    with torch.no_grad():  # the last channel is read by nobody, but for its share of a norm
        base.conv_norm_out.weight[-1] = 0.0
    silent = error_weights(base, batches, SCHEDULE, [last]).channels[last]
    assert float(silent[-1, -1]) < 0.1 * float(found[-1, -1])


def test_an_image_whose_errors_are_lost_counts_little():
    base, batches = random_unet(), noised(TINY, 8)
    (before,) = error_weights(base, batches, SCHEDULE).images["conv_in"]
    assert float(before.max() / before.min()) > 1.01  # images differ
    (last,) = error_weights(base, batches, SCHEDULE).images["conv_out"]
    size = TINY["sample_size"] ** 2 * TINY["out_channels"]
    assert float((last - 1).abs().max()) < 6 * (2 / size) ** 0.5  # only the direction's own norm
