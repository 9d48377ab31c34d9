import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tdc_ray.config.diffusion import DiffusionConfig
from tdc_ray.diffusion.schedule import NoiseProcess
from tdc_ray.diffusion.step_schedule import (
    choose_networks,
    entries_of,
    step_weights,
    stitched,
)

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


def test_a_weight_is_what_an_error_of_epsilon_adds_to_the_samples_of_gaussian_data():
    timesteps = range(998, -1, -2)
    weights = step_weights(ACP, timesteps, VARIANCE)
    right = ddim_of_gaussian_data(timesteps)
    for place in (0, 100, 250, 400, 480, len(timesteps) - 1):
        wrong = ddim_of_gaussian_data(timesteps, place, error=0.01)
        assert weights[place] == pytest.approx(((wrong - right) / 0.01) ** 2, rel=0.05)


@st.composite
def problems(draw):
    """Up to five steps and three networks, some of which may not run everywhere."""
    steps, networks = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    number = st.floats(0.1, 1.0)
    macs = np.tile([draw(number) for _ in range(networks)], (steps, 1))
    excess = np.array([[draw(st.floats(-1, 1)) for _ in range(networks)] for _ in range(steps)])
    allowed = np.array([[draw(st.booleans()) for _ in range(networks)] for _ in range(steps)])
    allowed[:, draw(st.integers(0, networks - 1))] = True
    least = np.where(allowed, macs, np.inf).min(1).sum()
    budget = least + draw(st.floats(0, 1)) * (np.where(allowed, macs, 0).max(1).sum() - least)
    return np.where(allowed, excess, np.inf), macs, float(budget)


@given(problems())
def test_the_choice_is_the_best_one_within_the_budget(problem):
    excess, macs, budget = problem
    steps = np.arange(len(excess))

    def total(values, choice):
        return float(values[steps, list(choice)].sum())

    found = choose_networks(excess, macs, budget)
    assert total(macs, found) <= budget * (1 + 1e-6)
    choices = list(itertools.product(range(excess.shape[1]), repeat=len(excess)))
    within = (c for c in choices if total(macs, c) <= budget * 0.999)
    best = min((total(excess, c) for c in within), default=np.inf)
    assert total(excess, found) <= best + 1e-9


@given(problems())
def test_stitching_puts_the_cheapest_first_and_meets_the_budget(problem):
    excess, macs, budget = problem
    found = stitched(np.isfinite(excess), macs, budget)
    taken = macs[np.arange(len(found)), found]
    assert taken.sum() <= budget * (1 + 1e-6)
    assert np.isfinite(excess[np.arange(len(found)), found]).all()


@given(
    st.lists(st.integers(0, 99), min_size=1, max_size=12, unique=True),
    st.lists(st.sampled_from("abc"), min_size=12, max_size=12),
)
def test_every_timestep_has_one_folder_and_a_sampled_one_its_own(timesteps, folders):
    timesteps = sorted(timesteps, reverse=True)
    folders = folders[: len(timesteps)]
    entries = entries_of(timesteps, folders, 100)
    served = [t for entry in entries for t in range(entry.first, entry.last + 1)]
    assert served == list(range(100))
    for timestep, folder in zip(timesteps, folders, strict=True):
        (entry,) = (entry for entry in entries if entry.first <= timestep <= entry.last)
        assert entry.folder == folder
    assert all(a.folder != b.folder for a, b in itertools.pairwise(entries))
