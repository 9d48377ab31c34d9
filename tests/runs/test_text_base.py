"""A base conditioned on text: a tiny Stable Diffusion with random weights, through the method."""

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from shutil import copytree

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

import tdc_ray as tdc
from tdc_ray.cli.main import run_command
from tdc_ray.cli.parse import parse
from tdc_ray.config.diffusion import DiffusionConfig
from tdc_ray.config.sampler import SamplerConfig
from tdc_ray.data.detect import data_config
from tdc_ray.data.latents import training_data
from tdc_ray.data.prompts import (
    BUNDLED,
    load_states,
    prompts_named,
    read_prompts,
    states_of_images,
)
from tdc_ray.diffusion.expert_denoiser import ExpertDenoiser
from tdc_ray.diffusion.pipeline import ProgressivePipeline
from tdc_ray.diffusion.pipeline_index import INDEX_FILE, ExpertEntry, PipelineIndex
from tdc_ray.diffusion.sampling import image_generators
from tdc_ray.errors import CheckpointError, ConfigError, UnsupportedModelError
from tdc_ray.models.families import given_config, load_network
from tdc_ray.models.network_config import STATES
from tdc_ray.models.saved_expert import save_expert
from tdc_ray.models.structure import units_for
from tdc_ray.models.text_encoder import encode_prompts, text_encoder_digest
from tdc_ray.models.units import keep_everything
from tdc_ray.runs.pretrained.sources import resolve_base
from tdc_ray.runs.results import load_results
from tests.small import TINY, random_unet

pytest.importorskip("transformers")
from tests.text_pipelines import PROMPTS, made, save, stable_diffusion, stop

FEW = ("--prune.num-images", "16", "--prune.num-refit-images", "16", "--prune.num-levels", "1")
FEW += ("--prune.num-rounds", "1", "--prune.num-candidates", "2", "--data.num-images", "20")
FEW += ("--sampler.num-inference-steps", "4")


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(stable_diffusion, tmp_path_factory.mktemp("text"))


def states_of(pipeline: Path, prompts: Sequence[str]) -> torch.Tensor:
    return encode_prompts(pipeline, prompts, (16, 16)).prompts[STATES]


def test_states_are_those_of_the_pipelines_own_text_encoder(pipeline):
    loaded = StableDiffusionPipeline.from_pretrained(pipeline)
    for prompt, states in zip(PROMPTS, states_of(pipeline, PROMPTS), strict=True):
        expected, _ = loaded.encode_prompt(prompt, torch.device("cpu"), 1, False)
        assert torch.equal(states, expected[0])


def test_a_text_encoder_in_half_precision_alone_computes_in_float32(pipeline, tmp_path, caplog):
    copytree(pipeline, tmp_path / "half")
    path = tmp_path / "half/text_encoder/model.safetensors"
    halves = {name: weights.half() for name, weights in load_file(path).items()}
    save_file(halves, path.with_name("model.fp16.safetensors"), {"format": "pt"})
    path.unlink()
    states = states_of(tmp_path / "half", ["a" * 100, PROMPTS[0]])
    assert states.dtype == torch.float32
    assert (states[1] - states_of(pipeline, PROMPTS[:1])[0]).abs().max() < 0.01
    assert "1 of 2 prompts are cut to 77 tokens" in caplog.text


def test_the_states_kept_depend_on_the_tokenizer(pipeline, tmp_path):
    before = text_encoder_digest(pipeline)
    copytree(pipeline, tmp_path / "other")
    assert text_encoder_digest(tmp_path / "other") == before
    (tmp_path / "other/tokenizer/added.txt").write_text("x")
    assert text_encoder_digest(tmp_path / "other") != before


