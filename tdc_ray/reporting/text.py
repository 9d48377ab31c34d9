"""Numbers as text, and the conclusions of a run in words."""

from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import Literal

from tdc_ray.runs.results import (
    ComparisonResult,
    GroupResult,
    LossDifference,
    Results,
    few_images_note,
    score_text,
)
from tdc_ray.storage.object_store import display_path


def timesteps_text(timesteps: tuple[int, int]) -> str:
    """Format a range of timesteps by its first and its last."""
    return f"{timesteps[0]}-{timesteps[1]}"


def limit_text(group: GroupResult) -> str:
    """Format a group's limit: macs, or milliseconds."""
    limit = group.milliseconds_limit
    return macs_text(group.macs_limit) if limit is None else f"{limit:.4g} ms"


def conclusions(results: Results) -> list[str]:
    """Return sentences on what a run showed and what it did not."""
    base, tdc, evaluation = results.base, results.tdc, results.evaluation
    better = "better" if tdc.score < base.score else "not better"
    if results.losses is not None:
        better = verdict(results.losses)
    lines = [
        f"Shown: {results.metric} {score_text(tdc.score)} against the base's "
        f"{score_text(base.score)} ({better}; lower is better) at {tdc.macs / base.macs:.3f} of "
        f"its macs per step, {_conditions(results)}.",
        _cost(results),
        *([] if results.comparison is None else _compared(results, results.comparison)),
        "One training seed shows no spread.",
    ]
    if results.losses is not None:
        lines.append(
            "No image was scored, as there were no features to score by: a loss does not tell how "
            "images look, so look at the samples, and compare it only with runs on the same data "
            "and noise process. tdc-ray sample and tdc-ray score make a score afterwards."
        )
    elif results.metric != "fid":
        lines.append(
            f"{results.metric} is a Frechet distance on features of {evaluation.features}: it is "
            "no FID and can be compared only with runs on the same data."
        )
    if results.prune.drawing_macs:
        lines.append(
            "No data set was used: scores say how near the images are to the base's own, not to "
            "what it was trained on."
            if results.losses is None
            else "No data set was used: the losses are on the base's own images, not on what it "
            "was trained on."
        )
    if evaluation.num_features is not None and (
        few := few_images_note(evaluation.num_images, evaluation.num_features)
    ):
        lines.append(f"Note: {few} (--evaluate.num-images).")
    return lines + [f"Note: {note}" for note in results.prune.notes]


def _conditions(results: Results) -> str:
    """Write what scores depend on, or losses in their place."""
    evaluation, losses = results.evaluation, results.losses
    if losses is not None:
        return (
            f"{percent_text(losses, losses.difference)} ({interval_text(losses)}, 95 %), over all "
            f"timesteps alike, on {evaluation.reference}, with {evaluation.weights} weights"
        )
    labels = ""
    if evaluation.labels is not None:
        labels = f"{evaluation.labels}, guidance {evaluation.guidance_scale:g}, "
    return (
        f"on {evaluation.num_images} images, {evaluation.num_inference_steps} "
        f"{evaluation.sampler} steps, eta {evaluation.eta:g}, seed {evaluation.seed}, {labels}"
        f"{evaluation.weights} weights in {evaluation.precision}, against {evaluation.reference}"
    )


def _cost(results: Results) -> str:
    """Write what training and search took, each and together, and what that leaves open."""
    base, tdc, searched = results.base, results.tdc, results.prune.search_macs
    spent, is_open = tdc.train_macs + searched, results.comparison is None
    if results.given_base is None:
        text = (
            f"Training base and experts took {tdc.train_macs / base.train_macs:.2f} times the "
            f"base's macs, with the search {spent / base.train_macs:.2f} times"
        )
        shown = "so the base alone had less; whether it would have gained as much from the same "
        shown += "macs is not shown here (--compare equal-macs shows it)"
        return f"{text}, {shown}." if is_open else f"{text}."
    text = (
        f"The base was given ({results.given_base.source}): what its training took is not known "
        f"and counts 0 here. The experts took {tdc.train_macs:.2e} macs of training and "
        f"{searched:.2e} of search beyond it"
    )
    if drawing := results.prune.drawing_macs:
        text += f" ({drawing:.2e} of it to draw images from the base in place of a data set)"
    shown = "whether the base would have gained as much from these is not shown here (--compare "
    shown += "equal-macs shows it)"
    return f"{text}; {shown}." if is_open else f"{text}."


