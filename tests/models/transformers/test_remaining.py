"""Transformers of which branches and whole blocks were removed."""

import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline

from tdc_ray.diffusion.expert_denoiser import ExpertDenoiser
from tdc_ray.diffusion.process import NoisedBatch
from tdc_ray.errors import CheckpointError, UnsupportedModelError
from tdc_ray.models.denoiser import count_params
from tdc_ray.models.families import family_of, steps_of
from tdc_ray.models.saved_expert import load_expert, save_expert
from tdc_ray.models.structure import network_structure
from tdc_ray.models.units import Unit, keep_everything
from tdc_ray.pruning.refit.error_weights import error_weights
from tdc_ray.pruning.refit.refit import refit
from tdc_ray.pruning.sensitivity import reader_layers
from tdc_ray.pruning.space import space_of
from tests.models.captioned import CASES as CAPTIONED
from tests.models.captioned import Case, count_macs
from tests.small import TINY, TINY_DIT, assert_same, widths_of

DIT = {
    **TINY_DIT,
    "activation_fn": "geglu",
    "norm_elementwise_affine": True,
    "attention_bias": False,
}


def call_dit(network, x_t, timesteps, classes):
    return network(x_t, timesteps, classes)


CASES: dict[str, Case] = {
    "dit": Case(TINY_DIT, call_dit, ("attn1", "ff")),
    "dit, all weights": Case(DIT, call_dit, ("attn1", "ff")),
    **{name: case for name, case in CAPTIONED.items() if not name.startswith("unet")},
}


@pytest.fixture(params=CASES)
def case(request) -> Case:
    return CASES[request.param]


def noised(case: Case, size: int, seed: int = 0) -> NoisedBatch:
    batch = case.noised(size, seed=seed)
    return batch if batch.labels else replace(batch, labels=torch.arange(size) % 10)


def without(units: Sequence[Unit], *ends: str) -> dict[str, tuple[int, ...]]:
    """Everything is kept but the branches whose names end so."""
    kept = keep_everything(tuple(units))
    return {name: () if name.endswith(ends) else steps for name, steps in kept.items()}


def some_removed(units: Sequence[Unit], seed: int) -> dict[str, tuple[int, ...]]:
    """About half of the branches are removed, others pruned."""
    draw = random.Random(seed)
    widths = {unit: draw.choice((0, draw.randint(1, unit.width))) for unit in units}
    return {
        unit.name: tuple(sorted(draw.sample(range(unit.width), width)))
        for unit, width in widths.items()
    }


@torch.no_grad()
def mask(network, units: Sequence[Unit], kept) -> None:
    """Let layers that read what is pruned not read it; those of removed branches output 0."""
    layers = reader_layers(steps_of(network))
    for unit in units:
        gone = sorted({*range(unit.width)} - {*kept[unit.name]})
        for layer in layers[unit.name].values():
            layer.weight[:, unit.channel_indices(gone)] = 0
            if not kept[unit.name] and layer.bias is not None:
                layer.bias.zero_()


def test_what_remains_computes_what_the_masked_base_does_and_is_as_large_as_the_table_says(case):
    space, batch = space_of(case.config, "depth"), noised(case, 3)
    choices = [some_removed(space.units, seed) for seed in (1, 2, 5)]
    for kept in (*choices, without(space.units, *case.parts)):
        base = case.network()
        pruned = family_of(base).cut(base, space.units, kept)
        found = case.by_diffusers(pruned, batch), case.by_steps(pruned, batch)
        mask(base, space.units, kept)
        expected = case.by_diffusers(base, batch)
        assert [len(one) for one in kept.values()] != [*space.full.values()]
        for output in found:
            torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
        assert count_params(pruned) == space.num_params(widths_of(kept))
        assert count_macs(pruned, case.call) == space.macs(widths_of(kept))


@pytest.mark.parametrize("index", [0, 1])
def test_a_block_without_branches_costs_nothing_and_has_no_weights(case, index):
    base, structure = case.network(), network_structure(case.config, "depth")
    block = f"transformer_blocks.{index}."
    kept = without(structure.units, *(f"{block}{part}" for part in case.parts))
    pruned = family_of(base).cut(base, structure.units, kept)
    left = {name for name in pruned.state_dict() if name.startswith(block)}
    serves_the_end = index == 0 and case.call is call_dit  # the first block's embedding
    assert all(name.startswith(f"{block}norm1.emb.") == serves_the_end for name in left)
    assert bool(left) == serves_the_end
    if not serves_the_end:
        space = space_of(case.config, "depth")
        layers = [layer for layer in structure.layers if layer.name.startswith(block)]
        assert space.macs_base - space.macs(widths_of(kept)) == sum(one.macs for one in layers)
        num_params = space.num_params(widths_of(kept))
        assert space.num_params_base - num_params == sum(one.num_params for one in layers)


def test_a_last_branch_saves_what_the_block_shares():
    space = space_of(TINY_DIT, "depth")
    name, other = "transformer_blocks.1.attn1", "transformer_blocks.1.ff"
    alone, last = ({**space.full, other: width} for width in (space.full[other], 0))
    saved = [space.costs.marginal_cost(name, 0, 1, widths) for widths in (alone, last)]
    assert saved[1] - saved[0] == 256 * 32 + 32 * 32  # the embedding of the timestep
    for widths, cost in zip((alone, last), saved, strict=True):
        assert cost == space.cost({**widths, name: 1}) - space.cost({**widths, name: 0})


