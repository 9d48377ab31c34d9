"""How images are drawn: ``--sampler.*``."""

from typing import Annotated, Literal

from pydantic import Field

from tdc_ray.config.validation import NonNegativeFloat, PositiveInt, settings

Sampler = Literal["ddim", "ddpm", "pndm", "dpmsolver++"]


@settings("sampler")
class SamplerConfig:
    """How images are drawn from the model."""

    sampler: Sampler = "ddim"
    """The diffusers scheduler; timesteps are spaced as its `leading`. pndm is PNDM by linear
    multistep alone, without Runge-Kutta steps, as in latent diffusion. dpmsolver++ is
    DPM-Solver++(2M) (arXiv:2211.01095), of second order and so for fewer steps, spaced as EDM's
    (arXiv:2206.00364)."""

    num_inference_steps: PositiveInt = 100
    """Denoising steps; pndm evaluates the network once more, at the second timestep again. But for
    dpmsolver++ numbers that divide the timesteps: others would begin far below the last one."""

    eta: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Stochasticity of DDIM, in [0, 1]; the other samplers have none to set."""

    guidance_scale: NonNegativeFloat = 1.0
    """Weight s of classifier-free guidance, unconditional + s (conditional - unconditional), for
    which every step takes two forward passes; 1: none."""

    steps_offset: Annotated[int, Field(ge=0, le=1)] = 0
    """Added to every sampled timestep (1 for latent diffusion). Not with dpmsolver++."""

    clip_sample: bool = True
    """Clip the predicted image to [-1, 1]; right for pixels, wrong for latents. For ddim and ddpm
    alone."""

    set_alpha_to_one: bool = True
    """The step after the last has no noise at all (diffusers' name); with ddpm and
    dpmsolver++ always so."""
