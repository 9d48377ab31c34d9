"""Algorithm 1 from start to end: plan, base, pruning rounds and fine-tunes, pipeline, scores."""

import logging
import math
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from tdc_ray.config.compute import ComputeConfig
from tdc_ray.config.data import BASE_SAMPLES
from tdc_ray.config.run import RunConfig, from_json, to_json, with_absolute_paths
from tdc_ray.data.latents import prepare_latents, training_data
from tdc_ray.diffusion.plan import Plan
from tdc_ray.diffusion.plan import to_json as plan_to_json
from tdc_ray.execution.cache import ResultCache
from tdc_ray.execution.chain import Chain
from tdc_ray.execution.events import EventSink
from tdc_ray.execution.item import actor_resources
from tdc_ray.execution.ray.cache_session import CacheSession
from tdc_ray.execution.ray.cluster import connected, with_gpus
from tdc_ray.execution.ray.event_collector import collecting
from tdc_ray.execution.ray.pool import Pool
from tdc_ray.execution.ray.service import Service
from tdc_ray.execution.timeline import Timeline, load_history, usage
from tdc_ray.models.first_stage import copy_first_stage
from tdc_ray.models.network_config import NetworkConfig
from tdc_ray.models.unet2d.architectures import base_unet
from tdc_ray.pruning.context import PruningContext
from tdc_ray.pruning.group import group_searches
from tdc_ray.pruning.latency import timed_space
from tdc_ray.pruning.memory import MemoryBank, MemoryEntry
from tdc_ray.pruning.proxies.language_model import LLM_SERVICE
from tdc_ray.pruning.proxies.llm_gateway import LLMGateway
from tdc_ray.pruning.space import Space
from tdc_ray.runs.budget import (
    Timing,
    has_room,
    mean_limit,
    steps_by_count,
    steps_by_time,
    timing_of,
    trains_base,
    with_time_left,
)
from tdc_ray.runs.choices import (
    with_choices,
    with_pretrained,
    with_smaller_network,
    with_steps_of,
)
from tdc_ray.runs.collect_results import RunOutcome, collect_results, mean_over_sampling_steps
from tdc_ray.runs.comparison import (
    LongerBase,
    finish_comparison,
    is_compared,
    train_and_measure,
)
from tdc_ray.runs.evaluation.evaluate import (
    Score,
    evaluate,
    num_sampled,
    prepare_features,
    save_real_images,
    score,
    unscored_samples,
)
from tdc_ray.runs.evaluation.features import FeatureSpec, choose_features
from tdc_ray.runs.evaluation.held_out import (
    held_out_text,
    loss_chains,
    mean_losses,
    score_by_loss,
)
from tdc_ray.runs.events import (
    CandidateMeasured,
    ImagesSampled,
    PlanMade,
    RunFinished,
    SettingsSaved,
    WorkersUsed,
)
from tdc_ray.runs.pipelines import save_index
from tdc_ray.runs.preflight import (
    check,
    check_limits,
    refuse_other_settings,
    space_and_plan,
)
from tdc_ray.runs.pretrained.importer import with_first_stage
from tdc_ray.runs.pretrained.notes import base_notes
from tdc_ray.runs.results import Results, load_results, save_results
from tdc_ray.runs.same_images import check_images, note_images, warn_of_other_images
from tdc_ray.runs.stages.base import checkpoint_of_moments, make_base
from tdc_ray.runs.stages.base_samples import draw_base_samples, with_base_samples
from tdc_ray.runs.stages.budgets import finetunes, finetunes_by_excess, measured_plan
from tdc_ray.runs.stages.expert import Expert, make_expert, pruning_context
from tdc_ray.runs.stages.precision import Stage, resolve_auto_precision
from tdc_ray.runs.stages.step_times import step_times
from tdc_ray.runs.stages.timing import expert_times
from tdc_ray.storage.files import exists, read_json, remove, write_json
from tdc_ray.storage.lease import hold_lease
from tdc_ray.storage.object_store import display_path, resolve_path
from tdc_ray.storage.provenance import commit, machine, versions
from tdc_ray.storage.run_dir import FIRST_STAGE_DIR, RunDir

