"""All settings of a run as the flags of a command."""

from typing import Annotated

from tyro.conf import UseAppendAction, arg

from tdc_ray.config.run import RunConfig
from tdc_ray.reporting.loggers.names import LoggerName

Settings = Annotated[RunConfig, arg(name="")]
"""Flags such as ``--plan.num-groups`` without a prefix of their own."""

LogTo = Annotated[
    tuple[tuple[LoggerName, ...], ...],
    UseAppendAction,
    arg(
        help="Where curves, sample grids, settings and results go beside TensorBoard, which is "
        "always written: one or several, each an extra of its own (pip install "
        "'tdc-ray[wandb]'). Keys and addresses are the clients' own environment's."
    ),
]
"""``--log-to wandb mlflow``, also ``--log-to wandb --log-to mlflow``."""