def test_the_base_brings_its_first_stage_noise_and_guidance(pipeline, tmp_path):
    assert run_command(["import", str(pipeline), str(tmp_path / "base")]) == 0
    imported = resolve_base(str(tmp_path / "base")).settings
    assert imported.data.text_encoder == str(pipeline)
    assert imported.sampler.guidance_scale == 7.5
    settings = resolve_base(str(pipeline)).settings
    assert settings.data.first_stage == str(pipeline / "vae")
    assert settings.sampler.guidance_scale == 7.5
    assert settings.diffusion.beta_schedule == "scaled_linear"


def prune(pipeline: Path, out: Path, *arguments: str) -> int:
    command = ["prune", str(pipeline), "--out", str(out), "--data", "base", "--macs", "0.8"]
    command += ["--data.prompts", str(pipeline.parent / "prompts.txt"), *FEW]
    return run_command([*command, "--evaluate.cache-dir", str(out.parent / "cache"), *arguments])


@pytest.mark.slow
def test_it_is_pruned_on_images_that_it_draws_for_prompts(pipeline, tmp_path):
    assert prune(pipeline, tmp_path / "out") == 0
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["macs"] <= report["macs_limit"] < report["macs_base"]
    # Of random weights a cut may lower the loss: the refit brings it back to the base's.
    base = report["loss_base"]
    assert abs(report["loss_refit"] - base) < abs(report["loss_cut"] - base)
    (samples,) = (tmp_path / "cache/base_samples").iterdir()
    states = load_states(samples)
    assert torch.equal(states.prompts[STATES], states_of(pipeline, PROMPTS))
    assert torch.equal(states.negative[STATES], states_of(pipeline, [""])[0])


@pytest.fixture(scope="module")
def captioned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Squares of a brightness, and captions that name it, not in the order of their files."""
    folder = tmp_path_factory.mktemp("captioned")
    rows = []
    for number in range(24):
        pixels = np.full((16, 16, 3), 10 * number, np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02}.png")
        rows.append({"file_name": f"{number:02}.png", "text": f"{'ab'[number % 2]} {number}"})
    lines = [json.dumps(row) for row in reversed(rows)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def test_it_is_pruned_on_captioned_images(pipeline, captioned, tmp_path):
    command = ["prune", str(pipeline), "--out", str(tmp_path / "out"), "--macs", "0.8"]
    command += ["--data", str(captioned), "--evaluate.cache-dir", str(tmp_path), *FEW[:-4]]
    assert run_command(command) == 0
    data = data_config(str(captioned), parse(command).config.data)
    training = training_data(data, str(tmp_path))
    latents, captions = training.open().__getitems__([0, 7, 3])
    expected = states_of(pipeline, ["a 0", "b 7", "b 3"])
    assert torch.equal(captions[STATES], expected)
    assert len(latents.flatten(1).unique(dim=0)) == 3
    drawn = states_of_images(training.prompts(), 0, 25)[STATES]
    assert torch.equal(drawn[[7, 24]], expected[[1, 0]])


def test_an_image_without_a_caption_is_refused_by_name(pipeline, captioned, tmp_path, capsys):
    copytree(captioned, tmp_path / "copy")
    rows = (tmp_path / "copy/metadata.jsonl").read_text()
    command = ["prune", str(pipeline), "--out", str(tmp_path / "out"), "--data"]
    for text, words in (
        ("null", "05.png has none"),
        ("5", "text in line 19 of .*/metadata.jsonl must be a text, got 5"),
        ('"\\ud800"', "in line 19 of .* must be a text"),
    ):
        changed = rows.replace('"text": "b 5"', f'"text": {text}')
        (tmp_path / "copy/metadata.jsonl").write_text(changed)
        assert run_command([*command, str(tmp_path / "copy")]) != 0
        assert re.search(words, capsys.readouterr().err)
    (tmp_path / "copy/metadata.jsonl").unlink()
    assert run_command([*command, str(tmp_path / "copy")]) != 0
    assert "data.source folder has no captions" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("--data", "digits"), "data.source digits has no captions"),
        (("--data.prompts", "nowhere.txt"), "nowhere.txt does not exist"),
        (
            ("--conditioning.num-classes", "3"),
            "num_classes must be None for a base conditioned on text",
        ),
    ],
)
def test_what_it_cannot_be_told_is_refused(pipeline, tmp_path, capsys, changes, message):
    command = ["prune", str(pipeline), "--out", str(tmp_path / "out"), "--data", "base"]
    assert run_command([*command, *FEW[:-4], *changes]) != 0
    assert message in capsys.readouterr().err


def test_a_pipeline_in_memory_takes_its_experts_back(pipeline, tmp_path):
    loaded = StableDiffusionPipeline.from_pretrained(pipeline, safety_checker=None)
    loaded.set_progress_bar_config(disable=True)
    settings = tdc.preset("digits")
    settings = replace(settings, evaluate=replace(settings.evaluate, cache_dir=str(tmp_path)))
    base = tdc.load_base(loaded, settings=settings)
    plan = tdc.plan_groups(base.scheduler, num_groups=2, min_macs_share=0.7)
    few = {"num_images": 8, "num_refit_images": 8, "num_levels": 1, "method": "magnitude"}
    experts = tdc.prune(base, plan, "base", progress=False, **few)
    assert min(group.macs for group in experts.groups) < 0.9 * base.macs
    loaded.unet = experts.to_denoiser()
    size = {"height": 16, "width": 16, "num_inference_steps": 2}
    assert np.isfinite(loaded(PROMPTS[0], output_type="np", **size).images).all()


@pytest.fixture(scope="module")
def experts(pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pipeline's own UNet as the only expert."""
    folder = tmp_path_factory.mktemp("experts")
    unet, config = load_network(pipeline / "unet"), given_config(pipeline / "unet")
    save_expert(folder / "expert-00", unet, config, keep_everything(units_for(config, {})))
    index = PipelineIndex(
        shape=(4, 8, 8),
        first_stage=str(pipeline / "vae"),
        diffusion=DiffusionConfig(beta_schedule="scaled_linear"),
        sampler=SamplerConfig(num_inference_steps=2, clip_sample=False, guidance_scale=3.0),
        text_encoder=str(pipeline),
        experts=(ExpertEntry(folder="expert-00", first=0, last=999),),
    )
    index.save(folder)
    return folder


