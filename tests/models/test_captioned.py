"""What holds of every class of networks that are conditioned on captions."""

from dataclasses import replace

import pytest
import torch

from tdc_ray.diffusion.expert_denoiser import ExpertDenoiser
from tdc_ray.errors import UnsupportedModelError
from tdc_ray.models.denoiser import count_params, has_classes
from tdc_ray.models.families import (
    build_network,
    captions_read,
    family_of,
    given_config,
    load_network,
    save_network,
    steps_of,
)
from tdc_ray.models.network_config import NetworkConfig
from tdc_ray.models.saved_expert import load_expert, save_expert
from tdc_ray.models.structure import TEXT_CLASSES, network_structure
from tdc_ray.models.surgery import kept_outputs
from tdc_ray.models.units import keep_everything
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
from tests.models.captioned import (
    CASES,
    Case,
    count_macs,
)
from tests.small import assert_same, random_kept, widths_of

PIXART_512: NetworkConfig = {  # PixArt-alpha/PixArt-XL-2-512x512
    "_class_name": "PixArtTransformer2DModel",
    "sample_size": 64,
    "caption_channels": 4096,
}
SD3_MEDIUM: NetworkConfig = {  # stabilityai/stable-diffusion-3-medium-diffusers
    "_class_name": "SD3Transformer2DModel",
    "num_layers": 24,
    "num_attention_heads": 24,
    "caption_projection_dim": 1536,
    "pos_embed_max_size": 192,
}
SANA_600M: NetworkConfig = {  # Efficient-Large-Model/Sana_600M_1024px_diffusers
    "_class_name": "SanaTransformer2DModel",
    "num_attention_heads": 36,
    "num_layers": 28,
    "num_cross_attention_heads": 16,
    "cross_attention_head_dim": 72,
    "cross_attention_dim": 1152,
}
CLASS = {"_class_name": "UNet2DConditionModel"}
XL: NetworkConfig = {
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
RELEASED: dict[str, tuple[NetworkConfig, str, float, int]] = {
    "pixart-512": (PIXART_512, "pixart", 610.86, 618),
    "pixart-1024": ({**PIXART_512, "sample_size": 128}, "pixart", 611.35, 3255),
    "sd3-medium": (SD3_MEDIUM, "sd3", 2028.33, 4452),
    "sd3.5-medium": (
        {
            **SD3_MEDIUM,
            "dual_attention_layers": list(range(13)),
            "pos_embed_max_size": 384,
            "qk_norm": "rms_norm",
        },
        "sd3",
        2243.17,
        5625,
    ),
    "sd3.5-large": (
        {
            **SD3_MEDIUM,
            "num_layers": 38,
            "num_attention_heads": 38,
            "caption_projection_dim": 2432,
            "qk_norm": "rms_norm",
        },
        "sd3",
        8056.63,
        15561,
    ),
    "sana-600m": (SANA_600M, "sana", 591.75, 561),
    # Efficient-Large-Model/Sana_1600M_1024px_diffusers: 3.21 GB in half precision
    "sana-1600m": ({"_class_name": "SanaTransformer2DModel"}, "sana", 1604.46, 1483),
    "sd-1.5": ({**CLASS, "sample_size": 64, "cross_attention_dim": 768}, "unet", 859.52, 402),
    "sd-2.1": (
        {
            **CLASS,
            "sample_size": 96,
            "attention_head_dim": [5, 10, 20, 20],
            "cross_attention_dim": 1024,
            "use_linear_projection": True,
        },
        "unet",
        865.91,
        1075,
    ),
    "sd-xl": (XL, "unet", 2567.46, 3381),
}
"""Configs, the case that is called alike, millions of parameters, and 10^9 macs."""


@pytest.fixture(params=CASES)
def case(request) -> Case:
    return CASES[request.param]


def test_every_class_has_a_case():
    assert {case.config["_class_name"] for case in CASES.values()} == {*TEXT_CLASSES}


def test_the_steps_are_the_forward_pass(case):
    network = case.network()
    for width in (8, 12):
        batch = case.noised(3, width=width)
        expected = case.by_diffusers(network, batch)
        torch.testing.assert_close(case.by_steps(network, batch), expected, rtol=1e-4, atol=1e-4)


def test_macs_and_parameters_are_those_that_torch_counts(case):
    network, structure = case.network(), network_structure(case.config)
    assert structure.num_params == count_params(network)
    assert structure.macs == count_macs(network, case.call)


@pytest.mark.parametrize("name", RELEASED)
def test_the_released_ones_are_as_large_as_they_are(name):
    config, _, millions, giga_macs = RELEASED[name]
    structure = network_structure(config)
    assert round(structure.num_params / 1e6, 2) == millions
    assert round(structure.macs / 1e9) == giga_macs


@pytest.mark.slow
@pytest.mark.parametrize("name", RELEASED)
def test_the_released_ones_are_as_large_as_torch_counts(name):
    config, case, *_ = RELEASED[name]
    with torch.device("meta"):
        network = build_network(config)
    structure = network_structure(config)
    assert structure.num_params == count_params(network)
    assert structure.macs == count_macs(network, CASES[case].call)


def test_a_pruned_one_is_as_large_as_the_table_says_and_loads_again(case, tmp_path):
    network, space = case.network(), space_of(case.config)
    kept = random_kept(space.units, 4)
    pruned = family_of(network).cut(network, space.units, kept)
    assert space.num_params(widths_of(kept)) == count_params(pruned)
    save_expert(tmp_path, pruned, case.config, kept)
    loaded, batch = load_expert(tmp_path), case.noised(2)
    assert_same(loaded.state_dict(), pruned.state_dict())
    assert torch.equal(case.by_steps(loaded, batch), case.by_steps(pruned, batch))
    assert torch.equal(case.by_diffusers(loaded, batch), case.by_diffusers(pruned, batch))
    assert space.macs(widths_of(kept)) == count_macs(pruned, case.call)
    with pytest.raises(UnsupportedModelError, match="could not be loaded again"):
        pruned.save_pretrained(tmp_path / "plain")


def test_before_the_refit_a_pruned_ones_outputs_are_those_of_the_masked_base(case):
    base, units, batch = case.network(), space_of(case.config).units, case.noised(3)
    kept = random_kept(units, 4)
    pruned = family_of(base).cut(base, units, kept)
    layers = reader_layers(steps_of(base))
    with torch.no_grad():
        for unit in units:
            gone = sorted({*range(unit.width)} - {*kept[unit.name]})
            for layer in layers[unit.name].values():
                layer.weight[:, unit.channel_indices(gone)] = 0
    expected = case.by_diffusers(base, batch)
    torch.testing.assert_close(case.by_diffusers(pruned, batch), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "part"),
    [(name, part) for name in ("pixart", "sd3.5", "sana", "unet") for part in CASES[name].parts],
)
def test_the_refit_brings_the_prediction_nearer_to_the_bases(name, part):
    case = CASES[name]
    base, units = case.network(), space_of(case.config).units
    halved = [unit for unit in units if unit.name.endswith(f".{part}")]
    kept = keep_everything(units) | {one.name: (*range(one.width // 2),) for one in halved}
    cut, pruned = (family_of(base).cut(base, units, kept) for _ in range(2))
    batches = [case.noised(48, seed=seed) for seed in (1, 2)]
    weights = error_weights(base, batches, case.schedule)
    refit(base, pruned, kept_outputs(base, units, kept), batches, case.schedule, weights)
    unseen = case.noised(32, seed=3)
    assert case.error(pruned, base, unseen) < 0.8 * case.error(cut, base, unseen)
    (step,) = (step for step in steps_of(pruned) if step.name == halved[0].name)
    for layer in step.output_layers.values():
        one, other = (
            network.get_submodule(f"{step.name}.{layer}").weight for network in (cut, pruned)
        )
        assert not torch.equal(one, other)


@pytest.mark.parametrize("name", ["sd3.5", "sana"])  # of two streams; without a bias behind units
def test_cuts_are_solved_for_and_predicted(name):
    case = CASES[name]
    base, units, batches = case.network(), space_of(case.config).units, [case.noised(32)]
    weights = error_weights(base, batches, case.schedule, [unit.name for unit in units])
    scores, solved, _ = solve_units(base, units, {}, batches, case.schedule, weights, 2)
    masked = masked_units(base, units, scores, 2)
    measured, masked_only = (
        measure_units(base, solutions, batches, case.schedule) for solutions in (solved, masked)
    )
    nearest = {name: {max(cuts): cuts[max(cuts)]} for name, cuts in solved.items()}
    model = quadratic_model(base, nearest, batches, case.schedule, num_probes=32)
    layers, wanted = reader_layers(steps_of(base)), case.by_steps(base, batches[0])
    cuts = [(name, width) for name, widths in model.levels.items() for width in widths]
    for place, (name, width) in enumerate(cuts):
        assert len(solved[name][width]) == len(layers[name])
        assert measured[name][width] != masked_only[name][width] != 0
        found = []
        for solutions in (solved, masked):
            with swapped_readers(layers[name].values(), solutions[name][width]):
                moved = case.by_steps(base, batches[0]) - wanted
            found.append(float(moved.square().mean()))
        assert found[0] < found[1]
        assert model.products[place][place] == pytest.approx(found[0], rel=0.3)


@pytest.mark.parametrize("name", ["sd3.5", "sana"])
def test_pruned_experts_stand_in_for_it_and_load_again(name, tmp_path):
    case = CASES[name]
    base, units, batch = case.network(), space_of(case.config).units, case.noised(2)
    kept = [random_kept(units, seed) for seed in (1, 2)]
    experts = [family_of(base).cut(base, units, one) for one in kept]
    denoiser = ExpertDenoiser(experts, [(0, 499), (500, 1000)], kept=kept, base=case.config)
    denoiser.save_pretrained(tmp_path / "experts")
    loaded = ExpertDenoiser.from_pretrained(tmp_path / "experts")
    for offset, expert in zip((0, 400), experts, strict=True):
        at = replace(batch, timesteps=batch.timesteps + offset)
        expected = case.by_diffusers(expert, at)
        assert torch.equal(case.by_diffusers(denoiser, at), expected)
        assert torch.equal(case.by_diffusers(loaded, at), expected)


@pytest.mark.parametrize("name", ["pixart", "sd3.5", "sana"])
def test_a_saved_one_loads_here_and_in_diffusers(name, tmp_path):
    case = CASES[name]
    network, batch = case.network(), case.noised(2)
    assert not has_classes(network)
    save_network(network, tmp_path)
    for loaded in (load_network(tmp_path), type(network).from_pretrained(tmp_path)):
        assert_same(loaded.state_dict(), network.state_dict())
        assert torch.equal(case.by_diffusers(loaded, batch), case.by_diffusers(network, batch))


def test_a_pixart_loads_under_the_name_that_all_transformers_had(tmp_path):
    case = CASES["pixart"]
    network = case.network()
    save_network(network, tmp_path)
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace(case.config["_class_name"], "Transformer2DModel"))
    assert given_config(tmp_path)["_class_name"] == case.config["_class_name"]
    assert_same(load_network(tmp_path).state_dict(), network.state_dict())


def test_settings_of_its_file_that_a_class_does_not_know_are_kept_and_do_not_matter(tmp_path):
    """As released PixArt-alpha's have them."""
    case = CASES["pixart"]
    save_network(case.network(), tmp_path)
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace("{", '{ "double_self_attention": false,', 1))
    loaded = load_network(tmp_path)
    assert "double_self_attention" in loaded.config
    assert captions_read(loaded) == captions_read(case.network())


def test_streams_cannot_be_pruned(case):
    with pytest.raises(UnsupportedModelError, match=r"set prune\.space to inner"):
        network_structure(case.config, "full")
