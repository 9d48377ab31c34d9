"""A transformer of two streams, image and caption, whose captions the tests draw at random."""

from dataclasses import replace

import pytest
import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tdc_ray.config.diffusion import DiffusionConfig
from tdc_ray.diffusion.expert_denoiser import ExpertDenoiser
from tdc_ray.diffusion.process import NoisedBatch, noise_schedule
from tdc_ray.errors import UnsupportedModelError
from tdc_ray.models.denoiser import count_params, has_classes
from tdc_ray.models.families import (
    build_network,
    family_of,
    load_network,
    save_network,
    steps_of,
)
from tdc_ray.models.network_config import SD3_CLASS, STATES, NetworkConfig
from tdc_ray.models.saved_expert import load_expert, save_expert
from tdc_ray.models.sd3.layers import CAPTION_TOKENS
from tdc_ray.models.step import run
from tdc_ray.models.structure import network_structure
from tdc_ray.models.surgery import kept_outputs
from tdc_ray.models.units import keep_everything
from tdc_ray.pruning.noised import first_state
from tdc_ray.pruning.refit.error_weights import error_weights
from tdc_ray.pruning.refit.refit import refit
from tdc_ray.pruning.second_order import quadratic_model
from tdc_ray.pruning.sensitivity import (
    masked_units,
    measure_units,
    reader_layers,
    solve_units,
    swapped_readers,
)
from tdc_ray.pruning.space import space_of
from tests.small import assert_same, random_kept, widths_of

SD3: NetworkConfig = {  # the kind of Stable Diffusion 3
    "_class_name": SD3_CLASS,
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 12,
    "num_attention_heads": 4,
    "joint_attention_dim": 16,
    "caption_projection_dim": 48,
    "pooled_projection_dim": 20,
    "pos_embed_max_size": 6,
}
SD35: NetworkConfig = {**SD3, "dual_attention_layers": [0], "qk_norm": "rms_norm"}
BOTH = pytest.mark.parametrize("config", [SD3, SD35], ids=["3", "3.5"])
MEDIUM: NetworkConfig = {  # stabilityai/stable-diffusion-3-medium-diffusers
    "_class_name": SD3_CLASS,
    "num_layers": 24,
    "num_attention_heads": 24,
    "caption_projection_dim": 1536,
    "pos_embed_max_size": 192,
}
MEDIUM_35: NetworkConfig = {  # stabilityai/stable-diffusion-3.5-medium
    **MEDIUM,
    "dual_attention_layers": list(range(13)),
    "pos_embed_max_size": 384,
    "qk_norm": "rms_norm",
}
LARGE_35: NetworkConfig = {  # stabilityai/stable-diffusion-3.5-large
    **MEDIUM,
    "num_layers": 38,
    "num_attention_heads": 38,
    "caption_projection_dim": 2432,
    "qk_norm": "rms_norm",
}
SCHEDULE = noise_schedule(DiffusionConfig(prediction_type="flow_prediction"))


def random_sd3(config: NetworkConfig, seed: int = 0) -> SD3Transformer2DModel:
    torch.manual_seed(seed)
    network = build_network(config).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network


def noised(size: int, tokens: int = 5, seed: int = 0, width: int = 8) -> NoisedBatch:
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(size, *shape, generator=generator)

    captions = {STATES: randn(tokens, 16), "pooled_projections": randn(20)}
    x_0, epsilon = randn(4, 8, width), randn(4, 8, width)
    return NoisedBatch(x_0, epsilon, torch.arange(size) * 7 + 200, captions)


@torch.no_grad()
def by_steps(network: SD3Transformer2DModel, batch: NoisedBatch) -> Tensor:
    return run(steps_of(network), first_state(network, batch, SCHEDULE)).hidden


@torch.no_grad()
def by_diffusers(network: SD3Transformer2DModel, batch: NoisedBatch) -> Tensor:
    timesteps = SCHEDULE.model_timesteps(batch.timesteps)
    states, pooled = batch.labels[STATES], batch.labels["pooled_projections"]
    return network(batch.x_t(SCHEDULE), states, pooled, timesteps).sample


def error(
    network: SD3Transformer2DModel, base: SD3Transformer2DModel, batch: NoisedBatch
) -> float:
    return float((by_steps(network, batch) - by_steps(base, batch)).square().mean())


@BOTH
@pytest.mark.parametrize("width", [8, 12])
def test_the_steps_are_the_forward_pass(config, width):
    network, batch = random_sd3(config), noised(3, width=width)
    expected = by_diffusers(network, batch)
    torch.testing.assert_close(by_steps(network, batch), expected, rtol=1e-5, atol=1e-5)


