import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from tdc_ray.cli.main import run_command
from tdc_ray.config.autoencoder import AutoencoderConfig
from tdc_ray.config.data import DataConfig
from tdc_ray.config.train import TrainConfig
from tdc_ray.data.batches import held_out_split, to_minus_one_one
from tdc_ray.data.load import load_dataset
from tdc_ray.errors import StorageError
from tdc_ray.models.first_stage import WEIGHTS_FILE, load_first_stage
from tdc_ray.runs.train_autoencoder import (
    CHECKPOINT_FILE,
    REPORT_FILE,
    SETTINGS_FILE,
    autoencoder_loss,
    build_autoencoder,
    train_autoencoder,
)
from tdc_ray.storage.files import write_json
from tests.small import assert_same


def settings(num_steps=60, **changes):
    """Digits at 8x8 to latents of 2x4x4."""
    train = TrainConfig(
        num_steps=num_steps,
        batch_size=32,
        learning_rate=3e-3,
        ema_decay=0.9,
        ema_warmup=True,
        log_every=5,
        checkpoint_every=10,
    )
    few = {"data": DataConfig(), "block_out_channels": (8, 16), "latent_channels": 2}
    return AutoencoderConfig(**few, train=train, **changes)


FLAGS = ["--data", "digits", "--data.image-size", "8", "--block-out-channels", "8", "16"]
FLAGS += ["--latent-channels", "2", "--train.batch-size", "8", "--train.checkpoint-every", "20"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("autoencoder")
    return out, train_autoencoder(settings(), out)


def held_out_images(config):
    dataset = load_dataset(config.data)
    _, numbers = held_out_split(dataset, config.held_out_share, config.seed)
    return to_minus_one_one(dataset.__getitems__(numbers)[0])


@pytest.mark.slow
def test_the_error_reported_is_that_of_what_was_saved_on_held_out_images(trained):
    out, report = trained
    first_stage, images = load_first_stage(out), held_out_images(settings())
    error = first_stage.decode(first_stage.encode(images)).clamp(-1, 1) - images
    errors = report["held_out"]
    assert errors["num_images"] == len(images) == 180
    assert errors["l1"] == pytest.approx(float(error.abs().mean()), rel=1e-4)
    assert errors["mse"] == pytest.approx(float(error.square().mean()), rel=1e-4)
    assert 10 ** (-errors["psnr_db"] / 10) * 4 == pytest.approx(errors["mse"])


def test_training_learns_to_reconstruct(trained, tmp_path):
    untrained = train_autoencoder(settings(0), tmp_path)["held_out"]["mse"]
    assert trained[1]["held_out"]["mse"] < 0.6 * untrained


def test_the_scaling_factor_brings_latents_to_a_deviation_of_one(trained):
    out, report = trained
    latents = load_first_stage(out).encode(held_out_images(settings()))
    assert report["latent_shape"] == [2, 4, 4] == list(latents.shape[1:])
    assert float(latents.std()) == pytest.approx(1.0, rel=0.1)
    assert report["scaling_factor"] != 1.0


def test_a_finished_one_is_read_and_not_trained_again(trained):
    out, report = trained
    before = (out / WEIGHTS_FILE).stat().st_mtime_ns
    assert train_autoencoder(settings(), out) == report
    assert (out / WEIGHTS_FILE).stat().st_mtime_ns == before
    assert not (out / CHECKPOINT_FILE).exists()


def test_other_settings_in_the_same_folder_are_refused_by_name(trained):
    changed = replace(settings(), kl_weight=0.5)
    with pytest.raises(StorageError, match=r"kl_weight 0\.001 -> 0\.5.*--out"):
        train_autoencoder(changed, trained[0])


@pytest.mark.parametrize(
    "document", [[], {}, {"data": None}, {"data": {"path": 1}}, {"other": {}}]
)
def test_settings_that_are_none_are_refused(tmp_path, document):
    write_json(tmp_path / SETTINGS_FILE, document)
    with pytest.raises(StorageError, match=f"{SETTINGS_FILE} is of another version.*--out"):
        train_autoencoder(settings(), tmp_path)


@pytest.mark.slow
def test_killed_and_called_again_equals_not_killed(tmp_path):
    arguments = [*FLAGS, "--train.num-steps", "120", "--out"]
    command = [sys.executable, "-m", "tdc_ray", "train-autoencoder", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    process = subprocess.Popen([*command, str(cut)], env=environment, stdout=subprocess.DEVNULL)
    while not (cut / CHECKPOINT_FILE).exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (cut / REPORT_FILE).exists()
    for out in (cut, whole):
        assert run_command(["train-autoencoder", *arguments, str(out)]) == 0
    assert_same(load_file(cut / WEIGHTS_FILE), load_file(whole / WEIGHTS_FILE))


def test_the_loss_is_the_mean_over_pixels_of_error_and_divergence():
    config = settings(loss="mse", kl_weight=0.25)
    torch.manual_seed(0)
    model, x = build_autoencoder(config), torch.rand(4, 1, 8, 8)
    loss = autoencoder_loss(model, x, config, torch.Generator().manual_seed(1))
    posterior = model.encode(x).latent_dist
    z = posterior.mean + posterior.std * torch.randn(
        posterior.mean.shape, generator=torch.Generator().manual_seed(1)
    )
    divergence = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).sum()
    expected = (model.decode(z).sample - x).square().mean() + 0.25 * divergence / x.numel()
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--block-out-channels", "12"], ["block_out_channels", "a multiple of 8", "12"]),
        (["--data.image-size", "30"], ["data.image_size", "multiple of 4", "30"]),
        (["--held-out-share", "0"], ["held_out_share", "greater than 0"]),
        (["--latent-channels", "0"], ["latent_channels", "at least 1"]),
        (["--train.micro-batch-size", "4"], ["train.micro_batch_size", "None", "4"]),
        (["--train.batch-size", "0"], ["train.batch_size", "at least 1"]),
        (["--data.first-stage", "."], ["data.first_stage", "None", "."]),
        (["--data", "nowhere"], ["--data", "nowhere"]),
        ([], ["mnist.npz does not exist"]),
    ],
)
def test_bad_input_is_one_clear_error_before_work(tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    if arguments:
        (tmp_path / "mnist.npz").touch()
    assert run_command(["train-autoencoder", "--out", "out", *arguments]) == 1
    error = capsys.readouterr().err
    assert len(error.strip().splitlines()) == 1
    for word in words:
        assert word in error
    assert not (tmp_path / "out").exists()
