import subprocess
import sys

import pytest

from tdc_ray.errors import ConfigError
from tdc_ray.models.denoiser import count_params
from tdc_ray.models.unet2d.architectures import architecture
from tdc_ray.models.unet2d.auto import LEVELS, auto_unet
from tdc_ray.models.unet2d.unet import build_unet
from tdc_ray.pruning.space import space_of
from tests.models.counting import count_macs
from tests.small import sizes


def unet_for(side, channels=3, num_images=1_000, **changes):
    return auto_unet(height=side, width=side, channels=channels, num_images=num_images, **changes)


@pytest.mark.parametrize(
    ("name", "side", "channels", "num_images"),
    [("digits", 8, 1, 1_797), ("photos16", 16, 3, 8_216), ("mnist16", 16, 1, 60_000)],
)
def test_small_images_get_the_architecture_of_the_preset_for_images_like_them(
    name, side, channels, num_images
):
    assert sizes(unet_for(side, channels, num_images)) == sizes(architecture(name))


@pytest.mark.parametrize(
    ("side", "few", "some", "many"),
    [
        (8, 1.08, 1.08, 4.30),
        (16, 0.19, 1.08, 4.30),
        (32, 2.57, 10.26, 40.94),
        (64, 5.77, 23.03, 92.03),
        (128, 5.96, 23.78, 95.00),
        (256, 7.78, 31.05, 124.05),
    ],
)
def test_parameters_are_those_of_the_table(side, few, some, many):
    found = [sizes(unet_for(side, num_images=number))[0] for number in (9_999, 10_000, 33_334)]
    assert [1e-6 * number for number in found] == pytest.approx([few, some, many], abs=0.005)


def test_more_images_of_a_size_never_get_a_smaller_network():
    for side in LEVELS:
        numbers = [sizes(unet_for(side, 1, 10**power))[0] for power in range(2, 7)]
        assert numbers == sorted(numbers)


@pytest.mark.parametrize(
    "side",
    [
        pytest.param(side, marks=pytest.mark.slow if side > 48 else ())
        for side in (4, 5, 7, 8, 12, 14, 20, 28, 36, 48, 96, 160, 224, 384, 512)
    ],
)
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_every_size_has_a_network_that_can_be_built_counted_and_pruned(side, channels):
    import torch

    config = unet_for(side, channels, learned_sigma=channels == 4)
    with torch.device("meta"):
        unet = build_unet(config)
    assert sizes(config) == (count_params(unet), count_macs(unet))
    assert config["out_channels"] == (8 if channels == 4 else channels)
    space = space_of(config, "full")
    assert space.macs(space.smallest) < space.macs_base
    assert side >> (len(config["block_out_channels"]) - 1) <= 16


@pytest.mark.parametrize("scale", [0.5, 0.75, 1.3, 2, 5])
@pytest.mark.parametrize("side", [8, 32, 64])
def test_width_scales_all_channels_in_whole_groups(side, scale):
    config, usual = unet_for(side, scale=scale), unet_for(side)
    first = config["block_out_channels"][0]
    assert first == pytest.approx(scale * usual["block_out_channels"][0], abs=4 * scale + 4)
    ratios = [width // first for width in config["block_out_channels"]]
    assert ratios == [width // 32 for width in usual["block_out_channels"]]
    assert all(width % config["norm_num_groups"] == 0 for width in config["block_out_channels"])
    build_unet(config)
    space_of(config)


def test_the_shorter_side_gives_the_levels_of_other_shapes():
    wide = auto_unet(height=16, width=48, channels=1, num_images=99)
    assert wide["sample_size"] == (16, 48)
    assert wide["block_out_channels"] == unet_for(16, 1)["block_out_channels"]
    assert sizes(wide)[1] > 2.9 * sizes(unet_for(16, 1))[1]
    space_of(wide)
    with pytest.raises(ConfigError, match=r"multiples of 4 .*, got 64x50: 48 and 52 are nearest"):
        auto_unet(height=64, width=50, channels=1, num_images=99)


def test_depth_is_the_number_of_residual_blocks():
    assert unet_for(16)["layers_per_block"] == 1
    assert unet_for(16, depth=3)["layers_per_block"] == 3


@pytest.mark.parametrize(
    ("side", "changes", "message"),
    [
        (100, {}, r"multiples of 8 with .* auto, .*, got 100x100: 96 and 104 are nearest"),
        (33, {}, r"multiples of 4 with .*, got 33x33: 32 and 36"),
        (1024, {}, r"data\.image_size must be at most 512 with .*got 1024x1024.*--data\.first"),
        (8, {"scale": 0.1}, r"model\.width must be at least 0\.5 for .* got 0\.1"),
    ],
)
def test_what_has_no_network_is_refused_with_the_way_out(side, changes, message):
    with pytest.raises(ConfigError, match=message):
        unet_for(side, **changes)


def test_choosing_needs_no_torch():
    code = (
        "import sys; from tdc_ray.models.unet2d.auto import auto_unet; "
        "auto_unet(height=8, width=8, channels=1, num_images=9); "
        "print('torch' in sys.modules, 'diffusers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
