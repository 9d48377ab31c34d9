from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tdc_ray.data.batches import batches, to_minus_one_one
from tdc_ray.data.load import load_dataset
from tdc_ray.diffusion.loss import denoising_loss
from tdc_ray.diffusion.process import NoisedBatch, noise_schedule
from tdc_ray.diffusion.train import start_state
from tdc_ray.errors import ClusterError, NonFiniteLossError
from tdc_ray.execution.ray.event_collector import collecting
from tdc_ray.models.unet2d.architectures import architecture
from tdc_ray.models.unet2d.unet import build_unet, load_unet
from tdc_ray.runs.stages.base_trainer import train_base_on_ray
from tdc_ray.seeds import derive_seed
from tdc_ray.storage.files import read_json
from tdc_ray.storage.run_dir import RunDir

pytestmark = pytest.mark.ray


def train(config, folder: Path) -> RunDir:
    run_dir = RunDir(folder)
    with (
        collecting([]) as events,
    ):
        train_base_on_ray(run_dir, config, "base", events)
    return run_dir


def weights(run_dir: RunDir) -> dict[str, torch.Tensor]:
    return load_unet(run_dir.base_unet).state_dict()


def short(config, **changes):
    return replace(config, base=replace(config.base, **{"num_steps": 20} | changes))


def two_ranks_by_hand(config) -> dict[str, torch.Tensor]:
    """The expected result of two workers: every step the mean of both ranks' gradients."""
    torch.manual_seed(derive_seed(config.seed, "init"))
    state = start_state(build_unet(architecture(config.model.architecture)), config.base)
    schedule, seed = noise_schedule(config.diffusion), derive_seed(config.seed, "base")
    shares = [
        batches(
            load_dataset(config.data),
            batch_size=config.base.batch_size,
            seed=derive_seed(config.seed, "base", "order"),
            num_steps=config.base.num_steps,
            rank=rank,
            world_size=2,
        )
        for rank in (0, 1)
    ]
    for step in range(config.base.num_steps):
        for rank, share in enumerate(shares):
            x_0 = to_minus_one_one(next(share)[0])
            noise = torch.Generator().manual_seed(derive_seed(seed, rank, step, "noise"))
            epsilon = torch.randn(x_0.shape, generator=noise)
            timesteps = torch.randint(0, 1000, (len(x_0),), generator=noise)
            noised = NoisedBatch(x_0, epsilon, timesteps)
            loss = denoising_loss(state.unet, schedule, noised).mean()
            (loss / 2).backward()
        torch.nn.utils.clip_grad_norm_(state.unet.parameters(), config.base.max_grad_norm)
        state.optimizer.step()
        state.optimizer.zero_grad()
        state.ema.step(state.unet.parameters())
    with state.ema_weights() as unet:
        return {name: value.clone() for name, value in unet.state_dict().items()}


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("sharding", ["none", "full"])
def test_two_workers_take_the_mean_of_their_gradients(
    ray_cluster, smoke_config, tmp_path, sharding
):
    config = short(smoke_config, num_steps=3, num_warmup_steps=0)
    compute = replace(config.compute, num_base_workers=2, sharding=sharding)
    trained = weights(train(replace(config, compute=compute), tmp_path))
    for name, value in two_ranks_by_hand(config).items():
        torch.testing.assert_close(trained[name], value, atol=1e-5, rtol=1e-3)


@pytest.mark.slow
def test_a_base_that_diverges_is_reported_as_what_it_is(ray_cluster, smoke_config, tmp_path):
    config = short(smoke_config, learning_rate=1e30, num_warmup_steps=0, max_grad_norm=None)
    with pytest.raises(NonFiniteLossError, match="at step"):
        train(config, tmp_path)
    assert not RunDir(tmp_path).base_result.exists()


def test_more_workers_than_the_cluster_has_are_refused_before_anything_starts(
    ray_cluster, smoke_config, tmp_path
):
    compute = replace(smoke_config.compute, num_base_workers=2, cpus_per_base_worker=500)
    with pytest.raises(
        ClusterError, match=r"2 workers of.*500.*of which 0 fit.*compute.num_base_workers"
    ):
        train(replace(smoke_config, compute=compute), tmp_path)
    assert not RunDir(tmp_path).base_training.exists()


def test_the_result_of_the_base_counts_its_training(finished_run, smoke_config):
    result = read_json(RunDir(finished_run).base_result)
    steps, batch = smoke_config.base.num_steps, smoke_config.base.batch_size
    assert result["train_steps"] == steps
    assert result["train_macs"] == 3 * result["macs"] * steps * batch