def test_it_is_saved_and_stands_in_for_the_base_the_same(case, tmp_path):
    base, units, batch = case.network(), space_of(case.config, "depth").units, noised(case, 2)
    kept = [without(units, *(f"0.{part}" for part in case.parts)), some_removed(units, 3)]
    experts = [family_of(base).cut(base, units, one) for one in kept]
    save_expert(tmp_path / "expert", experts[0], case.config, kept[0])
    loaded = load_expert(tmp_path / "expert")
    assert_same(loaded.state_dict(), experts[0].state_dict())
    assert torch.equal(case.by_diffusers(loaded, batch), case.by_diffusers(experts[0], batch))
    denoiser = ExpertDenoiser(experts, [(0, 499), (500, 1000)], kept=kept, base=case.config)
    denoiser.save_pretrained(tmp_path / "denoiser")
    again = ExpertDenoiser.from_pretrained(tmp_path / "denoiser")
    for offset, expert in zip((0, 400), experts, strict=True):
        at = replace(batch, timesteps=batch.timesteps + offset)
        expected = case.by_diffusers(expert, at)
        assert torch.equal(case.by_diffusers(denoiser, at), expected)
        assert torch.equal(case.by_diffusers(again, at), expected)
    with pytest.raises(UnsupportedModelError, match="could not be loaded again"):
        experts[0].save_pretrained(tmp_path / "plain")


def test_experts_without_blocks_draw_in_a_pipeline():
    torch.manual_seed(0)
    config = {**TINY_DIT, "in_channels": 4, "out_channels": 8, "num_embeds_ada_norm": 1000}
    case = Case(config, call_dit, ("attn1", "ff"))
    base, units = case.network(), space_of(config, "depth").units
    kept = [without(units, "0.attn1", "0.ff"), without(units, "0.attn1", "1.attn1", "1.ff")]
    vae = AutoencoderKL(latent_channels=4, block_out_channels=(4,), norm_num_groups=4).eval()

    def draw(choices) -> torch.Tensor:
        experts = [family_of(base).cut(base, units, one) for one in choices]
        denoiser = ExpertDenoiser(experts, [(0, 499), (500, 999)], kept=choices, base=config)
        pipeline = DiTPipeline(denoiser, vae, DDIMScheduler())
        pipeline.set_progress_bar_config(disable=True)
        torch.manual_seed(7)
        drawn = pipeline([1, 2], num_inference_steps=4, output_type="pt")
        return torch.as_tensor(drawn.images)

    images, others = draw(kept), draw([kept[0], kept[0]])
    assert images.isfinite().all()
    assert not torch.equal(images, others)


@pytest.mark.parametrize("name", ["dit", "pixart", "sd3.5", "sana"])
def test_the_refit_makes_up_for_a_removed_block_in_those_behind(name):
    case = CASES[name]
    base, units = case.network(), space_of(case.config, "depth").units
    kept = without(units, *(f"blocks.0.{part}" for part in case.parts))
    cut, pruned = (family_of(base).cut(base, units, kept) for _ in range(2))
    batches = [noised(case, 48, seed=seed) for seed in (1, 2)]
    weights = error_weights(base, batches, case.schedule)
    refit(base, pruned, {}, batches, case.schedule, weights)
    unseen = noised(case, 32, seed=3)
    assert case.error(pruned, base, unseen) < 0.8 * case.error(cut, base, unseen)


def test_outputs_that_nothing_reads_any_more_weigh_nothing():
    case = CASES["sd3.5"]
    base, units = case.network(), space_of(case.config, "depth").units
    joint = "transformer_blocks.0.attn"
    kept = {**keep_everything(units), "transformer_blocks.1.attn": ()}
    pruned = family_of(base).cut(base, units, kept)
    weights = error_weights(pruned, [noised(case, 2)], case.schedule, [joint])
    assert weights.channels[joint].any()
    assert not weights.channels[f"{joint}|context"].any()


@pytest.mark.parametrize("name", ["dit", "pixart", "sd3.5"])
def test_what_no_pipeline_gives_is_refused_and_not_ignored(name):
    case = CASES[name]
    base, units = case.network(), space_of(case.config, "depth").units
    pruned = family_of(base).cut(base, units, without(units, "0.ff"))
    block = pruned.transformer_blocks[0]
    tokens = torch.zeros(1, 4, 8)
    argument = "joint_attention_kwargs" if name == "sd3.5" else "cross_attention_kwargs"
    given = {argument: {"gligen": 1}} | ({"temb": tokens} if name == "sd3.5" else {})
    with pytest.raises(UnsupportedModelError, match=f"{argument} must be None"):
        block(tokens, encoder_hidden_states=None, **given)


@pytest.mark.parametrize(
    "config", [TINY, CAPTIONED["unet"].config, {"_class_name": "UViT2DModel"}]
)
def test_branches_of_other_networks_are_not_removed(config):
    with pytest.raises(
        UnsupportedModelError, match=r"not be depth for a U.*prune\.space to inner"
    ):
        space_of(config, "depth")


def test_an_expert_of_a_unet_without_any_group_of_a_unit_is_refused(tmp_path):
    base, units = CAPTIONED["unet"].network(), space_of(CAPTIONED["unet"].config).units
    kept = keep_everything(units)
    save_expert(tmp_path, base, CAPTIONED["unet"].config, {**kept, units[0].name: ()})
    with pytest.raises(CheckpointError, match=r"prune\.space must not be depth"):
        load_expert(tmp_path)


@pytest.mark.slow
def test_a_remaining_block_is_compiled_as_one_graph(case):
    base, units, batch = case.network(), space_of(case.config, "depth").units, noised(case, 2)
    pruned = family_of(base).cut(base, units, without(units, "0.ff", f"1.{case.parts[0]}"))
    compiled = torch.compile(pruned, backend="eager", fullgraph=True)
    assert torch.equal(case.by_diffusers(compiled, batch), case.by_diffusers(pruned, batch))
