"""Macs counted by running a network, for comparison with what its structure says."""

import torch
from torch.utils.flop_counter import FlopCounterMode

from tdc_ray.models.network_config import image_size

COUNTED = (torch.ops.aten.convolution, torch.ops.aten.addmm, torch.ops.aten.mm)
"""Convolutions and linear layers; not the two products inside attention."""


@torch.no_grad()
def count_macs(unet) -> int:
    """Macs of one forward pass for one image; on the meta device too."""
    config, weight = unet.config, next(unet.parameters())
    sample = weight.new_zeros(1, config["in_channels"], *image_size(config))
    timestep = torch.zeros(1, dtype=torch.long, device=weight.device)
    labels = None if config["num_class_embeds"] is None else timestep
    with FlopCounterMode(display=False) as counter:
        unet(sample, timestep, class_labels=labels)
    flops = counter.get_flop_counts()["Global"]
    return sum(flops.get(operation, 0) for operation in COUNTED) // 2
