"""Numbers as text, and the conclusions of a run in words."""

from typing import TYPE_CHECKING

from tdc_ray.runs.results import GroupResult, Results

if TYPE_CHECKING:
    pass  # imported where it is needed: it takes a second


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
    labels = ""
    if evaluation.labels is not None:
        labels = f"{evaluation.labels}, guidance {evaluation.guidance_scale:g}, "
    spent = tdc.train_macs + results.prune.search_macs
    if results.given_base is None:
        cost = (
            f"Training took {spent / base.train_macs:.2f} times the base's macs in all, so the "
            "base alone had less; whether it would have gained as much from the same macs is not "
            "shown here (experiments/main_results.py compares)."
        )
    else:
        cost = (
            f"The base was given ({results.given_base.source}): what its training took is not "
            f"known and counts 0 here. The experts took {spent:.2e} macs beyond it; whether the "
            "base would have gained as much from these is not shown."
        )
    lines = [
        f"Shown: {results.metric} {tdc.score:.3f} against the base's {base.score:.3f} ({better}; "
        f"lower is better) at {tdc.macs / base.macs:.3f} of its macs per step, on "
        f"{evaluation.num_images} images, {evaluation.num_inference_steps} {evaluation.sampler} "
        f"steps, eta {evaluation.eta:g}, seed {evaluation.seed}, {labels}{evaluation.weights} "
        f"weights in {evaluation.precision}, against {evaluation.reference}.",
        cost,
        "One training seed shows no spread.",
    ]
    if results.metric != "fid":
        lines.append(
            f"{results.metric} is a Frechet distance on features of {evaluation.features}: it is "
            "no FID and can be compared only with runs on the same data."
        )
    return lines + [f"Note: {note}" for note in results.prune.notes]


def macs_text(macs: float) -> str:
    """Format macs with the digits of the paper's tables."""
    return f"{macs / 1e9:.2f} G" if macs >= 1e9 else f"{macs / 1e6:.2f} M"


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
