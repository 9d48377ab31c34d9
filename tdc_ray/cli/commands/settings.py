"""All settings of a run as the flags of a command."""

from typing import Annotated

from tyro.conf import arg

from tdc_ray.config.run import RunConfig

Settings = Annotated[RunConfig, arg(name="")]
"""Flags such as ``--plan.num-groups`` without a prefix of their own."""
