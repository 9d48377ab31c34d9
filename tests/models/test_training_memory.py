"""What a training holds of a worker's memory, against networks themselves."""

from collections import Counter

import pytest
import torch

from tdc_ray.models.families import build_network
from tdc_ray.models.structure import network_structure
from tdc_ray.models.training_memory import is_sharding_unit, training_memory, unit_sizes
from tdc_ray.models.unet2d.architectures import architecture
from tests.small import TINY, TINY_DIT

LARGE = {**architecture("ldm-ffhq256"), "block_out_channels": (416, 832, 1248, 1664)}


@pytest.mark.parametrize("config", [TINY, TINY_DIT, LARGE], ids=["tiny", "dit", "large"])
def test_blocks_have_the_parameters_of_the_networks_modules(config):
    with torch.device("meta"):
        network = build_network(config)
    counted: Counter[str] = Counter()
    for name, parameter in network.named_parameters():
        parts = name.split(".")
        names = [".".join(parts[:end]) for end in range(len(parts), 0, -1)]
        counted[next((one for one in names if is_sharding_unit(one)), "")] += parameter.numel()
    assert unit_sizes(network_structure(config)) == counted


def test_workers_that_share_a_training_hold_less_of_it_and_as_much_of_its_largest_blocks():
    structure = network_structure(LARGE)
    alone = training_memory(structure, 1, "none", "bf16")
    assert alone.kept == 20 * structure.num_params  # 4 bytes, five times
    assert alone.exchanged == 0
    several = training_memory(structure, 8, "none", "bf16")
    assert (several.kept, several.exchanged) == (alone.kept, 4 * structure.num_params)
    two, eight = (training_memory(structure, number, "full", "bf16") for number in (2, 8))
    assert eight.kept == pytest.approx(alone.kept / 8, rel=1e-6)
    sizes = unit_sizes(structure)
    outside = sizes.pop("")
    largest = sum(size for _, size in sizes.most_common(2))
    assert two.exchanged == eight.exchanged == 8 * (outside + largest)  # bf16, bf16 and fp32
