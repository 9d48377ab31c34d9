"""``Experts.save_pretrained`` and ``tdc_ray.load_experts``."""

import json

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler

import tdc_ray as tdc
from tdc_ray.diffusion.pipeline_index import EXPERTS_FILE
from tdc_ray.diffusion.sampling import image_generators
from tdc_ray.errors import CheckpointError, ConfigError, StorageError, UnsupportedModelError
from tests.small import assert_same, random_unet, small_config


@pytest.fixture(scope="module")
def experts() -> tdc.Experts:
    scheduler = DDPMScheduler(600, beta_end=0.03)
    base = tdc.load_base(random_unet(), scheduler=scheduler, settings=small_config())
    plan = tdc.plan_groups(base.scheduler, num_groups=2)
    few = {"num_rounds": 1, "num_images": 16, "num_refit_images": 16}
    return tdc.prune(base, plan, "digits", method="magnitude", **few)


def images_of(pipeline: tdc.ProgressivePipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(3, image_generators(0, 0, 3), output_type="pt").images


def test_what_is_saved_loads_the_same(experts, tmp_path):
    expected = images_of(experts.to_pipeline())
    place = tmp_path / "experts"
    experts.save_pretrained(place)
    loaded = tdc.load_experts(place)
    loaded.save_pretrained(place)  # over itself
    loaded = tdc.load_experts(str(place))
    assert (loaded.plan, loaded.groups) == (experts.plan, experts.groups)
    assert str(loaded) == str(experts)
    assert_same(images_of(loaded.to_pipeline()), expected)
    assert_same(images_of(tdc.ProgressivePipeline.from_pretrained(place)), expected)
    for index in range(2):
        assert_same(loaded[index].state_dict(), experts[index].state_dict())
    moved = place.rename(tmp_path / "elsewhere")
    assert_same(images_of(tdc.load_experts(moved).to_pipeline()), expected)


def test_as_a_denoiser_they_draw_in_a_pipeline_of_diffusers(experts):
    ours = experts.to_pipeline()
    pipeline = DDPMPipeline(
        experts.to_denoiser(), DDPMScheduler.from_config(ours.scheduler.config)
    )
    pipeline.set_progress_bar_config(disable=True)
    drawn = pipeline(2, torch.manual_seed(0), num_inference_steps=4, output_type="np").images
    assert drawn.shape == (2, 8, 8, 1)
    noise = torch.randn(2, 1, 8, 8, generator=torch.manual_seed(0))
    for timestep in (0, 599):
        expected = ours.experts.for_timestep(timestep)(noise, timestep).sample
        torch.testing.assert_close(pipeline.unet(noise, timestep).sample, expected)


def test_a_single_expert_is_saved_whole_or_refused(experts, tmp_path):
    with pytest.raises(UnsupportedModelError, match="save_expert"):
        experts[0].save_pretrained(tmp_path / "pruned")
    whole = experts[len(experts) - 1]
    whole.save_pretrained(tmp_path / "whole")
    assert_same(type(whole).from_pretrained(tmp_path / "whole").state_dict(), whole.state_dict())


def test_experts_are_saved_over_nothing_else(experts, tmp_path):
    (tmp_path / "file").write_text("mine")
    for place in (tmp_path, tmp_path / "file"):
        with pytest.raises(ConfigError, match="needs a new folder"):
            experts.save_pretrained(place)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_pipeline_is_not_saved_over_experts_and_their_base(experts, tmp_path):
    experts.save_pretrained(tmp_path / "experts")
    with pytest.raises(ConfigError, match=r"has their base and experts\.json"):
        experts.to_pipeline().save_pretrained(tmp_path / "experts")
    assert tdc.load_experts(tmp_path / "experts").groups == experts.groups


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"format": 2}, StorageError, "has format 2, expected 1"),
        ({"groups": [{}]}, StorageError, f"no {EXPERTS_FILE} of format 1"),
        ({"config": {"seed": "no"}}, ConfigError, "seed"),
    ],
)
def test_a_spoilt_description_is_one_clear_error(experts, tmp_path, change, error, words):
    experts.save_pretrained(tmp_path / "experts")
    path = tmp_path / "experts" / EXPERTS_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(error, match=words):
        tdc.load_experts(tmp_path / "experts")


def test_a_folder_without_experts_is_refused(experts, tmp_path):
    experts.to_pipeline().save_pretrained(tmp_path / "pipeline")  # without the base
    for place in (tmp_path, tmp_path / "pipeline"):
        with pytest.raises(CheckpointError, match="holds no experts and their base"):
            tdc.load_experts(place)
    with pytest.raises(CheckpointError, match="nowhere does not exist"):
        tdc.load_experts(tmp_path / "nowhere")
