import pytest
import torch

from tdc_ray.pruning.criteria.magnitude import magnitude_scores
from tests.pruning.criteria.inputs import UNITS, unit_named
from tests.small import random_unet


@torch.no_grad()
def test_magnitude_of_a_residual_block_by_hand():
    unet, unit = random_unet(), unit_named("down_blocks.1.resnets.0")
    assert (unit.width, unit.channels) == (8, 4)
    block = unet.get_submodule(unit.name)
    for group in range(8):
        rows = slice(4 * group, 4 * group + 4)
        shift = slice(32 + 4 * group, 32 + 4 * group + 4)
        weights = (
            block.conv1.weight[rows],
            block.conv1.bias[rows],
            block.time_emb_proj.weight[rows],
            block.time_emb_proj.weight[shift],
            block.time_emb_proj.bias[rows],
            block.time_emb_proj.bias[shift],
            block.norm2.weight[rows],
            block.norm2.bias[rows],
            block.conv2.weight[:, rows],
        )
        expected = sum(float(weight.square().sum()) for weight in weights)
        score = magnitude_scores(unet, UNITS)[unit.name][group]
        assert score == pytest.approx(expected, rel=1e-5)


@torch.no_grad()
def test_magnitude_of_an_attention_by_hand():
    unet, unit = random_unet(), unit_named("mid_block.attentions.0")
    assert (unit.width, unit.channels) == (2, 16)
    block = unet.get_submodule(unit.name)
    for head in range(2):
        rows = slice(16 * head, 16 * head + 16)
        weights = [block.to_out[0].weight[:, rows]]
        for layer in (block.to_q, block.to_k, block.to_v):
            weights += [layer.weight[rows], layer.bias[rows]]
        expected = sum(float(weight.square().sum()) for weight in weights)
        score = magnitude_scores(unet, UNITS)[unit.name][head]
        assert score == pytest.approx(expected, rel=1e-5)