def count_macs(network: SD3Transformer2DModel) -> float:
    """Macs by torch's counter, of an image and a caption of diffusers' length."""
    network, settings = network.to("meta"), network.config
    side, channels = settings["sample_size"], settings["in_channels"]
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        network(
            torch.ones(1, channels, side, side),
            torch.ones(1, CAPTION_TOKENS, settings["joint_attention_dim"]),
            torch.ones(1, settings["pooled_projection_dim"]),
            torch.ones(1),
        )
    return counter.get_total_flops() / 2


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(SD3, id="tiny-3"),
        pytest.param(SD35, id="tiny-3.5"),
        pytest.param(MEDIUM, id="medium", marks=pytest.mark.slow),
        pytest.param(MEDIUM_35, id="medium-3.5", marks=pytest.mark.slow),
        pytest.param(LARGE_35, id="large-3.5", marks=pytest.mark.slow),
    ],
)
def test_macs_and_parameters_are_those_that_torch_counts(config):
    with torch.device("meta"):
        network = build_network(config)
    structure = network_structure(config)
    assert structure.num_params == count_params(network)
    assert structure.macs == count_macs(network)


def test_the_released_ones_are_as_large_as_they_are():
    found = [network_structure(config) for config in (MEDIUM, MEDIUM_35, LARGE_35)]
    assert [one.num_params for one in found] == [2_028_328_000, 2_243_171_520, 8_056_627_520]
    assert [round(one.macs / 1e9) for one in found] == [4452, 5625, 15561]  # 1024 x 1024 pixels


@BOTH
def test_a_pruned_one_is_as_large_as_the_table_says_and_loads_again(config, tmp_path):
    network, space = random_sd3(config), space_of(config)
    kept = random_kept(space.units, 4)
    pruned = family_of(network).cut(network, space.units, kept)
    assert space.num_params(widths_of(kept)) == count_params(pruned)
    save_expert(tmp_path, pruned, config, kept)
    loaded, batch = load_expert(tmp_path), noised(2)
    assert_same(loaded.state_dict(), pruned.state_dict())
    assert torch.equal(by_steps(loaded, batch), by_steps(pruned, batch))
    assert torch.equal(by_diffusers(loaded, batch), by_diffusers(pruned, batch))
    assert space.macs(widths_of(kept)) == count_macs(pruned)
    with pytest.raises(UnsupportedModelError, match="could not be loaded again"):
        pruned.save_pretrained(tmp_path / "plain")
    with pytest.raises(OSError, match=r"no file named config\.json"):
        SD3Transformer2DModel.from_pretrained(tmp_path)


