"""Builds, loads and runs ``DiTTransformer2DModel``."""

from functools import partial
from pathlib import Path

import torch
from diffusers import DiTTransformer2DModel
from diffusers.models.embeddings import LabelEmbedding
from torch import Tensor, nn
from torch.nn import functional

from tdc_ray.models.network_config import NetworkConfig
from tdc_ray.models.step import Ends, State, Step
from tdc_ray.models.transformers.network import build_transformer, load_transformer
from tdc_ray.models.transformers.steps import gated_step, modulation_of, transformer_steps


def build_dit(config: NetworkConfig) -> DiTTransformer2DModel:
    """Build a DiT with random weights on the current default device, as adaLN-Zero begins.

    All gates are 0, so that every block passes on what it reads, and so is the output
    (arXiv:2212.09748).
    """
    dit = _without_dropout(build_transformer(DiTTransformer2DModel, config))
    for module in dit.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for layer in (*(block.norm1.linear for block in dit.transformer_blocks), dit.proj_out_1):
        nn.init.zeros_(layer.weight)
    nn.init.zeros_(dit.proj_out_2.weight)
    return dit


def _without_dropout(dit: DiTTransformer2DModel) -> DiTTransformer2DModel:
    """Leave the dropout of labels to the training loop: every block would draw other ones."""
    for module in dit.modules():
        if isinstance(module, LabelEmbedding):
            module.dropout_prob = 0.0
    return dit


def load_dit(folder: Path) -> DiTTransformer2DModel:
    """Load a saved DiT, in eval mode, on the CPU.

    Raises:
        CheckpointError: The folder holds no ``DiTTransformer2DModel`` in safetensors.
    """
    return _without_dropout(load_transformer(DiTTransformer2DModel, folder))


def ends(dit: DiTTransformer2DModel) -> Ends:
    """Return the layers at both ends."""
    return Ends(dit.pos_embed.proj, dit.norm_out, dit.proj_out_2)


def start(
    dit: DiTTransformer2DModel, x_t: Tensor, timesteps: Tensor, class_labels: Tensor | None
) -> State:
    """Return the state before the first step.

    Args:
        dit: The network.
        x_t: Noised images, ``(B, C, H, W)``.
        timesteps: As the network sees them, ``(B,)``.
        class_labels: ``(B,)``
    """
    embeddings = [
        block.norm1.emb(timesteps, class_labels, hidden_dtype=dit.dtype)
        for block in dit.transformer_blocks
    ]
    return State(x_t, torch.stack(embeddings, dim=1))


def steps(dit: DiTTransformer2DModel) -> list[Step]:
    """Split the forward pass into steps; one after the other they return the network's output."""
    blocks: list[Step] = []
    for index, block in enumerate(dit.transformer_blocks):
        name, gate = f"transformer_blocks.{index}", partial(_modulation, block.norm1.linear, index)
        blocks += [
            gated_step(f"{name}.attn1", block.attn1, block.norm1.norm, partial(gate, 0)),
            gated_step(f"{name}.ff", block.ff, block.norm3, partial(gate, 1)),
        ]
    modulation = partial(_end_modulation, dit.proj_out_1)
    return transformer_steps(dit, blocks, "proj_out_2", dit.norm_out, modulation)


def _modulation(
    layer: nn.Linear, block: int, half: int, embeddings: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return shift, scale and gate of a block's attention (0) or feed-forward (1)."""
    return modulation_of(layer, half, embeddings[:, block])


def _end_modulation(layer: nn.Linear, embeddings: Tensor) -> tuple[Tensor, Tensor]:
    """Return shift and scale before the last layer, by the first block's embedding."""
    shift, scale = layer(functional.silu(embeddings[:, 0])).chunk(2, dim=1)
    return shift, scale
