"""Winograd's convolution against PyTorch's, alone and in a whole UNet."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from tdc_ray.models import winograd
from tdc_ray.models.unet2d.unet import build_unet
from tdc_ray.models.winograd import WinogradConvolutions, convolution


def largest_error(found, expected):
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("size", [(8, 8), (14, 13), (4, 1), (3, 9)])
@pytest.mark.parametrize("channels", [(3, 40), (40, 5)])
def test_a_convolution_is_as_pytorchs_in_any_size_and_number_of_images(
    size, channels, monkeypatch
):
    torch.manual_seed(0)
    layer = nn.Conv2d(*channels, 3, padding=1)
    x = torch.randn(5, channels[0], *size)
    with torch.inference_mode():
        expected = layer(x)
        for at_once in (1, 2**15, 2**16, 2**22):  # bytes: a row, an image, some images, all
            monkeypatch.setattr(winograd, "BYTES_AT_ONCE", at_once)
            found = convolution(x, layer.weight, layer.bias)
            assert found.shape == expected.shape
            assert largest_error(found, expected) < 2e-5
            assert found.stride(1) == 1


@pytest.fixture
def calls(monkeypatch):
    seen = []

    def counted(x, weight, bias):
        seen.append(tuple(weight.shape))
        return convolution(x, weight, bias)

    monkeypatch.setattr(winograd, "convolution", counted)
    return seen


@pytest.mark.parametrize(
    ("layer", "gains"),
    [
        (nn.Conv2d(32, 48, 3, padding=1), True),
        (nn.Conv2d(32, 48, 3, padding="same"), False),
        (nn.Conv2d(32, 48, 3, padding=1, stride=2), False),
        (nn.Conv2d(32, 48, 3, padding=2, dilation=2), False),
        (nn.Conv2d(32, 64, 3, padding=1, groups=32), False),
        (nn.Conv2d(32, 48, 3, padding=1, bias=False), False),
        (nn.Conv2d(32, 48, 3), False),
        (nn.Conv2d(32, 48, 1), False),
        (nn.Conv2d(32, 16, 3, padding=1), False),
        (nn.Conv2d(32, 48, 3, padding=1).bfloat16(), False),
    ],
)
def test_only_convolutions_that_gain_are_taken_over(layer, gains, calls):
    x = torch.randn(16, 32, 8, 8, dtype=layer.weight.dtype)
    with torch.inference_mode():
        expected = layer(x)
        with WinogradConvolutions():
            found = layer(x)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
        assert calls == ([tuple(layer.weight.shape)] if gains else [])
        layer(x)  # outside of it, nothing is taken over
        assert len(calls) == gains


@torch.no_grad()
def test_nothing_is_taken_over_that_gains_nothing_or_would_be_wrong(calls):
    layer, x = nn.Conv2d(32, 48, 3, padding=1), torch.randn(16, 32, 8, 8)
    with WinogradConvolutions():
        layer(x[:15])  # 60 tiles
        layer(torch.randn(64, 32, 5, 5))  # 4 tiles for 25 pixels
        layer(x[0])  # no batch
        functional.conv2d(x, layer.weight)
        with torch.autocast("cpu", torch.bfloat16):
            layer(x)
        with torch.enable_grad():
            layer(x).sum().backward()
    assert calls == []


@pytest.mark.parametrize("size", [16, 14])
def test_a_whole_unet_is_off_by_rounding(size, calls):
    torch.manual_seed(0)
    unet = build_unet(
        {
            "sample_size": size,
            "in_channels": 3,
            "out_channels": 3,
            "block_out_channels": (32, 64),
            "layers_per_block": 1,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
            "norm_num_groups": 16,
            "attention_head_dim": 16,
        }
    ).eval()
    x, timesteps = torch.randn(32, 3, size, size), torch.arange(32)
    with torch.inference_mode():
        expected = unet(x, timesteps).sample
        with WinogradConvolutions():
            found = unet(x, timesteps).sample
    assert len(calls) > 10
    assert 0 < largest_error(found, expected) < 1e-4
