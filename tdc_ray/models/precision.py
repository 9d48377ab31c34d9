"""Computation in fp32 or less: autocast, and the memory layout that goes with it."""

import contextlib
from collections.abc import Mapping
from contextlib import AbstractContextManager

import torch
from torch import nn

from tdc_ray.config.train import Precision

DTYPES: Mapping[str, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
"""Types of each precision but ``auto``, which a benchmark has replaced
(`runs.stages.precision`)."""


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """Enter autocast if the precision needs it.

    Without gradients no weight's cast is cached: its memory may be another weight's by then.
    """
    if precision == "fp32":
        return contextlib.nullcontext()
    cache = torch.is_grad_enabled()
    return torch.autocast(device.type, dtype=DTYPES[precision], cache_enabled=cache)


def in_layout(model: nn.Module, precision: Precision) -> nn.Module:
    """Convert a model, on its device, to the memory layout that its convolutions compute in.

    Tensor cores and bf16 want channels last; for fp32 on CPUs it makes no difference, as oneDNN
    uses a blocked layout of its own.
    """
    device = next(model.parameters()).device
    last = device.type == "cuda" or precision != "fp32"
    return model.to(memory_format=torch.channels_last if last else torch.contiguous_format)
