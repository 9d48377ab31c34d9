"""How noise is added and what the network predicts of it: ``--diffusion.*``."""

import math
from typing import Annotated, Literal

from pydantic import Field

from tdc_ray.config.validation import NonNegativeFloat, PositiveFloat, require, settings

BetaSchedule = Literal["linear", "scaled_linear", "squaredcos_cap_v2"]
PredictionType = Literal["epsilon", "v_prediction", "sample", "flow_prediction"]

EDM_FIELDS = ("sigma_data", "sigma_min", "sigma_max")
"""Settings of EDM's noise process, which its schedulers in diffusers have under these names."""

TRAINING_SIGMA_FIELDS = ("p_mean", "p_std")
"""Settings of the sigmas that EDM's training draws."""

LATER_DIFFUSION_FIELDS = (
    "prediction_type",
    "rescale_betas_zero_snr",
    *EDM_FIELDS,
    *TRAINING_SIGMA_FIELDS,
)
"""Settings that came after the first run directories and caches were named."""

MAX_STDS = 6.0
"""Most standard deviations of ln(sigma) in training between its mean and a timestep's."""


@settings("diffusion")
class DiffusionConfig:
    """The noise process and what the network predicts of it."""

    num_train_timesteps: Annotated[int, Field(ge=2)] = 1000
    """Number of timesteps T."""

    beta_schedule: BetaSchedule = "linear"
    """The noise schedule, under diffusers' name."""

    beta_start: Annotated[float, Field(gt=0, lt=1)] = 1e-4
    """First beta of the linear schedules."""

    beta_end: float = 0.02
    """Last beta of the linear schedules."""

    rescale_betas_zero_snr: bool = False
    """Rescale the betas so that nothing of the image is left at the last timestep
    (arXiv:2305.08891, algorithm 1; diffusers' name), where samplers begin; needs a network that
    predicts something else than epsilon, which says nothing there."""

    prediction_type: PredictionType = "epsilon"
    """What the network's output estimates, under diffusers' name: the noise, the velocity of
    Salimans and Ho (arXiv:2202.00512), which suits images that differ in overall colour (near
    pure noise epsilon says little about the image), the image itself (sample), or the velocity
    of rectified flow (arXiv:2209.03003), noise minus image, whose process has no betas: images and
    noise are mixed linearly."""

    sigma_data: PositiveFloat | None = None
    """Standard deviation of the images, 0.5 in EDM's paper (arXiv:2206.00364), whose noise process
    this turns on: no betas, sigma times noise is added to the image, the network sees both scaled
    to variance 1 and ln(sigma) / 4 for a timestep, and outputs EDM's F (prediction_type epsilon,
    as diffusers' EDM schedulers call it) or its negative (v_prediction). None: betas."""

    sigma_min: PositiveFloat = 0.002
    """Sigma at timestep 0, with sigma_data; those between are spaced as EDM's samplers do."""

    sigma_max: PositiveFloat = 80.0
    """Sigma at the last timestep, with sigma_data."""

    p_std: PositiveFloat | None = None
    """With sigma_data: base and fine-tunes draw sigma log-normally, as EDM's own training
    (arXiv:2206.00364, table 1: ln(sigma) has the mean p_mean and this standard deviation, 1.2 in
    the paper), rounded to the nearest timestep's. None: all timesteps equally often. An expert
    draws within its group."""

    p_mean: float = -1.2
    """Mean of ln(sigma) in training, with p_std."""

    learned_sigma: bool = False
    """The network predicts the variance's place in its range too, and the loss is L_hybrid."""

    vlb_weight: NonNegativeFloat = 0.001
    """Weight of L_vlb in L_hybrid (Nichol and Dhariwal, arXiv:2102.09672, equation 16); with 0
    the variance that a network predicts is not trained, as with latents, where it must be."""

    rescale_timesteps: bool = False
    """Feed the network t * 1000 / T in place of t, as improved-diffusion does."""

    def __post_init__(self) -> None:
        rule = f"in [diffusion.beta_start = {self.beta_start}, 1)"
        require("diffusion", self, "beta_end", rule, ok=self.beta_start <= self.beta_end < 1)
        rule = "False with diffusion.prediction_type flow_prediction, which has no betas"
        for name in ("rescale_betas_zero_snr", "learned_sigma"):
            ok = not (self.is_flow and getattr(self, name))
            require("diffusion", self, name, rule, ok=ok)
        rule = (
            "v_prediction or sample with diffusion.rescale_betas_zero_snr (epsilon is the input)"
        )
        tells = not self.rescale_betas_zero_snr or self.prediction_type != "epsilon"
        require("diffusion", self, "prediction_type", rule, ok=tells)
        self._check_edm()

    def _check_edm(self) -> None:
        """Refuse settings that do not go with EDM's noise process."""
        if not self.is_edm:
            names = ("sigma_min", "sigma_max", *TRAINING_SIGMA_FIELDS)
            self._check_left_out(names, without="sigma_data")
            return
        for name in EDM_FIELDS:
            require("diffusion", self, name, "finite", ok=math.isfinite(getattr(self, name)))
        ok = self.sigma_min < self.sigma_max
        require("diffusion", self, "sigma_max", f"above sigma_min = {self.sigma_min}", ok=ok)
        self._check_training_sigmas()
        ok = self.prediction_type in ("epsilon", "v_prediction")
        rule = "epsilon or v_prediction with diffusion.sigma_data, which has EDM's F"
        require("diffusion", self, "prediction_type", rule, ok=ok)
        rule = "False with diffusion.sigma_data, whose process has no betas or whole timesteps"
        for name in ("rescale_betas_zero_snr", "learned_sigma", "rescale_timesteps"):
            require("diffusion", self, name, rule, ok=not getattr(self, name))

    def _check_training_sigmas(self) -> None:
        """Refuse log-normal sigmas by which some timestep would never be drawn."""
        if self.p_std is None:
            self._check_left_out(("p_mean",), without="p_std")
            return
        require("diffusion", self, "p_mean", "finite", ok=math.isfinite(self.p_mean))
        ends = math.log(self.sigma_min), math.log(self.sigma_max)
        least = max(abs(end - self.p_mean) for end in ends) / MAX_STDS
        rule = f"finite and at least {least:.4g}, so that every sigma is drawn in training"
        require("diffusion", self, "p_std", rule, ok=least <= self.p_std < math.inf)

    def _check_left_out(self, names: tuple[str, ...], *, without: str) -> None:
        """Refuse settings that another one turns on."""
        for name in names:
            default = type(self).__dataclass_fields__[name].default
            rule = f"left out without diffusion.{without}"
            require("diffusion", self, name, rule, ok=getattr(self, name) == default)

    @property
    def is_edm(self) -> bool:
        """Whether the noise process and the network's preconditioning are EDM's, without betas."""
        return self.sigma_data is not None

    @property
    def is_flow(self) -> bool:
        """Whether images and noise are mixed linearly: rectified flow, which has no betas."""
        return self.prediction_type == "flow_prediction"

    @property
    def num_timesteps(self) -> int:
        """Number of timesteps from 0 on: T, and T + 1 for rectified flow, whose last is T."""
        return self.num_train_timesteps + self.is_flow

    @property
    def timestep_scale(self) -> float:
        """What a timestep is multiplied with before the network sees it."""
        return 1000 / self.num_train_timesteps if self.rescale_timesteps else 1.0
