"""Every scheduler of diffusers: it samples the base as its own loop does, across experts too."""

import inspect
from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch
from diffusers import SchedulerMixin

from tdc_ray.config.diffusion import DiffusionConfig
from tdc_ray.config.plan import PlanConfig
from tdc_ray.config.sampler import SamplerConfig
from tdc_ray.diffusion.expert_denoiser import ExpertDenoiser
from tdc_ray.diffusion.expert_set import ExpertSet
from tdc_ray.diffusion.pipeline import ProgressivePipeline
from tdc_ray.diffusion.plan import plan_groups
from tdc_ray.diffusion.samplers import make_scheduler
from tdc_ray.diffusion.sampling import image_generators
from tdc_ray.diffusion.schedule import NoiseProcess, as_seen
from tdc_ray.errors import ConfigError
from tests.small import assert_same, random_unet

LINEAR = DiffusionConfig()
EDM = DiffusionConfig(sigma_data=0.5)
RECTIFIED_FLOW = DiffusionConfig(prediction_type="flow_prediction")
STEPS = 5

FLOW = "it is for flow matching"
TOKENS = "it is for discrete tokens"
EXCLUDED = {
    "AmusedScheduler": TOKENS,
    "BlockRefinementScheduler": TOKENS,
    "CMStochasticIterativeScheduler": "it is for consistency models, at EDM's sigmas",
    "CogVideoXDDIMScheduler": "it shifts the SNR: another noise process",
    "CogVideoXDPMScheduler": "its step takes the step before and its x_0",
    "CosineDPMSolverMultistepScheduler": "it is for EDM's models of audio",
    "DDIMInverseScheduler": "it goes from an image to noise",
    "DDPMWuerstchenScheduler": "it has a cosine in continuous time of its own",
    "DPMSolverMultistepInverseScheduler": "it goes from an image to noise",
    "DPMSolverSDEScheduler": "its noise has no generator; it needs torchsde, too",
    "DiscreteDDIMScheduler": TOKENS,
    "EDMDPMSolverMultistepScheduler": "it is for EDM's networks",
    "EDMEulerScheduler": "it is for EDM's networks",
    "EntropyBoundScheduler": TOKENS,
    "FlowMapEulerDiscreteScheduler": FLOW,
    "FlowMatchEulerDiscreteScheduler": FLOW,
    "FlowMatchHeunDiscreteScheduler": FLOW,
    "FlowMatchLCMScheduler": FLOW,
    "HeliosDMDScheduler": FLOW,
    "HeliosScheduler": FLOW,
    "IPNDMScheduler": "it has a noise process in continuous time of its own",
    "KarrasVeScheduler": "it adds noise without shrinking the image (variance exploding)",
    "LTXEulerAncestralRFScheduler": FLOW,
    "MiniMaxH3Scheduler": FLOW,
    "PiflowScheduler": FLOW,
    "RFD4ProteinaScheduler": "it is for proteins",
    "RePaintScheduler": "its step takes the image that is to be filled in",
    "SCMScheduler": "it is for consistency models in TrigFlow's time",
    "ScoreSdeVeScheduler": "it adds noise without shrinking the image (variance exploding)",
    "UnCLIPScheduler": "it has the cosine betas alone, and none of one's own",
    "VQDiffusionScheduler": TOKENS,
}
"""The schedulers that cannot sample such a network, with the reason: a new one in diffusers fails
below until it is looked at."""

NAMES = sorted(name for name in dir(diffusers) if name.endswith("Scheduler"))
SAMPLED = [SamplerConfig(scheduler=name) for name in NAMES if name not in EXCLUDED]
EDM_SAMPLED = [
    SamplerConfig(scheduler="EDMEulerScheduler"),
    SamplerConfig(scheduler="EDMEulerScheduler", options=("sigma_schedule=exponential",)),
    SamplerConfig(scheduler="EDMDPMSolverMultistepScheduler"),
    SamplerConfig(
        scheduler="EDMDPMSolverMultistepScheduler",
        options=("algorithm_type=sde-dpmsolver++", "rho=5"),
    ),
]
FLOW_SAMPLED = [
    SamplerConfig(scheduler=name)
    for name in (
        "DEISMultistepScheduler",
        "DPMSolverMultistepScheduler",
        "DPMSolverSinglestepScheduler",
        "FlowMapEulerDiscreteScheduler",
        "FlowMatchEulerDiscreteScheduler",
        "FlowMatchHeunDiscreteScheduler",
        "FlowMatchLCMScheduler",
        "SASolverScheduler",
        "UniPCMultistepScheduler",
    )
]
SPACED = [
    SamplerConfig(spacing="trailing"),
    SamplerConfig(sampler="dpmsolver++", spacing="linspace"),
    SamplerConfig(scheduler="EulerDiscreteScheduler", karras_sigmas=True),
    SamplerConfig(scheduler="HeunDiscreteScheduler", options=("use_exponential_sigmas=true",)),
    SamplerConfig(
        scheduler="DPMSolverMultistepScheduler",
        options=("use_beta_sigmas=true", "algorithm_type=sde-dpmsolver++", "solver_order=3"),
    ),
]


def test_the_excluded_ones_exist():
    assert set(EXCLUDED) <= set(NAMES)