def _compared(results: Results, comparison: ComparisonResult) -> list[str]:
    """Write how TDC stands beside the base trained on, in score and in losses."""
    score, other = results.tdc.score, comparison.score
    better = "better" if score < other else "worse" if score > other else "the same"
    if results.losses is not None:
        found = verdict(comparison.mean)
        better = {"lower": "better", "higher": "worse", "undecided": "undecided"}[found]
    how = (
        "its optimizer and averaged weights carried on from stage 1"
        if comparison.continued
        else "from its averaged weights alone, for no optimizer state is left"
    )
    added = comparison.steps - results.base.train_steps
    verdicts: dict[str, list[str]] = {"lower": [], "higher": [], "undecided": []}
    for group in comparison.groups:
        verdicts[verdict(group)].append(str(group.index))
    groups = "; ".join(f"{name} in {', '.join(v)}" for name, v in verdicts.items() if v)
    mean = comparison.mean
    return [
        f"At equal macs: the base trained on by {added:,} steps, which cost what TDC spent beyond "
        f"stage 1, search included ({how}), has {results.metric} {score_text(other)}; TDC is "
        f"{better} at {score_text(score)}.",
        f"Losses of TDC against it on {comparison.num_images} held-out images that neither was "
        "trained on after stage 1 and no choice has seen, each noised "
        f"{comparison.num_noised // comparison.num_images} times in every group: over all "
        f"timesteps {percent_text(mean, mean.difference)} ({interval_text(mean)}, 95 %); by "
        f"group {groups}. {seen_text(comparison)}",
    ]


def seen_text(comparison: ComparisonResult) -> str:
    """Write whether the base was trained on the images that losses are compared on."""
    if comparison.seen_by_base is None:
        return "The base may have been trained on these images."
    if comparison.seen_by_base:
        return (
            "Stage 1 was trained on these images, which favours TDC, as a base that is trained on "
            "forgets them: --prune.held-out-of-base leaves them out."
        )
    return "No network was trained on these images."


def verdict(difference: LossDifference) -> Literal["lower", "higher", "undecided"]:
    """Write which loss is lower, as far as the interval of the difference tells."""
    if difference.high < 0:
        return "lower"
    return "higher" if difference.low > 0 else "undecided"


def percent_text(difference: LossDifference, value: float) -> str:
    """Write a difference of losses as a share of the base's."""
    if not difference.loss_base:
        return f"{value:+.2e}"
    share = 100 * value / difference.loss_base
    return f"{share:+.2f} %" if abs(share) < 100 else f"{share:+.0f} %"


def interval_text(difference: LossDifference) -> str:
    """Write the interval of a difference of losses, as shares of the base's."""
    low, high = (percent_text(difference, one) for one in (difference.low, difference.high))
    return f"{low.removesuffix(' %')} to {high}"


def macs_text(macs: float) -> str:
    """Format macs with the digits of the paper's tables."""
    return f"{macs / 1e9:.2f} G" if macs >= 1e9 else f"{macs / 1e6:.2f} M"


def bytes_text(count: float) -> str:
    """Format bytes with three digits, as decimal multiples."""
    return f"{count / 1e9:.3g} GB" if count >= 1e9 else f"{count / 1e6:.3g} MB"


def millions_text(count: float) -> str:
    """Format a number of parameters in millions."""
    return f"{count / 1e6:.2f} M"


def loss_text(loss: float | None) -> str:
    """Format a loss; None becomes empty."""
    return "" if loss is None else f"{loss:.5f}"


def duration(seconds: float) -> str:
    """Format a duration in readable units."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"


def short_names(roots: Sequence[Path]) -> list[str]:
    """Return the part of each folder's path that differs from the others', of one its name."""
    if len(roots) == 1:
        return [roots[0].name]
    parts = [display_path(root).split("/") for root in roots]
    shared = takewhile(lambda level: len(set(level)) == 1, zip(*parts, strict=False))
    common = len(list(shared))
    return ["/".join(part[common:]) or "." for part in parts]