QUICKER = 0.9
"""Share of a step's time that one of a smaller network takes, where it pays to go on so."""

Checked: TypeAlias = tuple[NetworkConfig, Space, Plan]
"""What ``check`` returns."""

logger = logging.getLogger(__name__)

STAGES: tuple[Stage, ...] = ("base", "prune", "finetune")
"""Stages that have a precision; a pretrained base has none."""


def run(
    config: RunConfig,
    folder: Path,
    sinks: Sequence[EventSink] = (),
    store: Path | None = None,
    began: float | None = None,
) -> Results:
    """Run algorithm 1, or the rest of it that an earlier call did not finish.

    Args:
        config: The settings.
        folder: The run directory, or its URI. The same call resumes an interrupted one.
        sinks: Called with the run's events: those of ``execution.events`` and ``runs.events``.
        store: Folder or URI of a cache (see ``execution.cache``) that runs share: results that are
            in it are reused, others are added. None means that all is computed here.
        began: When ``--hours`` began, by ``time.perf_counter``; None means now.

    Returns:
        The content of ``results.json``.

    Raises:
        TdcError: Something went wrong; raised before work starts wherever that can be known.
    """
    started = time.perf_counter()
    began = started if began is None else began
    run_dir = RunDir(resolve_path(folder).resolve())
    config = with_absolute_paths(config)
    config, pretrained = with_pretrained(config, run_dir.config)
    config = with_base_samples(with_first_stage(config, pretrained), pretrained)
    config = with_choices(config, run_dir.config)
    refuse_other_settings(run_dir.config, config, "run directory", "--run-dir")
    earlier = load_results(run_dir.results) if exists(run_dir.results) else None
    if earlier is not None:
        if is_compared(earlier, config.compare):
            logger.info("%s is finished; nothing is done again", display_path(run_dir.root))
            warn_of_other_images(run_dir.root, config.data)
            return earlier
        logger.info("%s is finished but for the comparison", display_path(run_dir.root))
    network, space, plan = check(config, pretrained)
    check_images(run_dir.root, config.data)
    if pretrained is not None:
        for note in base_notes(pretrained, config.diffusion, config.sampler):
            logger.warning("%s", note)
    with hold_lease(run_dir.root), connected(local_cpus(config.compute)):
        is_first = not exists(run_dir.config)
        is_timed = config.budget.hours is not None and is_first
        if is_first:
            _remove_leftovers(run_dir)
            config = steps_by_count(config, plan, space.macs_base)
        if not is_timed:
            _save_settings(run_dir, config, plan)
        asked, config = config, replace(config, compute=with_gpus(config.compute))
        spec = choose_features(config.data, config.evaluate, run_dir.features)
        timeline, cache = Timeline(run_dir.timeline), _open_cache(store, run_dir)
        with (
            collecting(sinks) as events,
            CacheSession(cache) as session,
            Pool(config.compute, events, timeline, session, services_of(config)) as pool,
        ):
            if not is_timed:
                events(SettingsSaved(to_json(asked)))
            if not config.measures_limits:
                events(PlanMade(plan))
            # These workers end before stage 1, which may need the whole cluster.
            with Pool(config.compute, events, timeline, session) as workers:
                if config.data.source == BASE_SAMPLES:
                    make_base(run_dir, config, pretrained, events, session)
                    drawing = draw_base_samples(config, run_dir.base_unet)
                    workers.run({"base samples": drawing}, "base samples")
                elif not exists(run_dir.real_images):
                    save_real_images(run_dir.real_images, config.data)
                training = training_data(config.data, config.evaluate.cache_dir)
                latents = prepare_latents(training, config.sampler.negative_prompt)
                workers.run({"latents": latents}, "latents")
                has_stage_1 = trains_base(config) or config.compare.kind != "none"
                stages = STAGES if has_stage_1 else STAGES[1:]
                hired = time.perf_counter()
                precision = resolve_auto_precision(run_dir, config, network, stages)
                config = workers.run({"precision": precision}, "precision")["precision"]
                timing = None
                if is_timed:
                    starting = time.perf_counter() - hired
                    config, (network, space, plan), timing = _within_hours(
                        run_dir, config, (network, space, plan), spec, workers, starting, began
                    )
                    asked = replace(with_steps_of(asked, config), model=config.model)
                    _save_settings(run_dir, asked, plan)
                    events(SettingsSaved(to_json(asked)))
                if config.prune.objective == "latency" and config.prune.method != "none":
                    size = config.prune.latency_batch_size
                    timed = timed_space(run_dir.latency, network, space, size)
                    space = workers.run({"latency": timed}, "latency")["latency"]
                    check_limits(config.prune, space, plan)
            stage_1 = time.perf_counter()
            make_base(run_dir, config, pretrained, events, session)
            if timing is not None:
                now = time.perf_counter()
                config = with_time_left(config, timing, now - stage_1, now - began)
                # Trackers that take settings once keep those from before.
                write_json(run_dir.config, to_json(with_steps_of(asked, config)))
            checkpoint = checkpoint_of_moments(run_dir, config, plan.groups, cache)
            context = pruning_context(
                run_dir,
                config,
                base_checkpoint=checkpoint,
                models_all_groups=config.models_all_groups,
            )
            if config.measures_limits:
                plan = _measure_limits(context, space, plan, pool)
                check_limits(config.prune, space, plan)
                events(PlanMade(plan))
            memory = _open_memory(run_dir, config.prune.max_per_round, events)
            experts, reference = _make_experts(context, config, space, plan, spec, memory, pool)
            save_index(run_dir, config, plan.groups)
            times = expert_times(run_dir, plan, config.prune.latency_batch_size)
            measured = pool.run({"times": times}, "times")["times"]
            longer = None
            if config.compare.kind != "none":
                longer = train_and_measure(run_dir, config, experts, cache)
            base, tdc, longer_base = _evaluate(
                run_dir, config, space, plan, experts, spec, pool, longer
            )
            comparison = None
            if longer_base is not None:
                comparison = finish_comparison(run_dir, config, spec, experts, longer_base, pool)
            timeline.flush()
            if exists(run_dir.real_images):
                events(ImagesSampled("real", run_dir.real_images))
            for model in ("base", "tdc", "longer-base"):
                if exists(path := run_dir.samples / model / "0000000.npz"):
                    events(ImagesSampled(model, path))
            history = load_history(run_dir.timeline)
            used = usage(history)
            events(WorkersUsed(history, used))
            has_cache = store is not None
            outcome = RunOutcome(
                plan, experts, measured, base, tdc, spec, reference, used, has_cache, comparison
            )
            # A comparison that is added later is no part of how long the run took.
            seconds = earlier.seconds.wall if earlier else time.perf_counter() - started
            results = collect_results(run_dir, config, outcome, seconds)
            save_results(run_dir.results, results)
            events(RunFinished(results))
            if timing is not None:
                logger.info(
                    "--hours %g: took %.1f of %.1f minutes",
                    config.budget.hours,
                    (time.perf_counter() - began) / 60,
                    60 * (config.budget.hours or 0),
                )
        return results


