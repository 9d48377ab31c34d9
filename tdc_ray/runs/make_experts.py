"""Experts of a given base, step by step: pruned to a plan, then fine-tuned; the Python API's jobs.

The chains are those of ``runs.run``, and so are the results.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

from tdc_ray.config.run import RunConfig
from tdc_ray.data.latents import prepare_latents, training_data
from tdc_ray.diffusion.plan import Plan
from tdc_ray.execution.chain import Chain
from tdc_ray.models.network_config import NetworkConfig
from tdc_ray.models.units import KeptIndices
from tdc_ray.pruning.group import group_searches
from tdc_ray.pruning.latency import timed_space
from tdc_ray.pruning.memory import MemoryBank
from tdc_ray.pruning.proxies.language_model import check_proxy
from tdc_ray.pruning.space import Space, space_of
from tdc_ray.runs.pipelines import save_index
from tdc_ray.runs.preflight import check_data, check_limits, check_network
from tdc_ray.runs.pretrained.importer import import_base
from tdc_ray.runs.pretrained.sources import BASE_FILE, PretrainedBase
from tdc_ray.runs.results import GroupResult
from tdc_ray.runs.stages.base_samples import draw_base_samples
from tdc_ray.runs.stages.budgets import finetunes, finetunes_by_excess, measured_plan
from tdc_ray.runs.stages.expert import (
    finetune_and_save,
    group_result,
    make_expert,
    pruning_context,
)
from tdc_ray.runs.stages.precision import Stage, resolve_auto_precision
from tdc_ray.runs.workers import RunChains
from tdc_ray.storage.files import exists
from tdc_ray.storage.lease import hold_lease
from tdc_ray.storage.run_dir import RunDir


@dataclass(frozen=True, slots=True)
class MadeExperts:
    """Experts in a run directory's ``experts``, and their results."""

    config: RunConfig
    """The settings, without ``auto`` where a precision was measured."""

    plan: Plan
    """With the limits that were measured, if they were."""

    groups: tuple[GroupResult, ...]
    """One for each group, in order."""


def prune_to_plan(
    run_dir: RunDir,
    config: RunConfig,
    base: PretrainedBase,
    plan: Plan,
    workers: AbstractContextManager[RunChains],
) -> MadeExperts:
    """Prune a base to every group's limit, refit, and save the experts; no gradient step is taken.

    The same call resumes an interrupted one.

    Args:
        run_dir: Where everything goes.
        config: The settings; those of the fine-tune do not count.
        base: The base.
        plan: The groups.
        workers: Who runs the work.

    Raises:
        TdcError: Something went wrong; raised before work starts wherever that can be known.
    """
    network = check_network(config, base)
    space = space_of(network, config.prune.space, config.prune.channel_multiple)
    if config.prune.objective == "macs":
        check_limits(config.prune, space, plan)
    check_data(config, network)
    if config.prune.method == "llm":
        check_proxy(config.proxy)
    with hold_lease(run_dir.root), workers as run:
        _import(run_dir, config, base)
        prepared = _prepare(run_dir, config, network, space, ["prune"])
        config, space = run({"prepare": prepared})["prepare"]
        check_limits(config.prune, space, plan)
        context = pruning_context(run_dir, config, models_all_groups=config.models_all_groups)
        if config.measures_limits:
            limits = measured_plan(plan, group_searches(context, space, plan.groups))
            plan = run({"limits": limits})["limits"]
            check_limits(config.prune, space, plan)
        memory = MemoryBank(run_dir.memory)
        untrained = replace(config.finetune, num_steps=0, allocation="equal")
        searches = group_searches(context, space, plan.groups)
        experts = run(
            {one.name: make_expert(one, memory, untrained, config.compute) for one in searches}
        )
        save_index(run_dir, config, plan.groups)
    groups = tuple(group_result(experts[one.name], space.macs_base) for one in searches)
    return MadeExperts(config, plan, groups)


def finetune_pruned(
    run_dir: RunDir,
    config: RunConfig,
    base: PretrainedBase,
    plan: Plan,
    pruned: Sequence[tuple[GroupResult, KeptIndices]],
    workers: AbstractContextManager[RunChains],
) -> MadeExperts:
    """Fine-tune what :func:`prune_to_plan` kept of the base in every group, and save the experts.

    Every expert starts from the base, pruned and refitted, as in a run. The same call resumes an
    interrupted one.

    Args:
        run_dir: Where everything goes; another one than the pruning's.
        config: The settings.
        base: The base.
        plan: The groups.
        pruned: What is known of each group, and what is kept of the base there.
        workers: Who runs the work.

    Raises:
        TdcError: Something went wrong; raised before work starts wherever that can be known.
    """
    network = check_network(config, base)
    space = space_of(network, config.prune.space, config.prune.channel_multiple)
    check_data(config, network)
    with hold_lease(run_dir.root), workers as run:
        _import(run_dir, config, base)
        prepared = _prepare(run_dir, config, network, space, ["prune", "finetune"])
        config, space = run({"prepare": prepared})["prepare"]
        context = pruning_context(run_dir, config, models_all_groups=config.models_all_groups)
        searches = group_searches(context, space, plan.groups)
        trains = finetunes(config.finetune, plan.groups)
        if config.finetune.allocation == "excess":
            shared = finetunes_by_excess(config.finetune, searches)
            trains = run({"allocation": shared})["allocation"]
        tuned = run(
            {
                search.name: finetune_and_save(search, kept, train, config.compute)
                for search, (_, kept), train in zip(searches, pruned, trains, strict=True)
            }
        )
        save_index(run_dir, config, plan.groups)
    groups = tuple(
        replace(
            before,
            loss_finetuned=tuned[search.name].loss_finetuned,
            train_steps=tuned[search.name].train_steps,
        )
        for search, (before, _) in zip(searches, pruned, strict=True)
    )
    return MadeExperts(config, plan, groups)


def _import(run_dir: RunDir, config: RunConfig, base: PretrainedBase) -> None:
    if not exists(run_dir.base / BASE_FILE):  # which comes last
        import_base(base, config, run_dir.base)


def _prepare(
    run_dir: RunDir,
    config: RunConfig,
    network: NetworkConfig,
    space: Space,
    stages: Sequence[Stage],
) -> Chain[tuple[RunConfig, Space]]:
    """Compute what all groups need: images or latents, the faster precision, times of units."""
    yield from draw_base_samples(config, run_dir.base_unet)
    yield from prepare_latents(training_data(config.data, config.evaluate.cache_dir))
    config = yield from resolve_auto_precision(run_dir, config, network, stages)
    if config.prune.objective == "latency" and config.prune.method != "none":
        size = config.prune.latency_batch_size
        space = yield from timed_space(run_dir.latency, network, space, size)
    return config, space
