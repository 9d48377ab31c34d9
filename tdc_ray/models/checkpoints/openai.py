"""Checkpoints of OpenAI's improved- and guided-diffusion: architecture, and tensors' places.

A checkpoint is the plain state dict of ``UNetModel`` (unet.py), which in guided-diffusion (ADM)
may sample between levels by residual blocks. CompVis' latent diffusion has the same network under
the same names. Some things do not show in the shapes: the attentions' heads and the order of their
q, k and v, and the size of the images.
"""

import itertools
from collections.abc import Mapping

import torch
from torch import Tensor

from tdc_ray.errors import CheckpointError
from tdc_ray.models.checkpoints.state_dicts import Shapes, StateDict, check_tensors, shape_of
from tdc_ray.models.network_config import NetworkConfig, num_heads_of
from tdc_ray.models.unet2d.architectures import (
    ATTN_DOWN,
    ATTN_UP,
    DOWN,
    RESNET_DOWN,
    RESNET_UP,
    UP,
)
from tdc_ray.models.unet2d.unet import build_unet

COMMON: NetworkConfig = {
    "norm_num_groups": 32,
    "attn_norm_num_groups": 32,
    "norm_eps": 1e-5,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "downsample_padding": 1,
}
"""Settings that all of them share (improved_diffusion/nn.py: GroupNorm32, timestep_embedding)."""

_OUTER = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "class_embedding": "label_emb",
    "conv_in": "input_blocks.0.0",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_INNER = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
    "group_norm": "norm",
    "to_q": "qkv",
    "to_k": "qkv",
    "to_v": "qkv",
    "to_out.0": "proj_out",
}
"""Modules of residual blocks and attentions: diffusers' names, the original ones."""


def config_from_state_dict(state: StateDict) -> NetworkConfig:
    """Derive the architecture from the tensors' shapes: all but ``sample_size`` and the heads.

    Raises:
        CheckpointError: The tensors are not those of such a network; the first is named.
    """
    width, in_channels, *_ = shape_of(state, "input_blocks.0.0.weight", 4)
    layers_by_resnet = _layers_between_residual_samplers(state)
    levels: list[list[tuple[int, bool]]] = [[]]  # channels of residual blocks, with attention?
    for number in itertools.count(1):
        block = f"input_blocks.{number}"
        if f"{block}.0.op.weight" in state:
            levels.append([])
        elif (conv := f"{block}.0.in_layers.2.weight") not in state:
            break
        elif layers_by_resnet and number % (layers_by_resnet + 1) == 0:
            levels.append([])
        else:
            levels[-1].append((len(state[conv]), f"{block}.1.qkv.weight" in state))
    if any(len(level) != len(levels[0]) or len(set(level)) != 1 for level in levels):
        raise CheckpointError(
            "its input_blocks must be levels of equally many residual blocks, alike within a "
            "level, with a convolution (.0.op) or a residual block (resblock_updown) between "
            f"levels. Found, as (channels, has attention): {levels}."
        )
    channels, attends = zip(*(level[0] for level in levels), strict=True)
    if width != channels[0] or any(count % COMMON["norm_num_groups"] for count in channels):
        raise CheckpointError(
            f"its channels must be multiples of {COMMON['norm_num_groups']}, and as many in "
            f"input_blocks.0.0 as in the first level; found {width}, then {channels}."
        )
    time_channels, timestep_channels = shape_of(state, "time_embed.0.weight", 2)
    embedded, _ = shape_of(state, "input_blocks.1.0.emb_layers.1.weight", 2)
    down, up = (RESNET_DOWN, RESNET_UP) if layers_by_resnet else (DOWN, UP)
    settings: NetworkConfig = {
        **COMMON,
        "in_channels": in_channels,
        "out_channels": shape_of(state, "out.2.weight", 4)[0],
        "layers_per_block": len(levels[0]),
        "block_out_channels": channels,
        "down_block_types": tuple(ATTN_DOWN if a else down for a in attends),
        "up_block_types": tuple(ATTN_UP if a else up for a in reversed(attends)),
        "resnet_time_scale_shift": "scale_shift" if embedded == 2 * channels[0] else "default",
    }
    if layers_by_resnet:
        settings |= {"downsample_type": "resnet", "upsample_type": "resnet"}
    if timestep_channels != width:  # of 512x512, whose channel_mult begins with 0.5
        settings |= {
            "time_embedding_dim": time_channels,
            "timestep_channels": timestep_channels,
        }
    if "label_emb.weight" in state:
        settings["num_class_embeds"] = len(state["label_emb.weight"])
    check_tensors(state, original_shapes(settings))
    return settings


