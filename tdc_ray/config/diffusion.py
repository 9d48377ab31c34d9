"""How noise is added and what the network predicts of it: ``--diffusion.*``."""

from dataclasses import dataclass
from typing import Literal

from tdc_ray.config.validation import at_least, require

BetaSchedule = Literal["linear", "scaled_linear", "squaredcos_cap_v2"]


@dataclass(frozen=True, kw_only=True, slots=True)
class DiffusionConfig:
    """The noise process and what the network predicts of it."""

    num_train_timesteps: int = 1000
    """Number of timesteps T."""

    beta_schedule: BetaSchedule = "linear"
    """The noise schedule, under diffusers' name."""

    beta_start: float = 1e-4
    """First beta of the linear schedules."""

    beta_end: float = 0.02
    """Last beta of the linear schedules."""

    learned_sigma: bool = False
    """The network predicts the variance's place in its range too, and the loss is L_hybrid."""

    vlb_weight: float = 0.001
    """Weight of L_vlb in L_hybrid (Nichol and Dhariwal, arXiv:2102.09672, equation 16)."""

    rescale_timesteps: bool = False
    """Feed the network t * 1000 / T in place of t, as improved-diffusion does."""

    def __post_init__(self) -> None:
        at_least(2, "diffusion", self, "num_train_timesteps")
        at_least(0, "diffusion", self, "vlb_weight")
        require("diffusion", self, "beta_start", "in (0, 1)", ok=0 < self.beta_start < 1)
        rule = f"in [diffusion.beta_start = {self.beta_start}, 1)"
        require("diffusion", self, "beta_end", rule, ok=self.beta_start <= self.beta_end < 1)

    @property
    def timestep_scale(self) -> float:
        """What a timestep is multiplied with before the network sees it."""
        return 1000 / self.num_train_timesteps if self.rescale_timesteps else 1.0
