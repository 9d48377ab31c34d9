import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from tdc_ray.pruning.refit.least_squares import (
    FLOATS_PER_BLOCK,
    RIDGE,
    ROWS_PER_UNKNOWN,
    ActivationHook,
    LeastSquares,
    layer_matrix,
)

LAYERS = {
    "conv": lambda: nn.Conv2d(4, 5, 3, padding=1),
    "conv-stride-2": lambda: nn.Conv2d(4, 5, 3, stride=2, padding=1),
    "conv-stride-2-unpadded": lambda: nn.Conv2d(4, 5, 3, stride=2),
    "conv-1x1": lambda: nn.Conv2d(6, 5, 1),
    "linear": lambda: nn.Linear(6, 5),
}
all_layers = pytest.mark.parametrize("layer", LAYERS)


def layer_of(kind: str, seed: int = 0) -> nn.Conv2d | nn.Linear:
    torch.manual_seed(seed)
    return LAYERS[kind]()


def inputs_of(layer: nn.Conv2d | nn.Linear, *, size: int = 40, seed: int = 0) -> Tensor:
    """Channels of different means and spreads."""
    generator = torch.Generator().manual_seed(seed)
    channels = layer.weight.shape[1]
    shape = (size, 25) if isinstance(layer, nn.Linear) else (size, 7, 7)
    values = torch.randn(*shape, channels, generator=generator)
    scale, mean = torch.rand(2, channels, generator=generator) + 0.5
    values = values * scale + mean
    return values if isinstance(layer, nn.Linear) else values.movedim(-1, 1).contiguous()


@torch.no_grad()
def outputs_of(
    layer: nn.Conv2d | nn.Linear, inputs: Tensor, *, noise: float = 0.0, seed: int = 0
) -> Tensor:
    outputs = layer(inputs)
    generator = torch.Generator().manual_seed(seed)
    return outputs + noise * torch.randn(outputs.shape, generator=generator)


def rows_of(
    layer: nn.Conv2d | nn.Linear, inputs: Tensor, outputs: Tensor
) -> tuple[Tensor, Tensor]:
    """What the layer reads at each place, ``(rows, n)``, and what should come out."""
    if isinstance(layer, nn.Linear):
        return inputs.flatten(0, 1).double(), outputs.flatten(0, 1).double()
    taps = functional.unfold(inputs, layer.kernel_size, 1, layer.padding, layer.stride)
    return (
        taps.transpose(1, 2).flatten(0, 1).double(),
        outputs.flatten(2).transpose(1, 2).flatten(0, 1).double(),
    )


def reference(
    layer: nn.Conv2d | nn.Linear, inputs: Tensor, outputs: Tensor, columns: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The ridge solution by rows: ridge rows pull each weight towards the layer's own."""
    rows, targets = rows_of(layer, inputs, outputs)
    mean, target = rows.mean(0), targets.mean(0)
    centred = rows - mean
    if columns is None:
        columns = torch.arange(rows.shape[1])
    pull = (len(rows) * RIDGE * centred.square().mean(0).mean()).sqrt()
    weights = torch.zeros_like(layer_matrix(layer))
    weights[columns] = torch.linalg.lstsq(
        torch.cat([centred[:, columns], pull * torch.eye(len(columns), dtype=torch.float64)]),
        torch.cat([targets - target, pull * layer_matrix(layer)[columns]]),
    ).solution
    bias = target - mean @ weights
    return weights.T.reshape(layer.weight.shape).float(), bias.float()


def squares_of(
    layer: nn.Conv2d | nn.Linear, *batches: tuple[Tensor, Tensor], num_rows: int = 1, seed: int = 0
) -> LeastSquares:
    """With ``num_rows`` 1 every place of every image counts."""
    squares = LeastSquares(layer, num_rows=num_rows, seed=seed)
    for inputs, outputs in batches:
        squares.add(inputs, outputs)
    return squares


def assert_close(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], atol: float):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=atol, rtol=0)


@all_layers
def test_the_weights_that_made_the_targets_are_found(layer):
    ours, theirs = layer_of(layer), layer_of(layer, seed=1)
    inputs = inputs_of(ours)
    found = squares_of(ours, (inputs, outputs_of(theirs, inputs))).solve()
    assert_close(found, (theirs.weight.detach(), theirs.bias.detach()), atol=2e-3)  # the ridge's


