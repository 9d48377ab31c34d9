import numpy as np
import pytest

from tdc_ray.config.diffusion import DiffusionConfig
from tdc_ray.diffusion.schedule import NoiseProcess
from tdc_ray.runs.step_schedule.networks import Network, Problem
from tests.experiments.conftest import EXPERIMENTS

ACP = NoiseProcess.of(DiffusionConfig()).alphas_cumprod
VARIANCE = 0.3


def ddim_of_gaussian_data(timesteps, wrong_at=None, error=0.0):
    """Sample one pixel of Gaussian data by DDIM with its exact score, but for one error."""
    x = 1.7
    for place, timestep in enumerate(timesteps):
        acp = ACP[timestep]
        following = ACP[timesteps[place + 1]] if place + 1 < len(timesteps) else 1.0
        epsilon = np.sqrt(1 - acp) * x / (acp * VARIANCE + 1 - acp)  # E[epsilon | x]
        epsilon += error if place == wrong_at else 0.0
        x_0 = (x - np.sqrt(1 - acp) * epsilon) / np.sqrt(acp)
        x = np.sqrt(following) * x_0 + np.sqrt(1 - following) * epsilon
    return x


def test_a_weight_is_what_an_error_of_epsilon_adds_to_the_samples_of_gaussian_data(monkeypatch):
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    from step_weights import sample_weights

    timesteps = range(998, -1, -2)
    weights = sample_weights(ACP, timesteps, VARIANCE)
    right = ddim_of_gaussian_data(timesteps)
    for place in (0, 100, 250, 400, 480, len(timesteps) - 1):
        wrong = ddim_of_gaussian_data(timesteps, place, error=0.01)
        assert weights[place] == pytest.approx(((wrong - right) / 0.01) ** 2, rel=0.05)


def test_evolution_finds_an_affordable_schedule_that_is_good_where_scores_are_additive(
    tmp_path, monkeypatch
):
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    from predictor_search import evolve

    macs = (1.0, 0.5, 0.25)
    networks = [Network(name, tmp_path, 4, (0, 39)) for name in "abc"]
    problem = Problem(
        networks, range(39, -1, -1), np.tile(macs, (40, 1)), np.ones((40, 3), bool), 40
    )
    harm = np.outer(np.linspace(0, 1, 40), (0, 1, 2))  # narrow networks harm late steps

    def score(choice):
        return float(harm[np.arange(40), choice].sum())

    found = evolve(problem, 24.0, score, num_scored=60, seed=0)
    assert problem.macs[np.arange(40), found].sum() <= 24.0
    stitched = [2] * 21 + [0] * 19
    assert score(found) < 1.5 * score(stitched)
