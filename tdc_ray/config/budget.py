"""What a run may take in place of steps: ``--hours``, ``--train-macs``, ``--epochs``."""

from typing import Annotated

from tyro.conf import arg

from tdc_ray.config.validation import PositiveFloat, refuse, settings

STEP_FIELDS = ("num_steps", "num_warmup_steps", "ema_warmup", "checkpoint_every")
"""Settings of training that a budget decides."""

LEAST_IMAGES = {
    "prune": {"num_images": 32, "num_refit_images": 32},
    "evaluate": {"num_images": 200},
}
"""Numbers of images that ``--hours`` lowers, down to these, where they are the preset's."""


@settings("budget")
class BudgetConfig:
    """What a run may take: the steps of base and fine-tunes, in the preset's ratio, follow."""

    hours: Annotated[PositiveFloat | None, arg(aliases=("--hours",))] = None
    """Hours after which the whole run is to be finished, search and evaluation included. Steps are
    timed on the workers first. Where the preset's images of search and evaluation would take more
    than half of it, there are fewer; where there is no room for 1,000 steps of the base,
    architecture auto takes a smaller network."""

    train_macs: Annotated[PositiveFloat | None, arg(aliases=("--train-macs",))] = None
    """Multiply-accumulates of base and fine-tunes together, three forward passes per image and
    step, as in results.json; experts count as what their limits allow."""

    epochs: Annotated[PositiveFloat | None, arg(aliases=("--epochs",))] = None
    """How often the base sees every image."""

    def __post_init__(self) -> None:
        if len(self._given) > 1:
            refuse(
                f"only one of --hours, --train-macs and --epochs may be given, got "
                f"{' and '.join(self._given)}."
            )

    @property
    def flag(self) -> str | None:
        """The flag that is given; None means that the steps are as ``base.num_steps`` says."""
        return next(iter(self._given), None)

    @property
    def _given(self) -> list[str]:
        values = {"hours": self.hours, "train-macs": self.train_macs, "epochs": self.epochs}
        return [f"--{name}" for name, value in values.items() if value is not None]
