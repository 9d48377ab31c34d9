from typing import get_args

import pytest

from tdc_ray.config.prune import ScoreMethod
from tdc_ray.pruning.criteria.registry import CRITERIA
from tests.pruning.criteria.inputs import UNITS, score_inputs


def test_the_rows_are_the_names_of_the_setting():
    assert tuple(CRITERIA) == get_args(ScoreMethod)


@pytest.mark.parametrize("method", CRITERIA)
def test_every_group_and_head_of_every_unit_has_a_score(method):
    scores, _ = CRITERIA[method].score(score_inputs())
    assert list(scores) == [unit.name for unit in UNITS]
    for unit in UNITS:
        values = scores[unit.name]
        assert len(values) == unit.width
        assert all(isinstance(value, float) and value >= 0 for value in values)
        assert len(set(values)) == unit.width


@pytest.mark.parametrize(
    ("method", "passes"),
    [("random", 0), ("magnitude", 0), ("lamp", 0), ("taylor", 12), ("diff-pruning", 12 * 3)],
)
def test_what_a_criterion_took_is_counted_in_forward_passes_of_an_image(method, passes):
    assert CRITERIA[method].score(score_inputs())[1] == passes


@pytest.mark.parametrize("method", ["taylor", "diff-pruning"])
def test_images_whose_gradients_do_not_fit_at_once_are_taken_in_parts(monkeypatch, method):
    whole, _ = CRITERIA[method].score(score_inputs())
    name = method.replace("-", "_")
    monkeypatch.setattr(
        f"tdc_ray.pruning.criteria.{name}.max_batch_size", lambda *_, **__: 3
    )  # of 4
    for name, scores in CRITERIA[method].score(score_inputs())[0].items():
        assert scores == pytest.approx(whole[name], rel=1e-3)