@BOTH
def test_before_the_refit_a_pruned_ones_outputs_are_those_of_the_masked_base(config):
    base, units, batch = random_sd3(config), space_of(config).units, noised(3)
    kept = random_kept(units, 4)
    pruned = family_of(base).cut(base, units, kept)
    layers = reader_layers(steps_of(base))
    with torch.no_grad():
        for unit in units:
            gone = sorted({*range(unit.width)} - {*kept[unit.name]})
            for layer in layers[unit.name].values():
                layer.weight[:, unit.channel_indices(gone)] = 0
    torch.testing.assert_close(
        by_diffusers(pruned, batch), by_diffusers(base, batch), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("part", ["attn", "attn2", "ff", "ff_context"])
def test_the_refit_brings_the_prediction_nearer_to_the_bases(part):
    base, units = random_sd3(SD35), space_of(SD35).units
    halved = [unit for unit in units if unit.name.endswith(f".{part}")]
    kept = keep_everything(units) | {one.name: (*range(one.width // 2),) for one in halved}
    cut, pruned = (family_of(base).cut(base, units, kept) for _ in range(2))
    batches = [noised(48, seed=seed) for seed in (1, 2)]
    weights = error_weights(base, batches, SCHEDULE)
    refit(base, pruned, kept_outputs(base, units, kept), batches, SCHEDULE, weights)
    unseen = noised(32, seed=3)
    assert error(pruned, base, unseen) < 0.8 * error(cut, base, unseen)
    layer = {"ff": "net.2", "ff_context": "net.2"}.get(part, "to_out.0")
    names = [f"{halved[0].name}.{layer}"]
    if part == "attn":
        names.append(f"{halved[0].name}.to_add_out")
    for name in names:
        one, other = (network.get_submodule(name).weight for network in (cut, pruned))
        assert not torch.equal(one, other)


def test_a_refit_from_the_disk_is_the_same(monkeypatch):
    base, units, batches = random_sd3(SD35), space_of(SD35).units, [noised(8)]
    weights, kept = error_weights(base, batches, SCHEDULE), random_kept(units, 4)
    found = []
    for size in (2**20, 0):
        monkeypatch.setattr("tdc_ray.pruning.refit.refit.BYTES_IN_MEMORY", size)
        pruned = family_of(base).cut(base, units, kept)
        refit(base, pruned, kept_outputs(base, units, kept), batches, SCHEDULE, weights)
        found.append(pruned.state_dict())
    assert_same(*found)


def test_cuts_are_solved_for_in_both_streams_and_predicted():
    base, units, batches = random_sd3(SD35), space_of(SD35).units, [noised(32)]
    weights = error_weights(base, batches, SCHEDULE, [unit.name for unit in units])
    scores, solved, _ = solve_units(base, units, {}, batches, SCHEDULE, weights, 2)
    masked = masked_units(base, units, scores, 2)
    measured, masked_only = (
        measure_units(base, solutions, batches, SCHEDULE) for solutions in (solved, masked)
    )
    nearest = {name: {max(cuts): cuts[max(cuts)]} for name, cuts in solved.items()}
    model = quadratic_model(base, nearest, batches, SCHEDULE, num_probes=32)
    layers, wanted = reader_layers(steps_of(base)), by_steps(base, batches[0])
    assert len(solved["transformer_blocks.0.attn"][1]) == 2
    assert len(solved["transformer_blocks.1.attn"][1]) == 1  # its caption ends there
    cuts = [(name, width) for name, widths in model.levels.items() for width in widths]
    for place, (name, width) in enumerate(cuts):
        assert measured[name][width] != masked_only[name][width] != 0
        found = []
        for solutions in (solved, masked):
            with swapped_readers(layers[name].values(), solutions[name][width]):
                moved = by_steps(base, batches[0]) - wanted
            found.append(float(moved.square().mean()))
        assert found[0] < found[1]
        assert model.products[place][place] == pytest.approx(found[0], rel=0.3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"caption_projection_dim": 32}, "caption_projection_dim must be .* 48, got 32"),
        ({"pos_embed_max_size": 3}, "sample_size must be at most .* 6, got 8"),
        ({"qk_norm": "layer_norm"}, "qk_norm"),
    ],
)
def test_contradictory_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        network_structure({**SD3, **changes})


def test_captions_are_split_and_joined_with_their_images():
    batch = noised(5)
    again = NoisedBatch.join([*batch.split(2)]).labels
    assert again.keys() == batch.labels.keys()
    for name, tensor in batch.labels.items():
        assert torch.equal(again[name], tensor)


def test_without_captions_it_is_not_run():
    with pytest.raises(UnsupportedModelError, match="SD3Transformer2DModel reads captions"):
        by_steps(random_sd3(SD3), replace(noised(2), labels=None))


def test_its_stream_cannot_be_pruned():
    with pytest.raises(UnsupportedModelError, match=r"set prune\.space to inner"):
        network_structure(SD3, "full")


def test_a_saved_one_loads_in_diffusers(tmp_path):
    network = random_sd3(SD35)
    assert not has_classes(network)
    save_network(network, tmp_path)
    assert_same(load_network(tmp_path).state_dict(), network.state_dict())
    plain = SD3Transformer2DModel.from_pretrained(tmp_path)
    assert_same(plain.state_dict(), network.state_dict())


def test_pruned_experts_stand_in_for_it_and_load_again(tmp_path):
    base, units, batch = random_sd3(SD35), space_of(SD35).units, noised(2)
    kept = [random_kept(units, seed) for seed in (1, 2)]
    experts = [family_of(base).cut(base, units, one) for one in kept]
    denoiser = ExpertDenoiser(experts, [(0, 499), (500, 1000)], kept=kept, base=SD35)
    denoiser.save_pretrained(tmp_path / "experts")
    loaded = ExpertDenoiser.from_pretrained(tmp_path / "experts")
    for offset, expert in zip((0, 400), experts, strict=True):
        at = replace(batch, timesteps=batch.timesteps + offset)
        expected = by_diffusers(expert, at)
        assert torch.equal(by_diffusers(denoiser, at), expected)
        assert torch.equal(by_diffusers(loaded, at), expected)
