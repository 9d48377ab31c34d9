"""A search for the network of every sampling step as in OMS-DPM, to hold ours against.

OMS-DPM (arXiv:2306.08860) scores thousands of random schedules, trains a predictor of the score on
them, and evolves schedules by it. Here, in little: a ridge regression on how many steps of each
stretch of the sampling each network takes, and as many scored schedules as one has time for.
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.random import Generator

from tdc_ray.diffusion.schedule import FloatArray
from tdc_ray.runs.step_schedule.networks import Problem

STRETCHES = 10
"""Parts of the sampling whose steps count alike for the predictor."""

GENERATIONS, POPULATION = 60, 64
RIDGE = 1.0
"""On standardised features and scores."""


def random_schedule(problem: Problem, budget: float, draw: Generator) -> list[int]:
    """Draw stretches of networks, and make the schedule affordable."""
    choice: list[int] = []
    for allowed in problem.allowed:
        options = np.flatnonzero(allowed)
        stays = choice and choice[-1] in options and draw.random() < 0.8
        choice.append(choice[-1] if stays else int(draw.choice(options)))
    return affordable(problem, choice, budget, draw)


def affordable(
    problem: Problem, choice: Sequence[int], budget: float, draw: Generator
) -> list[int]:
    """Assign random steps to their cheapest network until a schedule is within the budget."""
    found, steps = list(choice), np.arange(len(choice))
    cheapest = np.where(problem.allowed, problem.macs, np.inf).argmin(1)
    for step in draw.permutation(len(found)):
        if problem.macs[steps, found].sum() <= budget:
            break
        found[step] = int(cheapest[step])
    return found


def features(problem: Problem, choices: Sequence[Sequence[int]]) -> FloatArray:
    """Count each network's steps in every stretch: ``(N, STRETCHES * K)``."""
    one_hot = np.eye(len(problem.networks))[np.array(choices)]  # (N, S, K)
    parts = np.array_split(one_hot, STRETCHES, axis=1)
    return np.concatenate([part.sum(1) for part in parts], axis=1)


def evolve(
    problem: Problem,
    budget: float,
    score_of: Callable[[Sequence[int]], float],
    num_scored: int,
    seed: int,
) -> list[int]:
    """Score random schedules, fit the predictor, and return the best that evolves, or was scored.

    Args:
        problem: Networks and steps.
        budget: Most macs of all steps together.
        score_of: Samples with a schedule and scores the images; lower is better.
        num_scored: Schedules that are scored.
        seed: Of all draws.
    """
    draw = np.random.default_rng(seed)
    scored = [random_schedule(problem, budget, draw) for _ in range(num_scored)]
    scores = np.array([score_of(choice) for choice in scored])
    known = features(problem, scored)
    center, scale = known.mean(0), known.std(0) + 1e-9
    inputs = (known - center) / scale
    gram = inputs.T @ inputs + RIDGE * np.eye(inputs.shape[1])
    slopes = np.linalg.solve(gram, inputs.T @ (scores - scores.mean()))

    def predicted(choices: Sequence[Sequence[int]]) -> FloatArray:
        return np.asarray((features(problem, choices) - center) / scale @ slopes)

    population = scored[:POPULATION]
    for _ in range(GENERATIONS):
        children = []
        for _ in range(POPULATION):
            one, other = (population[int(draw.integers(len(population)))] for _ in range(2))
            cut = int(draw.integers(len(one) + 1))
            child = [*one[:cut], *other[cut:]]
            for step in draw.integers(len(child), size=3):
                child[step] = int(draw.choice(np.flatnonzero(problem.allowed[step])))
            children.append(affordable(problem, child, budget, draw))
        everyone = [*population, *children]
        order = np.argsort(predicted(everyone), kind="stable")
        population = [everyone[place] for place in order[:POPULATION]]
    best_scored = scored[int(scores.argmin())]
    return population[0] if score_of(population[0]) < scores.min() else best_scored
