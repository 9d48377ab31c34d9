"""The named UNets, as settings of ``diffusers.UNet2DModel``.

The settings of the paper's models were checked against openai/improved-diffusion and
CompVis/latent-diffusion; their parameters and macs are the paper's.
"""

from collections.abc import Mapping
from typing import Unpack, cast

from tdc_ray.config.conditioning import ConditioningConfig
from tdc_ray.config.model import AUTO, ModelConfig
from tdc_ray.config.validation import meant
from tdc_ray.errors import CheckpointError, ConfigError
from tdc_ray.models.network_config import NetworkConfig, num_class_embeds

DOWN, ATTN_DOWN = "DownBlock2D", "AttnDownBlock2D"
UP, ATTN_UP = "UpBlock2D", "AttnUpBlock2D"
RESNET_DOWN, RESNET_UP = "ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D"


def iddpm_unet(**changes: Unpack[NetworkConfig]) -> NetworkConfig:
    """UNet of improved-diffusion: scale_shift, a norm in the middle attention, eps 1e-5."""
    return {
        "in_channels": 3,
        "out_channels": 6,
        "attention_head_dim": 64,
        "resnet_time_scale_shift": "scale_shift",
        "norm_num_groups": 32,
        "attn_norm_num_groups": 32,
        "norm_eps": 1e-5,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "downsample_padding": 1,
        **changes,
    }


def _ddpm(**changes: Unpack[NetworkConfig]) -> NetworkConfig:
    """UNet of DDPM as diffusers ships it (google/ddpm-cifar10-32): one head, eps 1e-6."""
    return {
        "in_channels": 3,
        "out_channels": 3,
        "layers_per_block": 2,
        "attention_head_dim": None,
        "norm_eps": 1e-6,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "downsample_padding": 0,
        **changes,
    }


def _small(
    *, sample_size: int, channels: tuple[int, ...], layers_per_block: int, in_channels: int = 1
) -> NetworkConfig:
    """UNet for small grey images: attention at the lowest resolution, heads of 16, 8 groups."""
    depth = len(channels)
    return iddpm_unet(
        sample_size=sample_size,
        in_channels=in_channels,
        out_channels=in_channels,
        layers_per_block=layers_per_block,
        block_out_channels=channels,
        down_block_types=(DOWN,) * (depth - 1) + (ATTN_DOWN,),
        up_block_types=(ATTN_UP,) + (UP,) * (depth - 1),
        attention_head_dim=16,
        norm_num_groups=8,
        attn_norm_num_groups=8,
    )


ARCHITECTURES: Mapping[str, NetworkConfig] = {
    "tiny": _small(sample_size=8, channels=(16, 32), layers_per_block=1),
    "digits": _small(sample_size=8, channels=(32, 64), layers_per_block=2),
    "tiny16": _small(sample_size=16, channels=(16, 32), layers_per_block=1),
    "mnist16": _small(sample_size=16, channels=(32, 64), layers_per_block=2),
    "photos16": _small(sample_size=16, channels=(16, 32), layers_per_block=1, in_channels=3),
    "mnist32": _small(sample_size=32, channels=(32, 64, 64), layers_per_block=2),
    "mnist32-ldm": _small(sample_size=8, channels=(48, 96), layers_per_block=2, in_channels=4),
    "iddpm-cifar10": iddpm_unet(
        sample_size=32,
        layers_per_block=3,
        block_out_channels=(128, 256, 256, 256),
        down_block_types=(DOWN, ATTN_DOWN, ATTN_DOWN, DOWN),
        up_block_types=(UP, ATTN_UP, ATTN_UP, UP),
    ),
    "iddpm-imagenet64": iddpm_unet(
        sample_size=64,
        layers_per_block=3,
        block_out_channels=(128, 256, 384, 512),
        down_block_types=(DOWN, DOWN, ATTN_DOWN, ATTN_DOWN),
        up_block_types=(ATTN_UP, ATTN_UP, UP, UP),
        num_heads=4,
    ),
    "ddpm-cifar10": _ddpm(
        sample_size=32,
        block_out_channels=(128, 256, 256, 256),
        down_block_types=(DOWN, ATTN_DOWN, DOWN, DOWN),
        up_block_types=(UP, UP, ATTN_UP, UP),
    ),
    "ddpm-ffhq256": _ddpm(
        sample_size=256,
        block_out_channels=(128, 128, 256, 256, 512, 512),
        down_block_types=(DOWN, DOWN, DOWN, DOWN, ATTN_DOWN, DOWN),
        up_block_types=(UP, ATTN_UP, UP, UP, UP, UP),
    ),
    "ldm-ffhq256": {
        "sample_size": 64,
        "in_channels": 3,
        "out_channels": 3,
        "layers_per_block": 2,
        "block_out_channels": (224, 448, 672, 896),
        "down_block_types": (DOWN, ATTN_DOWN, ATTN_DOWN, ATTN_DOWN),
        "up_block_types": (ATTN_UP, ATTN_UP, ATTN_UP, UP),
        "attention_head_dim": 32,
    },
}

