"""Networks without a description; UNets without theirs have the units that it lists, and more."""

import pytest
import torch
from diffusers import AuraFlowTransformer2DModel

from tdc_ray.config.diffusion import DiffusionConfig
from tdc_ray.diffusion.plan import one_group
from tdc_ray.diffusion.process import NoisedBatch, noise_schedule
from tdc_ray.errors import ConfigError, UnsupportedModelError
from tdc_ray.models.denoiser import count_params
from tdc_ray.models.families import (
    FAMILIES,
    build_network,
    check_class,
    family_of,
    load_network,
    save_network,
    steps_of,
)
from tdc_ray.models.network_config import STATES, NetworkConfig
from tdc_ray.models.saved_expert import load_expert, save_expert
from tdc_ray.models.step import run
from tdc_ray.models.structure import STRUCTURES, network_structure
from tdc_ray.models.surgery import kept_outputs
from tdc_ray.models.traced import graph
from tdc_ray.models.units import keep_everything
from tdc_ray.pruning.latency import timed_space
from tdc_ray.pruning.noised import first_state
from tdc_ray.pruning.refit.error_weights import error_weights
from tdc_ray.pruning.refit.refit import refit
from tdc_ray.pruning.space import space_of
from tdc_ray.runs.preflight import space_and_plan
from tdc_ray.runs.prune_model import prune_model
from tests.models.configs import CONFIGS
from tests.models.counting import count_macs
from tests.small import (
    TINY,
    assert_same,
    output_of,
    random_kept,
    random_unet,
    small_config,
    widths_of,
)

AURA: NetworkConfig = {  # a class that has no description
    "_class_name": "AuraFlowTransformer2DModel",
    "sample_size": 8,
    "in_channels": 4,
    "num_mmdit_layers": 1,
    "num_single_dit_layers": 1,
    "attention_head_dim": 8,
    "num_attention_heads": 4,
    "joint_attention_dim": 16,
    "caption_projection_dim": 32,
    "pos_embed_max_size": 64,
}
SCHEDULE = noise_schedule(DiffusionConfig())


@pytest.fixture
def undescribed(monkeypatch):
    """UNet2DModel without its rows."""
    for table in (FAMILIES, STRUCTURES):
        monkeypatch.delitem(table, "UNet2DModel")


def noised(config: NetworkConfig, size: int, seed: int = 0) -> NoisedBatch:
    generator = torch.Generator().manual_seed(seed)
    shape = (size, config["in_channels"], 8, 8)
    x_0, epsilon = (torch.randn(shape, generator=generator) for _ in range(2))
    labels = None
    if config is AURA:
        labels = {STATES: torch.randn(size, 5, 16, generator=generator)}
    return NoisedBatch(x_0, epsilon, torch.arange(size) * 7 + 200, labels)


@torch.no_grad()
def by_steps(network, batch: NoisedBatch) -> torch.Tensor:
    return run(steps_of(network), first_state(network, batch, SCHEDULE)).hidden


def random_aura() -> AuraFlowTransformer2DModel:
    torch.manual_seed(0)
    network = build_network(AURA).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network


@pytest.mark.parametrize(
    "name",
    ["scale-shift", "time-added", "class-conditional", "one-head", "nothing-but-residual-blocks"],
)
def test_a_unets_units_are_those_of_its_description_and_more(name, monkeypatch):
    config, unet = CONFIGS[name], random_unet(CONFIGS[name])
    described, space = network_structure(config), space_of(config)
    kept = random_kept(described.units, 1)
    expected = family_of(unet).cut(unet, described.units, kept)
    for table in (FAMILIES, STRUCTURES):
        monkeypatch.delitem(table, "UNet2DModel")
    traced, traced_space = network_structure(config), space_of(config)
    assert (traced.num_params, traced.macs) == (described.num_params, described.macs)
    found = {unit.name.removesuffix(".conv2"): unit for unit in traced.units}
    for unit in described.units:
        same = found.pop(unit.name)
        assert (same.width, same.channels, same.pixels) == (unit.width, unit.channels, unit.pixels)
    of_traced = keep_everything(traced.units)
    for unit in traced.units:
        of_traced[unit.name] = kept.get(unit.name.removesuffix(".conv2"), of_traced[unit.name])
    pruned = family_of(unet).cut(unet, traced.units, of_traced)
    assert_same(pruned.state_dict(), expected.state_dict())
    assert torch.equal(output_of(pruned), output_of(expected))
    assert traced_space.macs(widths_of(of_traced)) == space.macs(widths_of(kept))


@pytest.mark.usefixtures("undescribed")
def test_a_pruned_one_is_as_large_as_the_table_says_and_loads_again(tmp_path):
    unet, space = random_unet(), space_of(TINY)
    assert "conv_out" in {unit.name for unit in space.units}
    kept = random_kept(space.units, 2)
    pruned = family_of(unet).cut(unet, space.units, kept)
    assert count_params(pruned) == space.num_params(widths_of(kept))
    assert count_macs(pruned) == space.macs(widths_of(kept))
    save_expert(tmp_path, pruned, TINY, kept)
    loaded = load_expert(tmp_path)
    assert_same(loaded.state_dict(), pruned.state_dict())
    assert torch.equal(output_of(loaded), output_of(pruned))


