"""How images are drawn: ``--sampler.*``."""

from dataclasses import dataclass
from typing import Literal

from tdc_ray.config.validation import at_least, require

Sampler = Literal["ddim", "ddpm", "pndm"]


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplerConfig:
    """How images are drawn from the model."""

    sampler: Sampler = "ddim"
    """The diffusers scheduler; timesteps are spaced as its `leading`. pndm is PNDM by linear
    multistep alone, without Runge-Kutta steps, as in latent diffusion."""

    num_inference_steps: int = 100
    """Denoising steps; pndm evaluates the network once more, at the second timestep again."""

    eta: float = 0.0
    """Stochasticity of DDIM, in [0, 1]; ddpm and pndm have none to set."""

    guidance_scale: float = 1.0
    """Weight s of classifier-free guidance, unconditional + s (conditional - unconditional), for
    which every step takes two forward passes; 1: none."""

    steps_offset: int = 0
    """Added to every sampled timestep (1 for latent diffusion)."""

    clip_sample: bool = True
    """Clip the predicted image to [-1, 1]; right for pixels, wrong for latents. Not for pndm."""

    set_alpha_to_one: bool = True
    """The step after the last has no noise at all (diffusers' name); with ddpm always so."""

    def __post_init__(self) -> None:
        at_least(1, "sampler", self, "num_inference_steps")
        at_least(0, "sampler", self, "guidance_scale")
        require("sampler", self, "eta", "in [0, 1]", ok=0 <= self.eta <= 1)
        require("sampler", self, "steps_offset", "0 or 1", ok=self.steps_offset in (0, 1))
