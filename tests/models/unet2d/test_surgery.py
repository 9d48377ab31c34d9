import pytest
import torch
from diffusers import UNet2DModel
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor

from tdc_ray.errors import UnsupportedModelError
from tdc_ray.models.denoiser import count_params
from tdc_ray.models.network_config import NetworkConfig, image_size
from tdc_ray.models.surgery import coupled_parameters
from tdc_ray.models.unet2d.architectures import ARCHITECTURES, architecture
from tdc_ray.models.unet2d.surgery import cut
from tdc_ray.models.unet2d.unet import build_unet
from tdc_ray.models.unet2d.units import units_of
from tdc_ray.models.units import SpaceKind, Unit, keep_everything
from tdc_ray.pruning.space import space_of
from tests.models.configs import CONFIGS, DOWN, UP
from tests.models.counting import count_macs
from tests.small import TINY, assert_same, output_of, random_kept, random_unet, widths_of

FROZEN = {"conv_in.weight", "conv_in.bias"}


@pytest.fixture(params=CONFIGS)
def config(request) -> NetworkConfig:
    return CONFIGS[request.param]


@pytest.fixture(params=["inner", "full"])
def kind(request) -> SpaceKind:
    return request.param


def unit_named(config: NetworkConfig, name: str) -> Unit:
    return next(unit for unit in units_of(config) if unit.name == name)


@torch.no_grad()
def silence(unet: UNet2DModel, unit: Unit, kept: tuple[int, ...]) -> None:
    """Zero what the block makes of the channels that are not kept."""
    gone = unit.channel_indices(i for i in range(unit.width) if i not in kept)
    block = unet.get_submodule(unit.name)
    behind = block.conv2 if isinstance(block, ResnetBlock2D) else block.to_out[0]
    behind.weight[:, gone] = 0


def test_units_are_all_residual_blocks_and_attentions_of_the_built_model(config):
    found = {
        name: block.norm2.num_groups if isinstance(block, ResnetBlock2D) else block.heads
        for name, block in build_unet(config).named_modules()
        if isinstance(block, ResnetBlock2D | Attention)
    }
    assert {unit.name: unit.width for unit in units_of(config)} == found


def test_macs_and_parameters_of_the_uncut_model_are_those_of_the_table(config, kind):
    unet, space = build_unet(config), space_of(config, kind)
    assert count_macs(unet) == space.macs_base == space.macs(space.full)
    assert count_params(unet) == space.num_params_base == space.num_params(space.full)


@pytest.mark.parametrize("seed", range(2))
def test_macs_and_parameters_of_a_cut_model_are_those_of_the_table(config, kind, seed):
    units, space = units_of(config, kind), space_of(config, kind)
    kept = random_kept(units, seed)
    pruned = cut(build_unet(config), units, kept)
    assert count_macs(pruned) == space.macs(widths_of(kept))
    assert count_params(pruned) == space.num_params(widths_of(kept))


def test_the_smallest_scheme_is_the_smallest_model(config, kind):
    units, space = units_of(config, kind), space_of(config, kind)
    pruned = cut(build_unet(config), units, {unit.name: (0,) for unit in units})
    assert count_macs(pruned) == space.macs(space.smallest)


QUICK = ("tiny16", "iddpm-cifar10", "ldm-ffhq256")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
        for name in ARCHITECTURES
        if name != "tiny"
    ],
)
def test_the_table_holds_for_the_named_architectures(name, kind):
    config = architecture(name)
    units, space = units_of(config, kind), space_of(config, kind)
    with torch.device("meta"):
        unet = build_unet(config)
    for seed in range(3 if kind == "full" else 1):
        kept = random_kept(units, seed)
        pruned = cut(unet, units, kept)
        assert count_macs(pruned) == space.macs(widths_of(kept))
        assert count_params(pruned) == space.num_params(widths_of(kept))


def test_cutting_nothing_changes_nothing(config, kind):
    unet, units = random_unet(config), units_of(config, kind)
    pruned = cut(unet, units, keep_everything(units))
    assert_same(pruned.state_dict(), unet.state_dict())
    assert_same(output_of(pruned), output_of(unet))


