"""What networks predict, compared: the unit of their losses, and a smoke run."""

import csv
import sys
from types import SimpleNamespace
from typing import get_args

import pytest
import torch

from tdc_ray.config.diffusion import DiffusionConfig, PredictionType
from tdc_ray.config.presets import preset
from tdc_ray.diffusion.prediction import PREDICTIONS
from tdc_ray.diffusion.process import NoisedBatch, noise_schedule
from tdc_ray.storage.files import read_json


@pytest.mark.usefixtures("importable")
def test_one_denoiser_has_one_loss_whatever_it_is_said_to_predict(monkeypatch):
    import parametrizations

    generator = torch.Generator().manual_seed(0)
    x_0, epsilon = torch.randn(2, 5, 1, 4, 4, generator=generator)
    batch = NoisedBatch(x_0, epsilon, torch.tensor([0, 30, 300, 700, 999]))
    levels = noise_schedule(DiffusionConfig())
    found = {}
    for predicts in get_args(PredictionType):

        def network(x_t, timesteps, predicts=predicts):
            if predicts == "flow_prediction":
                noise = timesteps[:, None, None, None] / 1000
                signal = 1 - noise
            else:
                signal, noise = levels.rates(timesteps)
            x_0 = 0.8 * signal * x_t / (signal**2 + noise**2)  # any denoiser, of the SNR alone
            of_x_t = (x_t - signal * x_0) / noise
            target = PREDICTIONS[predicts].target(x_0, of_x_t, signal, noise)
            return SimpleNamespace(sample=target)

        monkeypatch.setattr(parametrizations, "load_network", lambda _, network=network: network)
        monkeypatch.setattr(parametrizations, "unseen_batches", lambda *_: [batch])
        found[predicts] = parametrizations.loss_of_epsilon(preset("digits"), predicts, None, None)
    signal, noise = levels.rates(batch.timesteps)
    x_t = batch.x_t(levels)
    implied = (x_t - signal * 0.8 * signal * x_t) / noise
    expected = float((implied - epsilon).square().mean())
    assert found == pytest.approx(dict.fromkeys(found, expected), rel=2e-3)


@pytest.mark.slow
@pytest.mark.ray
def test_bases_of_two_predictions_are_scored_and_measured(storage, monkeypatch):
    import parametrizations
    from common import parse_flags

    command = ["parametrizations.py", "--smoke", "--storage", str(storage)]
    monkeypatch.setattr(sys, "argv", [*command, "--predictions", "epsilon", "flow_prediction"])
    flags = parse_flags(parametrizations.__doc__, parametrizations.PredictionFlags)
    parametrizations.main(flags)
    folder = storage / "parametrizations-digits-smoke"
    with (folder / "parametrizations.csv").open() as file:
        rows = {row["prediction"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["epsilon", "flow_prediction"]
    assert all(0 < float(row["loss"]) < 5 for row in rows.values())
    record = read_json(folder / "parametrizations.json")
    assert record["metric"] == "fd_digits_cnn"
    assert {len(losses) for by_seed in record["losses"].values() for losses in by_seed} == {4}
    assert len(record["made_by"]["commits"]) == 1
    assert (folder / "parametrizations.png").stat().st_size > 1000
