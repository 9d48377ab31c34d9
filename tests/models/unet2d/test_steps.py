import pytest
import torch
from diffusers import UNet2DModel
from torch import Tensor

from tdc_ray.models.network_config import image_size
from tdc_ray.models.step import State, Step
from tdc_ray.models.unet2d.steps import start, steps
from tdc_ray.models.unet2d.surgery import cut
from tdc_ray.models.unet2d.units import units_of
from tests.models.configs import CONFIGS, random_config
from tests.small import TINY, random_kept, random_unet


def sample_of(unet: UNet2DModel) -> tuple[Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(0)
    classes = unet.config["num_class_embeds"]
    shape = (3, unet.config["in_channels"], *image_size(unet.config))
    x_t = torch.randn(shape, generator=generator)
    timesteps = torch.randint(0, 1000, (3,), generator=generator)
    return x_t, timesteps, None if classes is None else timesteps % classes


@torch.inference_mode()
def states_of(unet: UNet2DModel) -> list[tuple[Step, State]]:
    """Every step, and the state that it leaves."""
    found, state = [], start(unet, *sample_of(unet))
    for step in steps(unet):
        state = step(state)
        found.append((step, state))
    return found


@torch.inference_mode()
def forward(unet: UNet2DModel) -> Tensor:
    x_t, timesteps, labels = sample_of(unet)
    return unet(x_t, timesteps, class_labels=labels).sample


def assert_steps_are_the_forward_pass(unet: UNet2DModel) -> None:
    assert torch.equal(states_of(unet)[-1][1].hidden, forward(unet))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_one_after_the_other_the_steps_give_the_unets_output(config):
    assert_steps_are_the_forward_pass(random_unet(config))


@pytest.mark.parametrize("seed", range(12))
def test_the_steps_of_any_unet_give_its_output(seed):
    assert_steps_are_the_forward_pass(random_unet(random_config(seed), seed=seed))


@pytest.mark.parametrize("kind", ["inner", "full"])
@pytest.mark.parametrize("name", ["time-added", "resampled-by-residual-blocks", "no-middle"])
def test_the_steps_of_a_cut_unet_give_its_output(name, kind):
    config = CONFIGS[name]
    units = units_of(config, kind)
    assert_steps_are_the_forward_pass(cut(random_unet(config), units, random_kept(units, seed=1)))


@pytest.mark.parametrize("changes", [{"center_input_sample": True}, {"freq_shift": 1}], ids=str)
def test_what_a_unet_does_to_its_inputs_is_done(changes):
    unet = random_unet({**TINY, **changes})
    assert_steps_are_the_forward_pass(unet)
    assert not torch.equal(forward(unet), forward(random_unet(TINY)))


def test_timesteps_may_lie_between_whole_numbers():
    unet, (x_t, _, _) = random_unet(), sample_of(random_unet())
    timesteps = torch.tensor([0.25, 1.5, 999.75])
    with torch.inference_mode():
        state = start(unet, x_t, timesteps)
        for step in steps(unet):
            state = step(state)
        assert torch.equal(state.hidden, unet(x_t, timesteps).sample)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_every_residual_block_and_attention_is_a_step_of_its_name(config):
    unet = random_unet(config)
    named = {step.name: step.module for step in steps(unet)}
    for unit in units_of(config):
        assert named[unit.name] is unet.get_submodule(unit.name)


def test_every_skip_is_read_once_and_none_is_left():
    found = states_of(random_unet(CONFIGS["three-levels-colour-learned-sigma"]))
    left = sum(step.leaves_skip for step, _ in found)
    assert left == sum(step.reads_skip for step, _ in found) == 9
    assert found[-1][1].skips == ()


def test_making_steps_leaves_the_unet_as_it_was():
    unet = random_unet()
    for training in (True, False):
        modules = dict(unet.train(training).named_modules())
        steps(unet)
        assert dict(unet.named_modules()) == modules
        assert all(module.training == training for module in unet.modules())
