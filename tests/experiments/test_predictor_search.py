import numpy as np

from tdc_ray.runs.step_schedule.networks import Network, Problem
from tests.experiments.conftest import EXPERIMENTS


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
