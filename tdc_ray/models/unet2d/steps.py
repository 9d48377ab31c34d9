"""A UNet's forward pass cut into steps, so that work can stop, look and go on between blocks."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from diffusers import UNet2DModel
from torch import Tensor, nn

from tdc_ray.models.step import State, Step


def start(
    unet: UNet2DModel, x_t: Tensor, timesteps: Tensor, class_labels: Tensor | None = None
) -> State:
    """Give the state before the first step.

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
    """Cut the forward pass into steps; one after the other they give the UNet's output.

    The UNet has nothing but the blocks that ``models.layers`` knows.
    """
    names = {module: name for name, module in unet.named_modules()}
    found = [Step("conv_in", unet.conv_in, leaves_skip=True)]
    for block in unet.down_blocks:
        for modules in _layers(block):
            *inner, last = modules
            found += [Step(names[module], module) for module in inner]
            found.append(Step(names[last], last, leaves_skip=True))
        for sampler in block.downsamplers or ():
            found.append(Step(names[sampler], sampler, leaves_skip=True))
    if unet.mid_block is not None:
        first, *others = unet.mid_block.resnets
        found.append(Step(names[first], first))
        for attention, resnet in zip(unet.mid_block.attentions, others, strict=True):
            pair = (attention, resnet) if attention is not None else (resnet,)
            found += [Step(names[module], module) for module in pair]
    for block in unet.up_blocks:
        for resnet, *attentions in _layers(block):
            found.append(Step(names[resnet], resnet, reads_skip=True))
            found += [Step(names[module], module) for module in attentions]
        for sampler in block.upsamplers or ():
            found.append(Step(names[sampler], sampler))
    out = nn.Sequential(unet.conv_norm_out, unet.conv_act, unet.conv_out)
    return [*found, Step("conv_out", out.train(unet.training))]


def run(some: Sequence[Step], state: State) -> State:
    """Run steps, one after the other."""
    for step in some:
        state = step(state)
    return state


def num_untouched(base: Sequence[Step], pruned: Sequence[Step]) -> int:
    """Count the steps before the first one that is cut: they are the base's own."""
    pairs = zip(base, pruned, strict=True)
    return sum(1 for _ in itertools.takewhile(lambda pair: not is_cut(*pair), pairs))


def is_cut(base: Step, step: Step) -> bool:
    """Tell whether a step has fewer channels than that of the base."""
    pairs = zip(base.module.parameters(), step.module.parameters(), strict=True)
    return any(one.shape != other.shape for one, other in pairs)


def _layers(block: Any) -> Iterator[tuple[nn.Module, ...]]:
    """Give every residual block with the attention that follows it, if any."""
    attentions = getattr(block, "attentions", None)
    if attentions is None:
        return zip(block.resnets)
    return zip(block.resnets, attentions, strict=True)
