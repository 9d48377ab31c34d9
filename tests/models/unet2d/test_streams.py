import gc
import random
import weakref

import pytest
import torch
import torch_pruning as tp
from diffusers import UNet2DModel
from torch import nn

from tdc_ray.models.denoiser import count_params
from tdc_ray.models.saved_expert import load_expert, save_expert
from tdc_ray.models.structure import units_for
from tdc_ray.models.surgery import coupled_parameters, kept_outputs
from tdc_ray.models.unet2d.architectures import ARCHITECTURES
from tdc_ray.models.unet2d.layers import all_layers
from tdc_ray.models.unet2d.streams import dependency_graph, root_of
from tdc_ray.models.unet2d.surgery import cut
from tdc_ray.models.unet2d.unet import build_unet
from tdc_ray.models.unet2d.units import units_of
from tdc_ray.models.units import Unit, keep_everything
from tdc_ray.pruning.space import space_of
from tests.models.configs import CONFIGS, random_config
from tests.models.counting import count_macs
from tests.small import TINY, output_of, random_kept, random_unet, widths_of

UNITS = units_of(TINY, "full")


def streams_of(config) -> list[Unit]:
    return [unit for unit in units_of(config, "full") if unit.kind == "stream"]


def stream_named(name: str, config=TINY) -> Unit:
    return next(unit for unit in streams_of(config) if unit.name == f"stream:{name}")


def sum_of_squares(unet: UNet2DModel) -> float:
    return sum(float(parameter.detach().square().sum()) for parameter in unet.parameters())


# --- which streams there are -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("variant", "module", "width", "channels"),
    [
        ("scale-shift", "conv_in", 2, 8),  # 16 channels in 8 groups
        ("scale-shift", "up_blocks.0.upsamplers.0", 4, 8),
        ("two-groups", "conv_in", 8, 2),
        ("other-groups-in-the-middle", "conv_in", 4, 4),
        ("other-groups-in-the-middle", "down_blocks.1.resnets.0", 2, 16),  # 4 groups and 16
        ("nothing-but-residual-blocks", "down_blocks.2.resnets.0", 3, 8),
        ("one-resolution", "conv_in", 4, 8),
    ],
)
def test_a_step_of_a_stream_has_a_channel_of_every_group_of_its_norms(
    variant, module, width, channels
):
    unit = stream_named(module, CONFIGS[variant])
    assert (unit.width, unit.channels) == (width, channels)


def test_a_stream_with_one_channel_in_each_group_cannot_be_cut():
    names = {unit.name for unit in streams_of(CONFIGS["a-group-per-channel"])}
    assert "stream:conv_in" not in names  # 16 channels in 16 groups
    assert "stream:up_blocks.0.resnets.0" in names


@pytest.mark.parametrize("unit", UNITS, ids=[unit.name for unit in UNITS])
def test_the_steps_of_a_unit_share_out_its_channels(unit):
    every = list(range(unit.width * unit.channels))
    assert (
        sorted(place for step in range(unit.width) for place in unit.channel_indices((step,)))
        == every
    )
    assert unit.channel_indices(range(unit.width)) == every


def test_steps_of_a_stream_are_at_the_same_place_of_every_group():
    unit = stream_named("down_blocks.1.resnets.0")  # 32 channels in 8 groups of 4
    assert unit.channel_indices((1, 3)) == [4 * group + i for group in range(8) for i in (1, 3)]


def test_a_choice_tells_which_units_it_was_made_among():
    for kind in ("inner", "full"):
        units = units_of(TINY, kind)
        assert units_for(TINY, keep_everything(units)) == units


# --- the config's streams and the dependency graph's -----------------------------------------


@pytest.mark.parametrize("name", [*CONFIGS, *ARCHITECTURES])
def test_what_goes_with_a_stream_is_what_torch_pruning_finds(name):
    config = {**CONFIGS, **ARCHITECTURES}[name]
    with torch.device("meta"):
        unet = build_unet(config)
    graph = dependency_graph(unet)
    names = {module: name for name, module in unet.named_modules()}
    for unit in streams_of(config):
        channel = random.Random(unit.name).randrange(unit.width * unit.channels)
        every = range(unit.width * unit.channels)
        group = graph.get_pruning_group(root_of(unet, unit), tp.prune_conv_out_channels, every)
        found = {}
        for item in group.items:
            module = item.dep.target.module
            if list(module.parameters()):
                dim = 0 if graph.is_out_channel_pruning_fn(item.dep.handler) else 1
                pairs = zip(item.idxs, item.root_idxs, strict=True)
                found[names[module], dim] = sorted(i for i, root in pairs if root == channel)
        expected = {
            (part.layer, part.dim): part.indices(torch.tensor([channel])).tolist()
            for part in coupled_parameters(unet, unit)
        }
        assert found == expected, unit.name


@pytest.mark.parametrize("name", CONFIGS)
def test_every_output_but_those_of_the_time_embedding_and_the_model_is_a_units(name):
    owners = {layer.name: {c.unit for c in layer.outputs} for layer in all_layers(CONFIGS[name])}
    nobodys = {layer for layer, units in owners.items() if None in units}
    fixed = {"time_embedding.linear_1", "time_embedding.linear_2", "class_embedding", "conv_out"}
    assert nobodys == fixed & owners.keys()


