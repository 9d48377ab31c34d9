"""How images are drawn: ``--sampler.*``."""

from dataclasses import asdict
from typing import Annotated, Any, Literal

from pydantic import Field
from tyro.conf import Fixed, Suppress

from tdc_ray.config.train import Compile
from tdc_ray.config.validation import NonNegativeFloat, PositiveInt, require, settings

Sampler = Literal["ddim", "ddpm", "pndm", "dpmsolver++"]
Spacing = Literal["leading", "trailing", "linspace", "quadratic"]

BASE = "base"
"""The scheduler of the base's own pipeline."""

LATER_SAMPLER_FIELDS = (
    "scheduler",
    "spacing",
    "karras_sigmas",
    "options",
    "of_base",
    "use_clipped_model_output",
    "compile",
    "negative_prompt",
)
"""Settings that came after the first run directories and cached images were named."""


@settings("sampler")
class SamplerConfig:
    """How images are drawn from the model."""

    sampler: Sampler = "ddim"
    """Short name of a diffusers scheduler; timesteps are spaced as its `leading`. pndm is PNDM by
    linear multistep alone, without Runge-Kutta steps, as in latent diffusion. dpmsolver++ is
    DPM-Solver++(2M) (arXiv:2211.01095), of second order and so for fewer steps, spaced as EDM's
    (arXiv:2206.00364)."""

    scheduler: str | None = None
    """Any scheduler of diffusers that samples such a network, by its class's name, in place of
    `sampler`: EulerDiscreteScheduler, UniPCMultistepScheduler, ...; base: that of the base's own
    pipeline. What no flag sets is as in that pipeline, if there is one, or diffusers' default."""

    spacing: Spacing | None = None
    """How timesteps are spaced, under diffusers' names (arXiv:2305.08891, table 2). quadratic is
    DDIM's (arXiv:2010.02502, appendix D.2), from 0.8 T down, for schedulers that take timesteps
    of one's own. None means as the scheduler does."""

    karras_sigmas: bool = False
    """Space by EDM's sigmas (arXiv:2206.00364, equation 5), where the scheduler can."""

    options: tuple[str, ...] = ()
    """Other settings of the scheduler, NAME=VALUE under diffusers' names, such as solver_order=3,
    algorithm_type=sde-dpmsolver++ or use_beta_sigmas=true."""

    of_base: Annotated[dict[str, Any] | None, Fixed, Suppress] = None
    """What the scheduler of the base's own pipeline sets, and its `_class_name`: what `scheduler`
    starts from; no flag."""

    num_inference_steps: PositiveInt = 100
    """Denoising steps; some schedulers evaluate the network more often (pndm once, Heun's nearly
    twice), which the plan counts. Numbers that let the first step begin far below the last
    timestep are refused: with the spacing leading, those that do not divide the timesteps."""

    eta: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Stochasticity of DDIM, in [0, 1]; most other samplers have none to set."""

    guidance_scale: NonNegativeFloat = 1.0
    """Weight s of classifier-free guidance, unconditional + s (conditional - unconditional), for
    which every step takes two forward passes; 1: none."""

    negative_prompt: str | None = None
    """What guidance leads away from, in words, for all images of models that are conditioned on
    text; None: what the base's own pipeline does by default, such as the empty prompt."""

    steps_offset: Annotated[int, Field(ge=0, le=1)] = 0
    """Added to every sampled timestep (1 for latent diffusion), where they are spaced as leading
    or quadratic."""

    clip_sample: bool = True
    """Clip the predicted image to [-1, 1], where the scheduler can (ddim, ddpm); right for
    pixels, wrong for latents."""

    set_alpha_to_one: bool = True
    """The step after the last has no noise at all (diffusers' name); with ddpm and
    dpmsolver++ always so."""

    use_clipped_model_output: bool | None = None
    """DDIM derives epsilon anew from the clipped image (diffusers' name). None means as
    improved-diffusion with `sampler`: it does; as diffusers' pipelines with `scheduler`: not."""

    compile: Compile = "none"
    """torch.compile's mode for the denoisers that images are drawn by, each compiled before its
    first step, which takes minutes; none: not at all. reduce-overhead uses CUDA graphs, for
    batches so small that launching kernels counts. Images differ by rounding."""

    def __post_init__(self) -> None:
        rule = "NAME=VALUE, each"
        ok = all(name and value for name, _, value in (one.partition("=") for one in self.options))
        require("sampler", self, "options", rule, ok=ok)

    @property
    def clips_epsilon(self) -> bool:
        """Whether DDIM derives epsilon anew from the clipped image."""
        if self.use_clipped_model_output is None:
            return self.scheduler is None
        return self.use_clipped_model_output

    @property
    def name(self) -> str:
        """What scores and errors call it: all that is said of the scheduler."""
        name = self.scheduler or self.sampler
        if name == BASE and self.of_base is not None:
            name = f"{self.of_base['_class_name']} of the base"
        asked = [self.spacing, "karras" if self.karras_sigmas else None, *self.options]
        details = ", ".join(filter(None, asked))
        return f"{name} ({details})" if details else name


def sampler_key(sampler: SamplerConfig) -> dict[str, Any]:
    """Return the settings that decide what is drawn; later ones are left out at their defaults.

    The base's scheduler counts where :attr:`SamplerConfig.scheduler` starts from it.
    """
    document, default = asdict(sampler), SamplerConfig()
    if sampler.scheduler is None:
        document["of_base"] = None
    for name in LATER_SAMPLER_FIELDS:
        if getattr(default, name) == document[name]:
            del document[name]
    return document
