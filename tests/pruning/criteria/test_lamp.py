import pytest

from tdc_ray.pruning.criteria.lamp import lamp_scores
from tdc_ray.pruning.criteria.magnitude import magnitude_scores
from tdc_ray.pruning.criteria.scores import select_top
from tests.pruning.criteria.inputs import UNITS
from tests.small import random_unet


def test_lamp_is_magnitude_over_the_sum_of_what_is_not_smaller():
    unet = random_unet()
    scores = lamp_scores(unet, UNITS)
    for name, squared in magnitude_scores(unet, UNITS).items():
        by_size = sorted(squared, reverse=True)
        expected = [value / sum(by_size[: by_size.index(value) + 1]) for value in squared]
        assert scores[name] == pytest.approx(expected)
        assert max(scores[name]) == 1.0


def test_within_a_unit_lamp_keeps_what_magnitude_keeps():
    unet = random_unet()
    half = {unit.name: unit.width // 2 for unit in UNITS}
    by_lamp = select_top(UNITS, lamp_scores(unet, UNITS), half)
    assert by_lamp == select_top(UNITS, magnitude_scores(unet, UNITS), half)


def test_a_scale_of_a_whole_unit_changes_no_score():
    unet, unit = random_unet(), UNITS[0]
    before = lamp_scores(unet, (unit,))[unit.name]
    for parameter in unet.get_submodule(unit.name).parameters():
        parameter.data *= 3.0
    assert lamp_scores(unet, (unit,))[unit.name] == pytest.approx(before)
    for parameter in unet.get_submodule(unit.name).parameters():
        parameter.data.zero_()
    assert set(lamp_scores(unet, (unit,))[unit.name]) == {0.0}
