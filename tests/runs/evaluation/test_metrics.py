"""Scores beside the Frechet distance: names, directions, and the formulas of their papers."""

import numpy as np
import pytest

from tdc_ray.runs.evaluation.metrics import MAX_FEATURES, drawn, other_metrics

BOTH = ("kid", "precision-recall")


def features(seed, count=60, move=0.0):
    return (np.random.default_rng(seed).normal(size=(count, 5)) + move).astype(np.float32)


def test_the_kernel_distance_is_the_unbiased_mmd_of_the_cubic_kernel():
    one, other = features(0), features(1, move=0.5)
    k11, k22, k12 = (
        (a.astype(float) @ b.T / 5 + 1) ** 3 for a, b in ((one, one), (other, other), (one, other))
    )
    pairs = 60 * 59
    within = (k11.sum() - np.trace(k11)) / pairs + (k22.sum() - np.trace(k22)) / pairs
    found = other_metrics(one, other, ("kid",))
    assert found == {"kd": pytest.approx(within - 2 * k12.mean(), rel=1e-6)}


def test_precision_and_recall_are_shares_within_the_third_neighbours_radius():
    one, other = features(0), features(1, move=1.0)

    def share(points, of):
        radius = np.sort(np.linalg.norm(of[:, None] - of, axis=2))[:, 3]  # the first is itself
        return (np.linalg.norm(points[:, None] - of, axis=2) <= radius).any(1).mean()

    found = other_metrics(one, other, ("precision-recall",))
    assert found["precision"] == pytest.approx(share(one, other))  # samples among the images
    assert found["recall"] == pytest.approx(share(other, one))
    assert found["precision"] != found["recall"]


def test_equal_sets_are_at_no_distance_and_far_ones_share_nothing():
    same = other_metrics(features(0), features(0), BOTH)
    assert same["precision"] == same["recall"] == 1
    far = other_metrics(features(0), features(1, move=100.0), BOTH)
    assert far["precision"] == far["recall"] == 0
    assert far["kd"] > 1000 > abs(same["kd"])


@pytest.mark.slow
def test_the_same_features_have_the_same_scores_whatever_was_drawn_before():
    one, other = features(0, 1500), features(1, 1200)
    first = other_metrics(one, other, BOTH)
    np.random.seed(5)  # noqa: NPY002  # what a library might draw from
    assert other_metrics(one, other, BOTH) == first


def test_nothing_is_said_of_fewer_images_than_neighbours():
    assert other_metrics(features(0, 3), features(1), BOTH) == {}
    assert set(other_metrics(features(0, 4), features(1), BOTH)) == {"kd", "precision", "recall"}
    assert other_metrics(features(0), features(1), ()) == {}


def test_all_of_few_and_a_random_choice_of_many_are_kept():
    assert drawn(7).tolist() == list(range(7))
    chosen = drawn(50_000)
    assert len(set(chosen.tolist())) == MAX_FEATURES
    assert chosen.tolist() == sorted(chosen.tolist())
    assert 24_000 < chosen.mean() < 26_000
