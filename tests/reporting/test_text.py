"""How differences are written, and what they are said to show."""

from dataclasses import replace

import pytest

from tdc_ray.reporting.text import (
    conclusions,
    interval_text,
    percent_text,
    verdict,
)
from tdc_ray.runs.results import HELD_OUT_LOSS, ComparisonResult, LossDifference, score_text
from tests.runs.test_results import MODEL, RESULTS


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


@pytest.mark.parametrize(
    ("score", "text"), [(12.3456, "12.346"), (0.012345, "0.01235"), (0.0, "0.000")]
)
def test_scores_are_written_with_digits_enough_for_losses(score, text):
    assert score_text(score) == text


def test_losses_in_place_of_scores_are_said_to_be_losses():
    base, tdc = (replace(MODEL, score=score) for score in (0.05, 0.0525))
    losses = difference_of(-0.0005, 0.0055, loss_base=0.05)
    results = replace(RESULTS, metric=HELD_OUT_LOSS, base=base, tdc=tdc, losses=losses)
    text = " ".join(conclusions(results))
    assert "held_out_loss 0.05250 against the base's 0.05000 (undecided; lower" in text
    assert "+5.00 % (-1.00 to +11.00 %, 95 %)" in text
    assert "No image was scored" in text
    assert "FID" not in text
    assert "No image was scored" not in " ".join(conclusions(RESULTS))


@pytest.mark.parametrize(("num_features", "is_said"), [(63, False), (64, True), (None, False)])
def test_images_that_are_too_few_for_the_covariance_are_said_to_be(num_features, is_said):
    evaluation = replace(RESULTS.evaluation, num_images=64, num_features=num_features)
    text = " ".join(conclusions(replace(RESULTS, evaluation=evaluation)))
    assert ("64 images are too few for the covariance of 64 features" in text) == is_said


@pytest.mark.parametrize(
    ("seen", "said"),
    [
        (True, "--prune.held-out-of-base leaves them out"),
        (False, "No network was trained on these images"),
        (None, "may have been trained"),
    ],
)
def test_a_comparison_says_whether_the_base_has_seen_its_images(seen, said):
    comparison = ComparisonResult(
        kind="equal-macs",
        score=1.0,
        train_macs=1.0,
        steps=2,
        continued=True,
        seconds=1.0,
        num_images=90,
        num_noised=180,
        seen_by_base=seen,
        mean=difference_of(-0.2, -0.1),
        groups=(),
    )
    results = replace(RESULTS, comparison=comparison)
    assert said in " ".join(conclusions(results))