def _within_hours(
    run_dir: RunDir,
    config: RunConfig,
    checked: Checked,
    spec: FeatureSpec | None,
    workers: Pool,
    starting: float,
    began: float,
) -> tuple[RunConfig, Checked, Timing]:
    """Time steps of the base, alone, and of an expert on all workers; set them by ``--hours``.

    Where there would be few, architecture auto takes a smaller network.

    Args:
        run_dir: The run.
        config: Its settings.
        checked: Its network, space and plan.
        spec: The features that images are scored by. None means that none is scored.
        workers: Time the steps.
        starting: Seconds that the first worker took to start, if it is known.
        began: When the hours began, by ``time.perf_counter``.

    Returns:
        The settings, what they came to, and what the parts of the run will take.

    Raises:
        ConfigError: There is no room for a single step of base and fine-tunes.
    """
    num_experts = workers.num_workers(actor_resources(config.compute))
    logger.info("timing steps of the base, then of experts, for --hours")
    before = math.inf  # seconds of a step of the larger network
    while True:
        network, space, plan = checked
        share = mean_limit(config, plan)
        base, experts = step_times(run_dir, config, network, share, num_experts)
        asked_at = time.perf_counter()
        alone = workers.run({"base": base}, "step times")["base"]
        timed_at = time.perf_counter()
        starting = max(starting, timed_at - asked_at - alone.seconds)
        timing = partial(timing_of, config, network, plan, spec, alone, macs_base=space.macs_base)
        # A GPU may take as long for a step of small networks, however small they are.
        if not trains_base(config) or alone.step_seconds > QUICKER * before:
            break
        guess = timing([alone] * num_experts, start_seconds=starting)  # experts as fast as it
        smaller = with_smaller_network(config, partial(has_room, config, guess, timed_at - began))
        if smaller == config:
            break
        network = base_unet(smaller.model, smaller.conditioning)
        checked = network, *space_and_plan(smaller, network)
        config, before = smaller, alone.step_seconds
    together = list(workers.run(experts, "step times").values())
    done = time.perf_counter()
    starting = max(starting, done - timed_at - max(one.seconds for one in together))
    found = timing(together, start_seconds=starting)
    config, found = steps_by_time(config, found, done - began)
    return config, checked, found