class Recorder(ExpertSet):
    """Remembers the timesteps that it was asked for."""

    def __init__(self, unets, spans):
        super().__init__(unets, spans)
        self.asked: list[float] = []

    def for_timestep(self, timestep):
        self.asked.append(timestep)
        return super().for_timestep(timestep)


@torch.no_grad()
def loop_of_diffusers(unet, scheduler: SchedulerMixin, count: int) -> torch.Tensor:
    """The loop of diffusers' pipelines, with their ``prepare_extra_step_kwargs``."""
    generators = image_generators(0, 0, count)
    x = torch.cat([torch.randn(1, 1, 8, 8, generator=one) for one in generators])
    scheduler.set_timesteps(STEPS)
    x = x * getattr(scheduler, "init_noise_sigma", 1.0)  # rectified flow has none, and no scale
    scaled = getattr(scheduler, "scale_model_input", lambda x, _: x)
    known = inspect.signature(scheduler.step).parameters
    more = {"eta": 0.0, "generator": generators}
    more = {name: value for name, value in more.items() if name in known}
    for t in scheduler.timesteps:
        output = unet(scaled(x, t), t).sample
        x = scheduler.step(output, t, x, **more).prev_sample
    return x


@pytest.mark.filterwarnings("ignore:__array_wrap__")  # NumPy's, of KDPM2's and DEIS's own code
@pytest.mark.parametrize(
    ("diffusion", "how"),
    [
        *((LINEAR, how) for how in [*SAMPLED, *SPACED]),
        *((EDM, how) for how in EDM_SAMPLED),
        *((RECTIFIED_FLOW, how) for how in FLOW_SAMPLED),
    ],
    ids=lambda one: one.name if isinstance(one, SamplerConfig) else "",
)
def test_copies_of_the_base_draw_the_images_that_the_loop_of_diffusers_draws(diffusion, how):
    how = replace(how, num_inference_steps=STEPS, use_clipped_model_output=False)
    plan = plan_groups(diffusion, PlanConfig(num_groups=4), how)
    unet, scheduler = random_unet(), make_scheduler(diffusion, how)
    expected = loop_of_diffusers(unet, make_scheduler(diffusion, how), count=2)
    assert expected.isfinite().all()
    asked: list[float] = []
    for spans in ([(0, 999)], [(group.first, group.last) for group in plan.groups]):
        seen = as_seen(diffusion, spans)
        denoiser = ExpertDenoiser([random_unet() for _ in spans], seen)
        denoiser.experts = experts = Recorder(list(denoiser.experts), seen)
        pipeline = ProgressivePipeline(denoiser, scheduler, shape=(1, 8, 8))
        pipeline.set_progress_bar_config(disable=True)
        images = pipeline(2, num_inference_steps=STEPS, output_type="pt").images
        assert_same(images, expected)
        asked = experts.asked[1:]  # the first is asked for its null class
    if diffusion is EDM:
        seen = NoiseProcess.of(EDM).conditioning
        asked = [int(np.abs(seen - c_noise).argmin()) for c_noise in asked]
    assert tuple(asked) == plan.sampling_timesteps
    counts = [sum(plan.group_of(step) is group for step in asked) for group in plan.groups]
    assert counts == [group.num_sampling_steps for group in plan.groups]


@pytest.mark.parametrize("name", EXCLUDED)
def test_schedulers_for_other_networks_are_refused(name):
    how = SamplerConfig(scheduler=name, num_inference_steps=STEPS)
    with pytest.raises(ConfigError, match=rf"{name}|must go from noise"):
        plan_groups(LINEAR, PlanConfig(num_groups=4), how)


NOT_FOR_FLOW = sorted(set(NAMES) - {how.scheduler for how in FLOW_SAMPLED})


@pytest.mark.filterwarnings("ignore:__array_wrap__")  # NumPy's, of Helios's own code
@pytest.mark.parametrize("name", NOT_FOR_FLOW)
def test_other_schedulers_are_refused_for_rectified_flow(name):
    how = SamplerConfig(scheduler=name, num_inference_steps=STEPS)
    with pytest.raises(ConfigError, match=name):
        plan_groups(RECTIFIED_FLOW, PlanConfig(num_groups=4), how)


@pytest.mark.parametrize("setting", ["use_karras_sigmas", "use_exponential_sigmas"])
def test_sigmas_of_betas_are_refused_for_rectified_flow(setting):
    options = (f"{setting}=true",) if setting != "use_karras_sigmas" else ()
    how = SamplerConfig(
        scheduler="UniPCMultistepScheduler", karras_sigmas=not options, options=options
    )
    with pytest.raises(ConfigError, match=f"with {setting} spaces sigmas of betas"):
        make_scheduler(RECTIFIED_FLOW, how)


def test_a_flow_without_noise_is_refused():
    how = SamplerConfig(scheduler="FlowMatchEulerDiscreteScheduler", options=("shift=0",))
    with pytest.raises(ConfigError, match="FlowMatchEulerDiscreteScheduler cannot"):
        make_scheduler(RECTIFIED_FLOW, how)


def test_a_setting_that_is_set_twice_is_refused():
    twice = replace(SPACED[2], options=("use_karras_sigmas=false",))
    with pytest.raises(ConfigError, match=r"sets what sampler\.karras_sigmas has set"):
        make_scheduler(LINEAR, twice)
