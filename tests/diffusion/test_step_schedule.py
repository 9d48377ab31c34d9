import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tdc_ray.diffusion.step_schedule import (
    choose_networks,
    entries_of,
    stitched,
)


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