def _remove_leftovers(run_dir: RunDir) -> None:
    """Remove what decides or shows a run of a call that ended before its settings were written."""
    precisions = (run_dir.precision / f"{stage}.json" for stage in STAGES)
    shown = (run_dir.plan_plot, run_dir.timeline, run_dir.loggers)
    decided = (run_dir.features, run_dir.real_images, run_dir.base_result)
    for path in (*decided, *shown, *precisions):
        remove(path)


def _save_settings(run_dir: RunDir, config: RunConfig, plan: Plan) -> None:
    """Write settings, versions, plan, first stage, images' fingerprint, unless a call before did.

    What is compared may be asked for later: it is then the only setting that is written anew.

    Raises:
        StorageError: The first stage is no longer that of the earlier call.
    """
    if config.data.first_stage is not None:
        copy_first_stage(Path(config.data.first_stage), run_dir.experts / FIRST_STAGE_DIR)
    if exists(run_dir.config):
        before = from_json(read_json(run_dir.config))
        if before.compare != config.compare:
            write_json(run_dir.config, to_json(replace(before, compare=config.compare)))
        return
    write_json(
        run_dir.environment, {"versions": versions(), "commit": commit(), "machine": machine()}
    )
    if not config.measures_limits:
        write_json(run_dir.plan, plan_to_json(plan))
    note_images(run_dir.root, config.data)
    write_json(run_dir.config, to_json(config))


def _open_cache(root: Path | None, run_dir: RunDir) -> ResultCache | None:
    if root is None:
        return None
    return ResultCache(resolve_path(root).resolve(), display_path(run_dir.root))


def _open_memory(run_dir: RunDir, max_per_round: int, events: EventSink) -> MemoryBank:
    """Open the memory bank; emit its entries, and later every new one."""

    def emit(entry: MemoryEntry) -> None:
        events(CandidateMeasured(entry, 1 + entry.round * max_per_round + entry.candidate))

    memory = MemoryBank(run_dir.memory, emit)
    for entry in sorted(memory.all(), key=lambda one: (one.round, one.candidate)):
        emit(entry)
    return memory