def _layers_between_residual_samplers(state: StateDict) -> int:
    """Return how many residual blocks a level has on the way down; 0 if none samples between.

    On the way up a level has one more, and the sampler is a further part of the last one's.
    """
    number = 0
    while f"output_blocks.{number}.0.in_layers.2.weight" in state:
        parts = (f"output_blocks.{number}.{part}.in_layers.2.weight" for part in (1, 2))
        if any(part in state for part in parts):
            return number
        number += 1
    return 0


def original_names(config: NetworkConfig) -> dict[str, str]:
    """Return for each tensor of the ``UNet2DModel`` the checkpoint's tensor that holds it.

    Three of diffusers', ``to_q``, ``to_k`` and ``to_v``, are parts of one ``qkv``.
    """
    blocks = dict(_OUTER)
    layers, depth = config["layers_per_block"], len(config["block_out_channels"])
    number = 1
    for level in range(depth):
        for layer in range(layers):
            blocks[f"down_blocks.{level}.resnets.{layer}"] = f"input_blocks.{number}.0"
            blocks[f"down_blocks.{level}.attentions.{layer}"] = f"input_blocks.{number}.1"
            number += 1
        blocks[f"down_blocks.{level}.downsamplers.0"] = f"input_blocks.{number}.0"
        blocks[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{number}.0.op"
        number += 1
    for level, kind in enumerate(config["up_block_types"]):
        for layer in range(layers + 1):
            number = level * (layers + 1) + layer
            blocks[f"up_blocks.{level}.resnets.{layer}"] = f"output_blocks.{number}.0"
            blocks[f"up_blocks.{level}.attentions.{layer}"] = f"output_blocks.{number}.1"
        position = 2 if kind == ATTN_UP else 1
        sampler = f"output_blocks.{number}.{position}"
        blocks[f"up_blocks.{level}.upsamplers.0"] = sampler
        blocks[f"up_blocks.{level}.upsamplers.0.conv"] = f"{sampler}.conv"
    return {name: _original_name(name, blocks) for name in _diffusers_shapes(config)}


def original_shapes(config: NetworkConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of a checkpoint of this architecture."""
    targets, shapes = _diffusers_shapes(config), {}
    for name, original in original_names(config).items():
        shape = targets[name]
        if ".qkv." in original:
            shape = (3 * shape[0], *shape[1:])
        if original.endswith(("qkv.weight", "proj_out.weight")):
            shape = (*shape, 1)  # of a Conv1d
        shapes[original] = shape
    return shapes


def to_diffusers(
    state: StateDict,
    config: NetworkConfig,
    new_order: bool = False,  # noqa: FBT001, FBT002
) -> dict[str, Tensor]:
    """Convert a checkpoint to the state dict of a ``UNet2DModel``, float32.

    The output of ``qkv`` reshapes to (heads, 3, C / heads): improved-diffusion splits the heads
    first, and so do CompVis and guided-diffusion unless their flags say otherwise
    (QKVAttentionLegacy).

    Args:
        state: The checkpoint.
        config: What :func:`config_from_state_dict` returned, with heads.
        new_order: Whether ``qkv`` reshapes to (3, heads, C / heads) (QKVAttention).

    Raises:
        CheckpointError: A tensor is missing, has another shape, or is too many.
    """
    check_tensors(state, original_shapes(config))
    targets, converted = _diffusers_shapes(config), {}
    for name, original in original_names(config).items():
        tensor, shape = state[original].float(), targets[name]
        if ".qkv." in original:
            heads = 1 if new_order else num_heads_of(config, name, shape[0])
            part = "qkv".index(name.removesuffix(".weight").removesuffix(".bias")[-1])
            tensor = tensor.reshape(heads, 3, -1, *tensor.shape[1:])[:, part]
        converted[name] = tensor.reshape(shape)
    return converted


def _diffusers_shapes(config: NetworkConfig) -> Shapes:
    with torch.device("meta"):
        unet = build_unet(config)
    return {name: tuple(value.shape) for name, value in unet.state_dict().items()}


def _original_name(name: str, blocks: Mapping[str, str]) -> str:
    module, _, parameter = name.rpartition(".")
    if module in blocks:
        return f"{blocks[module]}.{parameter}"
    for inner, original in _INNER.items():
        if module.endswith(f".{inner}"):
            return f"{blocks[module.removesuffix(f'.{inner}')]}.{original}.{parameter}"
    raise AssertionError(name)
