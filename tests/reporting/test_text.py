"""How differences are written, and what they are said to show."""

import pytest

from tdc_ray.reporting.text import interval_text, percent_text, verdict
from tdc_ray.runs.results import LossDifference


def difference_of(low: float, high: float, loss_base: float = 0.5) -> LossDifference:
    middle = (low + high) / 2
    return LossDifference(
        loss_tdc=loss_base + middle, loss_base=loss_base, difference=middle, low=low, high=high
    )


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [(-0.2, -0.1, "lower"), (0.1, 0.2, "higher"), (-0.1, 0.2, "undecided")],
)
def test_a_loss_is_lower_or_higher_where_the_interval_excludes_zero(low, high, said):
    assert verdict(difference_of(low, high)) == said


def test_differences_are_written_as_shares_of_the_bases_loss():
    found = difference_of(-0.01, 0.02)
    assert percent_text(found, found.difference) == "+1.00 %"
    assert interval_text(found) == "-2.00 to +4.00 %"
    assert percent_text(found, 5.0) == "+1000 %"
    assert percent_text(difference_of(0.1, 0.3, loss_base=0.0), 0.2) == "+2.00e-01"
