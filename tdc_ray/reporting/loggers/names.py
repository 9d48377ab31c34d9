"""Which trackers there are; imports none of their clients."""

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Literal

from tdc_ray.errors import ConfigError

LoggerName = Literal["tensorboard", "wandb", "mlflow", "comet"]

MODULES: dict[LoggerName, str] = {"wandb": "wandb", "mlflow": "mlflow", "comet": "comet_ml"}
"""The module of each client that is an extra."""


def check_loggers(names: Sequence[LoggerName]) -> None:
    """Refuse trackers whose client is not installed.

    Raises:
        ConfigError: There is one.
    """
    for name in names:
        if name in MODULES and find_spec(MODULES[name]) is None:
            raise ConfigError(
                f"--log-to {name} needs its client, which is not installed: pip install "
                f"'tdc-ray[{name}]', or leave {name} out."
            )
