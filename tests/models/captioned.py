"""Networks that are conditioned on captions, small, whose captions the tests draw at random."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tdc_ray.config.diffusion import DiffusionConfig, PredictionType
from tdc_ray.diffusion.process import NoisedBatch, NoiseSchedule, noise_schedule
from tdc_ray.models.families import blank_labels, build_network, steps_of
from tdc_ray.models.labels import Captions
from tdc_ray.models.network_config import (
    CONDITION_CLASS,
    MASK,
    STATES,
    NetworkConfig,
)
from tdc_ray.models.step import run
from tdc_ray.models.structure import caption_shapes
from tdc_ray.pruning.noised import first_state

Call = Callable[[Any, Tensor, Tensor, Captions], Any]
"""Calls a network, on noised images, timesteps and captions, as diffusers' pipelines do."""


@dataclass(frozen=True)
class Case:
    """A small network of a class, and how it is run."""

    config: NetworkConfig
    call: Call
    parts: tuple[str, ...]
    """What the names of units of each kind end with."""

    prediction: PredictionType = "epsilon"
    scale: float = 0.1
    """Standard deviation of what is added to all weights: none is at its initial 0 or 1."""

    @property
    def schedule(self) -> NoiseSchedule:
        return noise_schedule(DiffusionConfig(prediction_type=self.prediction))

    def network(self, seed: int = 0) -> Any:
        torch.manual_seed(seed)
        network = build_network(self.config).eval()
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(self.scale * torch.randn_like(parameter))
        return network

    def noised(self, size: int, tokens: int = 5, seed: int = 0, width: int = 8) -> NoisedBatch:
        generator = torch.Generator().manual_seed(seed)

        def randn(*shape: int) -> Tensor:
            return torch.randn(size, *shape, generator=generator)

        labels = {
            name: randn(tokens, *shape[1:]) if name == STATES else randn(*shape)
            for name, shape in caption_shapes(self.config["_class_name"], self.config).items()
        }
        if MASK in labels:  # captions of 1, 2, ... tokens
            labels[MASK] = (torch.arange(tokens) <= torch.arange(size)[:, None]).float()
        x_0, epsilon = (randn(self.config["in_channels"], 8, width) for _ in range(2))
        return NoisedBatch(x_0, epsilon, torch.arange(size) * 7 + 200, labels)

    @torch.no_grad()
    def by_steps(self, network: Any, batch: NoisedBatch) -> Tensor:
        return run(steps_of(network), first_state(network, batch, self.schedule)).hidden

    @torch.no_grad()
    def by_diffusers(self, network: Any, batch: NoisedBatch) -> Tensor:
        timesteps = self.schedule.model_timesteps(batch.timesteps)
        output: Tensor = self.call(
            network, batch.x_t(self.schedule), timesteps, batch.labels
        ).sample
        return output

    def error(self, network: Any, base: Any, batch: NoisedBatch) -> float:
        """How far a network's predictions are from the base's."""
        apart = self.by_steps(network, batch) - self.by_steps(base, batch)
        return float(apart.square().mean())


def count_macs(network: Any, call: Call) -> float:
    """Macs by torch's counter, of an image and a caption as long as macs are counted for."""
    network = network.to("meta")
    side, channels = network.config["sample_size"], network.config["in_channels"]
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        images = torch.ones(1, channels, side, side)
        call(network, images, torch.ones(1), blank_labels(network, 1))
    return counter.get_total_flops() / 2


def call_pixart(network: Any, x_t: Tensor, timesteps: Tensor, captions: Captions) -> Any:
    told = {name: captions.get(name) for name in ("resolution", "aspect_ratio")}
    return network(x_t, captions[STATES], timesteps, told, encoder_attention_mask=captions[MASK])


def call_sd3(network: Any, x_t: Tensor, timesteps: Tensor, captions: Captions) -> Any:
    return network(x_t, captions[STATES], captions["pooled_projections"], timesteps)


def call_sana(network: Any, x_t: Tensor, timesteps: Tensor, captions: Captions) -> Any:
    return network(x_t, captions[STATES], timesteps, encoder_attention_mask=captions[MASK])


def call_unet(network: Any, x_t: Tensor, timesteps: Tensor, captions: Captions) -> Any:
    return network(x_t, timesteps, captions[STATES], added_cond_kwargs=captions)


PIXART: NetworkConfig = {
    "_class_name": "PixArtTransformer2DModel",
    "num_attention_heads": 4,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 2,
    "sample_size": 8,
    "cross_attention_dim": 48,
    "caption_channels": 16,
}
SD3: NetworkConfig = {  # the kind of Stable Diffusion 3
    "_class_name": "SD3Transformer2DModel",
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 12,
    "num_attention_heads": 4,
    "joint_attention_dim": 16,
    "caption_projection_dim": 48,
    "pooled_projection_dim": 20,
    "pos_embed_max_size": 6,
}
SD35: NetworkConfig = {**SD3, "dual_attention_layers": [0], "qk_norm": "rms_norm"}
SANA: NetworkConfig = {
    "_class_name": "SanaTransformer2DModel",
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 3,
    "attention_head_dim": 16,  # linear attention jumps where all of a query's are below 0
    "num_layers": 2,
    "num_cross_attention_heads": 4,
    "cross_attention_head_dim": 12,
    "cross_attention_dim": 48,
    "caption_channels": 16,
    "sample_size": 8,
}
UNET: NetworkConfig = {
    "_class_name": CONDITION_CLASS,
    "sample_size": 8,
    "in_channels": 4,
    "block_out_channels": [16, 32],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "attention_head_dim": 4,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": 12,
}
LINEAR: NetworkConfig = {
    **UNET,
    "use_linear_projection": True,
    "attention_head_dim": [2, 4],
    "transformer_layers_per_block": [2, 1],
}
XL: NetworkConfig = {
    **UNET,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 2,
    "projection_class_embeddings_input_dim": 20,
}

_PARTS, _FLOW = ("attn1", "attn2", "ff"), "flow_prediction"
_SIZES = {"use_additional_conditions": True, "patch_size": 4}
_OPEN = {"attention_bias": True, "norm_elementwise_affine": True, "interpolation_scale": 1}

CASES: dict[str, Case] = {
    "pixart": Case(PIXART, call_pixart, _PARTS),
    "pixart, sizes": Case({**PIXART, **_SIZES}, call_pixart, _PARTS),
    "sd3": Case(SD3, call_sd3, ("attn", "ff", "ff_context"), _FLOW),
    "sd3.5": Case(SD35, call_sd3, ("attn", "attn2", "ff", "ff_context"), _FLOW),
    "sana": Case(SANA, call_sana, _PARTS, _FLOW),
    "sana, all weights": Case({**SANA, **_OPEN, "patch_size": 2}, call_sana, _PARTS, _FLOW),
    "unet": Case(UNET, call_unet, ("resnets.0", *_PARTS), scale=0.05),
    "unet, linear": Case(LINEAR, call_unet, ("resnets.0", *_PARTS), scale=0.05),
    "unet, xl": Case(XL, call_unet, ("resnets.0", *_PARTS), scale=0.05),
}
"""One or more of every class."""