def test_prompts_are_sampled_by_turns_and_with_guidance(pipeline, experts, tmp_path):
    own = StableDiffusionPipeline.from_pretrained(pipeline, safety_checker=None)
    cpu = torch.device("cpu")
    states = [own.encode_prompt(text, cpu, 1, False)[0] for text in ("a cat", "ab")]
    empty = own.encode_prompt("", cpu, 1, False)[0]
    loaded = ProgressivePipeline.from_pretrained(experts)
    loaded.set_progress_bar_config(disable=True)
    told = {
        "prompt_embeds": torch.cat([*states, states[0]]),
        "negative_prompt_embeds": empty.expand(3, -1, -1),
    }
    expected = loaded(3, output_type="np", **told).images
    command = ["sample", str(experts), "--num-images", "3", "--batch-size", "2"]
    (tmp_path / "some.txt").write_text("a cat\nab\n")
    for number, given in enumerate((["a cat", "ab"], [str(tmp_path / "some.txt")])):
        out = tmp_path / str(number)
        assert run_command([*command, "--prompts", *given, "--out-dir", str(out)]) == 0
        with np.load(out / "samples.npz") as drawn:
            assert np.abs(drawn["arr_0"].astype(int) - expected).max() <= 1
    again = loaded(3, output_type="np", prompt=["a cat", "ab", "a cat"]).images
    assert np.abs(again.astype(int) - expected).max() <= 1
    with pytest.raises(ConfigError, match="one, or one per image: got 2 for batch_size 3"):
        loaded(3, prompt=["a cat", "ab"])
    loaded.save_pretrained(tmp_path / "saved")
    assert PipelineIndex.load(tmp_path / "saved").text_encoder == str(pipeline)


