"""Denoising losses on held-out images, by which models are compared where no image is scored.

Those of TDC and of a base are of the same images and noise (``stages.paired_losses``).
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from tdc_ray.config.run import RunConfig
from tdc_ray.diffusion.plan import TimestepGroup
from tdc_ray.execution.chain import Chain, result_of
from tdc_ray.execution.item import WorkItem
from tdc_ray.runs.evaluation.evaluate import SampleResult, Score, Which, model_folder
from tdc_ray.runs.results import LossDifference
from tdc_ray.runs.stages.expert import Expert
from tdc_ray.runs.stages.paired_losses import (
    PairedJob,
    PairedResult,
    mean_difference,
    paired_difference,
    paired_item,
    unseen_images,
)
from tdc_ray.storage.run_dir import RunDir


def loss_items(
    run_dir: RunDir, config: RunConfig, experts: Sequence[Expert], which: Which, macs: float
) -> list[WorkItem[PairedJob, PairedResult]]:
    """Make the items that measure TDC and a base on ``compare.num_images`` of each group.

    Args:
        run_dir: Where both are and the losses go.
        config: The run's settings.
        experts: All experts.
        which: The base, or the base trained on.
        macs: Of a forward pass of it.
    """
    return [
        paired_item(
            f"{which}/losses-{expert.group.index:02d}",
            PairedJob(
                config,
                expert.group,
                run_dir.expert(expert.group.index),
                model_folder(run_dir, which),
                losses_path(run_dir, config, expert.group, which),
            ),
            (expert.macs, macs),
        )
        for expert in experts
    ]


def losses_path(run_dir: RunDir, config: RunConfig, group: TimestepGroup, which: Which) -> Path:
    """Return the file of what :func:`loss_items` measures on a group."""
    folder = run_dir.samples / "losses" if which == "base" else run_dir.comparison
    return folder / f"losses-{group.index:02d}-{config.compare.num_images}.npy"


def loss_chains(
    run_dir: RunDir, config: RunConfig, experts: Sequence[Expert], which: Which, macs: float
) -> Mapping[str, Chain[PairedResult]]:
    """Return the same as chains, of as many noised images as would be scored."""
    items = loss_items(run_dir, _in_place_of_scores(config), experts, which, macs)
    return {item.key: result_of(item) for item in items}


def mean_losses(
    run_dir: RunDir, config: RunConfig, groups: Sequence[TimestepGroup], which: Which
) -> LossDifference:
    """Compute the losses that :func:`loss_chains` measured, over all timesteps alike."""
    return mean_difference(_paths(run_dir, config, groups, which), groups)


def swapped_losses(
    run_dir: RunDir, config: RunConfig, groups: Sequence[TimestepGroup]
) -> list[float]:
    """Compute the loss of the base trained on with one group's expert put in, for every group."""
    base = mean_losses(run_dir, config, groups, "longer-base").loss_base
    total = sum(len(group.timesteps) for group in groups)
    paths = _paths(run_dir, config, groups, "longer-base")
    return [
        base + len(group.timesteps) / total * paired_difference(path).difference
        for group, path in zip(groups, paths, strict=True)
    ]


def score_by_loss(sampled: SampleResult, loss: float, measured: Sequence[PairedResult]) -> Score:
    """Return the loss of one model of a pair as its score.

    Args:
        sampled: Its samples, which are not scored.
        loss: Its loss.
        measured: The measurements of both models, of whose time half is its own.
    """
    seconds = sampled.seconds + sum(result.seconds for result in measured) / 2
    return Score(loss, sampled.num_images / sampled.seconds, seconds)


def held_out_text(config: RunConfig) -> str:
    """Write which images the losses are of."""
    config = _in_place_of_scores(config)
    count = len(unseen_images(config))
    return (
        f"{count} held-out images that no fine-tune and no choice of the search has seen (the "
        f"base's training may have), each noised {-(-config.compare.num_images // count)} times "
        "in every group"
    )


def _in_place_of_scores(config: RunConfig) -> RunConfig:
    compare = replace(config.compare, num_images=config.evaluate.num_images)
    return replace(config, compare=compare)


def _paths(
    run_dir: RunDir, config: RunConfig, groups: Sequence[TimestepGroup], which: Which
) -> list[Path]:
    config = _in_place_of_scores(config)
    return [losses_path(run_dir, config, group, which) for group in groups]
