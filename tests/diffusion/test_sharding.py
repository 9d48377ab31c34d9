"""Trainings whose ranks share weights, moments and averages (FSDP2), against those of DDP."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, nn
from torch.distributed.tensor import DTensor

from tdc_ray.config.run import RunConfig
from tdc_ray.diffusion.moments import MOMENTS
from tdc_ray.diffusion.sharding import sharding_mesh
from tdc_ray.diffusion.train import TrainState, start_state, update
from tdc_ray.errors import CheckpointError
from tdc_ray.execution.device import WorkerRank
from tdc_ray.models.denoiser import Denoiser, has_classes
from tdc_ray.models.structure import network_structure
from tdc_ray.models.training_memory import training_memory
from tdc_ray.runs.stages.base_worker import train_base
from tests.small import TINY, assert_same, random_dit, random_unet, small_config

NUM_STEPS, START_SHARE = 4, 0.25

Job = tuple[str, RunConfig, Path | None]
"""A training's name, its settings, and the checkpoint that it resumes from."""


@pytest.fixture
def group() -> Iterator[WorkerRank]:
    """A process group of one."""
    store = distributed.HashStore()
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield WorkerRank(0, 1, torch.device("cpu"))
    distributed.destroy_process_group()


def config_of(dropout: float = 0.1, **base: Any) -> RunConfig:
    """Four steps in parts of two images: of one, layouts and so what dropout draws may differ."""
    steps = {"num_steps": NUM_STEPS, "batch_size": 12, "checkpoint_every": 2, "log_every": 1}
    return small_config(
        base={**steps, "num_warmup_steps": 2, "micro_batch_size": 2, **base},
        model={"dropout": dropout},
        compute={"num_base_workers": 2},
    )


def sharing(config: RunConfig) -> RunConfig:
    compute = dataclasses.replace(config.compute, sharding="full")
    return dataclasses.replace(config, compute=compute)


CLIPPED = config_of(max_grad_norm=0.01)
LABELS, TIMESTEPS = torch.tensor([0, 3, 9, 10]), torch.tensor([0, 10, 500, 999])


def backward(unet: Denoiser) -> None:
    """Compute gradients on fixed images, of a denoiser that may be conditioned on classes."""
    x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = {"class_labels": LABELS} if has_classes(unet) else {}
    output = unet(x, TIMESTEPS, **labels).sample
    (output[:, :1] - x).square().mean().backward()


def steps_of(state: TrainState, config: RunConfig) -> list[float]:
    """Take two steps; return the norms of their gradients before clipping."""
    norms = []
    for _ in range(2):
        backward(state.unet)
        norms.append(float(update(state, config.base)))
    return norms


@pytest.mark.parametrize("make", [random_unet, pytest.param(random_dit, marks=pytest.mark.slow)])
def test_a_state_that_is_shared_trains_is_saved_and_read_as_one_that_is_not(
    make: Callable[[], Any], group: WorkerRank, tmp_path: Path
):
    config, mesh = config_of(), sharding_mesh(group)
    plain = start_state(make(), config.base, keep_start=True)
    shared = start_state(make(), config.base, keep_start=True, mesh=mesh)
    assert steps_of(shared, config) == pytest.approx(steps_of(plain, config), rel=1e-4)
    assert all(isinstance(one, DTensor) for one in shared.unet.parameters())
    shared.save(tmp_path / "shared.pt")
    read = start_state(make(), config.base, keep_start=True)
    read.load(tmp_path / "shared.pt")
    torch.testing.assert_close(read.state_dict(), plain.state_dict(), rtol=1e-3, atol=1e-5)
    with shared.ema_weights(START_SHARE) as one, read.ema_weights(START_SHARE) as other:
        assert type(one) is type(other)
        assert_same(one.state_dict(), other.state_dict())

    again = start_state(make(), config.base, keep_start=True, mesh=mesh)
    again.load(tmp_path / "shared.pt")
    for state, name in ((again, "again"), (shared, "shared")):
        steps_of(state, config)
        state.save(tmp_path / f"{name}.pt")
    files = [torch.load(tmp_path / f"{name}.pt") for name in ("again", "shared")]
    assert_same(*files)


def test_a_file_of_another_model_is_refused_where_the_state_is_shared(group, tmp_path):
    config = config_of()
    start_state(random_dit(), config.base).save(tmp_path / "state.pt")
    state = start_state(random_unet(), config.base, mesh=sharding_mesh(group))
    with pytest.raises(CheckpointError, match=r"state\.pt is no checkpoint of this model"):
        state.load(tmp_path / "state.pt")


