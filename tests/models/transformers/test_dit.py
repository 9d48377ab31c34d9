import itertools

import pytest
import torch
from diffusers import DiTTransformer2DModel
from torch.utils.flop_counter import FlopCounterMode

from tdc_ray.errors import CheckpointError, UnsupportedModelError
from tdc_ray.models.denoiser import count_params, has_classes
from tdc_ray.models.families import (
    build_network,
    family_of,
    given_config,
    load_config,
    load_network,
    save_network,
)
from tdc_ray.models.forward import predict
from tdc_ray.models.network_config import NetworkConfig, num_class_embeds
from tdc_ray.models.saved_expert import load_expert, save_expert
from tdc_ray.models.step import run
from tdc_ray.models.structure import network_structure
from tdc_ray.pruning.space import space_of
from tdc_ray.storage.files import read_json, write_json
from tests.small import TINY_DIT, assert_same, random_dit, random_kept, widths_of

XL: NetworkConfig = {
    "_class_name": "DiTTransformer2DModel",
    "in_channels": 4,
    "out_channels": 8,
    "sample_size": 32,
}
"""DiT-XL/2 at 256: diffusers' defaults, and variances."""


def changed(**changes: object) -> NetworkConfig:
    return {**TINY_DIT, **changes}


CONFIGS = {
    "tiny": TINY_DIT,
    "variances": changed(out_channels=2),
    "colours, larger patches": changed(in_channels=3, out_channels=None, patch_size=4),
    "gated, affine, no bias": changed(
        activation_fn="geglu", norm_elementwise_affine=True, attention_bias=False
    ),
}


@pytest.fixture(params=CONFIGS)
def config(request) -> NetworkConfig:
    return CONFIGS[request.param]


def inputs_of(config: NetworkConfig, count: int = 2) -> tuple[torch.Tensor, ...]:
    size, channels = config["sample_size"], config["in_channels"]
    generator = torch.Generator().manual_seed(1)
    x_t = torch.randn(count, channels, size, size, generator=generator)
    return x_t, torch.arange(count) * 300 + 3, torch.arange(count) % 11


def count_macs(network: DiTTransformer2DModel, config: NetworkConfig) -> float:
    """Macs of one image, counted by torch."""
    network = network.to("meta")
    with FlopCounterMode(display=False) as counter:
        network(*(tensor.to("meta") for tensor in inputs_of(config, 1)))
    return counter.get_total_flops() / 2


def test_macs_and_parameters_are_those_that_torch_counts(config):
    network, structure = random_dit(config), network_structure(config)
    assert structure.num_params == count_params(network)
    assert structure.macs == count_macs(network, config)


def test_macs_and_parameters_of_a_pruned_one_are_those_of_the_table(config):
    space, network = space_of(config), random_dit(config)
    kept = random_kept(space.units, 3)
    pruned = family_of(network).cut(network, space.units, kept)
    assert space.num_params(widths_of(kept)) == count_params(pruned)
    assert space.macs(widths_of(kept)) == count_macs(pruned, config)


def test_dit_xl_2_takes_the_macs_that_were_published():
    # 118.64 G; in diffusers every block has embeddings of its own
    assert network_structure(XL).macs == pytest.approx(118.64e9, rel=2e-3)


@pytest.mark.slow
def test_dit_xl_2_is_as_large_as_torch_counts():
    with torch.device("meta"):
        network = build_network(XL)
    structure = network_structure(XL)
    assert structure.macs == count_macs(network, XL)
    assert structure.num_params == count_params(network)


@torch.inference_mode()
def test_the_steps_are_the_forward_pass(config):
    network = random_dit(config)
    family, inputs = family_of(network), inputs_of(config)
    output = run(family.steps(network), family.start(network, *inputs)).hidden
    torch.testing.assert_close(output, network(*inputs).sample, rtol=1e-4, atol=1e-5)
    channels = config["in_channels"]
    predicted = predict(network, *inputs, num_channels=channels)
    torch.testing.assert_close(predicted, output[:, :channels], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_pruned_one_computes_what_the_whole_one_does_without_what_is_pruned(config):
    network = random_dit(config)
    family, units, inputs = family_of(network), space_of(config).units, inputs_of(config)
    kept = random_kept(units, 5)
    pruned = family.cut(network, units, kept)
    readers = {step.name: step for step in family.steps(network)}
    for unit in units:
        gone = unit.channel_indices(i for i in range(unit.width) if i not in kept[unit.name])
        step = readers[unit.name]
        step.module.get_submodule(step.output_layers["hidden"]).weight[:, gone] = 0
    expected = network(*inputs).sample
    torch.testing.assert_close(pruned(*inputs).sample, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_saved_one_loads_here_and_in_diffusers_the_same(tmp_path):
    network, inputs = random_dit(), inputs_of(TINY_DIT)
    save_network(network, tmp_path / "unet")
    for loaded in (
        load_network(tmp_path / "unet"),
        DiTTransformer2DModel.from_pretrained(tmp_path / "unet", low_cpu_mem_usage=False).eval(),
    ):
        assert torch.equal(loaded(*inputs).sample, network(*inputs).sample)
    for config in (load_config(tmp_path / "unet"), given_config(tmp_path / "unet")):
        assert network_structure(config) == network_structure(TINY_DIT)


@torch.no_grad()
def test_a_saved_pruned_one_loads_the_same(tmp_path):
    network, units = random_dit(), space_of(TINY_DIT).units
    kept = random_kept(units, 2)
    pruned = family_of(network).cut(network, units, kept)
    save_expert(tmp_path / "expert", pruned, TINY_DIT, kept)
    loaded = load_expert(tmp_path / "expert")
    assert_same(loaded.state_dict(), pruned.state_dict())
    inputs = inputs_of(TINY_DIT)
    assert torch.equal(loaded(*inputs).sample, pruned(*inputs).sample)
    with pytest.raises(UnsupportedModelError, match="keeps no widths"):
        pruned.save_pretrained(tmp_path / "other")


def test_the_config_of_a_released_one_names_the_class_that_all_transformers_had(tmp_path):
    save_network(random_dit(), tmp_path)
    document = read_json(tmp_path / "config.json")
    write_json(tmp_path / "config.json", {**document, "_class_name": "Transformer2DModel"})
    assert given_config(tmp_path)["_class_name"] == "DiTTransformer2DModel"
    assert isinstance(load_network(tmp_path), DiTTransformer2DModel)


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"num_layers": "2"}, CheckpointError, "num_layers"),
        ({"sample_size": 9}, UnsupportedModelError, "no multiple of the patch_size"),
        ({"activation_fn": "relu"}, UnsupportedModelError, "activation_fn relu"),
    ],
)
def test_a_malformed_config_is_refused(tmp_path, changes, error, text):
    write_json(tmp_path / "config.json", changed(**changes))
    with pytest.raises(error, match=text):
        given_config(tmp_path)


def test_no_label_is_dropped_by_the_network_itself():
    network = random_dit().train()
    assert has_classes(network)
    assert num_class_embeds(network.config) == 11
    outputs = [network(*inputs_of(TINY_DIT, 8)).sample for _ in range(4)]
    assert all(itertools.starmap(torch.equal, itertools.pairwise(outputs)))


def test_a_new_one_predicts_nothing_at_first():
    assert not build_network(TINY_DIT)(*inputs_of(TINY_DIT)).sample.any()
