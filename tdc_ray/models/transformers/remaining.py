"""What remains of a transformer's block without some of its branches (depth pruning).

It takes the place of diffusers' block, and the branches have the names that they had. What was
removed takes no time and has no weights: a block without any branch returns what it is given.
"""

from collections.abc import Collection, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tdc_ray.errors import UnsupportedModelError
from tdc_ray.models.step import State
from tdc_ray.models.step import run as run_steps
from tdc_ray.models.transformers.steps import (
    dit_block,
    joint_block,
    single_block,
    to_grid,
    to_tokens,
)


class RemainingBlock(nn.Module):
    """A block in which ``nn.Identity`` stands for what was removed."""

    branches: ClassVar[tuple[str, ...]]
    """Names of the branches that such blocks may have."""

    norms: ClassVar[dict[str, str]]
    """Names of what goes with a branch."""

    def __init__(self, block: nn.Module, gone: Collection[str]) -> None:
        """Take over the parts of a block, which is changed, without some of its branches."""
        super().__init__()
        removed = {*gone, *(norm for branch, norm in self.norms.items() if branch in gone)}
        for name, parameter in block.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        for name, module in block.named_children():
            self.add_module(name, nn.Identity() if name in removed else module)
        self.is_empty = all(name in gone or name not in self._modules for name in self.branches)


class RemainingDiTBlock(RemainingBlock):
    """Remains of a block of a ``DiTTransformer2DModel``."""

    branches = ("attn1", "ff")
    norms: ClassVar[dict[str, str]] = {"ff": "norm3"}

    norm1: Any

    def __init__(self, block: nn.Module, gone: Collection[str], *, keeps_embedding: bool) -> None:
        """Remove branches, and with the last of them the embedding of timestep and class."""
        super().__init__(block, gone)
        _keep_modulation(self.norm1, (name not in gone for name in self.branches))
        if self.is_empty and not keeps_embedding:
            self.norm1.emb = None

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        timestep: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        class_labels: Tensor | None = None,
    ) -> Tensor:
        """Run what is left, with the arguments of diffusers' block; return ``(B, N, C)``."""
        _check_unused(
            attention_mask=attention_mask,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
            cross_attention_kwargs=cross_attention_kwargs or None,
        )
        if self.is_empty:
            return hidden_states
        embedding = self.norm1.emb(timestep, class_labels, hidden_dtype=hidden_states.dtype)
        state = State(_grid(hidden_states), embedding[:, None])
        return to_tokens(run_steps(dit_block("", self, 0), state).hidden)


class RemainingSingleBlock(RemainingBlock):
    """Remains of a block of PixArt or SANA, whose networks have one adaptive norm."""

    branches = ("attn1", "attn2", "ff")
    norms: ClassVar[dict[str, str]] = {"attn1": "norm1", "ff": "norm2"}

    def __init__(self, block: nn.Module, gone: Collection[str]) -> None:
        """Remove branches, and with the last that has a gate what is added to the embedding."""
        super().__init__(block, gone)
        if {*self.norms} <= {*gone}:
            self.scale_shift_table = None

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        timestep: Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
        *,
        cross_attention_kwargs: dict[str, Any] | None = None,
        class_labels: Tensor | None = None,
    ) -> Tensor:
        """Run what is left, with the arguments of diffusers' blocks; return ``(B, N, C)``."""
        _check_unused(
            attention_mask=attention_mask,
            cross_attention_kwargs=cross_attention_kwargs or None,
            class_labels=class_labels,
        )
        if self.is_empty:
            return hidden_states
        assert timestep is not None
        state = State(
            _grid(hidden_states, height, width),
            timestep.unflatten(1, (6, -1)),
            context=encoder_hidden_states,
            context_bias=encoder_attention_mask,
        )
        return to_tokens(run_steps(single_block("", self), state).hidden)


class RemainingJointBlock(RemainingBlock):
    """Remains of a ``JointTransformerBlock`` of Stable Diffusion 3."""

    branches = ("attn", "ff", "attn2", "ff_context")
    norms: ClassVar[dict[str, str]] = {"ff": "norm2", "ff_context": "norm2_context"}

    def __init__(self, block: Any, gone: Collection[str]) -> None:
        """Remove branches, and their parts of the modulation."""
        super().__init__(block, gone)
        self.use_dual_attention = block.use_dual_attention
        self.context_pre_only = block.context_pre_only
        of_image = ["attn", "ff", *["attn2"] * block.use_dual_attention]
        of_caption = ["attn", *["ff_context"] * (not block.context_pre_only)]
        for norm, names in ((self.norm1, of_image), (self.norm1_context, of_caption)):
            _keep_modulation(norm, (name not in gone for name in names))

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor | None, Tensor]:
        """Run what is left, with the arguments of diffusers' block; return both streams."""
        _check_unused(joint_attention_kwargs=joint_attention_kwargs or None)
        context: Tensor | None = encoder_hidden_states
        if not self.is_empty:
            state = State(_grid(hidden_states), temb, context=context)
            state = run_steps(joint_block("", self), state)
            hidden_states, context = to_tokens(state.hidden), state.context
        return None if self.context_pre_only else context, hidden_states


def _grid(tokens: Tensor, height: int | None = None, width: int | None = None) -> Tensor:
    """Bring ``(B, N, C)`` to ``(B, C, h, w)``; where nothing convolves any grid will do."""
    if height is None or width is None:
        height, width = tokens.shape[1], 1
    return to_grid(tokens, height, width)


def _keep_modulation(norm: Any, kept: Iterable[bool]) -> None:
    """Keep some of the equal parts of what an adaptive norm's linear layer outputs."""
    parts = [*kept]
    if not any(parts):
        norm.linear = nn.Identity()
        return
    for name, values in [*norm.linear.named_parameters()]:
        rows = values.detach().chunk(len(parts))
        of_kept = torch.cat([part for part, keep in zip(rows, parts, strict=True) if keep])
        setattr(norm.linear, name, nn.Parameter(of_kept, requires_grad=values.requires_grad))


def _check_unused(**arguments: Any) -> None:
    """Refuse arguments that no pipeline gives to these blocks: they would be ignored.

    Raises:
        UnsupportedModelError: One is given.
    """
    for name, value in arguments.items():
        if value is not None:
            raise UnsupportedModelError(
                f"{name} must be None for a network of which branches were removed, got "
                f"{type(value).__name__}."
            )