def run_rank(rank: int, world_size: int, folder: Path, jobs: Sequence[Job]) -> None:
    """Train the base as one of the ranks, by each of the jobs.

    Checkpoints, and the averaged weights with losses and norms of gradients, go into ``folder``
    under the job's name, and so does what the first rank held of a shared state.
    """
    torch.set_num_threads(1)
    store = distributed.FileStore(str(folder / f"store-{world_size}"), world_size)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    worker = WorkerRank(rank, world_size, torch.device("cpu"))
    for name, config, resume_from in jobs:
        losses: dict[int, float] = {}
        norms: dict[int, float] = {}

        def report(metrics, step, losses=losses, norms=norms):
            losses[step], norms[step] = metrics["loss"], metrics["grad_norm"]

        def save(state, name=name):
            state.save(folder / f"{name}-{state.step}.pt")

        wrap = nn.parallel.DistributedDataParallel
        state = train_base(
            config, worker, resume_from=resume_from, wrap=wrap, report=report, save=save
        )
        with state.ema_weights() as unet:
            if rank == 0:
                torch.save((unet.state_dict(), losses, norms), folder / f"{name}.pt")
    state = start_state(random_unet(), CLIPPED.base, mesh=sharding_mesh(worker))
    backward(state.unet)
    gradients = held([one.grad for one in state.unet.parameters()])
    norms = clipped_norms(state)
    if rank == 0:
        moments = [held([one[name] for one in state.optimizer.state.values()]) for name in MOMENTS]
        weights, averages = held(state.unet.parameters()), held(state.ema.shadow_params)
        torch.save((weights, gradients, sum(moments), averages), folder / f"held-{world_size}.pt")
        torch.save(norms, folder / f"norms-{world_size}.pt")
    distributed.destroy_process_group()


def clipped_norms(state: TrainState) -> tuple[float, float]:
    """Take the first step on gradients that are there; return their norms before and after
    clipping, of which Adam's first moments have a tenth."""
    before = update(state, CLIPPED.base)
    after = nn.utils.get_total_norm([one["exp_avg"] for one in state.optimizer.state.values()])
    return float(before), 10 * float(after.full_tensor() if isinstance(after, DTensor) else after)


def held(tensors: Iterable[Any]) -> int:
    """Bytes of a rank's shards."""
    return sum(tensor.to_local().nbytes for tensor in tensors)


def run_ranks(world_size: int, folder: Path, jobs: Sequence[Job]) -> None:
    torch.multiprocessing.spawn(run_rank, (world_size, folder, jobs), nprocs=world_size)


def loaded(folder: Path, name: str) -> Any:
    return torch.load(folder / f"{name}.pt", weights_only=True)


@pytest.mark.slow
def test_workers_that_share_a_base_train_it_as_others_and_resume_on_any_number(tmp_path):
    config, bf16 = config_of(), config_of(dropout=0.0, precision="bf16")
    jobs = [
        ("ddp", config, None),
        ("shared", sharing(config), None),
        ("resumed", sharing(config), tmp_path / "shared-2.pt"),
        ("ddp-bf16", bf16, None),
        ("bf16", sharing(bf16), None),
    ]
    run_ranks(2, tmp_path, jobs)
    close = partial(torch.testing.assert_close, rtol=1e-3, atol=1e-4)
    shared, *metrics = loaded(tmp_path, "shared")
    ddp, *ddp_metrics = loaded(tmp_path, "ddp")
    close(shared, ddp)
    for found, expected in zip(metrics, ddp_metrics, strict=True):
        assert found == pytest.approx(expected, rel=1e-4)
    assert_same(loaded(tmp_path, "resumed-4"), loaded(tmp_path, "shared-4"))
    assert_same(loaded(tmp_path, "resumed")[0], shared)
    assert loaded(tmp_path, "bf16")[1] == pytest.approx(loaded(tmp_path, "ddp-bf16")[1], rel=1e-2)
    jobs = [  # each from a checkpoint of the other kind
        ("three-ddp", config, tmp_path / "shared-2.pt"),
        ("three-shared", sharing(config), tmp_path / "ddp-2.pt"),
    ]
    run_ranks(3, tmp_path, jobs)
    (shared, *metrics), (ddp, *ddp_metrics) = (loaded(tmp_path, name) for name, *_ in jobs[::-1])
    close(shared, ddp)
    for found, expected in zip(metrics, ddp_metrics, strict=True):
        assert found == pytest.approx(expected, rel=1e-4)
    alone = start_state(random_unet(), CLIPPED.base)
    backward(alone.unet)
    norms = clipped_norms(alone)
    assert norms[0] > norms[1] == pytest.approx(0.01, rel=1e-4)
    for workers in (2, 3):
        assert loaded(tmp_path, f"norms-{workers}") == pytest.approx(norms, rel=1e-4)
        memory = training_memory(network_structure(TINY), workers, "full", "fp32")
        counted = (memory.weights, memory.gradients, memory.moments, memory.averages)
        # the first rank's shards are the larger ones where dimensions do not divide evenly
        assert loaded(tmp_path, f"held-{workers}") == pytest.approx(counted, rel=0.05)