@all_layers
@settings(max_examples=10)
@given(seed=st.integers(0, 10**6), noise=st.sampled_from([0.0, 0.1, 3.0]))
def test_the_solution_is_that_of_ridge_least_squares_on_all_rows(layer, seed, noise):
    ours, theirs = layer_of(layer, seed), layer_of(layer, seed + 1)
    inputs = inputs_of(ours, seed=seed)
    outputs = outputs_of(theirs, inputs, noise=noise, seed=seed)
    found = squares_of(ours, (inputs, outputs)).solve()
    assert_close(found, reference(ours, inputs, outputs), atol=2e-5)


@all_layers
def test_columns_that_are_left_out_get_no_weight_and_the_others_make_up_for_them(layer):
    ours, theirs = layer_of(layer), layer_of(layer, seed=1)
    inputs = inputs_of(ours)
    inputs[:, 1:] += 0.5 * inputs[:, :-1]  # what is left can make up for some of it
    outputs = outputs_of(theirs, inputs, noise=0.1)
    size = len(layer_matrix(ours))
    left, out = torch.arange(0, size, 2), torch.arange(1, size, 2)
    found = squares_of(ours, (inputs, outputs)).solve(left)
    assert not found[0].flatten(1)[:, out].any()
    assert_close(found, reference(ours, inputs, outputs, left), atol=2e-5)


@all_layers
def test_it_does_not_matter_in_what_parts_the_rows_come(layer):
    ours, theirs = layer_of(layer), layer_of(layer, seed=1)
    inputs = inputs_of(ours)
    outputs = outputs_of(theirs, inputs, noise=0.5)
    parts = zip(inputs.split([1, 7, 32]), outputs.split([1, 7, 32]), strict=True)
    whole = squares_of(ours, (inputs, outputs))
    split = squares_of(ours, *parts)
    assert_close(split.solve(), whole.solve(), atol=1e-5)
    assert split.macs == whole.macs


def test_a_batch_too_large_for_one_block_is_added_in_blocks():
    torch.manual_seed(0)
    ours, theirs = nn.Linear(32, 3), nn.Linear(32, 3)
    places = FLOATS_PER_BLOCK // 75  # two images fill most of a block
    inputs = torch.randn(3, places, 32)
    outputs = outputs_of(theirs, inputs, noise=0.5)
    whole = squares_of(ours, (inputs, outputs))
    parts = zip(inputs, outputs, strict=True)
    split = squares_of(ours, *((one[None], other[None]) for one, other in parts))
    assert_close(whole.solve(), split.solve(), atol=1e-5)
    assert whole.macs == split.macs == 3 * places * 32 * (32 + 3)


@all_layers
def test_where_there_are_more_rows_than_enough_some_places_of_every_image_do(layer):
    ours, theirs = layer_of(layer), layer_of(layer, seed=1)
    inputs = inputs_of(ours, size=1200)
    outputs = outputs_of(theirs, inputs)
    num_rows, size = outputs.numel() // 5, len(layer_matrix(ours))
    few = squares_of(ours, (inputs, outputs), num_rows=num_rows)
    rows = few.macs / (size * (size + 5))
    assert rows == 1200 * max(1, round(ROWS_PER_UNKNOWN * size / 1200))  # of each image alike
    assert rows < num_rows
    assert_close(few.solve(), (theirs.weight.detach(), theirs.bias.detach()), atol=3e-3)


def test_the_places_follow_from_the_seed():
    ours, theirs = layer_of("conv"), layer_of("conv", seed=1)
    inputs = inputs_of(ours, size=100)
    batch = (inputs, outputs_of(theirs, inputs, noise=1.0))

    def weights(seed: int) -> Tensor:
        return squares_of(ours, batch, num_rows=10 * ROWS_PER_UNKNOWN * 36, seed=seed).solve()[0]

    assert torch.equal(weights(3), weights(3))
    assert not torch.equal(weights(3), weights(4))


