"""A transformer that is conditioned on captions, whose states the tests draw at random."""

import pytest
import torch
from diffusers import PixArtTransformer2DModel
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tdc_ray.config.diffusion import DiffusionConfig
from tdc_ray.diffusion.process import NoisedBatch, noise_schedule
from tdc_ray.models.denoiser import count_params, has_classes
from tdc_ray.models.families import (
    build_network,
    family_of,
    given_config,
    labels_for,
    load_network,
    save_network,
    steps_of,
)
from tdc_ray.models.labels import conditions
from tdc_ray.models.network_config import PIXART_CLASS, STATES, NetworkConfig
from tdc_ray.models.pixart.layers import CAPTION_TOKENS
from tdc_ray.models.saved_expert import load_expert, save_expert
from tdc_ray.models.step import run
from tdc_ray.models.structure import network_structure
from tdc_ray.models.surgery import kept_outputs
from tdc_ray.pruning.noised import first_state
from tdc_ray.pruning.refit.error_weights import error_weights
from tdc_ray.pruning.refit.refit import refit
from tdc_ray.pruning.space import space_of
from tests.small import assert_same, random_kept, widths_of

TINY: NetworkConfig = {
    "_class_name": PIXART_CLASS,
    "num_attention_heads": 4,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 2,
    "sample_size": 8,
    "cross_attention_dim": 48,
    "caption_channels": 16,
}
ALPHA_512: NetworkConfig = {  # PixArt-alpha/PixArt-XL-2-512x512
    "_class_name": PIXART_CLASS,
    "sample_size": 64,
    "caption_channels": 4096,
}
ALPHA_1024: NetworkConfig = {**ALPHA_512, "sample_size": 128}
SCHEDULE = noise_schedule(DiffusionConfig())


def random_pixart(config: NetworkConfig = TINY, seed: int = 0) -> PixArtTransformer2DModel:
    torch.manual_seed(seed)
    network = build_network(config).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network


def noised(config: NetworkConfig, size: int, tokens: int = 5, seed: int = 0) -> NoisedBatch:
    generator = torch.Generator().manual_seed(seed)
    side = config["sample_size"]
    shape = (size, 4, side, side)
    captions = torch.randn(size, tokens, config["caption_channels"], generator=generator)
    x_0, epsilon = (torch.randn(shape, generator=generator) for _ in range(2))
    sizes = torch.full((size, 2), 8.0 * side)
    told = {
        STATES: captions,
        "encoder_attention_mask": (torch.arange(tokens) <= torch.arange(size)[:, None]).float(),
        "resolution": sizes,
        "aspect_ratio": torch.ones(size, 1),
    }
    return NoisedBatch(x_0, epsilon, torch.arange(size) * 7 + 200, told)


@torch.no_grad()
def by_steps(network: PixArtTransformer2DModel, batch: NoisedBatch) -> Tensor:
    return run(steps_of(network), first_state(network, batch, SCHEDULE)).hidden


@torch.no_grad()
def by_diffusers(network: PixArtTransformer2DModel, batch: NoisedBatch) -> Tensor:
    timesteps = SCHEDULE.model_timesteps(batch.timesteps)
    told = conditions(labels_for(network, batch.labels))
    return network(batch.x_t(SCHEDULE), timestep=timesteps, **told).sample


@pytest.mark.parametrize("changes", [{}, {"use_additional_conditions": True, "patch_size": 4}])
def test_the_steps_are_the_forward_pass(changes):
    config: NetworkConfig = {**TINY, **changes}
    network, batch = random_pixart(config), noised(config, 3)
    expected = by_diffusers(network, batch)
    torch.testing.assert_close(by_steps(network, batch), expected, rtol=1e-4, atol=1e-4)


def count_macs(network: PixArtTransformer2DModel, config: NetworkConfig) -> float:
    network = network.to("meta")
    shape = (1, CAPTION_TOKENS, config["caption_channels"])
    side = config["sample_size"]
    told = {"resolution": torch.ones(1, 2), "aspect_ratio": torch.ones(1, 1)}
    told = {name: value.to("meta") for name, value in told.items()}
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        network(torch.ones(1, 4, side, side), torch.ones(shape), torch.ones(1), told)
    return counter.get_total_flops() / 2


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(TINY, id="tiny"),
        pytest.param(ALPHA_512, id="512", marks=pytest.mark.slow),
        pytest.param(ALPHA_1024, id="1024", marks=pytest.mark.slow),
    ],
)
def test_macs_and_parameters_are_those_that_torch_counts(config):
    with torch.device("meta"):
        network = build_network(config)
    structure = network_structure(config)
    assert structure.num_params == count_params(network)
    assert structure.macs == count_macs(network, config)


def test_a_pruned_one_is_as_large_as_the_table_says_and_loads_again(tmp_path):
    network, space = random_pixart(), space_of(TINY)
    kept = random_kept(space.units, 4)
    pruned = family_of(network).cut(network, space.units, kept)
    assert space.num_params(widths_of(kept)) == count_params(pruned)
    save_expert(tmp_path, pruned, TINY, kept)
    loaded, batch = load_expert(tmp_path), noised(TINY, 2)
    assert_same(loaded.state_dict(), pruned.state_dict())
    assert torch.equal(by_steps(loaded, batch), by_steps(pruned, batch))
    assert space.macs(widths_of(kept)) == count_macs(pruned, TINY)


@pytest.mark.parametrize("part", ["attn1", "attn2", "ff"])
def test_the_refit_brings_the_prediction_nearer_to_the_bases(part):
    base, units = random_pixart(), space_of(TINY).units
    kept = {
        unit.name: tuple(range(unit.width // (2 if unit.name.endswith(part) else 1)))
        for unit in units
    }
    cut, pruned = (family_of(base).cut(base, units, kept) for _ in range(2))
    batches = [noised(TINY, 48, seed=seed) for seed in (1, 2)]
    weights = error_weights(base, batches, SCHEDULE)
    outputs = kept_outputs(base, units, kept)
    refit(base, pruned, outputs, batches, SCHEDULE, weights)
    unseen = noised(TINY, 32, seed=3)
    wanted = by_steps(base, unseen)
    before, after = (
        float((by_steps(network, unseen) - wanted).square().mean()) for network in (cut, pruned)
    )
    assert after < 0.8 * before


def test_a_saved_one_loads_under_its_old_name(tmp_path):
    network = random_pixart()
    assert not has_classes(network)
    save_network(network, tmp_path)
    assert isinstance(load_network(tmp_path), PixArtTransformer2DModel)
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace(PIXART_CLASS, "Transformer2DModel"))
    assert given_config(tmp_path)["_class_name"] == PIXART_CLASS
    assert_same(load_network(tmp_path).state_dict(), network.state_dict())
