"""How work with a model grows: training, measuring, sampling; with images, width and experts."""

import dataclasses
from functools import partial
from pathlib import Path

import numpy as np
import torch

from benchmark.growth import Axis, ScalingFlags, peaks, timed
from benchmark.pruning import nothing
from benchmark.sampling import our_images, save_experts
from benchmark.timing import use_threads
from benchmark.training import CONFIG as TRAINING
from benchmark.training import OurTraining, random_images
from tdc_ray.config.data import DataConfig
from tdc_ray.config.presets import preset
from tdc_ray.config.prune import PruneConfig
from tdc_ray.config.run import RunConfig
from tdc_ray.config.sampler import SamplerConfig
from tdc_ray.diffusion.pipeline import ProgressivePipeline, base_pipeline
from tdc_ray.diffusion.plan import plan_groups
from tdc_ray.diffusion.train import start_state
from tdc_ray.models.network_config import NetworkConfig
from tdc_ray.models.unet2d.architectures import architecture, base_unet
from tdc_ray.models.unet2d.unet import build_unet, save_unet
from tdc_ray.models.units import keep_everything
from tdc_ray.pruning.context import PruningContext
from tdc_ray.pruning.criteria.random import random_scores
from tdc_ray.pruning.criteria.scores import select_top
from tdc_ray.pruning.proxies.by_score import sorted_scores, uniform_scheme
from tdc_ray.pruning.space import space_of
from tdc_ray.pruning.tasks.candidates import CandidateJob, measure_candidate
from tdc_ray.pruning.tasks.sensitivities import SensitivityJob, measure_sensitivities
from tdc_ray.runs.pipelines import pipeline_index
from tdc_ray.runs.stages.expert import pruning_context
from tdc_ray.storage.run_dir import RunDir

STEPS = 4
"""Denoising steps."""


def wider(width: int) -> NetworkConfig:
    """Return the config of a small UNet of another width."""
    config = architecture("tiny")
    return {**config, "block_out_channels": (width, 2 * width)}


class Measured:
    """A random base, and what is measured of it: a candidate of 0.7 of its macs, or its units."""

    def __init__(self, folder: Path, unet: NetworkConfig) -> None:
        path = folder / "images.npz"
        if not path.exists():
            images = np.random.default_rng(0).integers(0, 256, (2048, 8, 8), np.uint8)
            np.savez(path, images=images)
        data = DataConfig(source="npz", path=str(path))
        self.config = dataclasses.replace(preset("digits"), data=data)
        self.space, config = space_of(unet), self.config
        self.run_dir = RunDir(folder / f"width-{unet['block_out_channels'][0]}")
        torch.manual_seed(0)
        save_unet(build_unet(unet), self.run_dir.base_unet)
        self.group = plan_groups(config.diffusion, config.plan, config.sampler).groups[0]

    def with_images(self, num_images: int, num_refit_images: int) -> PruningContext:
        """Return a context with so many images; without any for the refit there is none."""
        prune = PruneConfig(
            num_images=num_images,
            num_refit_images=max(1, num_refit_images),
            refit="least-squares" if num_refit_images else "none",
            batch_size=32,
        )
        return pruning_context(self.run_dir, dataclasses.replace(self.config, prune=prune))

    def candidate(self, num_images: int, num_refit_images: int) -> None:
        """Measure a candidate."""
        space, scores = self.space, random_scores(self.space.units, 0)
        scheme = uniform_scheme(space, int(0.7 * space.macs_base), sorted_scores(scores))
        kept = select_top(space.units, scores, scheme)
        context = self.with_images(num_images, num_refit_images)
        measure_candidate(CandidateJob(context, self.group, kept, 1), nothing)

    def sensitivities(self, num_images: int, num_refit_images: int) -> None:
        """Measure the sensitivities of all units."""
        units = self.space.units
        names, kept = tuple(unit.name for unit in units), keep_everything(units)
        scores = {} if num_refit_images else random_scores(units, 0)
        context = self.with_images(num_images, num_refit_images)
        job = SensitivityJob(context, self.group, names, kept, scores)
        measure_sensitivities(job, nothing)


