"""Stable Diffusion's UNets: the real ones' sizes, and tiny ones with random weights."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tdc_ray.config.diffusion import DiffusionConfig
from tdc_ray.diffusion.process import NoisedBatch, noise_schedule
from tdc_ray.errors import UnsupportedModelError
from tdc_ray.models.denoiser import count_params
from tdc_ray.models.families import (
    blank_labels,
    build_network,
    family_of,
    steps_of,
)
from tdc_ray.models.labels import conditions
from tdc_ray.models.network_config import CONDITION_CLASS, STATES, NetworkConfig
from tdc_ray.models.saved_expert import load_expert, save_expert
from tdc_ray.models.step import run
from tdc_ray.models.structure import network_structure
from tdc_ray.models.surgery import kept_outputs
from tdc_ray.pruning.noised import first_state
from tdc_ray.pruning.refit.error_weights import error_weights
from tdc_ray.pruning.refit.refit import refit
from tdc_ray.pruning.space import space_of
from tests.small import assert_same, random_kept, widths_of

CLASS = {"_class_name": CONDITION_CLASS}
SD_15: NetworkConfig = {**CLASS, "sample_size": 64, "cross_attention_dim": 768}
SD_21: NetworkConfig = {
    **CLASS,
    "sample_size": 96,
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
}
SD_XL: NetworkConfig = {
    **CLASS,
    "sample_size": 128,
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": [5, 10, 20],
    "transformer_layers_per_block": [1, 2, 10],
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
TINY: NetworkConfig = {
    **CLASS,
    "sample_size": 8,
    "block_out_channels": [16, 32],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "attention_head_dim": 4,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": 12,
}
LINEAR: NetworkConfig = {
    **TINY,
    "use_linear_projection": True,
    "attention_head_dim": [2, 4],
    "transformer_layers_per_block": [2, 1],
}
XL: NetworkConfig = {
    **TINY,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 2,
    "projection_class_embeddings_input_dim": 20,
}
SCHEDULE = noise_schedule(DiffusionConfig())


def random_unet(config: NetworkConfig = TINY) -> UNet2DConditionModel:
    torch.manual_seed(0)
    network = build_network(config).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return network


def noised(size: int, seed: int = 0) -> NoisedBatch:
    generator = torch.Generator().manual_seed(seed)
    x_0, epsilon = (torch.randn(size, 4, 8, 8, generator=generator) for _ in range(2))
    captions = {
        STATES: torch.randn(size, 5, 12, generator=generator),
        "text_embeds": torch.randn(size, 8, generator=generator),
        "time_ids": 64 * torch.rand(size, 6, generator=generator),
    }
    return NoisedBatch(x_0, epsilon, torch.arange(size) * 7 + 200, captions)


@torch.no_grad()
def by_steps(network: UNet2DConditionModel, batch: NoisedBatch) -> Tensor:
    return run(steps_of(network), first_state(network, batch, SCHEDULE)).hidden


@pytest.mark.parametrize("config", [TINY, LINEAR, XL], ids=["convolutions", "linear", "XL"])
@torch.no_grad()
def test_the_steps_are_the_forward_pass(config):
    network, batch = random_unet(config), noised(3)
    timesteps = SCHEDULE.model_timesteps(batch.timesteps)
    told = {"encoder_hidden_states": batch.labels[STATES], "added_cond_kwargs": batch.labels}
    expected = network(batch.x_t(SCHEDULE), timesteps, **told).sample
    torch.testing.assert_close(by_steps(network, batch), expected, rtol=1e-4, atol=1e-4)


def count_macs(network: UNet2DConditionModel, config: NetworkConfig) -> float:
    side, network = config["sample_size"], network.to("meta")
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        told = conditions(blank_labels(network, 1))
        network(torch.ones(1, 4, side, side), torch.ones(1), **told)
    return counter.get_total_flops() / 2


@pytest.mark.parametrize(
    ("config", "millions"),
    [(SD_15, 859.52), (SD_21, 865.91), (SD_XL, 2567.46)],
    ids=["1.5", "2.1", "XL"],
)
def test_the_released_ones_have_as_many_parameters_as_is_known(config, millions):
    assert network_structure(config).num_params == pytest.approx(1e6 * millions, abs=1e4)


REAL = pytest.mark.slow


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(SD_15, id="1.5", marks=REAL),
        pytest.param(SD_21, id="2.1", marks=REAL),
        pytest.param(SD_XL, id="XL", marks=REAL),
        pytest.param(TINY, id="tiny"),
        pytest.param(LINEAR, id="linear"),
    ],
)
def test_macs_and_parameters_are_those_that_torch_counts(config):
    with torch.device("meta"):
        network = build_network(config)
    structure = network_structure(config)
    assert structure.num_params == count_params(network)
    assert structure.macs == count_macs(network, config)


@pytest.mark.parametrize("config", [TINY, LINEAR, XL], ids=["convolutions", "linear", "XL"])
def test_a_pruned_one_is_as_large_as_the_table_says_and_loads_again(config, tmp_path):
    network, space = random_unet(config), space_of(config)
    kept = random_kept(space.units, 4)
    pruned = family_of(network).cut(network, space.units, kept)
    assert space.num_params(widths_of(kept)) == count_params(pruned)
    save_expert(tmp_path, pruned, config, kept)
    loaded, batch = load_expert(tmp_path), noised(2)
    assert_same(loaded.state_dict(), pruned.state_dict())
    assert torch.equal(by_steps(loaded, batch), by_steps(pruned, batch))
    assert space.macs(widths_of(kept)) == count_macs(pruned, config)


@pytest.mark.parametrize("kind", ["residual", "attention", "feed-forward"])
def test_the_refit_brings_the_prediction_nearer_to_the_bases(kind):
    base, units = random_unet(), space_of(TINY).units
    kept = {
        unit.name: tuple(range(unit.width // (2 if unit.kind == kind else 1))) for unit in units
    }
    cut, pruned = (family_of(base).cut(base, units, kept) for _ in range(2))
    batches = [noised(32, seed=seed) for seed in (1, 2)]
    weights = error_weights(base, batches, SCHEDULE)
    refit(base, pruned, kept_outputs(base, units, kept), batches, SCHEDULE, weights)
    unseen = noised(32, seed=3)
    wanted = by_steps(base, unseen)
    before, after = (
        float((by_steps(network, unseen) - wanted).square().mean()) for network in (cut, pruned)
    )
    assert after < 0.8 * before


def test_what_is_not_known_is_refused():
    for changes in ({"class_embed_type": "timestep"}, {"down_block_types": ["KDownBlock2D"]}):
        with pytest.raises(UnsupportedModelError, match="is not supported; known are"):
            network_structure({**TINY, **changes})
    with pytest.raises(UnsupportedModelError, match=r"set prune\.space to inner"):
        network_structure(TINY, "full")
