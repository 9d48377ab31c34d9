"""Stage 1: trains the base on all timesteps (TDC Eq. 6). Knows nothing of Ray."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import UNet2DModel
from torch import Tensor, nn

from tdc_ray.config.run import RunConfig
from tdc_ray.data.batches import batches
from tdc_ray.data.fingerprint import data_key, training_key
from tdc_ray.data.latents import training_data
from tdc_ray.diffusion.pipeline import base_pipeline
from tdc_ray.diffusion.process import noise_schedule
from tdc_ray.diffusion.train import TrainState, start_state, train
from tdc_ray.execution.device import WorkerRank
from tdc_ray.execution.item import Inputs, Report, WorkItem
from tdc_ray.models.unet2d.architectures import base_unet
from tdc_ray.models.unet2d.unet import build_unet
from tdc_ray.runs.pipelines import pipeline_index
from tdc_ray.seeds import derive_seed
from tdc_ray.storage.run_dir import RunDir

VERSION = 1
"""Changes whenever what stage 1 comes to does, so that stored bases are made again."""


@dataclass(frozen=True, slots=True)
class BaseResult:
    """What the base is, and what training it took."""

    macs: int
    num_params: int
    train_steps: int
    train_macs: float
    """Three forward passes per image seen."""

    seconds: float


def base_inputs(config: RunConfig) -> Inputs:
    """Give what the base follows from."""
    return {
        "stage": "base",
        "version": VERSION,
        "unet": base_unet(config.model, config.conditioning),
        "dropout": config.model.dropout,
        "workers": config.compute.num_base_workers,
        "cpus": config.compute.cpus_per_base_worker,
        **data_key(
            training_data(config.data, config.evaluate.cache_dir),
            seed=config.seed,
            diffusion=config.diffusion,
            conditioning=config.conditioning,
            tf32=config.compute.tf32,
        ),
        **training_key(config.base),
    }


def base_item(run_dir: RunDir, config: RunConfig) -> WorkItem[RunConfig, BaseResult]:
    """Describe stage 1 as a work item, by which a store knows it; Ray Train runs it."""
    return WorkItem(
        key="base",
        function=_no_item,
        job=config,
        result_path=run_dir.base_result,
        cost=0.0,
        num_steps=config.base.num_steps,
        inputs=base_inputs,
        files=(run_dir.base_unet,),
        result_type=BaseResult,
    )


def _no_item(_config: RunConfig, _report: Report) -> BaseResult:
    raise AssertionError("stage 1 is no item of a pool")


def train_base(
    config: RunConfig,
    place: WorkerRank,
    *,
    resume_from: Path | None,
    wrap: Callable[[UNet2DModel], nn.Module],
    report: Report,
    save: Callable[[TrainState], None],
) -> TrainState:
    """Train the base, or go on from a checkpoint; a finished one is given back as it is.

    Args:
        config: The run's settings.
        place: This worker.
        resume_from: A checkpoint file of an earlier attempt.
        wrap: Wraps the UNet for data parallel training.
        report: Gets metrics and the step.
        save: Gets the state to be kept, on every rank.

    Raises:
        NonFiniteLossError: Training diverged.
        CheckpointError: The checkpoint does not fit.
        DataError: The dataset is missing or malformed.
    """
    torch.manual_seed(derive_seed(config.seed, "init"))
    unet = build_unet(
        {**base_unet(config.model, config.conditioning), "dropout": config.model.dropout}
    )
    state = start_state(unet.to(place.device), config.base)
    if resume_from is not None:
        state.load(resume_from)
    images = batches(
        training_data(config.data, config.evaluate.cache_dir).open(),
        batch_size=config.base.batch_size,
        seed=derive_seed(config.seed, "base", "order"),
        start_step=state.step,
        num_steps=config.base.num_steps,
        rank=place.rank,
        world_size=place.world_size,
        num_workers=config.data.num_workers,
    )
    train(
        state,
        wrap(unet),
        images,
        noise_schedule(config.diffusion).to(place.device),
        config.base,
        config.data,
        timesteps=range(config.diffusion.num_train_timesteps),
        seed=derive_seed(config.seed, "base"),
        rank=place.rank,
        label_dropout=config.conditioning.label_dropout,
        report=report,
        save=save,
    )
    return state


def sample_grid(state: TrainState, config: RunConfig, num_images: int = 16) -> Tensor:
    """Sample a few images with the averaged weights: uint8, ``(B, H, W, C)``."""
    with state.ema_weights() as unet:
        pipeline = base_pipeline(unet, pipeline_index(config)).to(state.device)
        pipeline.set_progress_bar_config(disable=True)
        images = pipeline(num_images, seed=config.evaluate.seed, output_type="np").images
    return torch.from_numpy(images)
