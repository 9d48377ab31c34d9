"""Bases that read more of a prompt than states of its tokens: tiny ones with random weights."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from tdc_ray.cli.main import run_command
from tdc_ray.config.presets import preset
from tdc_ray.diffusion.expert_denoiser import ExpertDenoiser
from tdc_ray.diffusion.pipeline import ProgressivePipeline, base_pipeline
from tdc_ray.models.families import load_network
from tdc_ray.models.text_encoder import PromptStates, encode_prompts, text_encoder_digest
from tdc_ray.runs.pipelines import pipeline_index
from tdc_ray.runs.pretrained.settings import apply_settings
from tdc_ray.runs.pretrained.sources import images_of, resolve_base

pytest.importorskip("transformers")
from tests import text_pipelines
from tests.text_pipelines import PROMPTS

SIZE = {"height": 16, "width": 16}
FEW = ("--prune.num-images", "8", "--prune.num-refit-images", "8", "--prune.num-levels", "1")
FEW += ("--prune.num-rounds", "1", "--prune.num-candidates", "2", "--data.num-images", "16")
FEW += ("--sampler.num-inference-steps", "4")


@dataclass(frozen=True)
class Kind:
    """A kind of pipeline."""

    make: Callable[[Path], DiffusionPipeline]
    network: str
    guidance: float


KINDS = {
    "xl": Kind(text_pipelines.stable_diffusion_xl, "unet", 5.0),
    "sd3": Kind(text_pipelines.stable_diffusion_3, "transformer", 7.0),
}


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    return KINDS[request.param]


@pytest.fixture(scope="module")
def pipeline(kind: Kind, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_pipelines.save(kind.make, tmp_path_factory.mktemp("text"))


def load(pipeline: Path) -> Any:
    loaded = DiffusionPipeline.from_pretrained(pipeline)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def told(states: PromptStates) -> dict[str, dict[str, Tensor]]:
    empty = {name: states.empty[name].expand_as(one) for name, one in states.prompts.items()}
    return {"prompt_embeds": dict(states.prompts), "negative_prompt_embeds": empty}


def seeded() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in (1, 2)]


def test_its_own_pipeline_draws_the_same(kind, pipeline):
    """With guidance, and with two copies of its network; all that it reads of prompts counts."""
    base = resolve_base(str(pipeline))
    config = apply_settings(base.settings, preset("digits"), with_data=True)
    images = images_of(base.first_stage, base.unet["sample_size"])
    config = replace(config, data=replace(config.data, **images))
    assert config.sampler.guidance_scale == kind.guidance
    index = pipeline_index(config).model_copy(update={"first_stage": None})
    ours = base_pipeline(load_network(pipeline / kind.network), index)
    ours.set_progress_bar_config(disable=True)
    own, prompts = load(pipeline), list(PROMPTS[:2])
    own.scheduler = ours.scheduler
    few = {"num_inference_steps": 4, "output_type": "latent", **SIZE}
    expected = own(prompts, generator=seeded(), **few).images
    states = told(encode_prompts(pipeline, prompts, (16, 16)))
    drawn = ours(2, seeded(), 4, output_type="pt", **states).images
    torch.testing.assert_close(drawn, expected, rtol=1e-4, atol=1e-4)
    for name, tensor in states["prompt_embeds"].items():
        other = {**states["prompt_embeds"], name: torch.zeros_like(tensor)}
        without = ours(2, seeded(), 4, output_type="pt", **{**states, "prompt_embeds": other})
        assert (without.images - expected).abs().max() > 1e-3, name
    copies = ExpertDenoiser([getattr(own, kind.network)] * 2, [(0, 499), (500, 1000)])
    setattr(own, kind.network, copies)
    assert torch.equal(own(prompts, generator=seeded(), **few).images, expected)


def test_what_is_encoded_follows_all_encoders(pipeline):
    before = text_encoder_digest(pipeline)
    file = pipeline / "tokenizer_2/added.txt"
    file.write_text("x")
    assert text_encoder_digest(pipeline) != before
    file.unlink()
    assert text_encoder_digest(pipeline) == before


def test_without_t5_its_states_are_zeros(tmp_path):
    pipeline = text_pipelines.save(text_pipelines.stable_diffusion_3, tmp_path)
    own = DiffusionPipeline.from_pretrained(pipeline, text_encoder_3=None, tokenizer_3=None)
    own.save_pretrained(tmp_path / "small")
    states = encode_prompts(tmp_path / "small", PROMPTS, (16, 16)).prompts
    expected, _, pooled, _ = own.encode_prompt([*PROMPTS], None, None)
    assert torch.equal(states["encoder_hidden_states"], expected)
    assert torch.equal(states["pooled_projections"], pooled)


@pytest.mark.ray
@pytest.mark.slow
def test_experts_of_it_draw_within_its_own_pipeline(ray_cluster, kind, pipeline, tmp_path):
    run = tmp_path / "run"
    command = ["run", "--base", str(pipeline), "--data", "base", "--finetune.num-steps", "2"]
    command += ["--data.prompts", str(pipeline.parent / "prompts.txt"), *FEW]
    command += ["--plan.num-groups", "2", "--evaluate.num-images", "8", "--run-dir", str(run)]
    command += ["--prune.held-out-share", "0.25", "--evaluate.cache-dir", str(tmp_path / "cache")]
    assert run_command([*command, "--evaluate.features", "none"]) == 0
    results = json.loads((run / "results.json").read_text())
    assert results["tdc"]["macs"] < results["base"]["macs"]
    experts = ProgressivePipeline.from_pretrained(run)
    experts.set_progress_bar_config(disable=True)
    prompts, few = list(PROMPTS[:2]), {"num_inference_steps": 4, "output_type": "np"}
    states = told(encode_prompts(pipeline, prompts, (16, 16)))
    drawn = experts(2, seeded(), **few, **states).images
    own = load(pipeline)
    setattr(own, kind.network, ExpertDenoiser.from_pretrained(run / "experts"))
    own.scheduler = experts.scheduler
    images = own(prompts, generator=seeded(), **few, **SIZE).images
    assert np.abs(255 * images - drawn).max() <= 1