# --- what a cut leaves -----------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("seed", range(2))
def test_a_cut_model_has_the_weights_of_the_channels_that_are_kept(name, seed):
    config = CONFIGS[name]
    unet, units = random_unet(config), units_of(config, "full")
    kept = random_kept(units, seed)
    pruned = cut(unet, units, kept)
    expected = dict(unet.named_parameters())
    for layer in all_layers(config):
        for dim, channels in ((0, layer.outputs), (1, layer.inputs)):
            if all(some.unit is None for some in channels):
                continue
            index, start = [], 0
            for some in channels:
                unit = next((unit for unit in units if unit.name == some.unit), None)
                places = (
                    range(some.count) if unit is None else unit.channel_indices(kept[unit.name])
                )
                index += [start + place for place in places]
                start += some.count
            weights = [f"{layer.name}.weight"]
            if dim == 0 and layer.has_bias:
                weights.append(f"{layer.name}.bias")
            for weight in weights:
                if dim < expected[weight].ndim:
                    places = torch.tensor(index)
                    expected[weight] = expected[weight].index_select(dim, places)
    for weight, values in pruned.named_parameters():
        assert torch.equal(values, expected[weight]), weight


@pytest.mark.parametrize("name", ["scale-shift", "no-middle", "resampled-by-residual-blocks"])
def test_the_weights_by_channel_are_those_that_a_cut_takes(name):
    config = CONFIGS[name]
    unet, units = random_unet(config).double(), units_of(config, "full")
    whole = sum_of_squares(unet)
    for unit in units:
        if unit.width == 1:
            continue
        step = unit.width - 1
        by_channel = sum(
            part.by_channel(part.parameter.detach().square()).sum(1)
            for part in coupled_parameters(unet, unit)
        )
        others = {**keep_everything(units), unit.name: tuple(range(step))}
        left = sum_of_squares(cut(unet, units, others))
        assert float(by_channel[unit.channel_indices((step,))].sum()) == pytest.approx(
            whole - left
        )


@pytest.mark.parametrize("name", CONFIGS)
def test_modules_say_what_their_weights_are(name):
    config = CONFIGS[name]
    units = units_of(config, "full")
    pruned = cut(random_unet(config), units, random_kept(units, seed=3))
    for module in pruned.modules():
        if isinstance(module, nn.Conv2d):
            assert module.weight.shape[:2] == (module.out_channels, module.in_channels)
        elif isinstance(module, nn.Linear):
            assert module.weight.shape == (module.out_features, module.in_features)
        elif isinstance(module, nn.GroupNorm):
            assert len(module.weight) == module.num_channels
            assert module.num_channels % module.num_groups == 0


def test_kept_channels_stay_in_the_group_they_were_in():
    unet, unit = random_unet(), stream_named("conv_in")
    norm = "down_blocks.0.resnets.0.norm1"
    unet.get_submodule(norm).bias.data = torch.arange(16.0)  # 8 groups of 2 channels
    pruned = cut(unet, [unit], {unit.name: (1,)}).get_submodule(norm)
    assert pruned.num_groups == 8
    assert pruned.bias.tolist() == [1, 3, 5, 7, 9, 11, 13, 15]


@pytest.mark.parametrize("name", ["scale-shift", "time-added", "no-middle", "one-resolution"])
def test_kept_outputs_are_those_of_the_layers_that_lost_some(name):
    config = CONFIGS[name]
    unet, units = random_unet(config), units_of(config, "full")
    kept = random_kept(units, seed=1)
    outputs, pruned = kept_outputs(unet, units, kept), cut(unet, units, kept)
    for layer, module in unet.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            bias = pruned.get_submodule(layer).bias
            assert (layer in outputs) == (len(bias) < len(module.bias)), layer
            if layer in outputs:
                assert torch.equal(bias, module.bias[outputs[layer]]), layer


def test_a_cut_keeps_nothing_of_the_base_in_memory():
    unet = random_unet()
    gc.collect()
    gc.disable()  # what only it can free would pile up from cut to cut
    try:
        pruned = cut(unet, UNITS, random_kept(UNITS, seed=0))
        weights = [weakref.ref(weight) for weight in pruned.parameters()]
        del pruned
        count = sum(weight() is not None for weight in weights)
    finally:
        gc.enable()
    assert count == 0


def test_a_stream_is_cut_where_gradients_are_off():
    kept = random_kept(UNITS, seed=0)
    expected = output_of(cut(random_unet(), UNITS, kept))
    with torch.no_grad():
        assert torch.equal(output_of(cut(random_unet(), UNITS, kept)), expected)


@pytest.mark.parametrize("seed", range(8))
def test_a_random_unet_runs_trains_saves_and_loads_whatever_is_cut(tmp_path, seed):
    config = random_config(seed)
    space = space_of(config, "full")
    kept = random_kept(space.units, seed)
    pruned = cut(random_unet(config), space.units, kept)
    assert count_macs(pruned) == space.macs(widths_of(kept))
    assert count_params(pruned) == space.num_params(widths_of(kept))

    labels = None if config["num_class_embeds"] is None else torch.tensor([7, 2])
    output = pruned(torch.randn(2, 1, 8, 8), torch.tensor([3, 800]), class_labels=labels).sample
    output.square().sum().backward()
    torch.optim.SGD(pruned.parameters(), lr=1e-3).step()  # every weight moves by its gradient
    assert all(parameter.grad is not None for parameter in pruned.parameters())

    save_expert(tmp_path / "expert", pruned, config, kept)
    assert torch.equal(output_of(load_expert(tmp_path / "expert")), output_of(pruned))
