"""The duration of stage 2 on a cluster of any size: its own items, in simulated time."""

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any

from tdc_ray.config.run import RunConfig, differences, from_json
from tdc_ray.config.simulation import SimulationConfig
from tdc_ray.data.latents import TrainingData
from tdc_ray.errors import StorageError
from tdc_ray.execution.chain import Barrier, Chain
from tdc_ray.execution.item import AnyItem
from tdc_ray.execution.simulator import FailureModel, Simulation, SimulationResult
from tdc_ray.execution.timeline import load_history
from tdc_ray.models.network_config import NetworkConfig
from tdc_ray.models.unet2d.architectures import base_unet
from tdc_ray.pruning.group import GroupSearch, group_searches
from tdc_ray.pruning.memory import MemoryBank
from tdc_ray.pruning.proxies.language_model import AskJob, ProposalReply
from tdc_ray.pruning.proxies.offline import propose_offline
from tdc_ray.pruning.quadratic_model import QuadraticModel
from tdc_ray.pruning.space import Space
from tdc_ray.pruning.tasks.candidates import CandidateResult
from tdc_ray.pruning.tasks.scores import ScoreResult
from tdc_ray.pruning.tasks.second_order import SecondOrderResult
from tdc_ray.pruning.tasks.sensitivities import SensitivityResult, StreamResult
from tdc_ray.runs.choices import with_choices
from tdc_ray.runs.preflight import space_and_plan
from tdc_ray.runs.stages.budgets import finetunes
from tdc_ray.runs.stages.expert import make_expert, pruning_context
from tdc_ray.runs.stages.finetune import FinetuneResult, ShortFinetuneResult
from tdc_ray.storage.files import read_json
from tdc_ray.storage.object_store import display_path, resolve_path
from tdc_ray.storage.run_dir import RunDir


def simulate_run(config: RunConfig, simulation: SimulationConfig) -> list[SimulationResult]:
    """Simulate stage 2 of a run, or of several side by side, for every number of workers.

    Budgets that are shared by models of the loss are not known (:func:`assumptions`), and no group
    waits for the models of the others.

    Raises:
        LimitError: A group's limit is below the smallest pruned model.
        StorageError: The run whose costs are used has no timeline, or other settings.
    """
    config = with_choices(config)
    network = base_unet(config.model, config.conditioning)
    seconds_of, searches = _costs(config, simulation), _searches(config, network)
    failures = FailureModel(
        failures_per_hour=simulation.failures_per_hour,
        joins_per_hour=simulation.joins_per_hour,
        seed=simulation.simulation_seed,
    )

    def checkpoint_every_s(item: AnyItem) -> float | None:
        if not item.key.endswith("/finetune"):
            return None
        share = config.finetune.checkpoint_every / max(1, item.num_steps)
        return seconds_of(item) * min(1.0, share)

    return [
        Simulation(
            {
                f"trial-{trial}/{search.name}": _dry_run(search, stages, f"trial-{trial}/")
                for trial in range(simulation.trials)
                for search, stages in searches
            },
            seconds_of,
            num_workers=num_workers,
            failures=failures,
            checkpoint_every_s=checkpoint_every_s,
            max_attempts=config.compute.max_attempts,
        ).run()
        for num_workers in simulation.workers
    ]


def assumptions(config: RunConfig) -> list[str]:
    """Return what a simulation takes for budgets that a run shares after stage 1."""
    notes = []
    if config.measures_limits:
        notes.append("every group's limit is the mean: plan.schedule measured sets it in the run")
    if config.finetune.allocation == "excess":
        notes.append("all fine-tunes are alike: finetune.allocation excess sets them in the run")
    return notes


def search_seconds(
    config: RunConfig, network: NetworkConfig, num_workers: int, macs_per_second: float
) -> float:
    """Return how long the search of a run would take, without its fine-tunes."""
    config = replace(config, finetune=replace(config.finetune, num_steps=0))
    chains = {
        search.name: _dry_run(search, stages, "") for search, stages in _searches(config, network)
    }
    simulation = Simulation(
        chains,
        lambda item: item.cost / (macs_per_second * item.num_workers),
        num_workers=num_workers,
    )
    return simulation.run().makespan_seconds