LATENT = frozenset({"ldm-ffhq256", "mnist32-ldm"})
"""Architectures that denoise latents of a first stage, not pixels."""


def architecture(name: str) -> NetworkConfig:
    """Return the settings of a named UNet.

    Raises:
        ConfigError: No architecture has this name.
    """
    if name not in ARCHITECTURES:
        raise ConfigError(
            f"model.architecture must be auto or one of {', '.join(ARCHITECTURES)}, got "
            f"{name}{meant(name, [AUTO, *ARCHITECTURES])}"
        )
    return ARCHITECTURES[name]


def base_unet(model: ModelConfig, conditioning: ConditioningConfig) -> NetworkConfig:
    """Return the settings of a run's base, and the classes that it embeds.

    They are those that the run chose or read from a file, else the named UNet's.

    Raises:
        ConfigError: No architecture has this name; what ``auto`` is has to be chosen first.
    """
    chosen, num_classes = model.network, conditioning.num_class_embeds
    settings = architecture(model.architecture) if chosen is None else cast(NetworkConfig, chosen)
    if num_classes is None or num_class_embeds(settings) is not None:
        return settings
    return {**settings, "num_class_embeds": num_classes}


def with_heads(
    config: NetworkConfig, num_heads: int, upsample: int | None = None
) -> NetworkConfig:
    """Return a config whose attentions all have the same number of heads.

    Args:
        config: The config.
        num_heads: Their number.
        upsample: That on the way up; None means the same.

    Raises:
        CheckpointError: An attention's channels are no multiple of it.
    """
    widths = _attention_widths(config)
    for heads in (num_heads, upsample or num_heads):
        if odd := [width for width in sorted(widths) if width % heads]:
            raise CheckpointError(f"{heads} heads do not divide attention of {odd[0]} channels.")
    if upsample not in (None, num_heads):
        config = {**config, "num_heads_upsample": upsample}
    elif len(widths) == 1:
        return {**config, "attention_head_dim": widths.pop() // num_heads}
    return {**config, "attention_head_dim": None, "num_heads": num_heads}


def with_head_channels(config: NetworkConfig, num_channels: int) -> NetworkConfig:
    """Return a config whose attentions all have heads of the same number of channels.

    Raises:
        CheckpointError: An attention's channels are no multiple of it.
    """
    if odd := [width for width in sorted(_attention_widths(config)) if width % num_channels]:
        raise CheckpointError(
            f"heads of {num_channels} channels do not divide attention of {odd[0]} channels."
        )
    return {**config, "attention_head_dim": num_channels}


def _attention_widths(config: NetworkConfig) -> set[int]:
    kinds = zip(config["block_out_channels"], config["down_block_types"], strict=True)
    widths = {width for width, kind in kinds if kind == ATTN_DOWN}
    return widths | {config["block_out_channels"][-1]}  # that of the middle
