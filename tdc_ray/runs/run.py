"""Algorithm 1 from start to end: plan, base, pruning rounds and fine-tunes, pipeline, scores."""

import logging
import os
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tdc_ray.config.compute import ComputeConfig
from tdc_ray.config.run import RunConfig, to_json, with_absolute_paths
from tdc_ray.data.latents import prepare_latents, training_data
from tdc_ray.data.load import load_dataset
from tdc_ray.diffusion.plan import Plan
from tdc_ray.diffusion.plan import to_json as plan_to_json
from tdc_ray.execution.cache import ResultCache
from tdc_ray.execution.events import EventSink
from tdc_ray.execution.item import ItemResult
from tdc_ray.execution.ray.cache_session import CacheSession
from tdc_ray.execution.ray.cluster import connected
from tdc_ray.execution.ray.event_collector import collecting
from tdc_ray.execution.ray.pool import Pool
from tdc_ray.execution.ray.service import Service
from tdc_ray.execution.timeline import Timeline, load_history, usage
from tdc_ray.models.first_stage import copy_first_stage
from tdc_ray.models.network_config import NetworkConfig
from tdc_ray.models.structure import network_structure
from tdc_ray.models.unet2d.architectures import base_unet
from tdc_ray.models.unet2d.unet import unet_config
from tdc_ray.pruning.group import group_searches
from tdc_ray.pruning.latency import timed_space
from tdc_ray.pruning.memory import MemoryBank, MemoryEntry
from tdc_ray.pruning.proxies.llm_gateway import LLM_SERVICE, LLMGateway
from tdc_ray.pruning.space import Space
from tdc_ray.runs.collect_results import RunOutcome, collect_results, mean_over_sampling_steps
from tdc_ray.runs.evaluation.evaluate import Score, evaluate, prepare_features, score
from tdc_ray.runs.evaluation.features import FeatureSpec, choose_features
from tdc_ray.runs.events import CandidateMeasured, ImagesSampled, PlanMade, WorkersUsed
from tdc_ray.runs.pipelines import save_index
from tdc_ray.runs.preflight import _check_limits, _refuse_other_settings, check
from tdc_ray.runs.pretrained.importer import import_base, with_first_stage
from tdc_ray.runs.pretrained.sources import PretrainedBase, pretrained_base
from tdc_ray.runs.results import Results, load_results, save_results
from tdc_ray.runs.stages.base import BaseResult
from tdc_ray.runs.stages.expert import Expert, make_expert, pruning_context
from tdc_ray.runs.stages.precision import Stage, resolve_auto_precision
from tdc_ray.runs.stages.stage_1 import make_base
from tdc_ray.runs.stages.timing import expert_times
from tdc_ray.storage.files import exists, write_json
from tdc_ray.storage.lease import hold_lease
from tdc_ray.storage.object_store import display_path, resolve_path
from tdc_ray.storage.provenance import commit, machine, versions
from tdc_ray.storage.run_dir import FIRST_STAGE_DIR, RunDir

logger = logging.getLogger(__name__)

STAGES: tuple[Stage, ...] = ("base", "prune", "finetune")
"""Stages that have a precision; a base that is given is not trained."""


def run(
    config: RunConfig,
    folder: Path,
    sinks: Sequence[EventSink] = (),
    store: Path | None = None,
) -> Results:
    """Do the whole of algorithm 1, or what of it an earlier call has left to do.

    Args:
        config: The settings.
        folder: The run directory, or its URI. The same call goes on where an earlier one was cut.
        sinks: What takes the run's events: those of ``execution.events`` and ``runs.events``.
        store: Folder or URI of a store (see ``tdc_ray.execution.cache``): what other runs left
            there is taken, and what this one computes is left there. None: all is computed here.

    Returns:
        What is then in ``results.json``.

    Raises:
        TdcError: What went wrong, said before work starts wherever that can be known.
    """
    started = time.perf_counter()
    run_dir = RunDir(resolve_path(folder).resolve())
    config = with_absolute_paths(config)
    pretrained = pretrained_base(config.model)
    config = with_first_stage(config, pretrained)
    _refuse_other_settings(run_dir, config)
    if exists(run_dir.results):
        logger.info("%s is finished; nothing is done again", display_path(run_dir.root))
        return load_results(run_dir.results)
    space, plan = check(config, pretrained)
    with hold_lease(run_dir.root):
        _prepare(run_dir, config, plan)
        if pretrained is not None:
            _bring_in_base(run_dir, config, pretrained)
        spec = choose_features(config, load_dataset(config.data), run_dir.features)
        timeline = Timeline(run_dir.timeline)
        with (
            connected(local_cpus(config.compute)),
            collecting(sinks) as events,
            CacheSession(_store(store, run_dir)) as sharing,
            Pool(config.compute, events, timeline, sharing, services_of(config)) as pool,
        ):
            events(PlanMade(plan))
            training = training_data(config.data, config.evaluate.cache_dir)
            # Their actors end before stage 1.
            with Pool(config.compute, events, timeline, sharing) as encoders:
                encoders.run({"latents": prepare_latents(training)}, "latents")
                stages = STAGES if config.model.base is None else STAGES[1:]
                unet = (
                    unet_config(run_dir.base_unet)
                    if config.model.base
                    else base_unet(config.model, config.conditioning)
                )
                chain = resolve_auto_precision(run_dir, config, unet, stages)
                config = encoders.run({"precision": chain}, "precision")["precision"]
                space = _limited_space(run_dir, config, unet, space, plan, encoders)
            if config.model.base is None:
                make_base(run_dir, config, events, sharing)
            memory = _open_memory(run_dir, config, events)
            experts, reference = _make_experts(run_dir, config, space, plan, spec, memory, pool)
            times = pool.run({"times": expert_times(run_dir, config, plan)}, "times")["times"]
            scores = _evaluate(run_dir, config, space, plan, experts, spec, pool)
            timeline.flush()
            for model in ("base", "tdc"):
                events(ImagesSampled(model, run_dir.samples / model / "0000000.npz"))
            history = load_history(run_dir.timeline)
            used = usage(history)
            events(WorkersUsed(history, used))
        outcome = RunOutcome(
            plan, experts, times, *scores, spec, reference, used, store is not None
        )
        seconds = time.perf_counter() - started
        results = collect_results(run_dir, config, outcome, seconds)
        save_results(run_dir.results, results)
        return results