def test_a_negative_prompt_is_that_of_its_own_pipeline(pipeline, experts, tmp_path):
    loaded = ProgressivePipeline.from_pretrained(experts)
    own = StableDiffusionPipeline.from_pretrained(pipeline, safety_checker=None)
    own.scheduler = loaded.scheduler
    for one in (loaded, own):
        one.set_progress_bar_config(disable=True)
    call = {"generator": image_generators(0, 0, 2), "num_inference_steps": 2, "output_type": "np"}
    call |= {"negative_prompt": ["ab"] * 2, "guidance_scale": 3.0, "height": 16, "width": 16}
    expected = 255 * own(["a cat", "a"], **call).images
    drawn = loaded(2, prompt=["a cat", "a"], negative_prompt="ab", output_type="np").images
    assert np.abs(drawn - expected).max() <= 1
    assert (drawn != loaded(2, prompt=["a cat", "a"], output_type="np").images).any()
    command = ["sample", str(experts), "--num-images", "2", "--prompts", "a cat", "a"]
    command += ["--negative-prompt", "ab", "--out-dir", str(tmp_path)]
    assert run_command(command) == 0
    with np.load(tmp_path / "samples.npz") as sampled:
        assert np.array_equal(sampled["arr_0"], drawn)
    planned = ProgressivePipeline.from_pretrained(experts, sampler={"negative_prompt": "ab"})
    planned.save_pretrained(tmp_path / "saved")
    again = ProgressivePipeline.from_pretrained(tmp_path / "saved")
    assert np.array_equal(again(2, prompt=["a cat", "a"], output_type="np").images, drawn)


def test_a_negative_prompt_that_nothing_leads_away_from_is_refused(
    pipeline, experts, tmp_path, capsys
):
    loaded = ProgressivePipeline.from_pretrained(experts)
    states = states_of(pipeline, ["a"])
    for call in ({"prompt_embeds": states}, {"prompt": "a", "guidance_scale": 1.0}):
        with pytest.raises(ConfigError, match="negative_prompt must come with prompt, without"):
            loaded(1, negative_prompt="b", **call)
    command = ["sample", str(experts), "--prompts", "a", "--out-dir", str(tmp_path)]
    assert run_command([*command, "--negative-prompt", "b", "--guidance-scale", "1"]) == 1
    assert "negative_prompt must come with prompts and a guidance scale" in capsys.readouterr().err
    negative = ("--sampler.negative-prompt", "b")
    assert prune(pipeline, tmp_path / "out", *negative, "--sampler.guidance-scale", "1") == 1
    assert "sampler.negative_prompt must be None for a base that is" in capsys.readouterr().err
    digits = ["run", "--preset", "digits-smoke", "--dry-run", "--run-dir", str(tmp_path / "run")]
    assert run_command([*digits, *negative]) == 1
    assert "sampler.negative_prompt must be None for a base that is" in capsys.readouterr().err


@pytest.mark.slow
def test_images_are_drawn_away_from_a_negative_prompt(pipeline, tmp_path):
    settings = ("--sampler.negative-prompt", "a cat")
    assert prune(pipeline, tmp_path / "out", *settings, "--prune.method", "magnitude") == 0
    (samples,) = (tmp_path / "cache/base_samples").iterdir()
    document = json.loads((samples / "samples.json").read_text())
    assert document["sampler"]["negative_prompt"] == "a cat"
    states = encode_prompts(pipeline, PROMPTS, (16, 16), negative_prompt="a cat")
    found = load_states(samples, "a cat")
    assert torch.equal(found.negative[STATES], states.negative[STATES])
    assert torch.equal(found.prompts[STATES], states.prompts[STATES])
    plain = load_states(samples)
    assert torch.equal(plain.negative[STATES], states_of(pipeline, [""])[0])


