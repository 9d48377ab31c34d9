"""Sampling: our pipeline with the base and with experts, and diffusers' DDIMPipeline."""

import copy
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from diffusers import UNet2DModel
from torch import Tensor

from benchmark.peers import ddim_images, ddim_pipeline
from benchmark.timing import Row, SpeedFlags, compared, precision_of
from tdc_ray.config.presets import preset
from tdc_ray.config.run import RunConfig
from tdc_ray.diffusion.pipeline import ProgressivePipeline, base_pipeline
from tdc_ray.diffusion.plan import plan_groups
from tdc_ray.diffusion.samplers import make_scheduler
from tdc_ray.diffusion.sampling import image_generators
from tdc_ray.models.precision import DTYPES
from tdc_ray.models.saved_expert import save_expert
from tdc_ray.models.unet2d.architectures import base_unet
from tdc_ray.models.unet2d.surgery import cut
from tdc_ray.models.unet2d.unet import build_unet
from tdc_ray.pruning.criteria.random import random_scores
from tdc_ray.pruning.criteria.scores import select_top
from tdc_ray.pruning.proxies.by_score import sorted_scores, uniform_scheme
from tdc_ray.pruning.space import space_of
from tdc_ray.runs.pipelines import pipeline_index

PEER, BASE, EXPERTS = "DDIMPipeline", "ours, base", "ours, experts"
WINOGRAD, BF16 = "winograd: ", "bf16: "
"""Before a row's name: the same by Winograd's convolutions, or with weights in bf16."""
KINDS = ("", WINOGRAD, BF16)
YARDSTICK = "images, DDIMPipeline by bf16 autocast"


def sampled_config(flags: SpeedFlags) -> RunConfig:
    """Return the settings: the cifar10 preset's with another number of steps; N = 10, k = 0.5."""
    config = preset("digits-smoke" if flags.smoke else "cifar10")
    plan = replace(config.plan, num_groups=10, min_macs_share=0.5)
    sampler = replace(config.sampler, num_inference_steps=2 if flags.smoke else flags.steps)
    return replace(config, plan=plan, sampler=sampler)


def random_base(config: RunConfig) -> UNet2DModel:
    """Build the base with random weights."""
    torch.manual_seed(0)
    return build_unet(base_unet(config.model, config.conditioning)).eval()


def save_experts(config: RunConfig, unet: UNet2DModel, folder: Path) -> float:
    """Prune experts at random to every group's limit by uniform ratios, and save them.

    Returns:
        The mean of their macs over the sampling steps, as a share of the base's.
    """
    # brings Ray along, which all else here, and so gpu.py, does without
    from tdc_ray.runs.collect_results import mean_over_sampling_steps

    settings = base_unet(config.model, config.conditioning)
    space = space_of(settings)
    scores, macs, experts = random_scores(space.units, 0), [], {}
    plan = plan_groups(config.diffusion, config.plan, config.sampler)
    for group in plan.groups:
        limit = max(space.macs(space.smallest), group.limit(space.macs_base))
        scheme = uniform_scheme(space, limit, sorted_scores(scores))
        kept = select_top(space.units, scores, scheme)
        name = f"expert-{group.index:02d}"
        experts[name] = group
        macs.append(space.macs(scheme))
        save_expert(folder / name, cut(unet, space.units, kept), settings, kept)
    pipeline_index(config, experts).save(folder)
    return mean_over_sampling_steps(plan, macs) / space.macs_base


def our_base(unet: UNet2DModel, config: RunConfig, kind: str) -> ProgressivePipeline:
    """Create our pipeline with the base, in the precision of one of the kinds."""
    pipeline = base_pipeline(unet, pipeline_index(config))
    pipeline.experts.to(DTYPES[precision_of(kind)])
    pipeline.winograd = kind == WINOGRAD
    return pipeline


def our_experts(folder: Path, kind: str) -> ProgressivePipeline:
    """Load our pipeline with experts, of one of the kinds."""
    return ProgressivePipeline.from_pretrained(
        folder, torch_dtype=DTYPES[precision_of(kind)], winograd=kind == WINOGRAD
    )


def our_images(pipeline: ProgressivePipeline, num_images: int, steps: int) -> Tensor:
    """Sample with our pipeline: ``(B, C, H, W)`` in [0, 1], from the noise of seed 0."""
    pipeline.set_progress_bar_config(disable=True)
    generators = image_generators(0, 0, num_images)
    images = pipeline(num_images, generators, steps, output_type="pt").images
    return (images / 2 + 0.5).clamp(0, 1)


def sampling(flags: SpeedFlags) -> list[Row]:
    """Time sampling with the base by both pipelines, and with experts; compare the images."""
    config, section = sampled_config(flags), "sampling"
    count, steps = (4 if flags.smoke else flags.images), config.sampler.num_inference_steps
    unet = random_base(config)
    peer = ddim_pipeline(unet, make_scheduler(config.diffusion, config.sampler))
    with tempfile.TemporaryDirectory() as place:
        macs_ratio = save_experts(config, unet, Path(place))
        images: dict[str, Tensor] = {}

        def keep(name: str, images_of: Callable[[], Tensor]) -> None:
            images[name] = images_of()

        ways = {PEER: partial(ddim_images, peer, count, steps)}
        for kind in KINDS:
            for name, pipeline in {
                BASE: our_base(copy.deepcopy(unet), config, kind),
                EXPERTS: our_experts(Path(place), kind),
            }.items():
                ways[kind + name] = partial(our_images, pipeline, count, steps)
        ways = {name: partial(keep, name, way) for name, way in ways.items()}
        rows = compared(section, ways, flags.repeats, against=PEER, batch=count)
        loading = {"experts, loading": partial(ProgressivePipeline.from_pretrained, place)}
        rows += compared(section, loading, flags.repeats)
    by_name = {row.name: row for row in rows}
    rows += [
        Row(
            section=section,
            name=f"{kind}experts' time over their macs",
            unit="of the base's",
            precision=precision_of(kind),
            values=tuple(
                one / other / macs_ratio
                for one, other in zip(
                    by_name[kind + EXPERTS].values, by_name[kind + BASE].values, strict=True
                )
            ),
        )
        for kind in KINDS
    ]
    rows += [
        Row(
            section=section,
            name="experts' mean macs",
            unit="of the base's",
            values=(macs_ratio,),
        ),
    ]
    with torch.autocast("cpu", torch.bfloat16):
        autocast = ddim_images(peer, count, steps)

    def difference(name: str, found: Tensor) -> Row:
        rms = float((found - images[PEER]).square().mean().sqrt())
        return Row(
            section=section,
            name=name,
            unit="rms, of 1",
            values=(rms,),
            precision=precision_of(name),
            batch=count,
        )

    differences = [
        replace(difference(f"images, {kind}{BASE}", images[kind + BASE]), against=YARDSTICK)
        for kind in KINDS
    ]
    return [*rows, difference(YARDSTICK, autocast), *differences]
