"""How a network is written down: the keyword arguments that its class is built with."""

from collections.abc import Mapping
from typing import Any

NetworkConfig = Mapping[str, Any]
"""Keyword arguments of ``diffusers.UNet2DModel``, and ``num_heads`` where every attention has the
same number of heads whatever its width, which ``attention_head_dim`` cannot say."""


def class_name(config: NetworkConfig) -> str:
    """Return the name of the network's class; configs without one are of a ``UNet2DModel``."""
    return str(config.get("_class_name", "UNet2DModel"))
