"""A UNet's forward pass split into steps, so that states between blocks can be read and kept."""

from collections.abc import Iterator
from typing import Any

from diffusers import UNet2DModel
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from tdc_ray.models.step import Ends, State, Step
from tdc_ray.models.unet2d.blocks import output_layer, residual_scale


def ends(unet: UNet2DModel) -> Ends:
    """Return the layers at both ends."""
    return Ends(unet.conv_in, unet.conv_norm_out, unet.conv_out)


def start(
    unet: UNet2DModel, x_t: Tensor, timesteps: Tensor, class_labels: Tensor | None = None
) -> State:
    """Return the state before the first step.

    Args:
        unet: The UNet.
        x_t: Noised images, ``(B, C, H, W)``.
        timesteps: As the network sees them, ``(B,)``.
        class_labels: ``(B,)`` where the UNet is conditioned on classes.
    """
    embedding = unet.time_embedding(unet.time_proj(timesteps).to(unet.dtype))
    if unet.class_embedding is not None:
        embedding = embedding + unet.class_embedding(class_labels)
    centred = 2 * x_t - 1 if unet.config["center_input_sample"] else x_t
    return State(centred, embedding)


def steps(unet: UNet2DModel) -> list[Step]:
    """Split the forward pass into steps; one after the other they return the UNet's output.

    The UNet has only blocks that ``unet2d.layers`` knows.
    """
    names = {module: name for name, module in unet.named_modules()}

    def step(
        module: nn.Module,
        name: str | None = None,
        *,
        reads_skip: bool = False,
        leaves_skip: bool = False,
    ) -> Step:
        return Step(
            name=name or names[module],
            module=module,
            output_layers={"hidden": output_layer(module)},
            residual_scale=residual_scale(module),
            reads_embedding=isinstance(module, ResnetBlock2D),
            reads_skip=reads_skip,
            leaves_skip=leaves_skip,
        )

    sequence = [step(unet.conv_in, leaves_skip=True)]
    for block in unet.down_blocks:
        for *inner, last in _layers(block):
            sequence += [*map(step, inner), step(last, leaves_skip=True)]
        sequence += [step(sampler, leaves_skip=True) for sampler in block.downsamplers or ()]
    if unet.mid_block is not None:
        first, *others = unet.mid_block.resnets
        sequence.append(step(first))
        for attention, resnet in zip(unet.mid_block.attentions, others, strict=True):
            sequence += map(step, (resnet,) if attention is None else (attention, resnet))
    for block in unet.up_blocks:
        for resnet, *attentions in _layers(block):
            sequence += [step(resnet, reads_skip=True), *map(step, attentions)]
        sequence += map(step, block.upsamplers or ())
    out = nn.Sequential(unet.conv_norm_out, unet.conv_act, unet.conv_out)
    return [*sequence, step(out.train(unet.training), "conv_out")]


def _layers(block: Any) -> Iterator[tuple[nn.Module, ...]]:
    """Yield every residual block with the attention that follows it, if any."""
    attentions = getattr(block, "attentions", None)
    if attentions is None:
        return zip(block.resnets)
    return zip(block.resnets, attentions, strict=True)