def _costs(config: RunConfig, simulation: SimulationConfig) -> Callable[[AnyItem], float]:
    """Return a function that estimates the seconds of an item: as measured, or by its macs."""
    measured: dict[str, float] = {}
    if simulation.costs is not None:
        run_dir = RunDir(resolve_path(simulation.costs))
        timeline, spans = run_dir.timeline, defaultdict(list)
        for span in load_history(timeline).spans:
            if span.outcome == "done" and span.ended is not None:
                spans[_kind(span.item)].append(span.ended - span.started)
        if not spans:
            raise StorageError(
                f"{display_path(timeline)} has no finished item: name a run that is further."
            )
        changed = differences(from_json(read_json(run_dir.config)), config)
        if changed:
            raise StorageError(
                f"--costs {display_path(run_dir.root)} has other settings: {'; '.join(changed)}. "
                "Leave them as that run's are, or leave --costs out: times then follow from macs."
            )
        measured = {kind: mean(seconds) for kind, seconds in spans.items()}
    return lambda item: measured.get(
        _kind(item.key), item.cost / (simulation.macs_per_second * item.num_workers)
    )


def _kind(key: str) -> str:
    """Return an item's key without round and number of a candidate: other ones are finalists."""
    return re.sub(r"round-\d+-candidate-\d+", "candidate", key)


_Stage = Sequence[AnyItem] | Barrier


def _searches(config: RunConfig, network: NetworkConfig) -> list[tuple[GroupSearch, list[_Stage]]]:
    """Return every group's search with the stages of its chain.

    The chain is the one of a run, on assumed results. Items of services are left out: they use no
    worker.
    """
    space, plan = space_and_plan(config, network)
    by_macs = replace(config, prune=replace(config.prune, objective="macs"))
    with TemporaryDirectory() as folder:
        run_dir = RunDir(Path(folder))
        context = pruning_context(
            run_dir,
            by_macs,
            TrainingData(config.data),
            models_all_groups=config.models_all_groups,
        )
        memory = MemoryBank(run_dir.memory)
        trains = finetunes(config.finetune, plan.groups)
        return [
            (search, _stages(make_expert(search, memory, train, config.compute), space))
            for search, train in zip(
                group_searches(context, space, plan.groups), trains, strict=True
            )
        ]


def _stages(chain: Chain[Any], space: Space) -> list[_Stage]:
    """Run a chain on results by which all steps have equal value; return its stages."""
    scores = {unit.name: [1.0] * unit.width for unit in space.units}
    assumed = {
        ScoreResult: ScoreResult(scores, 0.0, 0.0),
        SensitivityResult: SensitivityResult(scores, {}, 0.0, 0.0),
        StreamResult: StreamResult({}, 0.0, 0.0),
        SecondOrderResult: SecondOrderResult(scores, QuadraticModel({}, ()), 0.0, 0.0),
        CandidateResult: CandidateResult(1.0, None, 0.0, 0.0),
        ShortFinetuneResult: ShortFinetuneResult(1.0, 0.0, 0.0),
        FinetuneResult: FinetuneResult(0, 0, 1.0, 0, 0.0, 0.0),
    }
    stages: list[_Stage] = []
    results: Sequence[Any] | None = None
    while True:
        try:
            stage = next(chain) if results is None else chain.send(results)
        except StopIteration:
            return stages
        items = [] if isinstance(stage, Barrier) else stage
        results = [_assumed(item) or assumed[item.result_type] for item in items]
        if all(item.service is None for item in items):
            stages.append(stage)


def _assumed(item: AnyItem) -> Any:
    """Return a service's result: of a language model as many schemes as it may have measured."""
    if not isinstance(job := item.job, AskJob):
        return item.fallback_result
    schemes = tuple(propose_offline(job.request, job.memory))
    count = len(schemes)
    return ProposalReply(schemes, hypotheses=("",) * count, repaired=(False,) * count)


def _dry_run(search: GroupSearch, stages: Sequence[_Stage], prefix: str) -> Chain[None]:
    """Yield the stages, on workers that are all alike; groups of one trial meet at barriers."""
    participants = frozenset(f"{prefix}{name}" for name in search.participants)
    for stage in stages:
        if isinstance(stage, Barrier):
            yield replace(stage, participants=participants)
        else:
            yield [replace(item, resources=None) for item in stage]
