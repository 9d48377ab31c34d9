import pytest

from tdc_ray.config.run import RunConfig, digest, from_json, to_json
from tdc_ray.config.sampler import SamplerConfig, sampler_key
from tdc_ray.errors import ConfigError

BEFORE = {
    "sampler": "ddim",
    "num_inference_steps": 100,
    "eta": 0.0,
    "guidance_scale": 1.0,
    "steps_offset": 0,
    "clip_sample": True,
    "set_alpha_to_one": True,
}
"""The settings of 0.1.0, which cached images were named by."""

OF_BASE = {"_class_name": "DDPMScheduler", "variance_type": "fixed_large"}


def test_images_and_runs_of_before_keep_their_names():
    assert sampler_key(SamplerConfig()) == BEFORE
    assert sampler_key(SamplerConfig(of_base=OF_BASE)) == BEFORE  # nothing starts from it
    document = to_json(RunConfig())
    assert from_json(document | {"sampler": BEFORE}) == RunConfig()
    assert digest(RunConfig(sampler=SamplerConfig(of_base=OF_BASE))) == digest(RunConfig())
    changed = (
        {"scheduler": "DDIMScheduler"},
        {"spacing": "trailing"},
        {"karras_sigmas": True},
        {"options": ("solver_order=3",)},
        {"use_clipped_model_output": False},
        {"compile": "default"},
    )
    names = {digest(RunConfig(sampler=SamplerConfig(**change))) for change in changed}
    assert len(names | {digest(RunConfig())}) == 7
    by_base = [SamplerConfig(scheduler="base", of_base=one) for one in (OF_BASE, None)]
    assert sampler_key(by_base[0]) != sampler_key(by_base[1])


def test_epsilon_follows_the_clipped_image_by_the_short_name_alone():
    assert SamplerConfig().clips_epsilon
    assert not SamplerConfig(scheduler="DDIMScheduler").clips_epsilon
    assert not SamplerConfig(use_clipped_model_output=False).clips_epsilon


def test_a_sampler_is_named_by_all_that_decides_its_scheduler():
    assert SamplerConfig().name == "ddim"
    how = SamplerConfig(
        scheduler="base", of_base=OF_BASE, spacing="trailing", options=("thresholding=true",)
    )
    assert how.name == "DDPMScheduler of the base (trailing, thresholding=true)"


@pytest.mark.parametrize("option", ["solver_order", "=3", "solver_order="])
def test_options_are_names_and_values(option):
    with pytest.raises(ConfigError, match=r"sampler\.options must be NAME=VALUE, each"):
        SamplerConfig(options=(option,))
