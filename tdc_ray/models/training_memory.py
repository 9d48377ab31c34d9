"""What a training holds in a worker's memory beside activations, by the network's config."""

import math
import re
from collections import Counter
from dataclasses import dataclass

from tdc_ray.config.compute import Sharding
from tdc_ray.config.train import Precision
from tdc_ray.models.structure import NetworkStructure

_UNIT = re.compile(
    r"(?:.*\.)?(?:resnets|attentions|downsamplers|upsamplers|transformer_blocks)\.\d+"
    r"(?:\.norm1\.emb)?"  # by which a DiT also embeds outside of its blocks
)
_FLOAT = 4
"""Bytes of a number of all that is kept, whatever the precision of computing."""


@dataclass(frozen=True, slots=True)
class TrainingMemory:
    """Bytes of one worker; activations come on top."""

    weights: int
    gradients: int
    moments: int
    """AdamW's two."""

    averages: int
    """The weights' exponential moving averages."""

    exchanged: int
    """What workers exchange: gradients a second time (DDP's buckets), or, roughly, weights and
    gradients, in the precision of computing, of two blocks and of what lies outside of blocks:
    one block computes, the next is being gathered (FSDP)."""

    @property
    def kept(self) -> int:
        """All that is there at every step."""
        return self.weights + self.gradients + self.moments + self.averages


def is_sharding_unit(name: str) -> bool:
    """Whether the module of a dotted name gathers its weights by itself (FSDP)."""
    return _UNIT.fullmatch(name) is not None


def unit_sizes(structure: NetworkStructure) -> Counter[str]:
    """Count the parameters by the module that gathers them; ``""`` is the network itself."""
    sizes: Counter[str] = Counter()
    for layer in structure.layers:
        parts = layer.name.split(".")
        names = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
        sizes[next(filter(is_sharding_unit, names), "")] += layer.num_params
    return sizes


def training_memory(
    structure: NetworkStructure, num_workers: int, sharding: Sharding, precision: Precision
) -> TrainingMemory:
    """Compute what each of some data-parallel workers holds of a training by AdamW.

    Args:
        structure: Of the network.
        num_workers: How many train it.
        sharding: Whether they share it.
        precision: Of computing; auto counts as fp32.
    """
    if sharding == "none":
        whole = _FLOAT * structure.num_params
        return TrainingMemory(whole, whole, 2 * whole, whole, whole if num_workers > 1 else 0)
    share = _FLOAT * math.ceil(structure.num_params / num_workers)
    sizes = unit_sizes(structure)
    outside = sizes.pop("", 0)
    numbers = outside + sum(size for _, size in sizes.most_common(2))
    # Gathered weights, their gradients, and in half precision the float32 that gradients are
    # summed in.
    bytes_each = 2 + 2 + _FLOAT if precision in ("bf16", "fp16") else 2 * _FLOAT
    return TrainingMemory(share, share, 2 * share, share, bytes_each * numbers)
