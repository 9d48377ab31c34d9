"""Small things that many tests share: a tiny base, its run directory, quick settings."""

import dataclasses
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DiTTransformer2DModel, UNet2DModel, VQModel
from torch import Tensor

from tdc_ray.config.presets import preset
from tdc_ray.config.run import RunConfig
from tdc_ray.data.latents import TrainingData, training_data
from tdc_ray.diffusion.plan import TimestepGroup, plan_groups
from tdc_ray.diffusion.process import noise_schedule
from tdc_ray.execution.events import EventSink, Reported
from tdc_ray.execution.item import Report
from tdc_ray.models.families import build_network
from tdc_ray.models.network_config import NetworkConfig, image_size
from tdc_ray.models.structure import network_structure
from tdc_ray.models.unet2d.architectures import architecture
from tdc_ray.models.unet2d.unet import build_unet, save_unet
from tdc_ray.models.units import SpaceKind, Unit
from tdc_ray.pruning.context import PruningContext
from tdc_ray.pruning.group import GroupSearch
from tdc_ray.pruning.noised import held_out_loss
from tdc_ray.pruning.space import space_of
from tdc_ray.runs.stages.expert import pruning_context
from tdc_ray.storage.run_dir import RunDir

TINY: NetworkConfig = architecture("tiny")

TINY_DIT: NetworkConfig = {
    "_class_name": "DiTTransformer2DModel",
    "num_attention_heads": 4,
    "attention_head_dim": 8,
    "in_channels": 1,
    "out_channels": 1,
    "num_layers": 2,
    "sample_size": 8,
    "num_embeds_ada_norm": 10,
}


def small_config(**changes: Mapping[str, Any] | int) -> RunConfig:
    """The settings of digits-smoke, with fields of its stages changed, such as
    ``prune={"method": "none"}``."""
    config = preset("digits-smoke")
    for stage, change in changes.items():
        new = (
            dataclasses.replace(getattr(config, stage), **change)
            if isinstance(change, Mapping)
            else change
        )
        config = dataclasses.replace(config, **{stage: new})
    return config


def random_unet(
    config: NetworkConfig = TINY, *, seed: int = 0, dropout: float = 0.0
) -> UNet2DModel:
    """A UNet in eval mode, none of whose parameters is at its initial 0 or 1."""
    torch.manual_seed(seed)
    unet = build_unet({**config, "dropout": dropout})
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return unet.eval()


def random_dit(config: NetworkConfig = TINY_DIT, *, seed: int = 0) -> DiTTransformer2DModel:
    """A DiT in eval mode, none of whose parameters is at its initial 0 or 1."""
    torch.manual_seed(seed)
    dit = build_network(config)
    with torch.no_grad():
        for parameter in dit.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return dit.eval()


def sizes(config: NetworkConfig) -> tuple[int, int]:
    """Parameters and macs of a network, from its config."""
    structure = network_structure(config)
    return structure.num_params, structure.macs


def training_of(config: RunConfig) -> TrainingData:
    """What the denoisers of a run are trained on."""
    return training_data(config.data, config.evaluate.cache_dir)


def make_run_dir(root: Path, *, seed: int = 0) -> RunDir:
    """A run directory whose base is there, though untrained."""
    run_dir = RunDir(root)
    save_unet(random_unet(seed=seed), run_dir.base_unet)
    return run_dir


def make_first_stage(
    folder: Path,
    kind: str = "AutoencoderKL",
    *,
    seed: int = 0,
    scaling_factor: float = 0.7,
    latent_channels: int = 1,
) -> Path:
    """A first stage of random weights that halves grey images: 16x16 become latents of 1x8x8,
    which the tiny base takes."""
    torch.manual_seed(seed)
    shared = {
        "in_channels": 1,
        "out_channels": 1,
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "block_out_channels": (8, 16),
        "latent_channels": latent_channels,
        "norm_num_groups": 4,
        "sample_size": 16,
        "scaling_factor": scaling_factor,
    }
    model = AutoencoderKL(**shared)
    if kind == "VQModel":
        model = VQModel(**shared, num_vq_embeddings=16)
        torch.nn.init.normal_(model.quantize.embedding.weight)
    model.save_pretrained(folder)
    return folder


def latent_config(folder: Path, cache_dir: Path, **changes: Mapping[str, Any] | int) -> RunConfig:
    """Small settings for the latents that :func:`make_first_stage` makes of digits."""
    stages: dict[str, Any] = {
        "sampler": {"clip_sample": False, "num_inference_steps": 4},
        "data": {"image_size": 16, "first_stage": str(folder)},
        "evaluate": {"cache_dir": str(cache_dir)},
    }
    for name, change in changes.items():
        stages[name] = stages.get(name, {}) | change if isinstance(change, Mapping) else change
    return small_config(**stages)


def group_of(config: RunConfig, index: int) -> TimestepGroup:
    """One group of the config's plan."""
    return plan_groups(config.diffusion, config.plan, config.sampler).groups[index]


def context_of(run_dir: RunDir, config: RunConfig) -> PruningContext:
    """What the searches of a run have in common."""
    return pruning_context(run_dir, config)


def task_of(run_dir: RunDir, config: RunConfig, index: int = 0) -> GroupSearch:
    """One group's share of stage 2, for the tiny base."""
    kind: SpaceKind = config.prune.space
    context = context_of(run_dir, config)
    return GroupSearch(context, space_of(TINY, kind), group_of(config, index))


def held_out_loss_of(unet: UNet2DModel, config: RunConfig, group: TimestepGroup) -> float:
    """The loss on a group's held-out images, of which no run is needed."""
    context = context_of(RunDir(Path("/nonexistent")), config)
    return held_out_loss(unet, context, group, noise_schedule(config.diffusion))


def with_run_dir(task: GroupSearch, run_dir: RunDir) -> GroupSearch:
    """The same search in another run directory."""
    return dataclasses.replace(task, context=dataclasses.replace(task.context, run_dir=run_dir))


def reporting_to(report: Report) -> EventSink:
    """A sink that hands on what is reported."""

    def sink(event: object) -> None:
        if isinstance(event, Reported):
            report(event.metrics, event.step)

    return sink


def random_kept(units: Sequence[Unit], seed: int) -> dict[str, tuple[int, ...]]:
    """At least one group or head of every unit, drawn at random."""
    draw = random.Random(seed)
    return {
        unit.name: tuple(sorted(draw.sample(range(unit.width), draw.randint(1, unit.width))))
        for unit in units
    }


def widths_of(kept: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """The scheme that a choice amounts to."""
    return {name: len(places) for name, places in kept.items()}


@torch.inference_mode()
def output_of(unet: UNet2DModel, *, seed: int = 0, batch_size: int = 3) -> Tensor:
    """A UNet's output for some noise at some timesteps."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch_size, unet.config["in_channels"], *image_size(unet.config))
    noise = torch.randn(shape, generator=generator)
    timesteps = torch.randint(0, 1000, (batch_size,), generator=generator)
    classes = unet.config["num_class_embeds"]
    labels = None if classes is None else timesteps % classes
    return unet(noise, timesteps, class_labels=labels).sample


def assert_same(one: Any, other: Any, where: str = "") -> None:
    """Two nests of dicts, lists, tensors and plain values are equal, tensors bit for bit."""
    if isinstance(one, Tensor):
        assert one.dtype == other.dtype, where
        assert torch.equal(one, other), where
    elif isinstance(one, Mapping):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_same(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for index, (left, right) in enumerate(zip(one, other, strict=True)):
            assert_same(left, right, f"{where}[{index}]")
    else:
        assert (type(one), one) == (type(other), other), where
