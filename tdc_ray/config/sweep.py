"""How settings are searched: the flags of ``tdc-ray sweep``."""

from typing import Literal

from tdc_ray.config.validation import PositiveInt, refuse, settings

Search = Literal["grid", "random", "tpe"]
Objective = Literal["score", "macs", "train_macs"]


@settings("sweep")
class SweepConfig:
    """How settings are searched."""

    search: Search = "grid"
    """grid: every combination of the values; random and tpe: --num-trials of them, drawn, or
    chosen by Optuna after what was found so far."""

    num_trials: PositiveInt = 20
    """Settings that random and tpe try."""

    objectives: tuple[Objective, ...] = ("score",)
    """What is minimised: the experts' score, their macs, the macs of all training. Of several, the
    Pareto front is shown."""

    seeds: tuple[int, ...] = (0,)
    """Training seeds: each setting is run with each of them; mean and spread are shown, and the
    search goes by the mean."""

    max_concurrent: PositiveInt = 2
    """Most concurrent trials. Each takes a process of some 0.6 GB; their work shares the
    cluster."""

    stop_early: bool = False
    """Stop trials whose base learns worse than others' (successive halving, ASHA, on the base's
    training loss at equal steps). Accepted only where fields of the base are varied: experts
    cannot be judged before they are done."""

    study: str | None = None
    """URL of a database for Optuna's study, such as postgresql://host/db; None means a file in the
    sweep's folder. A password in it is neither shown nor kept."""

    search_seed: int = 0
    """Seed of random and tpe."""

    def __post_init__(self) -> None:
        for name in ("objectives", "seeds"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                refuse(f"sweep.{name} must be some, none of them twice, got {values}.")
