"""What the state of a training takes of a worker's memory, by the network's config; no torch."""

import re

_UNIT = re.compile(
    r"(.*\.)?(resnets|attentions|downsamplers|upsamplers|transformer_blocks)\.\d+(\.norm1\.emb)?"
)
"""Names of blocks whose weights are gathered at once; a DiT also embeds outside of its blocks."""


def is_sharding_unit(name: str) -> bool:
    """Whether the module of a dotted name gathers its weights by itself (FSDP)."""
    return _UNIT.fullmatch(name) is not None