@pytest.mark.parametrize("config", [TINY, AURA], ids=["UNet2DModel", "AuraFlow"])
@pytest.mark.usefixtures("undescribed")
def test_the_refit_brings_the_prediction_nearer_to_the_bases(config):
    base, units = random_aura() if config is AURA else random_unet(), space_of(config).units
    kept = {unit.name: tuple(range((unit.width + 1) // 2)) for unit in units}
    cut, pruned = (family_of(base).cut(base, units, kept) for _ in range(2))
    batches = [noised(config, 48, seed=seed) for seed in (1, 2)]
    weights = error_weights(base, batches, SCHEDULE)
    refit(base, pruned, kept_outputs(base, units, kept), batches, SCHEDULE, weights)
    unseen = noised(config, 32, seed=3)
    wanted = by_steps(base, unseen)
    before, after = (
        float((by_steps(network, unseen) - wanted).square().mean()) for network in (cut, pruned)
    )
    assert after < 0.8 * before


def test_a_class_that_has_no_description_is_cut_saved_and_loaded(tmp_path, caplog):
    graph._traced.cache_clear()
    network, units, batch = random_aura(), network_structure(AURA).units, noised(AURA, 2)
    assert [unit.name for unit in units] == [
        "joint_transformer_blocks.0.attn",
        "single_transformer_blocks.0.attn",
    ]
    assert "heads alone can be pruned" in caplog.text  # Torch-Pruning fails at its parameters
    assert {unit.width for unit in units} == {4}
    timesteps = SCHEDULE.model_timesteps(batch.timesteps)
    with torch.no_grad():
        expected = network(batch.x_t(SCHEDULE), batch.labels[STATES], timesteps).sample
    assert torch.equal(by_steps(network, batch), expected)
    save_network(network, tmp_path / "whole")
    assert torch.equal(by_steps(load_network(tmp_path / "whole"), batch), expected)
    kept = random_kept(units, 0)
    pruned = family_of(network).cut(network, units, kept)
    save_expert(tmp_path / "expert", pruned, AURA, kept)
    loaded = load_expert(tmp_path / "expert")
    assert torch.equal(by_steps(loaded, batch), by_steps(pruned, batch))
    with pytest.raises(ConfigError, match="has a AuraFlowTransformer2DModel: only a "):
        check_class("AuraFlowTransformer2DModel", "it has")  # it reads captions


@pytest.mark.parametrize(
    "method", ["taylor", pytest.param("offline", marks=pytest.mark.slow)]
)  # the latter measures every unit's cuts as candidates
@pytest.mark.usefixtures("undescribed")
def test_a_saved_one_is_pruned(method, tmp_path):
    save_network(random_unet(), tmp_path / "unet")
    counts = {"num_images": 4, "num_refit_images": 4, "num_levels": 1, "num_passes": 1}
    rounds = {"num_rounds": 1, "num_candidates": 1}
    config = small_config(
        prune={"method": method, **counts, **rounds},
        evaluate={"cache_dir": str(tmp_path / "cache")},
    )
    group = one_group(config.diffusion, config.sampler, (0, 999), 0.7)
    report = prune_model(tmp_path / "unet", config, group, tmp_path / "out")
    assert report["macs"] <= report["macs_limit"] == int(0.7 * report["macs_base"])
    assert report["loss_refit"] != report["loss_cut"]
    assert count_macs(load_expert(tmp_path / "out")) == report["macs"]


@pytest.mark.usefixtures("undescribed")
def test_times_of_its_units_are_not_measured(tmp_path):
    with pytest.raises(ConfigError, match=r"prune\.objective must be macs for a UNet2DModel"):
        next(timed_space(tmp_path / "times", TINY, space_of(TINY), 1))


@pytest.mark.usefixtures("undescribed")
def test_its_limits_are_not_measured():
    config = small_config(plan={"schedule": "measured"}, prune={"method": "offline"})
    with pytest.raises(ConfigError, match=r"plan\.schedule must not be measured, nor"):
        space_and_plan(config, TINY)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"_class_name": "NoModel"}, "diffusers has no such model"),
        ({"_class_name": "VQModel"}, "it takes no timestep"),
        ({"_class_name": "PriorTransformer"}, "must say how wide they are"),
        (
            {"_class_name": "UNet1DModel", "sample_size": 8},
            "could not be found by running it on an image",
        ),
    ],
)
def test_what_cannot_be_traced_is_one_clear_error(config, message):
    with pytest.raises(UnsupportedModelError, match=message):
        network_structure(config)


def test_its_stream_cannot_be_pruned():
    with pytest.raises(UnsupportedModelError, match=r"set prune\.space to inner"):
        network_structure(AURA, "full")