def _limited_space(
    run_dir: RunDir, config: RunConfig, unet: NetworkConfig, space: Space, plan: Plan, pool: Pool
) -> Space:
    """Give the space with what is limited in it: where that is time it is measured, once.

    Raises:
        LimitError: A group's limit is below what the smallest pruned model takes.
    """
    if config.prune.objective == "macs" or config.prune.method == "none":
        return space
    chain = timed_space(run_dir.latency, unet, space, config.prune.latency_batch_size)
    timed = pool.run({"latency": chain}, "latency")["latency"]
    _check_limits(config, timed, plan)
    return timed


def _store(root: Path | None, run_dir: RunDir) -> ResultCache | None:
    """Open a store for a run."""
    return (
        None
        if root is None
        else ResultCache(resolve_path(root).resolve(), display_path(run_dir.root))
    )


def _prepare(run_dir: RunDir, config: RunConfig, plan: Plan) -> None:
    """Write down settings, versions and plan, unless an earlier call did.

    Raises:
        StorageError: The first stage is no longer that of the earlier call.
    """
    if config.data.first_stage is not None:
        copy_first_stage(Path(config.data.first_stage), run_dir.experts / FIRST_STAGE_DIR)
    if exists(run_dir.config):
        return
    write_json(
        run_dir.environment, {"versions": versions(), "commit": commit(), "machine": machine()}
    )
    write_json(run_dir.plan, plan_to_json(plan))
    write_json(run_dir.config, to_json(config))


def _bring_in_base(run_dir: RunDir, config: RunConfig, pretrained: PretrainedBase) -> None:
    """Import a pretrained base, unless an earlier call did; nothing of it is trained."""
    if exists(run_dir.base_result):
        return
    folder = display_path(run_dir.base_unet)
    logger.info("stage 1: importing the base %s (%s)", pretrained.source, folder)
    started = time.perf_counter()
    structure = network_structure(import_base(pretrained, config, run_dir.base))
    seconds = time.perf_counter() - started
    result = BaseResult(structure.macs, structure.num_params, 0, 0.0, seconds)
    ItemResult(result).save(run_dir.base_result)


def _open_memory(run_dir: RunDir, config: RunConfig, events: EventSink) -> MemoryBank:
    """Open the memory bank; emits what it holds, and later what is added."""

    def emit(entry: MemoryEntry) -> None:
        step = 1 + entry.round * config.prune.num_candidates + entry.candidate
        events(CandidateMeasured(entry, step))

    memory = MemoryBank(run_dir.memory, emit)
    for entry in sorted(memory.all(), key=lambda one: (one.round, one.candidate)):
        emit(entry)
    return memory


def _make_experts(
    run_dir: RunDir,
    config: RunConfig,
    space: Space,
    plan: Plan,
    spec: FeatureSpec,
    memory: MemoryBank,
    pool: Pool,
) -> tuple[list[Expert], str]:
    """Stage 2: all groups side by side; the features are made ready beside them."""
    logger.info("stage 2: %d groups, method %s", len(plan.groups), config.prune.method)
    tasks = group_searches(pruning_context(run_dir, config), space, plan.groups)
    chains: dict[str, Any] = {
        task.name: make_expert(task, memory, config.finetune, config.compute) for task in tasks
    }
    done = pool.run(chains | {"features": prepare_features(run_dir, config, spec)}, "experts")
    experts = [done[task.name] for task in tasks]
    save_index(run_dir, config, plan.groups)
    return experts, done["features"]


def _evaluate(
    run_dir: RunDir,
    config: RunConfig,
    space: Space,
    plan: Plan,
    experts: Sequence[Expert],
    spec: FeatureSpec,
    pool: Pool,
) -> tuple[Score, Score]:
    """Score the base and the experts on the same noise."""
    logger.info("evaluation: %d images of each model", config.evaluate.num_images)
    base = evaluate(run_dir, config, spec, "base", space.macs_base)
    tdc = evaluate(
        run_dir,
        config,
        spec,
        "tdc",
        mean_over_sampling_steps(plan, [expert.macs for expert in experts]),
    )
    done = pool.run({**base, **tdc}, "evaluation")
    return (
        score(run_dir, [done[name] for name in base]),
        score(run_dir, [done[name] for name in tdc]),
    )


def services_of(config: RunConfig) -> dict[str, Service]:
    """Return the services that the work of a run needs."""
    if config.prune.method != "llm":
        return {}
    gateway = partial(LLMGateway, config.proxy)
    return {LLM_SERVICE: Service(gateway, config.proxy.max_concurrent)}


def local_cpus(compute: ComputeConfig) -> int:
    """Logical CPUs of a local Ray: the machine's, or as many as one base worker wants."""
    return max(os.cpu_count() or 1, compute.cpus_per_base_worker * compute.num_base_workers)