@all_layers
def test_weights_that_nothing_is_known_of_stay_those_of_the_layer(layer):
    ours, theirs = layer_of(layer), layer_of(layer, seed=1)
    inputs = inputs_of(ours)
    channel = (..., 2) if isinstance(ours, nn.Linear) else (slice(None), 2)
    inputs[channel] = 0.0
    weight, _ = squares_of(ours, (inputs, outputs_of(theirs, inputs))).solve()
    torch.testing.assert_close(weight[:, 2], ours.weight.detach()[:, 2])


@all_layers
def test_a_layer_that_gives_what_is_wanted_stays_as_it_is(layer):
    ours = layer_of(layer)
    inputs = inputs_of(ours)
    found = squares_of(ours, (inputs, outputs_of(ours, inputs))).solve()
    assert_close(found, (ours.weight.detach(), ours.bias.detach()), atol=1e-5)


@pytest.mark.parametrize("far", [10.0, 1000.0])
def test_inputs_that_hardly_vary_far_from_zero_are_solved_too(far):
    torch.manual_seed(0)
    ours, theirs = nn.Linear(16, 4), nn.Linear(16, 4)
    inputs = far + far / 1000 * torch.randn(50, 64, 16)
    inputs[..., 8:] = inputs[..., :8] + far / 1e5 * torch.randn(50, 64, 8)
    wanted = theirs.double()(inputs.double()).detach()
    weight, bias = squares_of(ours, (inputs, wanted.float())).solve()
    found = functional.linear(inputs.double(), weight.double(), bias.double())
    off = (found - wanted).square().mean() / wanted.var(dim=(0, 1)).mean()
    assert off < 1e-4


def test_inputs_that_do_not_vary_at_all_are_solved_by_the_bias():
    torch.manual_seed(0)
    ours, theirs = nn.Linear(3, 2), nn.Linear(3, 2)
    inputs = torch.tensor([1.0, 2.0, 3.0]).expand(4, 5, 3)
    outputs = outputs_of(theirs, inputs)
    weight, bias = squares_of(ours, (inputs, outputs)).solve()
    torch.testing.assert_close(weight, ours.weight.detach())
    torch.testing.assert_close(functional.linear(inputs, weight, bias), outputs)


def test_what_is_kept_does_not_grow_with_the_rows():
    def num_floats(squares: LeastSquares) -> int:
        return sum(v.numel() for v in vars(squares).values() if isinstance(v, Tensor))

    layer = layer_of("conv")
    batch = (inputs_of(layer), outputs_of(layer, inputs_of(layer)))
    kept = [num_floats(squares_of(layer, *[batch] * count)) for count in (0, 1, 30)]
    assert kept[0] == kept[1] == kept[2] >= 36 * (36 + 5)


def test_statistics_leave_inputs_targets_and_layer_as_they_were():
    layer = layer_of("linear")
    inputs = inputs_of(layer)
    outputs = outputs_of(layer, inputs, noise=1.0)
    before = [value.clone() for value in (inputs, outputs, layer.weight.detach())]
    squares = squares_of(layer, (inputs, outputs))
    first = squares.solve()
    assert_close(squares.solve(), first, atol=0)  # solving changes nothing either
    for value, was in zip((inputs, outputs, layer.weight.detach()), before, strict=True):
        assert torch.equal(value, was)


def test_a_tap_keeps_what_last_went_in_and_came_out_while_it_is_entered():
    layer, first, second = nn.Linear(2, 3), torch.ones(1, 2), torch.zeros(1, 2)
    with ActivationHook(layer) as tap:
        layer(second)
        wanted = layer(first)
    layer(second)
    assert tap.input is first
    assert tap.output is wanted


@all_layers
def test_an_image_that_counts_twice_is_an_image_that_comes_twice(layer):
    ours, theirs = layer_of(layer), layer_of(layer, seed=1)
    inputs = inputs_of(ours, size=6)
    outputs = outputs_of(theirs, inputs, noise=0.5)
    counts = torch.tensor([1, 2, 1, 0, 3, 1])
    weighted = LeastSquares(ours, num_rows=1, seed=0)
    weighted.add(inputs, outputs, counts.float())
    repeated = squares_of(
        ours, (inputs.repeat_interleave(counts, 0), outputs.repeat_interleave(counts, 0))
    )
    assert_close(weighted.solve(), repeated.solve(), atol=1e-4)
