import pytest
import torch
from diffusers import UNet2DModel
from torch import Tensor

from tdc_ray.models.forward import swapped_weights
from tdc_ray.models.unet2d.units import units_of
from tdc_ray.pruning.second_order import cut_responses, quadratic_model
from tdc_ray.pruning.sensitivity import Solutions, solve_units
from tests.models.configs import CONFIGS
from tests.pruning.test_sensitivity import SCHEDULE, SEEN, noised, reader_of, weights_of
from tests.small import assert_same, random_unet

PROBED = noised(5, 3, seed=2)
KINDS = ["attention-everywhere", "resampled-by-residual-blocks"]


def solutions_of(base: UNet2DModel, share: float = 1.0) -> Solutions:
    """The weights behind every cut, or only a share of the way there from the base's own."""
    units = units_of(base.config)
    _, solved, _ = solve_units(base, units, {}, SEEN, SCHEDULE, weights_of(base), num_levels=2)
    for unit in units:
        layer = reader_of(base, unit)
        own = (layer.weight.detach(), layer.bias.detach())
        for width, (found,) in solved[unit.name].items():
            weight, bias = (torch.lerp(o, f, share) for o, f in zip(own, found, strict=True))
            solved[unit.name][width] = [(weight, bias)]
    return solved


@torch.no_grad()
def predictions(base: UNet2DModel, solutions: Solutions) -> Tensor:
    """What is predicted with each cut alone: ``(cuts, images, values)``."""
    found = []
    for unit in units_of(base.config):
        for (weights,) in solutions[unit.name].values():
            with swapped_weights(reader_of(base, unit), *weights):
                found.append(torch.cat([b.predict(base, SCHEDULE) for b in PROBED]).flatten(1))
    return torch.stack(found).double()


def moves_of(base: UNet2DModel) -> Tensor:
    """The Jacobian times the change of each cut: ``(cuts, images, values)``."""
    ahead, behind = (predictions(base, solutions_of(base, share)) for share in (0.02, -0.02))
    return (ahead - behind) / (2 * 0.02)


@pytest.mark.parametrize("name", KINDS)
def test_a_response_is_how_far_the_change_of_weights_moves_the_prediction_to_first_order(name):
    base = random_unet(CONFIGS[name])
    directions = [torch.randn(2, *batch.x_0.shape) for batch in PROBED]
    found = cut_responses(base, solutions_of(base), PROBED, SCHEDULE, directions)
    along = torch.cat(directions, 1).flatten(2).double()  # (P, images, values)
    expected = torch.einsum("civ,piv->pic", moves_of(base), along) / along.shape[2] ** 0.5
    by_batch = torch.cat([part.flatten(0, 1) for part in expected.split([5, 3], 1)])
    assert float((found - by_batch).norm(dim=0).div(by_batch.norm(dim=0)).max()) < 0.01


@pytest.mark.slow
def test_a_model_has_the_mean_products_of_what_cuts_do_to_the_prediction():
    base = random_unet()
    model = quadratic_model(base, solutions_of(base), PROBED, SCHEDULE, num_probes=300)
    moves = moves_of(base).flatten(1)
    expected, found = moves @ moves.T / moves.shape[1], torch.tensor(model.products).double()
    scale = expected.diagonal().sqrt()
    assert float((found - expected).div(torch.outer(scale, scale)).abs().max()) < 0.15
    assert list(model.levels) == [unit.name for unit in units_of(base.config)]


def test_the_base_is_left_as_it_was():
    base = random_unet()
    before = {name: value.clone() for name, value in base.state_dict().items()}
    quadratic_model(base, solutions_of(base), PROBED, SCHEDULE, num_probes=2)
    assert_same(base.state_dict(), before)
    assert not any(module._forward_hooks for module in base.modules())
