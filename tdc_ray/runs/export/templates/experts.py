"""Pruned denoisers, each for a range of timesteps. Needs torch, diffusers and safetensors.

From tdc_ray (Apache-2.0), which is not needed to run this.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from types import MethodType
from typing import Any

import diffusers
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional

PARAMETERS = ("weight", "bias")


def load_expert(folder: str | Path) -> nn.Module:
    """Load one pruned denoiser of a class of diffusers, in eval mode, on the CPU.

    It is built with the base's widths; then every layer gets its pruned weights, and every module
    the numbers that say how wide it is.
    """
    document = json.loads((Path(folder) / "modules.json").read_text())
    tensors = load_file(Path(folder) / "model.safetensors")
    kind = getattr(diffusers, document["class"])
    with torch.device("meta"):
        unet: Any = kind(**document["unet"])
    for name, module in unet.named_modules():
        for key in PARAMETERS:
            if f"{name}.{key}" in tensors:
                setattr(module, key, nn.Parameter(tensors.pop(f"{name}.{key}")))
        for key, value in document["attributes"].get(name, {}).items():
            setattr(module, key, value)
    for name, branches in document.get("removed", {}).items():
        _remove(unet.get_submodule(name), branches)
    left = [*tensors, *(name for name, value in unet.named_parameters() if value.is_meta)]
    if left:
        raise ValueError(f"{folder}: weights and modules.json do not fit: {', '.join(left)}.")
    if any(buffer.is_meta for buffer in unet.buffers()):  # such as positions: computed, not saved
        for name, module in kind(**document["unet"]).named_modules():
            for key, buffer in module.named_buffers(recurse=False):
                setattr(unet.get_submodule(name), key, buffer)
    unet.save_pretrained = _refuse_to_save
    network: nn.Module = unet.eval()
    return network


def _remove(block: Any, branches: Sequence[str]) -> None:
    """Remove attention, feed-forward or both of a DiT's block, and weights that the file lacks."""
    for module in block.modules():
        for key, value in list(module.named_parameters(recurse=False)):
            if value.is_meta:
                setattr(module, key, None)
    block.removed, block.forward = tuple(branches), MethodType(_remaining_forward, block)


def _remaining_forward(
    block: Any,
    hidden_states: torch.Tensor,
    attention_mask: None = None,
    encoder_hidden_states: None = None,
    encoder_attention_mask: None = None,
    timestep: torch.Tensor | None = None,
    cross_attention_kwargs: dict[str, Any] | None = None,
    class_labels: torch.Tensor | None = None,
) -> torch.Tensor:
    """Run the only branch that is left, if one is, with its part of the modulation.

    The arguments are those of diffusers' block, which checkpointing gives by position.
    """
    del attention_mask, encoder_hidden_states, encoder_attention_mask, cross_attention_kwargs
    for branch, norm in (("attn1", block.norm1.norm), ("ff", block.norm3)):
        if branch not in block.removed:
            emb = block.norm1.emb(timestep, class_labels, hidden_dtype=hidden_states.dtype)
            shift, scale, gate = block.norm1.linear(functional.silu(emb)).chunk(3, dim=1)
            tokens = norm(hidden_states) * (1 + scale[:, None]) + shift[:, None]
            hidden_states = hidden_states + gate[:, None] * getattr(block, branch)(tokens)
    return hidden_states


def _refuse_to_save(*_: Any, **__: Any) -> None:
    raise ValueError(
        "diffusers' save_pretrained keeps no widths, and what it saved of a pruned UNet could not "
        "be loaded: copy the folder that this one was loaded from."
    )


class Experts(nn.ModuleList):
    """Denoisers, each for a range of timesteps; together they serve every timestep."""

    def __init__(self, unets: Sequence[nn.Module], spans: Sequence[tuple[int, int]]) -> None:
        """Wrap denoisers with one span ``(first, last)`` of timesteps, last included, for each."""
        super().__init__(unets)
        self.spans = tuple(spans)

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the weights."""
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    def for_timestep(self, timestep: float) -> nn.Module:
        """Return the expert that serves the timestep of training nearest to one."""
        nearest = math.floor(timestep + 0.5)
        for unet, (first, last) in zip(self, self.spans, strict=True):
            if first <= nearest <= last:
                return unet
        raise ValueError(f"no expert serves timestep {timestep}, but {self.spans} are served.")

    @classmethod
    def from_pretrained(
        cls, path: str | Path, torch_dtype: torch.dtype | None = None, **_: Any
    ) -> "Experts":
        """Load what ``progressive.json`` lists; diffusers' other arguments are ignored."""
        rows = json.loads((Path(path) / "progressive.json").read_text())["experts"]
        unets = [load_expert(Path(path) / row["folder"]) for row in rows]
        experts = cls(unets, [(row["first"], row["last"]) for row in rows])
        return experts if torch_dtype is None else experts.to(torch_dtype)