def test_prompts_that_cannot_be_sampled_are_refused(experts, tmp_path, capsys):
    plain = tmp_path / "plain"
    save_expert(plain / "expert-00", random_unet(), TINY, keep_everything(units_for(TINY, {})))
    index = PipelineIndex.load(experts)
    index.model_copy(update={"first_stage": None, "text_encoder": None}).save(plain)
    for arguments, words in (
        ([experts], "prompts must be given for experts that are conditioned on text"),
        ([experts, "--prompts", "no.txt", "--text-encoder", "x"], "no.txt does not exist: name a"),
        ([experts, "--prompts", "no.txt", "--text-encoder", "x"], "x does not exist: name the f"),
        (
            [experts, "--prompts", "a", "--text-encoder", tmp_path],
            f" text_encoder {tmp_path} must be the folder of a pipeline",
        ),
        ([plain, "--prompts", "a"], "prompts go with experts that are conditioned on text"),
    ):
        out = ["--out-dir", str(tmp_path)]
        assert run_command(["sample", *map(str, arguments), *out]) == 1
        assert words in capsys.readouterr().err


def test_a_uri_that_a_folder_brings_along_is_read_only_if_the_user_names_it(experts, tmp_path):
    copytree(experts, tmp_path, dirs_exist_ok=True)
    index = PipelineIndex.load(experts).model_dump(mode="json")
    uri = index["text_encoder"] = "memory://elsewhere/sd"
    (tmp_path / INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(ConfigError, match="must be named by you, as it is a URI"):
        ProgressivePipeline.from_pretrained(tmp_path).encode_prompts(["a"])
    named = ProgressivePipeline.from_pretrained(tmp_path, text_encoder=uri)
    with pytest.raises(ConfigError, match=r"^text_encoder memory://elsewhere/sd is not there"):
        named.encode_prompts(["a"])


def test_no_more_prompts_are_encoded_than_images_and_before_the_experts_move(
    experts, monkeypatch, tmp_path
):
    found = []

    def refuse(pipeline, prompts, _device):
        found.append((prompts, pipeline.experts.dtype))
        raise ConfigError("enough")

    monkeypatch.setattr(ProgressivePipeline, "encode_prompts", refuse)
    command = ["sample", str(experts), "--prompts", "a", "b", "c", "--num-images", "2"]
    assert run_command([*command, "--precision", "bf16", "--out-dir", str(tmp_path)]) == 1
    assert found == [(("a", "b"), torch.float32)]


def test_prompts_are_files_only_where_they_look_like_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cat").write_text("a dog\n")
    given = ["cat", "~nobody-of-this-name/ at sea", "x" * 5000 + "/", "black/white", "./cat"]
    assert prompts_named(given, "prompts") == (*given[:-1], "a dog")
    with pytest.raises(ConfigError, match=r"prompts ~nobody-here/x\.txt does not exist"):
        prompts_named(["~nobody-here/x.txt"], "prompts")


def test_code_that_lies_with_a_text_encoder_is_not_run(pipeline, monkeypatch):
    told: dict[str, object] = {}

    def refuse(_folder, **options):
        told.update(options)
        raise OSError

    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", refuse)
    with pytest.raises(CheckpointError):
        encode_prompts(pipeline, PROMPTS, (16, 16))
    assert told["trust_remote_code"] is False


@pytest.mark.ray
@pytest.mark.slow
def test_training_free_experts_of_it_take_0_8_of_its_macs_by_one_command(
    ray_cluster, pipeline, tmp_path
):
    command = ["run", "--base", str(pipeline), "--data", "base", "--finetune.num-steps", "0"]
    command += ["--plan.schedule", "measured", "--plan.mean-macs-share", "0.8"]
    command += ["--data.prompts", str(pipeline.parent / "prompts.txt"), *FEW]
    command += ["--plan.num-groups", "2", "--evaluate.num-images", "8"]
    command += ["--prune.held-out-share", "0.25", "--evaluate.features", "none"]
    command += ["--run-dir", str(tmp_path), "--evaluate.cache-dir", str(tmp_path / "cache")]
    assert run_command(command) == 0
    results = load_results(tmp_path / "results.json")
    assert results.tdc.train_macs == results.base.train_macs == 0
    assert 0.7 * results.base.macs < results.tdc.macs <= 0.8 * results.base.macs
    denoiser = ExpertDenoiser.from_pretrained(tmp_path / "experts")
    assert len(denoiser.experts) == len(results.groups)


@pytest.mark.ray
@pytest.mark.slow
def test_experts_of_it_draw_within_its_own_pipeline(
    ray_cluster, pipeline, tmp_path, capsys, monkeypatch
):
    run = tmp_path / "run"
    command = ["run", "--base", str(pipeline), "--data", "base", "--finetune.num-steps", "4"]
    command += ["--data.prompts", str(pipeline.parent / "prompts.txt"), *FEW]
    command += ["--plan.num-groups", "2", "--evaluate.num-images", "8", "--run-dir", str(run)]
    command += ["--prune.held-out-share", "0.25"]
    command += ["--evaluate.cache-dir", str(tmp_path / "cache"), "--evaluate.features", "none"]
    command += ["--sampler.negative-prompt", "a cat"]
    with monkeypatch.context() as stopped:
        stopped.setattr("tdc_ray.runs.run.expert_times", stop)
        assert run_command(command) == 1
    before = made(run)
    assert not (run / "results.json").exists()
    assert run_command(command) == 0
    assert made(run) == before
    results = json.loads((run / "results.json").read_text())
    assert results["tdc"]["macs"] < results["base"]["macs"]
    labels = results["evaluation"]["labels"]
    assert labels == "image i is of prompt i mod 3, away from 'a cat'"
    with np.load(run / "evaluation/tdc/0000000.npz") as drawn:
        assert drawn["arr_0"].shape == (8, 16, 16, 3)

    assert run_command(["export", str(run), str(tmp_path / "plain")]) != 0
    assert "with --denoiser" in capsys.readouterr().err
    experts = ProgressivePipeline.from_pretrained(run)
    experts.set_progress_bar_config(disable=True)
    with pytest.raises(ConfigError, match="prompt_embeds, and with guidance"):
        experts(1)
    states = states_of(pipeline, [PROMPTS[0], ""])
    told = {"prompt_embeds": states[:1], "negative_prompt_embeds": states[1:]}
    own = StableDiffusionPipeline.from_pretrained(pipeline, safety_checker=None)
    own.set_progress_bar_config(disable=True)
    own.unet = ExpertDenoiser.from_pretrained(run / "experts")
    own.scheduler = experts.scheduler
    same = {"num_inference_steps": 4, "output_type": "np"}
    noise, again = (torch.Generator().manual_seed(1) for _ in range(2))
    image = own(PROMPTS[0], height=16, width=16, generator=noise, **same).images
    expected = experts(1, [again], **same, **told).images
    assert np.abs(255 * image - expected).max() <= 1


def test_prompts_come_along_and_are_checked(tmp_path):
    assert len(read_prompts(None)) == 48
    assert BUNDLED.read_text().isascii()
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(ConfigError, match="must hold a prompt a line"):
        read_prompts(str(tmp_path / "empty.txt"))
    (tmp_path / "marked.txt").write_bytes("\ufeffa cat\r\na\u2028dog\r\n".encode())
    assert read_prompts(str(tmp_path / "marked.txt")) == ("a cat", "a\u2028dog")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="in UTF-8, one prompt a line"):
        read_prompts(str(tmp_path / "bytes.txt"))


def test_a_unet_that_reads_images_too_is_refused(tmp_path):
    config = {"_class_name": "UNet2DConditionModel", "addition_embed_type": "text_image"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match="addition_embed_type text_image"):
        given_config(tmp_path)