def _measure_limits(context: PruningContext, space: Space, plan: Plan, pool: Pool) -> Plan:
    """Share the budget among the groups by what cuts cost in each; write the plan."""
    searches = group_searches(context, space, plan.groups)
    plan = pool.run({"limits": measured_plan(plan, searches)}, "limits")["limits"]
    write_json(context.run_dir.plan, plan_to_json(plan))
    return plan


def _make_experts(
    context: PruningContext,
    config: RunConfig,
    space: Space,
    plan: Plan,
    spec: FeatureSpec | None,
    memory: MemoryBank,
    pool: Pool,
) -> tuple[list[Expert], str]:
    """Run stage 2, all groups side by side, and prepare the reference of the scores beside it."""
    logger.info("stage 2: %d groups, method %s", len(plan.groups), config.prune.method)
    searches = group_searches(context, space, plan.groups)
    trains = finetunes(config.finetune, plan.groups)
    if config.finetune.allocation == "excess":
        shared = finetunes_by_excess(config.finetune, searches)
        trains = pool.run({"allocation": shared}, "allocation")["allocation"]
    if config.finetune.allocation != "equal":
        steps = ", ".join(str(train.num_steps) for train in trains)
        logger.info("fine-tune steps by group: %s", steps)
    chains: dict[str, Any] = {
        search.name: make_expert(search, memory, train, config.compute)
        for search, train in zip(searches, trains, strict=True)
    }
    if spec is not None:
        chains["features"] = prepare_features(context.run_dir, config.data, config.evaluate, spec)
    done = pool.run(chains, "experts")
    reference = held_out_text(config) if spec is None else done["features"]
    return [done[search.name] for search in searches], reference


def _evaluate(
    run_dir: RunDir,
    config: RunConfig,
    space: Space,
    plan: Plan,
    experts: Sequence[Expert],
    spec: FeatureSpec | None,
    pool: Pool,
    longer: Chain[LongerBase] | None,
) -> tuple[Score, Score, LongerBase | None]:
    """Score the base and the experts on the same noise, while the base trains on if it does."""
    logger.info("evaluation: %d images of each model", num_sampled(config.evaluate, spec))
    tdc_macs = mean_over_sampling_steps(plan, [expert.macs for expert in experts])
    chains: dict[str, Any] = {} if longer is None else {"longer-base": longer}
    if spec is None:
        losses = loss_chains(run_dir, config, experts, "base", space.macs_base)
        chains |= losses
        chains["base"] = unscored_samples(run_dir, config, "base", space.macs_base)
        chains["tdc"] = unscored_samples(run_dir, config, "tdc", tdc_macs)
        done = pool.run(chains, "evaluation")
        mean = mean_losses(run_dir, config, plan.groups, "base")
        measured = [done[name] for name in losses]
        return (
            score_by_loss(done["base"], mean.loss_base, measured),
            score_by_loss(done["tdc"], mean.loss_tdc, measured),
            done.get("longer-base"),
        )
    base = evaluate(run_dir, config, spec, "base", space.macs_base)
    tdc = evaluate(run_dir, config, spec, "tdc", tdc_macs)
    done = pool.run({**chains, **base, **tdc}, "evaluation")
    return (
        score(run_dir, [done[name] for name in base], spec, config.evaluate.metrics),
        score(run_dir, [done[name] for name in tdc], spec, config.evaluate.metrics),
        done.get("longer-base"),
    )


def services_of(config: RunConfig) -> dict[str, Service]:
    """Return the services that the work of a run needs."""
    if config.prune.method != "llm":
        return {}
    gateway = partial(LLMGateway, config.proxy)
    return {LLM_SERVICE: Service(gateway, config.proxy.max_concurrent)}


def local_cpus(compute: ComputeConfig) -> int:
    """Return the logical CPUs of a local Ray: the machine's, or as many as base workers need."""
    return max(os.cpu_count() or 1, compute.cpus_per_base_worker * compute.num_base_workers)
