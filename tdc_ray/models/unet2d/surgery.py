"""Prunes units of a UNet."""

import copy
from collections.abc import Sequence

from diffusers import UNet2DModel
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import nn

from tdc_ray.models.surgery import cut_inner, refuse_to_save, update_attributes
from tdc_ray.models.unet2d.streams import cut_streams
from tdc_ray.models.units import KeptIndices, Unit


def cut(unet: UNet2DModel, units: Sequence[Unit], kept: KeptIndices) -> UNet2DModel:
    """Return a copy of a UNet without the steps (groups, heads, slices) that are not kept.

    diffusers' ``save_pretrained``, which would write a config without its widths, refuses it.

    Args:
        unet: An unpruned UNet, which is not changed. It may be on the meta device.
        units: Its units.
        kept: What stays of each of them; at least one step.
    """
    pruned = copy.deepcopy(unet)
    narrower = [unit for unit in units if len(kept[unit.name]) < unit.width]
    cut_streams(pruned, [unit for unit in narrower if unit.kind == "stream"], kept)
    for unit in narrower:
        if unit.kind != "stream":
            cut_inner(pruned, unit, kept[unit.name])
    for module in pruned.modules():
        update_attributes(module)
        _update_own_attributes(module)
    if narrower:
        pruned.save_pretrained = refuse_to_save
    return pruned


def _update_own_attributes(module: nn.Module) -> None:
    """Do so for the modules that UNets alone have."""
    if isinstance(module, ResnetBlock2D):
        module.in_channels = len(module.norm1.weight)
        module.out_channels = len(module.conv2.weight)
        for sampler in (module.upsample, module.downsample):
            if sampler is not None:  # without weights; its forward pass checks its input
                sampler.channels = sampler.out_channels = module.in_channels
    elif isinstance(module, Downsample2D | Upsample2D) and isinstance(module.conv, nn.Conv2d):
        module.out_channels, module.channels = module.conv.weight.shape[:2]
