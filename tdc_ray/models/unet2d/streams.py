"""Narrows the residual stream through Torch-Pruning's dependency graph."""

from collections.abc import Sequence

import torch
import torch_pruning as tp
from diffusers import UNet2DModel
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from tdc_ray.models.layer import STREAM
from tdc_ray.models.units import KeptIndices, Unit


def dependency_graph(unet: UNet2DModel) -> tp.DependencyGraph:
    """Trace which channels of a UNet are coupled; it may be on the meta device.

    The UNet is left in eval mode, and all its parameters must require gradients.
    """
    size = 2 ** len(unet.config["block_out_channels"])  # halved at every level but the last
    parameter = next(unet.parameters())
    timestep = torch.zeros(1, dtype=torch.long, device=parameter.device)
    inputs = {
        "sample": parameter.new_zeros(1, unet.config["in_channels"], size, size),
        "timestep": timestep,
        "class_labels": None if unet.config["num_class_embeds"] is None else timestep,
    }
    with torch.enable_grad():
        return tp.DependencyGraph().build_dependency(
            unet, inputs, output_transform=lambda output: output.sample
        )


def root_of(unet: UNet2DModel, unit: Unit) -> nn.Module:
    """Return the convolution that starts a stream."""
    module = unet.get_submodule(unit.name.removeprefix(STREAM))
    if isinstance(module, nn.Conv2d):
        return module
    root = module.conv2 if isinstance(module, ResnetBlock2D) else module.conv
    assert isinstance(root, nn.Module)
    return root


def cut_streams(unet: UNet2DModel, units: Sequence[Unit], kept: KeptIndices) -> None:
    """Narrow streams of a UNet, in place.

    The weights, and the attributes of ``torch.nn``'s own modules, are pruned; those of diffusers'
    modules stay as they are.
    """
    if not units:
        return
    training = [module for module in unet.modules() if module.training]
    frozen = [name for name, value in unet.named_parameters() if not value.requires_grad]
    graph = dependency_graph(unet.requires_grad_(requires_grad=True))
    for unit in units:
        gone = unit.channel_indices(
            step for step in range(unit.width) if step not in kept[unit.name]
        )
        graph.get_pruning_group(root_of(unet, unit), tp.prune_conv_out_channels, gone).prune()
    for node in graph.module2node.values():
        vars(node).clear()  # nodes form cycles, which would keep the model's memory
    for module in training:
        module.training = True
    for name in frozen:
        unet.get_parameter(name).requires_grad_(requires_grad=False)
