import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tdc_ray.models.units import Unit
from tdc_ray.pruning.criteria.reconstruction import reconstruction_scores
from tdc_ray.pruning.refit.least_squares import LeastSquares


def unit_and_squares(
    seed: int, *, linear: bool, width: int = 4, channels: int = 2
) -> tuple[Unit, LeastSquares]:
    """A unit of four steps of two channels whose channels can make up for each other."""
    torch.manual_seed(seed)
    unit = Unit("block", "attention" if linear else "residual", width, channels, pixels=36)
    size = channels * width
    layer = nn.Linear(size, 5) if linear else nn.Conv2d(size, 5, 3, padding=1)
    mixed = torch.randn(20, 36, size) @ torch.randn(size, size)
    inputs = mixed if linear else mixed.transpose(1, 2).reshape(20, size, 6, 6)
    squares = LeastSquares(layer, num_rows=1, seed=0)
    squares.add(inputs, layer(inputs).detach() + 0.1)
    return unit, squares


def least_error(squares: LeastSquares, columns: list[int]) -> float:
    """What is left of the error with some columns alone, but for a constant."""
    gram, cross = squares.normal()
    solved = torch.linalg.lstsq(gram[columns][:, columns], cross[columns]).solution
    return -float((cross[columns] * solved).sum())


@pytest.mark.parametrize(
    ("linear", "channels", "num_readers"),
    [(True, 2, 1), (False, 2, 1), (True, 1, 1), (True, 2, 2)],
    ids=["attention", "residual", "feed-forward", "joint-attention"],
)
@settings(max_examples=5)
@given(seed=st.integers(0, 10**6))
def test_reconstruction_eliminates_as_brute_force_does(linear, channels, num_readers, seed):
    made = [
        unit_and_squares(seed + number, linear=linear, channels=channels)
        for number in range(num_readers)
    ]
    unit, readers = made[0][0], [squares for _, squares in made]
    taps = 1 if linear else 9

    def columns(steps: set[int]) -> list[int]:
        size = unit.channels * taps
        return [step * size + place for step in sorted(steps) for place in range(size)]

    def least(steps: set[int]) -> float:
        return sum(least_error(squares, columns(steps)) for squares in readers) if steps else 0.0

    left, expected = set(range(unit.width)), [0.0] * unit.width
    start = least(left)
    while left:
        errors = {step: least(left - {step}) - start for step in left}
        gone = min(errors, key=errors.__getitem__)
        expected[gone] = errors[gone]
        left.remove(gone)
    pairs = [(squares, torch.eye(len(squares.layer.weight))) for squares in readers]
    assert reconstruction_scores(unit, pairs) == pytest.approx(expected, rel=1e-6)


def test_a_step_that_is_a_copy_of_another_goes_first_and_costs_nothing():
    torch.manual_seed(0)
    unit, layer = Unit("block", "attention", 3, 2, pixels=36), nn.Linear(6, 5)
    inputs = torch.randn(20, 36, 6)
    inputs[..., 4:] = inputs[..., :2]
    squares = LeastSquares(layer, num_rows=1, seed=0)
    squares.add(inputs, layer(inputs).detach())
    scores = reconstruction_scores(unit, [(squares, torch.eye(5))])
    assert min(scores[0], scores[2]) < 1e-3 * min(scores[1], max(scores[0], scores[2]))


def test_a_step_that_nothing_reads_costs_nothing():
    unit, squares = unit_and_squares(0, linear=True)
    with torch.no_grad():
        squares.layer.weight[:, 2:4] = 0.0
    inputs = torch.randn(20, 36, 8)
    silent = LeastSquares(squares.layer, num_rows=1, seed=0)
    silent.add(inputs, squares.layer(inputs).detach())
    scores = reconstruction_scores(unit, [(silent, torch.eye(len(squares.layer.weight)))])
    assert scores[1] < 1e-6 * min(scores[:1] + scores[2:])


def test_an_error_in_outputs_that_change_nothing_costs_nothing():
    unit, squares = unit_and_squares(0, linear=True)
    outputs = len(squares.layer.weight)
    with torch.no_grad():  # the second step is read for the last output alone
        squares.layer.weight[:-1, 2:4] = 0.0
    inputs = torch.randn(20, 36, 8)
    read = LeastSquares(squares.layer, num_rows=1, seed=0)
    read.add(inputs, squares.layer(inputs).detach())
    weights = torch.eye(outputs)
    weights[-1, -1] = 0.0
    scores = reconstruction_scores(unit, [(read, weights)])
    assert scores[1] < 1e-6 * min(scores[:1] + scores[2:])
    alike = reconstruction_scores(unit, [(read, torch.zeros(outputs, outputs))])
    assert alike == reconstruction_scores(unit, [(read, torch.eye(outputs))])


def test_errors_in_two_outputs_that_cancel_cost_nothing():
    torch.manual_seed(0)
    unit, layer = Unit("block", "attention", 3, 2, pixels=36), nn.Linear(6, 2)
    with torch.no_grad():  # what the first step adds to one output it takes from the other
        layer.weight[1, :2] = -layer.weight[0, :2]
    inputs = torch.randn(20, 36, 6)
    squares = LeastSquares(layer, num_rows=1, seed=0)
    squares.add(inputs, layer(inputs).detach())
    scores = reconstruction_scores(unit, [(squares, torch.ones(2, 2))])
    assert scores[0] < 1e-6 * min(scores[1:])