def measuring(flags: ScalingFlags, folder: Path) -> list[Axis]:
    """Measure candidates and sensitivities: with images, refit images, and width."""
    base, counts = Measured(folder, wider(16)), flags.some(64, 128, 256, 512)
    found = [
        timed(flags, what, over, [(n, partial(measure, *images(n))) for n in numbers])
        for what, over, measure, images, numbers in (
            ("a candidate's loss", "images", base.candidate, lambda n: (n, 0), counts),
            ("a candidate's refit", "refit images", base.candidate, lambda n: (1, n), counts),
            (
                "sensitivities of all units",
                "images",
                base.sensitivities,
                lambda n: (n, 0),
                flags.some(16, 32, 64, 128),
            ),
        )
    ]
    bases = [Measured(folder, wider(width)) for width in flags.some(16, 32, 64, 128)]
    found += [
        timed(
            flags,
            what,
            "macs of the base",
            [(one.space.macs_base, partial(one.candidate, *images)) for one in bases],
            reason=reason,
        )
        for what, images, reason in (
            ("a candidate's loss", (64, 0), Axis.reason),
            ("a candidate's refit", (1, 64), "a layer's least squares take its width cubed"),
        )
    ]
    return found


def training(flags: ScalingFlags, _folder: Path) -> list[Axis]:
    """Train with more images in a batch, and with wider models."""

    def ours(width: int) -> OurTraining:
        return OurTraining(start_state(build_unet(wider(width)), TRAINING))

    small = ours(16)
    batches = [
        (n, partial(small.step, random_images(wider(16), n))) for n in flags.some(16, 32, 64, 128)
    ]
    images, widths = random_images(wider(16), 16), flags.some(16, 32, 64, 128)
    wide = [
        (space_of(wider(width)).macs_base, partial(ours(width).step, images)) for width in widths
    ]
    return [
        timed(flags, "a training step", "images in a batch", batches),
        timed(flags, "a training step", "macs of the model", wide),
    ]


def sampled(num_groups: int) -> RunConfig:
    """Return settings of a small model with so many groups, each of as many timesteps."""
    config = preset("digits-smoke")
    plan = dataclasses.replace(config.plan, num_groups=num_groups, schedule="uni-increasing")
    sampler = SamplerConfig(num_inference_steps=STEPS)
    return dataclasses.replace(config, plan=plan, sampler=sampler)


def sample(num_images: float) -> None:
    """Sample so many images at once, in two threads."""
    use_threads(2)
    config = sampled(1)
    unet = build_unet(base_unet(config.model, config.conditioning)).eval()
    our_images(base_pipeline(unet, pipeline_index(config)), int(num_images), STEPS)


def load(_count: float, folder: Path) -> None:
    """Load experts."""
    ProgressivePipeline.from_pretrained(folder)


def sampling(flags: ScalingFlags, folder: Path) -> list[Axis]:
    """Sample more images; load more experts."""
    base, counts = sampled(1), flags.some(2, 4, 8, 16)
    unet = build_unet(base_unet(base.model, base.conditioning)).eval()
    pipeline = base_pipeline(unet, pipeline_index(base))
    places = {n: folder / f"experts-{n}" for n in counts}
    for count, place in places.items():
        save_experts(sampled(count), unet, place)
    images = flags.some(16, 32, 64, 128)
    return [
        timed(
            flags,
            "sampling",
            "images at once",
            [(n, partial(our_images, pipeline, n, STEPS)) for n in images],
        ),
        timed(
            flags,
            "loading experts",
            "groups N",
            [(n, partial(load, n, place)) for n, place in places.items()],
        ),
    ]


def refit(num_images: float, folder: Path) -> None:
    """Refit a candidate on so many images, in two threads."""
    use_threads(2)
    Measured(folder, wider(16)).candidate(32, int(num_images))


def memory(flags: ScalingFlags, folder: Path) -> list[Axis]:
    """Measure peaks; every point is a process of its own, which takes seconds to start."""
    if flags.smoke:
        return []
    return [
        peaks("sampling", "images at once", (128, 512), sample),
        peaks("a candidate's refit", "refit images", (512, 2048), refit, folder),
    ]
