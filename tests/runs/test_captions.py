"""Networks in pixels that learn from captioned images, from scratch and as experts."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tdc_ray.cli.main import run_command
from tdc_ray.config.model import ModelConfig
from tdc_ray.config.run import RunConfig, to_json
from tdc_ray.data.latents import prepare_latents, training_data
from tdc_ray.diffusion.pipeline import ProgressivePipeline
from tdc_ray.diffusion.process import NoisedBatch
from tdc_ray.execution.chain import run_chains
from tdc_ray.execution.device import WorkerRank
from tdc_ray.execution.item import ItemResult
from tdc_ray.models.config_file import with_file
from tdc_ray.models.families import load_network, save_network
from tdc_ray.models.network_config import STATES
from tdc_ray.models.structure import units_for
from tdc_ray.models.text_encoder import encode_prompts
from tdc_ray.models.units import keep_everything
from tdc_ray.runs.preflight import check
from tdc_ray.runs.pretrained.sources import resolve_base
from tdc_ray.runs.stages.base_result import BaseResult
from tdc_ray.runs.stages.base_worker import sample_grid, train_base
from tdc_ray.runs.stages.finetune import FinetuneJob, finetune_expert
from tdc_ray.storage.files import write_json
from tdc_ray.storage.run_dir import RunDir

pytest.importorskip("transformers")
from tests.small import assert_same, context_of, group_of, small_config
from tests.text_pipelines import made, of_pixels, save, stop


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """Squares of a brightness whose captions name it, and a network that reads them."""
    folder = tmp_path_factory.mktemp("captions")
    pipeline = save(of_pixels, folder)
    (folder / "images").mkdir()
    rows = []
    for number in range(20):
        name = f"{number:02}.png"
        Image.fromarray(np.full((8, 8), 10 * number, np.uint8)).save(folder / "images" / name)
        rows.append(json.dumps({"file_name": name, "text": "ab"[number % 2]}))
    (folder / "images/metadata.jsonl").write_text("\n".join(rows))
    steps = {"num_steps": 2, "batch_size": 16}
    return replace(
        small_config(
            base=steps,
            finetune=steps,
            data={
                "source": "imagefolder",
                "path": str(folder / "images"),
                "text_encoder": str(pipeline),
            },
            conditioning={"caption_dropout": 0.5},
            evaluate={"features": "none", "cache_dir": str(folder / "cache")},
            prune={"num_images": 16, "held_out_share": 0.25},
            sampler={"num_inference_steps": 2, "guidance_scale": 2.0},
        ),
        model=with_file(ModelConfig(config=str(pipeline / "unet"))),
    )


@pytest.fixture(scope="module")
def prepared(config: RunConfig) -> RunConfig:
    training = training_data(config.data, config.evaluate.cache_dir)
    run_chains({"captions": prepare_latents(training)})
    return config


def empties_seen(monkeypatch: pytest.MonkeyPatch, config: RunConfig) -> list[bool]:
    """Have training note, image by image, whether its caption was replaced by the empty one."""
    assert config.data.text_encoder is not None
    empty = encode_prompts(Path(config.data.text_encoder), [""], (8, 8)).negative[STATES]
    seen, split = list[bool](), NoisedBatch.split

    def noted(batch: NoisedBatch, size: int) -> object:
        seen.extend((batch.labels[STATES] == empty).all(dim=(-2, -1)).tolist())
        return split(batch, size)

    monkeypatch.setattr(NoisedBatch, "split", noted)
    return seen


def test_images_lie_beside_the_states_of_their_captions(prepared):
    data = training_data(prepared.data, prepared.evaluate.cache_dir)
    images, captions = data.open().__getitems__([3, 0])
    assert images.dtype == torch.uint8
    assert images.flatten(1)[:, 0].tolist() == [30, 0]
    pipeline = Path(prepared.data.text_encoder)
    assert_same(captions[STATES], encode_prompts(pipeline, ["b", "a"], (8, 8)).prompts[STATES])


def test_a_base_is_trained_from_scratch_on_captions_some_of_them_dropped(
    prepared, tmp_path, monkeypatch
):
    check(prepared)
    seen = empties_seen(monkeypatch, prepared)
    state = train_base(
        prepared,
        WorkerRank(0, 1, torch.device("cpu")),
        resume_from=None,
        wrap=lambda unet: unet,
        report=lambda *_: None,
        save=lambda _: None,
    )
    assert len(seen) == 32
    assert 4 < sum(seen) < 28
    assert sample_grid(state.unet.eval(), prepared, 2).shape == (2, 8, 8, 1)
    run_dir = RunDir(tmp_path)
    save_network(state.unet, run_dir.base_unet)
    write_json(run_dir.config, to_json(prepared))
    ItemResult(BaseResult(1, 1, 2, 1.0, 1.0)).save(run_dir.base_result)
    settings = resolve_base(str(tmp_path)).settings
    assert settings.data.text_encoder == prepared.data.text_encoder
    assert settings.sampler.guidance_scale == 2.0


def test_fine_tunes_drop_captions_too(prepared, tmp_path, monkeypatch):
    network = load_network(Path(prepared.data.text_encoder) / "unet")
    run_dir, group = RunDir(tmp_path), group_of(prepared, 1)
    save_network(network, run_dir.base_unet)
    kept = keep_everything(units_for(prepared.model.network, {}))
    checkpoint = tmp_path / "checkpoint.pt"
    context = context_of(run_dir, prepared)
    seen = empties_seen(monkeypatch, prepared)
    job = FinetuneJob(context, group, kept, prepared.finetune, 1, checkpoint)
    finetune_expert(job, lambda *_: None)
    assert 4 < sum(seen[:32]) < 28


@pytest.mark.ray
@pytest.mark.slow
def test_a_run_on_captions_goes_from_start_to_end_and_resumes(
    ray_cluster, config, tmp_path, monkeypatch
):
    """Base from scratch, plan, prune, refit, fine-tune, sample; images for prompts at the end."""
    run, pipeline = tmp_path / "run", config.data.text_encoder
    command = ["run", "--preset", "digits-smoke", "--run-dir", str(run)]
    command += ["--model.config", f"{pipeline}/unet", "--data.text-encoder", pipeline]
    command += ["--data.source", "imagefolder", "--data.path", config.data.path]
    command += ["--conditioning.caption-dropout", "0.2", "--sampler.guidance-scale", "2"]
    command += ["--sampler.negative-prompt", "c", "--sampler.num-inference-steps", "4"]
    command += ["--base.num-steps", "20", "--finetune.num-steps", "4", "--plan.num-groups", "2"]
    command += ["--prune.num-images", "16", "--prune.num-refit-images", "16"]
    command += ["--prune.held-out-share", "0.25", "--evaluate.num-images", "8"]
    command += ["--evaluate.features", "none", "--evaluate.cache-dir", str(tmp_path / "cache")]
    with monkeypatch.context() as stopped:
        stopped.setattr("tdc_ray.runs.run.expert_times", stop)
        assert run_command(command) == 1
    before = made(run)
    assert len(before) >= 4
    assert not (run / "results.json").exists()
    assert run_command(command) == 0
    assert made(run) == before
    results = json.loads((run / "results.json").read_text())
    assert results["tdc"]["macs"] < results["base"]["macs"]
    assert results["evaluation"]["labels"] == "image i is of prompt i mod 20, away from 'c'"

    sample = ["sample", str(run), "--num-images", "2", "--prompts", "a", "b"]
    assert run_command([*sample, "--out-dir", str(tmp_path / "drawn")]) == 0
    experts = ProgressivePipeline.from_pretrained(run)
    experts.set_progress_bar_config(disable=True)
    assert experts.negative_prompt == "c"
    expected = experts(2, prompt=["a", "b"], output_type="np").images
    with np.load(tmp_path / "drawn/samples.npz") as drawn:
        assert np.array_equal(drawn["arr_0"], expected)
