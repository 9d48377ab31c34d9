"""Runs chains of work items over a pool of Ray actors; what to do is decided by ``policy``."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayTaskError

from tdc_ray.distributed.cluster import Board, node_resources
from tdc_ray.distributed.policy import Action, Failure, after_failure, next_item, num_actors
from tdc_ray.errors import WorkFailedError
from tdc_ray.progress import ProgressView
from tdc_ray.settings import ComputeConfig
from tdc_ray.work import Chain, Result, WorkItem, finished, run_item

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LOOKS = 5.0

T = TypeVar("T")


class _Worker:
    """A process that runs items, one at a time."""

    def __init__(self, num_threads: int, board: Board) -> None:
        import torch  # the driver of a pool may do without

        torch.set_num_threads(num_threads)
        self.board = board

    def run(self, item: WorkItem) -> Result:
        return run_item(item, self.board.reporter(item.key))


@dataclass(slots=True)
class _Progress(Generic[T]):
    """How far a chain has come: the items it waits for, and their results by key."""

    chain: Chain[T]
    waiting: list[WorkItem] | None = None
    """None before it has begun."""

    results: dict[str, Result] = field(default_factory=dict)


class Pool:
    """Actors, started as there is work for them; a context manager that ends them."""

    def __init__(self, compute: ComputeConfig, board: Board, view: ProgressView) -> None:
        self._compute, self._board, self._view = compute, board, view
        self._idle: list[ActorHandle] = []
        self._max_actors = 0
        self._running: dict[ray.ObjectRef, tuple[ActorHandle, str, WorkItem]] = {}
        self._attempts: dict[str, int] = {}

    def __enter__(self) -> "Pool":
        compute = self._compute
        resources = {"CPU": float(compute.cpus_per_actor), "GPU": compute.gpus_per_actor}
        self._max_actors = num_actors(compute.num_actors, node_resources(), resources)
        return self

    def __exit__(self, *_: object) -> None:
        for actor in [*self._idle, *(actor for actor, _, _ in self._running.values())]:
            ray.kill(actor)

    def run(self, chains: Mapping[str, Chain[T]]) -> dict[str, T]:
        """Run all chains side by side, and within each its items in order.

        A chain whose item fails for good ends there; the others are finished first.

        Returns:
            What each chain returned, by its name.

        Raises:
            WorkFailedError: Chains failed; names each and its reason.
        """
        self._attempts = {}
        values: dict[str, T] = {}
        failed: dict[str, str] = {}
        states: dict[str, _Progress[T]] = {}
        ready: list[tuple[str, WorkItem]] = []
        for name, chain in chains.items():
            states[name] = _Progress(chain)
            ready += self._advance(name, states[name], values)
        while ready or self._running:
            while ready and (self._idle or len(self._running) < self._max_actors):
                item = next_item(item for _, item in ready)
                entry = next(entry for entry in ready if entry[1] is item)
                ready.remove(entry)
                self._start(*entry)
            refs = list(self._running)
            done, _ = ray.wait(refs, num_returns=1, timeout=SECONDS_BETWEEN_LOOKS)
            for ref in done:
                name, item, outcome = self._collect(ref)
                if isinstance(outcome, Action):
                    ready.append((name, item))
                elif isinstance(outcome, str):
                    failed[name] = outcome
                    ready = [entry for entry in ready if entry[0] != name]
                elif name not in failed:
                    state = states[name]
                    state.results[item.key] = outcome
                    ready += self._advance(name, state, values)
        if failed:
            raise WorkFailedError(failed)
        return values

    def _advance(
        self, name: str, state: _Progress[T], values: dict[str, T]
    ) -> list[tuple[str, WorkItem]]:
        """Let a chain go on while all it waits for has results; give what is to be run."""
        while state.waiting is None or all(i.key in state.results for i in state.waiting):
            results = None
            if state.waiting is not None:
                results = [state.results.pop(i.key) for i in state.waiting]
            try:
                state.waiting = list(state.chain.send(results))  # type: ignore[arg-type]
            except StopIteration as stop:
                values[name] = stop.value
                return []
            missing = []
            for item in state.waiting:
                earlier = finished(item)
                if earlier is None:
                    missing.append((name, item))
                else:
                    state.results[item.key] = earlier
            if missing:
                return missing
        return []

    def _start(self, name: str, item: WorkItem) -> None:
        actor = self._idle.pop() if self._idle else self._new_actor()
        self._attempts[item.key] = self._attempts.get(item.key, 0) + 1
        self._view.start(item.key, item.num_steps)
        self._running[actor.run.remote(item)] = (actor, name, item)

    def _collect(self, ref: ray.ObjectRef) -> tuple[str, WorkItem, Result | Action | str]:
        """Give the result of an item, that it is to be tried again, or why it failed for good."""
        actor, name, item = self._running.pop(ref)
        self._view.finish(item.key)
        attempts = self._attempts[item.key]
        try:
            result: Result = ray.get(ref)
        except RayTaskError as error:
            self._idle.append(actor)
            failure, reason = Failure.OWN_ERROR, f"{type(error.cause).__name__}: {error.cause}"
        except RayActorError as error:
            ray.kill(actor)  # it may be alive but out of reach
            failure, reason = Failure.WORKER_LOST, f"its worker died {attempts} times: {error}"
        else:
            self._idle.append(actor)
            return name, item, result
        most = self._compute.max_attempts
        if after_failure(failure, attempts=attempts, max_attempts=most) is Action.GIVE_UP:
            return name, item, reason
        logger.warning("%s lost its worker (attempt %d); it starts again", item.key, attempts)
        return name, item, Action.RETRY

    def _new_actor(self) -> Any:
        compute = self._compute
        remote = ray.remote(
            num_cpus=compute.cpus_per_actor,
            num_gpus=compute.gpus_per_actor,
            max_restarts=0,
            max_task_retries=0,
            scheduling_strategy="SPREAD",
        )
        return remote(_Worker).remote(compute.cpus_per_actor, self._board)