@pytest.mark.parametrize("seed", range(2))
def test_cutting_equals_silencing(config, seed):
    unet, units = random_unet(config), units_of(config)
    kept = random_kept(units, seed)
    pruned = cut(unet, units, kept)
    before = output_of(unet)
    for unit in units:
        silence(unet, unit, kept[unit.name])
    torch.testing.assert_close(output_of(pruned), output_of(unet), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(output_of(pruned), before, rtol=1e-4, atol=1e-3)


def norm2_output(unet: UNet2DModel, name: str) -> Tensor:
    seen: list[Tensor] = []
    hook = unet.get_submodule(f"{name}.norm2").register_forward_hook(
        lambda _module, _inputs, output: seen.append(output)
    )
    output_of(unet)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("form", ["scale-shift", "time-added"])
def test_groups_that_are_kept_keep_their_statistics(form):
    config = CONFIGS[form]
    unet, name, places = random_unet(config), "mid_block.resnets.0", (1, 2, 6)
    unit = unit_named(config, name)
    pruned = cut(unet, [unit], {name: places})
    whole = norm2_output(unet, name)[:, unit.channel_indices(places)]
    torch.testing.assert_close(norm2_output(pruned, name), whole, rtol=1e-5, atol=1e-5)


def test_the_model_that_is_cut_is_left_as_it_was(config, kind):
    unet, units = random_unet(config).train(), units_of(config, kind)
    unet.conv_in.requires_grad_(False)
    weights = {name: value.clone() for name, value in unet.state_dict().items()}
    output = output_of(unet)
    pruned = cut(unet, units, random_kept(units, seed=1))
    with torch.no_grad():
        for parameter in pruned.parameters():  # none of them may share its memory with the base
            parameter.zero_()
    assert_same(unet.state_dict(), weights)
    assert_same(output_of(unet), output)
    assert all(module.training for module in unet.modules())
    assert {name for name, p in unet.named_parameters() if not p.requires_grad} == FROZEN


def test_every_parameter_of_a_cut_model_gets_a_gradient(config, kind):
    units = units_of(config, kind)
    pruned = cut(random_unet(config), units, random_kept(units, seed=2)).train()
    classes = config.get("num_class_embeds")
    x = torch.randn(4, config["in_channels"], *image_size(config))
    labels = None if classes is None else torch.arange(4)
    pruned(
        x, torch.tensor([0, 10, 500, 999]), class_labels=labels
    ).sample.square().sum().backward()
    for name, parameter in pruned.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.shape == parameter.shape, name
        assert parameter.grad.isfinite().all(), name
    for unit in units:  # conv1 of a residual block, to_q of an attention, what starts a stream
        assert coupled_parameters(pruned, unit)[0].parameter.grad.count_nonzero() > 0, unit.name


def test_a_cut_model_is_as_frozen_and_as_much_in_training_as_its_base(kind):
    unet, units = random_unet(), units_of(TINY, kind)
    unet.requires_grad_(False).mid_block.requires_grad_(True).train()
    pruned = cut(unet, units, {unit.name: (0,) for unit in units})
    for name, parameter in pruned.named_parameters():
        assert parameter.requires_grad == name.startswith("mid_block."), name
    for name, module in pruned.named_modules():
        assert module.training == name.startswith("mid_block"), name


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("conv_in", "residual"),
        ("down_blocks.0.downsamplers.0", "residual"),
        ("stream:mid_block.resnets.0", "stream"),
    ],
)
def test_a_unit_that_a_unet_does_not_have_is_refused(name, kind):
    unit = Unit(name, kind, width=8, channels=2, pixels=64)
    with pytest.raises(UnsupportedModelError, match=f"this network has no {kind} unit {name}"):
        coupled_parameters(random_unet(), unit)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"down_block_types": ("SkipDownBlock2D", DOWN)}, "SkipDownBlock2D"),
        ({"up_block_types": (UP, "KUpBlock2D")}, "KUpBlock2D"),
        ({"mid_block_type": "UNetMidBlock2DCrossAttn"}, "mid_block_type"),
        ({"time_embedding_type": "fourier"}, "time_embedding_type fourier"),
        ({"class_embed_type": "timestep"}, "class_embed_type timestep"),
        ({"resnet_time_scale_shift": "spatial"}, "resnet_time_scale_shift spatial"),
        ({"attention_head_dim": 12}, "32 channels, which its heads do not divide"),
        ({"attention_head_dim": 12, "num_heads": 4}, "32 channels, which its heads do not divide"),
        ({"num_heads": 3}, "32 channels, which its heads do not divide"),
    ],
)
def test_a_unet_of_an_unknown_kind_has_no_units(change, named):
    with pytest.raises(UnsupportedModelError, match=named):
        units_of({**TINY, **change})
