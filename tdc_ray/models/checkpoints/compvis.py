"""Checkpoints of CompVis/latent-diffusion: UNet with EMA, VQ or KL first stage, noise schedule.

``state_dict`` holds the UNet under ``model.diffusion_model.``, its moving averages under
``model_ema.`` with the dots dropped from the names (ldm/modules/ema.py), the first stage under
``first_stage_model.``, and the schedule's buffers under names without a dot. The UNet is
improved-diffusion's; ``ffhq256`` and ``celebahq256`` have the same one.
"""

import re
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL, VQModel
from torch import Tensor

from tdc_ray.errors import CheckpointError
from tdc_ray.models.checkpoints.state_dicts import Shapes, StateDict, check_tensors, shape_of
from tdc_ray.models.first_stage import KINDS
from tdc_ray.models.network_config import FirstStageConfig

UNET, EMA, FIRST_STAGE = "model.diffusion_model.", "model_ema.", "first_stage_model."

_NAMES = (
    (r"^encoder\.down_blocks\.(\d+)", r"encoder.down.\1"),
    (r"mid_block\.resnets\.0", "mid.block_1"),
    (r"mid_block\.resnets\.1", "mid.block_2"),
    (r"mid_block\.attentions\.0", "mid.attn_1"),
    (r"resnets", "block"),
    (r"attentions", "attn"),
    (r"(down|up)samplers\.0", r"\1sample"),
    (r"conv_shortcut", "nin_shortcut"),
    (r"group_norm", "norm"),
    (r"conv_norm_out", "norm_out"),
    (r"to_([qkv])\.", r"\1."),
    (r"to_out\.0", "proj_out"),
)
"""Names in an autoencoder of diffusers and in ldm/modules/diffusionmodules/model.py, without the
decoder's levels, which are counted in reverse there."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The parts of a checkpoint."""

    unet: StateDict
    """Under improved-diffusion's names."""

    is_averaged: bool
    """The UNet's weights are the moving averages."""

    first_stage: StateDict

    betas: Tensor | None
    """Shape ``(T,)``; None means that the file has none."""

    scaling_factor: float
    """Factor of the latents; 1.0 where training did not measure it (scale_by_std)."""


def split(state: StateDict) -> Checkpoint:
    """Split a checkpoint into its parts; of the UNet's weights the averaged ones are preferred.

    Raises:
        CheckpointError: It is of a conditional model, or parts are missing or unknown.
    """
    unet = _with_prefix(state, UNET)
    if not unet:
        raise CheckpointError(f"it holds no {UNET}*, under which CompVis keeps the UNet.")
    known = (UNET, EMA, FIRST_STAGE)
    if other := [name for name in state if "." in name and not name.startswith(known)]:
        raise CheckpointError(
            f"it holds {other[0]}: only unconditional models are supported, of "
            f"{', '.join(f'{name}*' for name in known)} alone."
        )
    averaged = _with_prefix(state, EMA)
    first_stage = {
        name: tensor
        for name, tensor in _with_prefix(state, FIRST_STAGE).items()
        if not name.startswith("loss.")  # its discriminator, which training alone needs
    }
    betas = state.get("betas")
    scale = float(state["scale_factor"]) if "scale_factor" in state else 1.0
    if averaged:
        plain = {name: f"diffusion_model.{name}".replace(".", "") for name in unet}
        shapes = {plain[name]: tuple(tensor.shape) for name, tensor in unet.items()}
        counters = {name: tuple(averaged[name].shape) for name in _COUNTERS if name in averaged}
        check_tensors(averaged, shapes | counters)
        unet = {name: averaged[plain[name]] for name in unet}
    return Checkpoint(unet, bool(averaged), first_stage, betas, scale)


_COUNTERS = ("decay", "num_updates")
"""What ``model_ema.`` holds beside weights."""


def config_from_state_dict(checkpoint: Checkpoint) -> FirstStageConfig:
    """Derive the settings of the first stage from shapes: all but ``sample_size``.

    It is a ``VQModel`` where it has a codebook, else an ``AutoencoderKL``.

    Raises:
        CheckpointError: The tensors are those of neither.
    """
    state = checkpoint.first_stage
    shape_of(state, "encoder.down.0.block.0.conv1.weight", 4)
    channels: list[int] = []
    while (name := f"encoder.down.{len(channels)}.block.0.conv1.weight") in state:
        channels.append(len(state[name]))
    layers = 0
    while f"encoder.down.0.block.{layers}.conv1.weight" in state:
        layers += 1
    attends = [f"encoder.down.{level}.attn.0.q.weight" in state for level in range(len(channels))]
    config: FirstStageConfig = {
        "_class_name": "AutoencoderKL",
        "in_channels": shape_of(state, "encoder.conv_in.weight", 4)[1],
        "out_channels": shape_of(state, "decoder.conv_out.weight", 4)[0],
        "down_block_types": tuple("Attn" * a + "DownEncoderBlock2D" for a in attends),
        "up_block_types": tuple("Attn" * a + "UpDecoderBlock2D" for a in reversed(attends)),
        "block_out_channels": tuple(channels),
        "layers_per_block": layers,
        "latent_channels": shape_of(state, "post_quant_conv.weight", 4)[0],
        "scaling_factor": checkpoint.scaling_factor,
        "mid_block_add_attention": "encoder.mid.attn_1.q.weight" in state,
    }
    if "quantize.embedding.weight" in state:
        config["_class_name"] = "VQModel"
        codes = shape_of(state, "quantize.embedding.weight", 2)
        config["num_vq_embeddings"], config["vq_embed_dim"] = codes
    return config


def to_first_stage(state: StateDict, config: FirstStageConfig) -> VQModel | AutoencoderKL:
    """Convert a first stage to a model of diffusers, float32, in eval mode.

    Args:
        state: The first stage's tensors.
        config: What :func:`config_from_state_dict` returned, with a ``sample_size``.

    Raises:
        CheckpointError: A tensor is missing, has another shape, or is too many.
    """
    with torch.device("meta"):
        arguments = {name: value for name, value in config.items() if name[0] != "_"}
        model: VQModel | AutoencoderKL = KINDS[config["_class_name"]](**arguments)
    targets = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    names = {name: _original_name(name, len(config["block_out_channels"])) for name in targets}
    check_tensors(state, _original_shapes(targets, names))
    weights = {name: state[names[name]].float().reshape(shape) for name, shape in targets.items()}
    model = model.to_empty(device="cpu")
    model.load_state_dict(weights)
    return model.eval()


def _original_shapes(targets: Shapes, names: dict[str, str]) -> Shapes:
    """Attention's linear layers are convolutions there."""
    return {
        names[name]: (*shape, 1, 1) if ".attentions." in name and len(shape) == 2 else shape
        for name, shape in targets.items()
    }


def _original_name(name: str, depth: int) -> str:
    name = re.sub(
        r"^decoder\.up_blocks\.(\d+)",
        lambda match: f"decoder.up.{depth - 1 - int(match[1])}",
        name,
    )
    for pattern, original in _NAMES:
        name = re.sub(pattern, original, name)
    return name


def _with_prefix(state: StateDict, prefix: str) -> StateDict:
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in state.items()
        if name.startswith(prefix)
    }
