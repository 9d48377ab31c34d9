"""Builds, loads and runs ``UNet2DConditionModel`` as steps, on given states of captions."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from diffusers import Transformer2DModel, UNet2DConditionModel
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from tdc_ray.models.diffusers_folder import load_pretrained
from tdc_ray.models.labels import Captions, conditions
from tdc_ray.models.network_config import STATES, NetworkConfig
from tdc_ray.models.step import Ends, State, Step
from tdc_ray.models.transformers.steps import to_grid, to_tokens
from tdc_ray.models.unet2d.blocks import output_layer, residual_scale


def build_unet(config: NetworkConfig) -> UNet2DConditionModel:
    """Build a UNet with random weights on the current default device."""
    return UNet2DConditionModel(**{k: v for k, v in config.items() if not k.startswith("_")})


def load_unet(folder: Path) -> UNet2DConditionModel:
    """Load a saved UNet, in eval mode, on the CPU.

    Raises:
        CheckpointError: The folder holds none in safetensors.
    """
    return load_pretrained(UNet2DConditionModel, folder)


def ends(unet: UNet2DConditionModel) -> Ends:
    """Return the layers at both ends."""
    return Ends(unet.conv_in, unet.conv_norm_out, unet.conv_out)


def start(unet: UNet2DConditionModel, x_t: Tensor, timesteps: Tensor, captions: Captions) -> State:
    """Return the state before the first step."""
    embedding = unet.time_embedding(unet.time_proj(timesteps).to(unet.dtype))
    if unet.config["addition_embed_type"] is not None:
        embedding = embedding + unet.get_aug_embed(embedding, **conditions(captions))
    centred = 2 * x_t - 1 if unet.config["center_input_sample"] else x_t
    return State(centred, embedding, context=captions[STATES])


def steps(unet: UNet2DConditionModel) -> list[Step]:
    """Split the forward pass into steps; one after the other they return the UNet's output."""
    sequence = [_step("conv_in", unet.conv_in, leaves_skip=True)]
    for level, block in enumerate(unet.down_blocks):
        for pair in _pairs(f"down_blocks.{level}", block):
            parts = [part for name, module in pair for part in _parts(name, module)]
            sequence += [*parts[:-1], replace(parts[-1], leaves_skip=True)]
        for index, module in enumerate(block.downsamplers or ()):
            name = f"down_blocks.{level}.downsamplers.{index}"
            sequence.append(_step(name, module, leaves_skip=True))
    mid = unet.mid_block
    for index, module in enumerate(mid.resnets):
        sequence += _parts(f"mid_block.resnets.{index}", module)
        if index < len(mid.attentions):
            sequence += _parts(f"mid_block.attentions.{index}", mid.attentions[index])
    for level, block in enumerate(unet.up_blocks):
        for (name, resnet), *attention in _pairs(f"up_blocks.{level}", block):
            sequence.append(_step(name, resnet, reads_skip=True))
            sequence += [part for named in attention for part in _parts(*named)]
        for index, module in enumerate(block.upsamplers or ()):
            sequence.append(_step(f"up_blocks.{level}.upsamplers.{index}", module))
    end = nn.Sequential(unet.conv_norm_out, unet.conv_act, unet.conv_out).train(unet.training)
    return [*sequence, _step("conv_out", end)]


def _step(
    name: str, module: nn.Module, *, reads_skip: bool = False, leaves_skip: bool = False
) -> Step:
    return Step(
        name=name,
        module=module,
        output_layers={"hidden": output_layer(module)},
        residual_scale=residual_scale(module),
        reads_embedding=isinstance(module, ResnetBlock2D),
        reads_skip=reads_skip,
        leaves_skip=leaves_skip,
    )


def _pairs(name: str, block: Any) -> Iterator[list[tuple[str, nn.Module]]]:
    """Yield every residual block of a level with the transformer behind it, if any, by name."""
    for index, resnet in enumerate(block.resnets):
        pair = [(f"{name}.resnets.{index}", resnet)]
        if getattr(block, "attentions", None) is not None:
            pair.append((f"{name}.attentions.{index}", block.attentions[index]))
        yield pair


def _parts(name: str, module: nn.Module) -> list[Step]:
    """Split a transformer into its steps; a residual block is one."""
    if not isinstance(module, Transformer2DModel):
        return [_step(name, module)]
    entry = nn.Sequential(module.norm, module.proj_in)
    parts: list[Step] = [
        _EnterStep(name=f"{name}.proj_in", module=entry, output_layers={"hidden": "1"})
    ]
    for index, block in enumerate(module.transformer_blocks):
        inner = f"{name}.transformer_blocks.{index}"
        own = _NormedStep(
            name=f"{inner}.attn1",
            module=block.attn1,
            norm=block.norm1,
            output_layers={"hidden": "to_out.0"},
        )
        cross = replace(
            own, name=f"{inner}.attn2", module=block.attn2, norm=block.norm2, reads_context=True
        )
        feed_forward = replace(
            own,
            name=f"{inner}.ff",
            module=block.ff,
            norm=block.norm3,
            output_layers={"hidden": "net.2"},
        )
        parts += [own, cross, feed_forward]
    exit_step = _ExitStep(
        name=f"{name}.proj_out", module=module.proj_out, output_layers={"hidden": ""}
    )
    return [*parts, exit_step]


def _project(layer: nn.Module, hidden: Tensor) -> Tensor:
    if isinstance(layer, nn.Linear):
        return to_grid(layer(to_tokens(hidden)), *hidden.shape[2:])
    projected: Tensor = layer(hidden)
    return projected


@dataclass(frozen=True, slots=True, kw_only=True)
class _EnterStep(Step):
    """The norm and the projection into a transformer, whose input waits as a skip."""

    def __call__(self, state: State) -> State:
        norm, layer = self.module.children()
        hidden = _project(layer, norm(state.hidden))
        return replace(state, hidden=hidden, skips=(*state.skips, state.hidden))


@dataclass(frozen=True, slots=True, kw_only=True)
class _NormedStep(Step):
    """An attention or a feed-forward behind its norm."""

    norm: nn.Module
    reads_context: bool = False

    def __call__(self, state: State) -> State:
        tokens = to_tokens(state.hidden)
        conditions = {"encoder_hidden_states": state.context} if self.reads_context else {}
        tokens = self.module(self.norm(tokens), **conditions) + tokens
        return replace(state, hidden=to_grid(tokens, *state.hidden.shape[2:]))


@dataclass(frozen=True, slots=True, kw_only=True)
class _ExitStep(Step):
    """The projection out of a transformer, to which its input is added."""

    def __call__(self, state: State) -> State:
        hidden = _project(self.module, state.hidden) + state.skips[-1]
        skips = state.skips[:-1]
        return replace(state, hidden=hidden, skips=(*skips, hidden) if self.leaves_skip else skips)
