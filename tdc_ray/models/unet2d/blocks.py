"""How a step of a ``UNet2DModel`` writes to the residual stream."""

from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from torch import nn


def output_layer(module: nn.Module) -> str:
    """Return the name of the layer whose output a step adds to the residual stream, or outputs."""
    if isinstance(module, ResnetBlock2D):
        return "conv2"
    if isinstance(module, Attention):
        return "to_out.0"
    layers = (nn.Conv2d, nn.Linear)
    (name,) = (str(name) for name, layer in module.named_modules() if isinstance(layer, layers))
    return name  # a sampler, or an end of the network, has just one


def residual_scale(module: nn.Module) -> float:
    """Return the divisor of the sum of a block's output layer and its shortcut."""
    if isinstance(module, ResnetBlock2D):
        return float(module.output_scale_factor)
    return float(module.rescale_output_factor) if isinstance(module, Attention) else 1.0
