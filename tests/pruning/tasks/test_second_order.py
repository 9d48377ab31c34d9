"""The quadratic model of a trained base's loss, against what measuring finds."""

import pytest
import torch
from scipy.stats import spearmanr

from tdc_ray.config.run import RunConfig
from tdc_ray.data.batches import batches, to_minus_one_one
from tdc_ray.diffusion.loss import denoising_loss
from tdc_ray.diffusion.process import NoisedBatch, noise_schedule
from tdc_ray.execution.item import ItemResult, load_result
from tdc_ray.models.unet2d.unet import save_unet
from tdc_ray.models.unet2d.units import units_of
from tdc_ray.models.units import keep_everything
from tdc_ray.pruning.joint_increase import JointIncrease
from tdc_ray.pruning.sensitivity import levels
from tdc_ray.pruning.space import space_of
from tdc_ray.pruning.tasks.second_order import SecondOrderJob, SecondOrderResult, model_loss
from tdc_ray.pruning.tasks.sensitivities import SensitivityJob, measure_sensitivities
from tdc_ray.storage.run_dir import RunDir
from tests.small import TINY, context_of, group_of, random_unet, small_config, training_of

UNITS = units_of(TINY)


def config_of(**prune) -> RunConfig:
    few = {"num_images": 128, "num_refit_images": 128, "num_levels": 2}
    return small_config(prune={**few, **prune})


CONFIG = config_of()


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> RunDir:
    """The run directory of a tiny base that was trained for a few seconds."""
    unet, schedule = random_unet().train(), noise_schedule(CONFIG.diffusion)
    optimizer = torch.optim.Adam(unet.parameters(), lr=2e-3)
    generator = torch.Generator().manual_seed(0)
    images = batches(training_of(CONFIG).open(), batch_size=32, seed=0, num_steps=100)
    for pixels, _ in images:
        x_0 = to_minus_one_one(pixels)
        epsilon = torch.randn(x_0.shape, generator=generator)
        batch = NoisedBatch(x_0, epsilon, torch.randint(0, 1000, (32,), generator=generator))
        optimizer.zero_grad()
        denoising_loss(unet, schedule, batch).mean().backward()
        optimizer.step()
    run_dir = RunDir(tmp_path_factory.mktemp("run"))
    save_unet(unet.eval(), run_dir.base_unet)
    return run_dir


def ignore(_metrics, _step):
    pass


def modelled(run_dir: RunDir, config: RunConfig, index: int = 1) -> SecondOrderResult:
    return model_loss(SecondOrderJob(context_of(run_dir, config), group_of(config, index)), ignore)


def test_units_rank_as_their_measured_increase_does(run_dir):
    result, config = modelled(run_dir, CONFIG), CONFIG
    names, kept = tuple(unit.name for unit in UNITS), keep_everything(UNITS)
    job = SensitivityJob(context_of(run_dir, config), group_of(config, 1), names, kept, {})
    measured = measure_sensitivities(job, ignore)
    assert result.scores == measured.scores
    increase = JointIncrease(space_of(TINY), result.model).sensitivities()
    cuts = [(u.name, width) for u in UNITS for width in levels(u, config.prune.num_levels)]
    predicted = [increase[name][width] for name, width in cuts]
    found = [measured.sensitivities[name][width] for name, width in cuts]
    assert spearmanr(predicted, found).statistic > 0.8


def test_a_model_survives_its_file(run_dir, tmp_path):
    result = modelled(run_dir, CONFIG)
    ItemResult(result).save(tmp_path / "result.json")
    assert load_result(tmp_path / "result.json", SecondOrderResult).value == result
    assert result.seconds > 0


@pytest.mark.slow
def test_macs_grow_with_probes_by_a_backward_pass_each_of_the_images(run_dir):
    two, three = (modelled(run_dir, config_of(num_probes=number)).macs for number in (2, 3))
    assert three - two == CONFIG.prune.num_images * space_of(TINY).macs_base
