import copy

import pytest
import torch

from tdc_ray.models.forward import max_batch_size, predict
from tdc_ray.models.unet2d.architectures import architecture
from tdc_ray.models.unet2d.unet import build_unet
from tests.small import TINY, random_unet

LEARNED = {**TINY, "out_channels": 2 * TINY["in_channels"]}


def test_larger_models_take_smaller_batches():
    with torch.device("meta"):
        unet = build_unet(architecture("iddpm-cifar10"))
    weight = torch.empty(128, 3, 3, 3)
    unet.conv_in.weight = torch.nn.Parameter(weight)
    assert max_batch_size(unet) == 32  # 128 channels of 32 x 32, 4 bytes each: 16 MiB
    assert max_batch_size(unet, (64, 64)) == 8
    assert max_batch_size(unet, (4096, 4096)) == 1
    assert max_batch_size(random_unet()) > 256


@pytest.mark.parametrize("num_channels", [None, 1])
def test_in_parts_the_output_is_that_of_one_pass(num_channels, monkeypatch):
    unet = random_unet(LEARNED)
    before = copy.deepcopy(unet.state_dict())
    x_t, timesteps = torch.randn(7, 1, 8, 8), torch.arange(7) * 100
    seen = []
    unet.register_forward_pre_hook(lambda _module, inputs: seen.append(len(inputs[0])))
    with torch.inference_mode():
        expected = unet(x_t, timesteps).sample
        monkeypatch.setattr("tdc_ray.models.forward.max_batch_size", lambda *_: 3)
        found = predict(unet, x_t, timesteps, num_channels=num_channels)
    assert seen == [7, 3, 3, 1]
    assert found.shape[1] == (num_channels or 2)
    torch.testing.assert_close(found, expected[:, :num_channels], rtol=1e-4, atol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in unet.state_dict().items())


def test_in_bf16_the_last_layers_round_nothing():
    exact, unet = random_unet(LEARNED), random_unet(LEARNED).to(torch.bfloat16)
    before = copy.deepcopy(unet.state_dict())
    x_t, timesteps = torch.randn(64, 1, 8, 8), torch.arange(64) * 10
    with torch.inference_mode():
        expected = exact(x_t, timesteps).sample
        plain = unet(x_t.bfloat16(), timesteps).sample
        found = predict(unet, x_t.bfloat16(), timesteps)
        again = unet(x_t.bfloat16(), timesteps).sample
    assert found.dtype == torch.float32
    assert not torch.equal(found, found.bfloat16().float())
    assert 0 < (found - expected).square().mean() < (plain - expected).square().mean()
    assert torch.equal(again, plain)
    for name, value in unet.state_dict().items():
        assert value.dtype == torch.bfloat16
        assert torch.equal(value, before[name])
