"""Which network runs at which sampling step: the choice within a budget of macs.

OMS-DPM (arXiv:2306.08860) searches such schedules by evolution over a predictor of the score that
is trained on thousands of scored schedules; T-Stitch (arXiv:2402.14167) lets a small network take
the noisiest steps and a large one the rest. Here each network's loss at each step is measured, and
a knapsack over (step, network) is solved.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tdc_ray.diffusion.pipeline_index import ExpertEntry
from tdc_ray.diffusion.schedule import FloatArray

BoolArray = NDArray[np.bool_]

BINS = 50_000
"""Into how many parts the budget is divided by the knapsack."""


def choose_networks(excess: FloatArray, macs: FloatArray, budget: float) -> list[int]:
    """Solve the knapsack over (step, network): the least sum of excess within a sum of macs.

    By dynamic programming over the macs spent, in parts of the budget; the budget is never
    exceeded, and the choice is the best one of a budget smaller by at most a thousandth or so.

    Args:
        excess: ``(S, K)``: what each network costs in quality at each step; infinite where it
            cannot run.
        macs: ``(S, K)``: what it takes there.
        budget: Most that all steps take together; some choice is within it.

    Returns:
        The network of each step, ``S`` indices.
    """
    steps = np.arange(len(excess))
    parts = np.floor(macs * (BINS / budget)).astype(int)  # down: a full budget stays possible
    least, chosen = np.zeros(BINS + 1), np.zeros((len(excess), BINS + 1), np.int16)
    for step in range(len(excess)):
        options = np.full((excess.shape[1], BINS + 1), np.inf)
        for network, taken in enumerate(parts[step]):
            if taken <= BINS and np.isfinite(excess[step, network]):
                options[network, taken:] = least[: BINS + 1 - taken] + excess[step, network]
        chosen[step] = options.argmin(0)
        least = options.min(0)
    capacity = BINS
    while capacity >= 0 and np.isfinite(least[capacity]):
        choice, left = [0] * len(excess), capacity
        for step in reversed(range(len(excess))):
            choice[step] = int(chosen[step, left])
            left -= parts[step, choice[step]]
        over = float(macs[steps, choice].sum()) - budget
        if over <= 1e-9 * budget:
            return choice
        capacity -= max(1, int(over * BINS / budget))
    return [int(network) for network in np.where(np.isfinite(excess), macs, np.inf).argmin(1)]


def stitched(allowed: BoolArray, macs: FloatArray, budget: float) -> list[int]:
    """Let the cheapest network take the noisiest steps and the dearest the rest (T-Stitch).

    As many steps as the budget asks for are taken by the cheapest network that may run there.

    Args:
        allowed: ``(S, K)``: whether a network may run at a step; steps from the noisiest on.
        macs: ``(S, K)``.
        budget: Most that all steps take together.

    Returns:
        The network of each step.
    """
    dearest = np.where(allowed, macs, -np.inf).argmax(1)
    cheapest = np.where(allowed, macs, np.inf).argmin(1)
    steps = np.arange(len(macs))
    choice = dearest
    for count in range(1, len(macs) + 1):
        if macs[steps, choice].sum() <= budget * (1 + 1e-9):
            break
        choice = np.where(steps < count, cheapest, dearest)
    return [int(network) for network in choice]


def entries_of(
    timesteps: Sequence[int], folders: Sequence[str], num_train_timesteps: int
) -> tuple[ExpertEntry, ...]:
    """Return which folder serves which timesteps when it runs at some sampling steps.

    A timestep between two sampling steps belongs to the nearer one, the noisier one of equals.

    Args:
        timesteps: Of the sampling steps, without repeats, falling.
        folders: The network's folder of each.
        num_train_timesteps: Number of timesteps T.
    """
    entries: list[ExpertEntry] = []
    first = 0
    rising = list(zip(reversed(timesteps), reversed(folders), strict=True))
    for place, (timestep, folder) in enumerate(rising):
        is_last = place == len(rising) - 1
        last = num_train_timesteps - 1 if is_last else (timestep + rising[place + 1][0] - 1) // 2
        if entries and entries[-1].folder == folder:
            first = entries.pop().first
        entries.append(ExpertEntry(folder=folder, first=first, last=last))
        first = last + 1
    return tuple(entries)
