"""Bases that read more of a prompt than states of its tokens: tiny ones with random weights."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

import tdc_ray as tdc
from tdc_ray.config.presets import preset
from tdc_ray.diffusion.expert_denoiser import ExpertDenoiser
from tdc_ray.diffusion.pipeline import base_pipeline
from tdc_ray.errors import ConfigError
from tdc_ray.models.families import build_network, given_config, load_network
from tdc_ray.models.structure import caption_shapes
from tdc_ray.models.text_encoder import (
    PromptStates,
    check_captions_read,
    check_text_encoder,
    encode_prompts,
    text_encoder_digest,
)
from tdc_ray.runs.pipelines import pipeline_index
from tdc_ray.runs.pretrained.importer import with_dropout
from tdc_ray.runs.pretrained.settings import apply_settings
from tdc_ray.runs.pretrained.sources import images_of, resolve_base

pytest.importorskip("transformers")
from tests import text_pipelines
from tests.text_pipelines import PROMPTS

EXACT = {"use_resolution_binning": False}


@dataclass(frozen=True)
class Kind:
    """A kind of pipeline."""

    make: Callable[[Path], DiffusionPipeline]
    network: str
    guidance: float
    size: int = 16
    call: dict[str, Any] = field(default_factory=dict)
    """Arguments of the pipeline's call."""

    @property
    def sides(self) -> tuple[int, int]:
        return self.size, self.size

    @property
    def sized(self) -> dict[str, Any]:
        return {"height": self.size, "width": self.size, **self.call}


