import pytest
import torch
from diffusers import UNet2DModel
from torch import Tensor
from torch.func import functional_call

from tdc_ray.diffusion.loss import denoising_loss
from tdc_ray.models.unet2d.units import units_of
from tdc_ray.models.units import Unit
from tdc_ray.pruning.criteria.taylor import taylor_scores
from tests.pruning.criteria.inputs import SCHEDULE, UNITS, noised
from tests.small import TINY, random_unet

TIME_ADDED = {**TINY, "resnet_time_scale_shift": "default"}


def gates_of(unet: UNet2DModel, unit: Unit) -> tuple[Tensor, dict[str, Tensor]]:
    """A factor per channel, and the weights that go with the channels, multiplied by it."""
    gate = torch.ones(unit.width * unit.channels, requires_grad=True)
    weights = dict(unet.named_parameters())

    def scaled(name: str, *, columns: bool = False) -> dict[str, Tensor]:
        full = f"{unit.name}.{name}"
        weight = weights[full]
        front = weight.movedim(1, 0) if columns else weight
        factor = gate.repeat(len(front) // len(gate)).reshape(-1, *[1] * (front.ndim - 1))
        product = front * factor
        return {full: product.movedim(0, 1) if columns else product}

    changed: dict[str, Tensor] = {}
    if unit.kind == "residual":
        for layer in ("conv1", "time_emb_proj", "norm2"):
            changed |= scaled(f"{layer}.weight") | scaled(f"{layer}.bias")
        changed |= scaled("conv2.weight", columns=True)
    else:
        for layer in ("to_q", "to_k", "to_v"):
            changed |= scaled(f"{layer}.weight") | scaled(f"{layer}.bias")
        changed |= scaled("to_out.0.weight", columns=True)
    return gate, changed


@pytest.mark.parametrize("config", [TINY, TIME_ADDED], ids=["scale-shift", "time-added"])
@pytest.mark.parametrize(
    "name", ["down_blocks.0.resnets.0", "mid_block.attentions.0", "up_blocks.1.resnets.1"]
)
def test_taylor_is_the_first_order_change_of_the_mean_loss(config, name):
    unet = random_unet(config)
    (unit,) = (unit for unit in units_of(config) if unit.name == name)
    batches = noised(3, 5)  # of different sizes: every image counts the same
    scores = taylor_scores(unet, (unit,), batches, SCHEDULE)

    gate, changed = gates_of(unet, unit)

    def model(sample: Tensor, timestep: Tensor) -> object:
        return functional_call(unet, changed, (sample, timestep))

    losses = torch.cat([denoising_loss(model, SCHEDULE, batch) for batch in batches])
    (slope,) = torch.autograd.grad(losses.mean(), gate)
    expected = slope.abs().view(unit.width, unit.channels).sum(1)
    assert len(losses) == 8
    assert scores[name] == pytest.approx(expected.tolist(), rel=1e-3)


def test_taylor_leaves_no_gradient_and_no_change_behind():
    unet = random_unet()
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    unet.conv_in.weight.grad = torch.ones_like(unet.conv_in.weight)
    taylor_scores(unet, UNITS, noised(4), SCHEDULE)
    assert all(parameter.grad is None for parameter in unet.parameters())
    assert all(torch.equal(value, before[name]) for name, value in unet.state_dict().items())


def test_taylor_does_not_depend_on_gradients_of_earlier_work():
    unet = random_unet()
    first = taylor_scores(unet, UNITS, noised(4), SCHEDULE)
    for parameter in unet.parameters():
        parameter.grad = torch.full_like(parameter, 9.0)
    assert taylor_scores(unet, UNITS, noised(4), SCHEDULE) == first
