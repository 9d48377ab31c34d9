"""Builds, saves, loads and runs transformers of diffusers by their descriptions."""

import inspect
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, cast

import diffusers
import torch
from diffusers.models.embeddings import LabelEmbedding, get_2d_sincos_pos_embed
from torch import Tensor, nn

from tdc_ray.models.diffusers_folder import load_pretrained
from tdc_ray.models.network_config import MASK, NetworkConfig
from tdc_ray.models.step import Ends, State
from tdc_ray.models.transformers.transformer import Transformer
from tdc_ray.storage.files import atomic_path, fetch, read_json

MASKED = -10000.0
"""What is added to the scores of tokens that do not count, as diffusers does."""


def build_transformer(transformer: Transformer, config: NetworkConfig) -> Any:
    """Build a network with random weights on the current default device."""
    arguments = {key: value for key, value in config.items() if key[0] != "_"}
    network = _completed(transformer, _class_of(transformer)(**arguments))
    if transformer.zero_at_first is not None:
        _start_at_zero(transformer, network)
    return network


def _start_at_zero(transformer: Transformer, network: Any) -> None:
    """Initialize as adaLN-Zero begins (arXiv:2212.09748)."""
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    assert transformer.zero_at_first is not None
    for layer in transformer.zero_at_first(network):
        nn.init.zeros_(layer.weight)


def _completed(transformer: Transformer, network: Any) -> Any:
    """Name the channels that a config leaves open; compute positions, also on the meta device.

    The dropout of labels is left to the training loop: every block would draw other ones.
    """
    config = network.config
    network.register_to_config(out_channels=config["out_channels"] or config["in_channels"])
    patches = network.get_submodule(transformer.ends.patches)
    positions = patches.pos_embed
    if positions is not None and positions.is_meta and patches.pos_embed_max_size is None:
        computed = get_2d_sincos_pos_embed(  # which are not saved
            patches.proj.out_channels,
            patches.height,
            base_size=patches.base_size,
            interpolation_scale=patches.interpolation_scale,
            output_type="pt",
            device=torch.device("cpu"),
        )
        patches.pos_embed = computed.float()[None]
    for module in network.modules():
        if isinstance(module, LabelEmbedding):
            module.dropout_prob = 0.0
    return network


def save_transformer(network: Any, folder: Path) -> None:
    """Save config and weights (safetensors) as diffusers does; the folder appears when whole."""
    network.to(memory_format=torch.contiguous_format)
    with atomic_path(folder) as temporary:
        network.save_pretrained(temporary)


def load_transformer(transformer: Transformer, folder: Path) -> Any:
    """Load a saved network, in eval mode, on the CPU.

    Raises:
        CheckpointError: The folder holds none of the class in safetensors.
    """
    return _completed(transformer, load_pretrained(_class_of(transformer), folder))


def transformer_config(transformer: Transformer, folder: Path) -> NetworkConfig:
    """Load a saved one's config without its weights; diffusers' defaults fill what it lacks."""
    return config_in(folder, _class_of(transformer))


def config_in(folder: Path, kind: Any) -> NetworkConfig:
    """Load the config of a class of diffusers; its defaults fill what the file lacks."""
    defaults = {key: value.default for key, value in inspect.signature(kind).parameters.items()}
    document = read_json(fetch(folder) / "config.json")
    config = defaults | {key: value for key, value in document.items() if key in defaults}
    if config.get("out_channels", 0) is None:
        config["out_channels"] = config["in_channels"]
    return cast("NetworkConfig", {"_class_name": kind.__name__, **config})


def _class_of(transformer: Transformer) -> Any:
    return getattr(diffusers, transformer.name)


def remove_branches(transformer: Transformer, network: Any, units: Collection[str]) -> None:
    """Remove branches of a network in place, by the names of their units."""
    gone: dict[str, list[str]] = {}
    for name in units:
        block, _, branch = name.rpartition(".")
        gone.setdefault(block, []).append(branch)
    for name, branches in gone.items():
        blocks, _, index = name.rpartition(".")
        block, is_first = network.get_submodule(name), index == "0"
        remaining = transformer.remaining_block(block, branches, is_first)
        network.get_submodule(blocks)[int(index)] = remaining


def transformer_ends(transformer: Transformer, network: Any) -> Ends:
    """Return the layers at both ends."""
    patches, norm, output = map(network.get_submodule, transformer.ends)
    return Ends(patches.proj, norm, output)


def first_state(
    transformer: Transformer, network: Any, x_t: Tensor, timesteps: Tensor, labels: Any
) -> State:
    """Return the state before the first step.

    Args:
        transformer: The network's description.
        network: The network.
        x_t: Noised images, ``(B, C, H, W)``.
        timesteps: As the network sees them, ``(B,)``.
        labels: Classes, ``(B,)``, or captions.
    """
    embedding, context = transformer.embed(network, x_t, timesteps, labels)
    bias = None
    if isinstance(labels, Mapping) and MASK in labels:
        bias = MASKED * (1 - labels[MASK].to(x_t.dtype)[:, None])
    return State(x_t, embedding, context=context, context_bias=bias)