KINDS = {
    "xl": Kind(text_pipelines.stable_diffusion_xl, "unet", 5.0),
    "sd3": Kind(text_pipelines.stable_diffusion_3, "transformer", 7.0),
    "pixart": Kind(text_pipelines.pixart, "transformer", 4.5, 256, EXACT),
    "sana": Kind(text_pipelines.sana, "transformer", 4.5, 64, EXACT),
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
    negative = {name: states.negative[name].expand_as(one) for name, one in states.prompts.items()}
    return {"prompt_embeds": dict(states.prompts), "negative_prompt_embeds": negative}


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
    few = {"num_inference_steps": 4, "output_type": "latent", **kind.sized}
    expected = own(prompts, generator=seeded(), **few).images
    states = told(encode_prompts(pipeline, prompts, kind.sides))
    drawn = ours(2, seeded(), 4, output_type="pt", **states).images
    torch.testing.assert_close(drawn, expected, rtol=1e-4, atol=1e-4)
    away = own(prompts, negative_prompt=["a cat"] * 2, generator=seeded(), **few).images
    negative = told(encode_prompts(pipeline, prompts, kind.sides, negative_prompt="a cat"))
    drawn = ours(2, seeded(), 4, output_type="pt", **negative).images
    torch.testing.assert_close(drawn, away, rtol=1e-4, atol=1e-4)
    assert (away - expected).abs().max() > 1e-3
    for name, tensor in states["prompt_embeds"].items():
        other = {**states["prompt_embeds"], name: torch.zeros_like(tensor)}
        without = ours(2, seeded(), 4, output_type="pt", **{**states, "prompt_embeds": other})
        assert (without.images - expected).abs().max() > 1e-3, name
    copies = ExpertDenoiser([getattr(own, kind.network)] * 2, [(0, 499), (500, 1000)])
    setattr(own, kind.network, copies)
    assert torch.equal(own(prompts, generator=seeded(), **few).images, expected)


def test_what_is_encoded_follows_all_encoders(pipeline):
    before = text_encoder_digest(pipeline)
    file = pipeline / f"{'tokenizer_2' if (pipeline / 'tokenizer_2').exists() else 'tokenizer'}/x"
    file.write_text("x")
    assert text_encoder_digest(pipeline) != before
    file.unlink()
    assert text_encoder_digest(pipeline) == before


def test_a_pipeline_for_other_networks_is_refused(tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    states = {"encoder_hidden_states": (77, 16)}
    check_captions_read(tmp_path, states)
    with pytest.raises(ConfigError, match="networks that read text_embeds and time_ids, as this"):
        check_captions_read(tmp_path, {**states, "text_embeds": (16,), "time_ids": (6,)})


def test_states_of_another_width_are_refused(kind, pipeline):
    network = given_config(pipeline / kind.network)
    shapes = caption_shapes(network["_class_name"], network)
    check_captions_read(pipeline, shapes)
    with pytest.raises(ConfigError, match="must be of states 7 wide, which this base reads"):
        check_captions_read(pipeline, {**shapes, "encoder_hidden_states": (77, 7)})


def test_without_a_dropout_its_network_is_built_without_one(kind, pipeline):
    settings = dict(given_config(pipeline / kind.network))
    settings.pop("dropout", None)
    network = build_network(with_dropout(settings, 0.0))
    assert type(network).__name__ == settings["_class_name"]


def test_pixart_alpha_and_sigma_share_no_states(tmp_path):
    pipeline = text_pipelines.save(text_pipelines.pixart, tmp_path)
    before, index = text_encoder_digest(pipeline), pipeline / "model_index.json"
    index.write_text(index.read_text().replace("PixArtAlpha", "PixArtSigma"))
    assert text_encoder_digest(pipeline) != before


def test_only_prompts_that_are_too_long_for_every_encoder_are_reported(tmp_path, caplog):
    pipeline = text_pipelines.save(text_pipelines.stable_diffusion_3, tmp_path)
    encode_prompts(pipeline, ["a" * 100, "a" * 300], (16, 16))
    assert "1 of 2 prompts are cut to 256 tokens" in caplog.text


def test_what_reads_the_words_of_t5_must_be_installed(tmp_path, monkeypatch):
    pipeline = text_pipelines.save(text_pipelines.pixart, tmp_path)
    (pipeline / "tokenizer/tokenizer.json").unlink(missing_ok=True)
    (pipeline / "tokenizer/spiece.model").write_text("")
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(ConfigError, match=r"needs sentencepiece: pip install 'tdc-ray\[text\]'"):
        check_text_encoder(str(pipeline))


def test_without_t5_its_states_are_zeros(tmp_path):
    pipeline = text_pipelines.save(text_pipelines.stable_diffusion_3, tmp_path)
    own = DiffusionPipeline.from_pretrained(pipeline, text_encoder_3=None, tokenizer_3=None)
    own.save_pretrained(tmp_path / "small")
    states = encode_prompts(tmp_path / "small", PROMPTS, (16, 16)).prompts
    expected, _, pooled, _ = own.encode_prompt([*PROMPTS], None, None)
    assert torch.equal(states["encoder_hidden_states"], expected)
    assert torch.equal(states["pooled_projections"], pooled)


@pytest.mark.slow
def test_experts_of_it_draw_within_its_own_pipeline(kind, pipeline, tmp_path):
    """Pruned, refitted and fine-tuned on images that it draws for prompts."""
    settings = preset("digits")
    settings = replace(
        settings,
        evaluate=replace(settings.evaluate, cache_dir=str(tmp_path)),
        sampler=replace(settings.sampler, num_inference_steps=4),
    )
    own = load(pipeline)
    base = tdc.load_base(own, settings=settings)
    plan = tdc.plan_groups(base.scheduler, num_groups=2, min_macs_share=0.7)
    few = {"num_images": 8, "num_refit_images": 8, "num_rounds": 1, "num_candidates": 2}
    pruned = tdc.prune(base, plan, "base", progress=False, num_levels=1, **few)
    assert min(group.macs for group in pruned.groups) < 0.9 * base.macs
    experts = tdc.finetune(pruned, "base", num_steps=2, batch_size=4, progress=False)
    ours = experts.to_pipeline()
    ours.set_progress_bar_config(disable=True)
    prompts, few = list(PROMPTS[:2]), {"num_inference_steps": 4, "output_type": "np"}
    states = told(encode_prompts(pipeline, prompts, kind.sides))
    drawn = ours(2, seeded(), **few, **states).images
    setattr(own, kind.network, experts.to_denoiser())
    own.scheduler = ours.scheduler
    images = own(prompts, generator=seeded(), **few, **kind.sized).images
    assert np.abs(255 * images - drawn).max() <= 1
