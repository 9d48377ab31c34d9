from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from tdc_ray.base import Place, train_base
from tdc_ray.distributed.base import train_base_on_ray
from tdc_ray.distributed.cluster import board
from tdc_ray.errors import ClusterError, NonFiniteLossError
from tdc_ray.layout import RunDir
from tdc_ray.models.unet import load_unet
from tdc_ray.progress import ProgressView
from tdc_ray.storage import read_json

pytestmark = pytest.mark.ray


def train(config, folder: Path) -> RunDir:
    run_dir = RunDir(folder)
    with (
        ProgressView(run_dir.tensorboard, Console(quiet=True)) as view,
        board(view) as events,
    ):
        train_base_on_ray(run_dir, config, events, view)
    return run_dir


def weights(run_dir: RunDir) -> dict[str, torch.Tensor]:
    return load_unet(run_dir.base_unet).state_dict()


def short(config, **changes):
    return replace(config, base=replace(config.base, num_steps=20, checkpoint_every=10, **changes))


@pytest.mark.timeout(300)
def test_two_workers_train_the_same_base_as_one_process_up_to_rounding(
    ray_cluster, smoke_config, tmp_path
):
    config = short(smoke_config)
    compute = replace(config.compute, num_base_workers=2, cpus_per_base_worker=1)
    parallel = weights(train(replace(config, compute=compute), tmp_path))

    # In one process: the same two shares of each batch, as two micro-batches with the same noise.
    losses = {}
    alone = train_base(
        config,
        Place(0, 1, torch.device("cpu")),
        resume_from=None,
        wrap=lambda unet: unet,
        report=lambda metrics, step: losses.update({step: metrics["loss"]}),
        save=lambda state: None,
    )
    start = torch.cat([p.flatten() for p in parallel.values()])
    assert torch.isfinite(start).all()
    with alone.averaged() as unet:
        distance = max(
            float((parallel[name] - value).abs().max())
            for name, value in unet.state_dict().items()
        )
    assert 0 < distance < 0.1  # other noise per rank, so near but not equal


def test_a_base_that_diverges_is_reported_as_what_it_is(ray_cluster, smoke_config, tmp_path):
    config = short(smoke_config, learning_rate=1e30, num_warmup_steps=0, max_grad_norm=None)
    with pytest.raises(NonFiniteLossError, match="at step"):
        train(config, tmp_path)
    assert not RunDir(tmp_path).base_result.exists()


def test_more_workers_than_the_cluster_has_are_refused_before_anything_starts(
    ray_cluster, smoke_config, tmp_path
):
    compute = replace(smoke_config.compute, num_base_workers=2, cpus_per_base_worker=500)
    with pytest.raises(ClusterError, match=r"needs 1000 CPU.*compute\.num_base_workers"):
        train(replace(smoke_config, compute=compute), tmp_path)
    assert not RunDir(tmp_path).base_training.exists()


def test_the_result_of_the_base_counts_its_training(finished_run, smoke_config):
    result = read_json(RunDir(finished_run).base_result)
    steps, batch = smoke_config.base.num_steps, smoke_config.base.batch_size
    assert result["train_steps"] == steps
    assert result["train_macs"] == 3 * result["macs"] * steps * batch
