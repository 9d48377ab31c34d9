"""A whole latent run: a first stage trained here, latents on the pool, decoded images scored."""

import shutil

import numpy as np
import pytest
from rich.console import Console

from tdc_ray.cli.run import run
from tdc_ray.config.autoencoder import AutoencoderConfig
from tdc_ray.config.data import DataConfig
from tdc_ray.config.train import TrainConfig
from tdc_ray.data.batches import to_minus_one_one
from tdc_ray.data.load import load_dataset
from tdc_ray.diffusion.pipeline import ProgressivePipeline
from tdc_ray.models.first_stage import first_stage_digest, load_first_stage
from tdc_ray.runs.results import load_results
from tdc_ray.runs.train_autoencoder import train_autoencoder
from tdc_ray.storage.run_dir import RunDir
from tests.small import assert_same, latent_config, training_of

pytestmark = pytest.mark.ray


@pytest.mark.slow
def test_a_latent_run_ends_with_results_and_decoded_images(ray_cluster, cache_dir, tmp_path):
    autoencoder = AutoencoderConfig(
        data=DataConfig(),
        block_out_channels=(8,),
        latent_channels=1,
        train=TrainConfig(num_steps=5, batch_size=16),
    )
    stage = tmp_path / "first_stage"
    train_autoencoder(autoencoder, stage)
    config = latent_config(
        stage,
        cache_dir,
        data={"image_size": 8},  # the classifier that scores is that of other tests
        base={"num_steps": 4, "checkpoint_every": 4, "batch_size": 16},
        finetune={"num_steps": 2, "checkpoint_every": 2, "batch_size": 16},
        prune={"num_images": 16, "num_refit_images": 16, "num_rounds": 1, "num_candidates": 1},
        plan={"num_groups": 2},
        evaluate={"num_images": 40, "batch_size": 20},
    )
    folder = tmp_path / "run"
    results = run(config, folder, Console(quiet=True))
    assert load_results(RunDir(folder).results) == results
    assert results.metric == "fd_digits_cnn"
    assert np.isfinite([results.base.score, results.tdc.score]).all()
    assert results.evaluation.first_stage == first_stage_digest(stage)
    assert results.evaluation.reference == "the 1797 training images"

    images = to_minus_one_one(load_dataset(config.data).__getitems__(range(64))[0])
    encoded = load_first_stage(stage).encode(images)
    assert_same(training_of(config).open().__getitems__(range(64))[0], encoded)
    assert {path.suffix for path in training_of(config).latents.iterdir()} == {
        ".safetensors",
        ".json",
    }

    shutil.rmtree(stage)  # the experts need nothing from elsewhere
    pipeline = ProgressivePipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    scored = np.load(folder / "evaluation" / "tdc" / "0000000.npz")["arr_0"]
    again = pipeline(len(scored), seed=config.evaluate.seed, output_type="np").images
    assert scored.shape == (20, 8, 8, 1)
    assert np.abs(scored.astype(int) - again).max() <= 1  # other threads, other last bits
