"""The classes of transformers that are described."""

from collections.abc import Mapping

from tdc_ray.models.transformers.dit import DIT
from tdc_ray.models.transformers.pixart import PIXART
from tdc_ray.models.transformers.sana import SANA
from tdc_ray.models.transformers.sd3 import SD3
from tdc_ray.models.transformers.transformer import Transformer

TRANSFORMERS: Mapping[str, Transformer] = {one.name: one for one in (DIT, PIXART, SD3, SANA)}
"""Rows by diffusers' name of the class."""
