"""The computations of a run on a GPU, against those on the CPU, where only training is tried."""

from dataclasses import replace

import pytest
import torch

from tdc_ray.diffusion.loss import denoising_loss
from tdc_ray.diffusion.pipeline import base_pipeline
from tdc_ray.diffusion.process import NoisedBatch, noise_schedule
from tdc_ray.diffusion.train import start_state, train
from tdc_ray.execution.device import allow_tf32
from tdc_ray.models.timing import time_passes
from tdc_ray.models.unet2d.units import units_of
from tdc_ray.pruning import loaded_base
from tdc_ray.pruning.loaded_base import load_base, measure
from tdc_ray.runs.pipelines import pipeline_index
from tests.small import (
    TINY,
    context_of,
    group_of,
    make_run_dir,
    random_kept,
    random_unet,
    small_config,
)

CPU = torch.device("cpu")


@pytest.fixture
def gpu() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    allow_tf32(allowed=False)
    return torch.device("cuda")


def images_of(device: torch.device, compile_mode: str = "none") -> torch.Tensor:
    pipeline = base_pipeline(random_unet(), pipeline_index(small_config())).to(device)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.compile_mode = compile_mode
    return pipeline(3, output_type="pt").images.cpu()


@pytest.mark.gpu
def test_images_are_those_of_the_cpu(gpu):
    torch.testing.assert_close(images_of(gpu), images_of(CPU), rtol=0, atol=1e-3)


@pytest.mark.gpu  # compiles with CUDA graphs
@pytest.mark.filterwarnings("ignore")  # of the compiler
def test_images_by_cuda_graphs_are_those_of_the_cpu(gpu):
    found = images_of(gpu, "reduce-overhead")
    torch.testing.assert_close(found, images_of(CPU), rtol=0, atol=1e-3)


def gradients_of(device: torch.device) -> list[torch.Tensor]:
    unet, draw = random_unet().to(device), torch.Generator().manual_seed(0)
    x_0, epsilon = torch.randn(2, 8, 1, 8, 8, generator=draw).unbind()
    batch = NoisedBatch(x_0, epsilon, torch.arange(0, 1000, 125)).to(device)
    schedule = noise_schedule(small_config().diffusion).to(device)
    denoising_loss(unet, schedule, batch).mean().backward()
    return [one.grad.cpu() for one in unet.parameters()]


@pytest.mark.gpu
def test_gradients_are_those_of_the_cpu(gpu):
    torch.testing.assert_close(gradients_of(gpu), gradients_of(CPU), rtol=1e-3, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_learns_on_a_gpu(gpu, precision):
    training_learns(gpu, precision)


def test_training_learns_on_the_cpu():
    training_learns(CPU, "fp32")


def training_learns(device: torch.device, precision: str) -> None:
    config = small_config()
    chosen = replace(config.base, num_steps=40, log_every=20, precision=precision)
    state, losses = start_state(random_unet().to(device), chosen), []
    images = torch.full((16, 1, 8, 8), 99, dtype=torch.uint8), torch.full((16,), -1)
    train(
        state,
        state.unet,
        [images] * 40,
        noise_schedule(config.diffusion).to(device),
        chosen,
        config.data,
        timesteps=range(1000),
        seed=0,
        report=lambda metrics, _: losses.append(metrics["loss"]),
        save=lambda _: None,
    )
    assert 0 < losses[-1] < 0.9 * losses[0]


@pytest.mark.gpu
def test_a_candidates_losses_are_those_of_the_cpu(gpu, tmp_path, monkeypatch):
    config = small_config(prune={"num_images": 8, "num_refit_images": 16})
    run_dir, kept = make_run_dir(tmp_path), random_kept(units_of(TINY), 0)
    found = []
    for where in (gpu, CPU):
        monkeypatch.setattr(loaded_base, "worker_device", lambda where=where: where)
        base = load_base(context_of(run_dir, config), group_of(config, 1))
        assert base.network.device == where
        measured = measure(base, kept)
        found.append([measured.loss_base, measured.loss_cut, measured.loss_refit])
    assert found[0] == pytest.approx(found[1], rel=1e-3)
    assert found[0][2] < found[0][1]


@pytest.mark.gpu
def test_all_steps_of_a_pass_take_time(gpu):
    (times,) = time_passes([random_unet().to(gpu)], 2, min_repeats=2, min_seconds=0.0)
    assert min(times.steps.values()) > 0
    assert times.total >= sum(times.steps.values())
