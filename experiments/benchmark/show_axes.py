"""How showing a run grows with its groups: its results, and the report on it."""

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmark.driver_axes import CONFIG, filled
from benchmark.growth import Axis, ScalingFlags, Way, timed
from tdc_ray.diffusion.plan import plan_groups, to_json
from tdc_ray.models.unet2d.architectures import architecture
from tdc_ray.pruning.space import Space, space_of
from tdc_ray.reporting.console import print_results
from tdc_ray.reporting.html.write import write_report
from tdc_ray.runs.results import (
    EvaluationResult,
    GroupResult,
    ModelResult,
    PlanResult,
    PruneResult,
    Results,
    StageSeconds,
    load_results,
    save_results,
)
from tdc_ray.storage.files import write_json
from tdc_ray.storage.run_dir import RunDir


def showing(flags: ScalingFlags, folder: Path) -> list[Axis]:
    """Save, load and print the results of N groups, and write the report on them."""
    space, counts = space_of(architecture("digits")), flags.some(5, 10, 20, 40)
    roots = {}
    for count in counts:
        plan_config = dataclasses.replace(CONFIG.plan, num_groups=count)
        plan = plan_groups(CONFIG.diffusion, plan_config, CONFIG.sampler)
        run_dir = RunDir(folder / f"run-{count}")
        write_json(run_dir.plan, to_json(plan))
        save_results(run_dir.results, results(space, len(plan.groups)))
        filled(run_dir.memory, space, len(plan.groups), 3)
        roots[len(plan.groups)] = run_dir

    def show(run_dir: RunDir) -> None:
        found = load_results(run_dir.results)
        save_results(run_dir.results, found)
        print_results(Console(quiet=True), found)

    def way(function: Callable[[Any], object], pick: Callable[[RunDir], Any]) -> list[Way]:
        return [(n, partial(function, pick(run_dir))) for n, run_dir in roots.items()]

    shown = timed(flags, "results: load, save, print", "groups", way(show, lambda run: run))
    if flags.smoke:  # a page of figures takes a second
        return [shown]
    reported = way(write_report, lambda run: [run.root])
    return [shown, timed(flags, "the HTML report", "groups", reported)]


def results(space: Space, num_groups: int) -> Results:
    """Create results of so many groups."""
    model = ModelResult(
        score=4.0,
        macs=float(space.macs_base),
        num_params=1e6,
        train_steps=100,
        train_macs=1e12,
        images_per_second=10.0,
    )
    groups = tuple(
        GroupResult(
            index=index,
            timesteps=(10 * index, 10 * index + 9),
            macs_limit=space.macs_base,
            macs=space.macs_base,
            num_params=10**6,
            widths=space.full,
            loss_base=0.01,
            loss_cut=0.03,
            loss_refit=0.02,
            loss_finetuned=0.015,
            source="offline",
        )
        for index in range(num_groups)
    )
    return Results(
        preset="digits",
        seed=0,
        dataset="digits",
        metric="fd_digits_cnn",
        base=model,
        tdc=model,
        plan=PlanResult(
            k=0.5, num_groups=num_groups, schedule="snr", mean_macs_limit=1e6, notes=()
        ),
        groups=groups,
        prune=PruneResult(
            method="offline",
            rounds=3,
            candidates=3,
            seconds=1.0,
            search_macs=1e9,
            prompt_tokens=0,
            completion_tokens=0,
        ),
        evaluation=EvaluationResult(
            sampler="ddim",
            num_inference_steps=100,
            eta=0.0,
            seed=0,
            num_images=10,
            reference="none",
            features="none",
            weights="EMA",
        ),
        seconds=StageSeconds(base=1.0, prune=1.0, finetune=1.0, evaluate=1.0, wall=4.0),
        versions={},
        commit=None,
    )
