"""Runs chains of work items over a pool of Ray actors; what to do is decided by ``policy``."""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayTaskError

from tdc_ray.config import RunConfig
from tdc_ray.distributed.caller import start_caller, start_checked_caller
from tdc_ray.distributed.cluster import Board, node_resources
from tdc_ray.distributed.policy import Action, Failure, after_failure, next_item, num_actors
from tdc_ray.errors import WorkFailedError
from tdc_ray.progress import ProgressView
from tdc_ray.work import Chain, Chains, Result, WorkItem, run_item

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LOOKS = 5.0

T = TypeVar("T")

Entry = tuple[str, WorkItem]
"""An item that is to be run, with the name of its chain."""


class _Worker:
    """A process that runs items, one at a time."""

    def __init__(self, num_threads: int, board: Board) -> None:
        import torch  # the driver of a pool may do without

        torch.set_num_threads(num_threads)
        self.board = board

    def run(self, item: WorkItem) -> Result:
        return run_item(item, self.board.reporter(item.key))


class Pool:
    """Actors, started as there is work for them; a context manager that ends them.

    Where a language model is to be asked, entering makes sure that it can be.
    """

    def __init__(self, config: RunConfig, board: Board, view: ProgressView) -> None:
        self._compute, self._proxy = config.compute, config.proxy
        self._asks = config.prune.method == "llm"
        self._board, self._view = board, view
        self._caller: ActorHandle | None = None
        self._idle: list[ActorHandle] = []
        self._max_actors = 0
        self._running: dict[ray.ObjectRef, tuple[ActorHandle, str, WorkItem]] = {}
        self._attempts: Counter[tuple[str, str]] = Counter()

    def __enter__(self) -> "Pool":
        compute = self._compute
        if self._asks:
            self._caller = start_checked_caller(self._proxy)
        resources = {"CPU": float(compute.cpus_per_actor), "GPU": compute.gpus_per_actor}
        self._max_actors = num_actors(compute.num_actors, node_resources(), resources)
        return self

    def __exit__(self, *_: object) -> None:
        busy = [actor for actor, _, item in self._running.values() if not item.is_call]
        for actor in [*self._idle, *busy]:
            ray.kill(actor)

    def run(self, chains: Mapping[str, Chain[T]]) -> dict[str, T]:
        """Run all chains side by side, and within each its items in order.

        A chain whose item fails for good ends there; the others are finished first.

        Returns:
            What each chain returned, by its name.

        Raises:
            WorkFailedError: Chains failed; names each and its reason.
        """
        self._attempts.clear()
        under_way = Chains(chains)
        failed: dict[str, str] = {}
        ready = under_way.go_on()
        while ready or self._running:
            ready = self._start_some(ready)
            refs = list(self._running)
            done, _ = ray.wait(refs, num_returns=1, timeout=SECONDS_BETWEEN_LOOKS)
            for ref in done:
                name, item, outcome = self._collect(ref)
                if isinstance(outcome, Action):
                    ready += [(name, item)] if name not in failed else []
                elif isinstance(outcome, str):
                    failed[name] = outcome
                    under_way.drop(name)
                    ready = [entry for entry in ready if entry[0] != name]
                else:
                    under_way.put(name, item, outcome)
            ready += under_way.go_on()
        if failed:
            raise WorkFailedError(failed)
        return under_way.values

    def _start_some(self, ready: Sequence[Entry]) -> list[Entry]:
        """Start all calls, and as many other items as there are actors for; give what is left."""
        left = [entry for entry in ready if not entry[1].is_call]
        for name, item in ready:
            if item.is_call:
                if self._caller is None:
                    self._caller = start_caller(self._proxy)
                self._start(name, item, self._caller, self._caller.run.remote(item, self._board))
        while left and (self._idle or self._num_busy() < self._max_actors):
            chosen = next_item(item for _, item in left)
            name, item = next(entry for entry in left if entry[1] is chosen)
            left.remove((name, item))
            actor = self._idle.pop() if self._idle else self._new_actor()
            self._start(name, item, actor, actor.run.remote(item))
        return left

    def _num_busy(self) -> int:
        return sum(not item.is_call for _, _, item in self._running.values())

    def _start(self, name: str, item: WorkItem, actor: ActorHandle, ref: ray.ObjectRef) -> None:
        self._attempts[name, item.key] += 1
        self._view.start(item.key, item.num_steps)
        self._running[ref] = (actor, name, item)

    def _collect(self, ref: ray.ObjectRef) -> tuple[str, WorkItem, Result | Action | str]:
        """Give the result of an item, that it is to be tried again, or why it failed for good."""
        actor, name, item = self._running.pop(ref)
        self._view.finish(item.key)
        attempts = self._attempts[name, item.key]
        try:
            result: Result = ray.get(ref)
        except RayTaskError as error:
            self._release(actor, item)
            failure, reason = Failure.OWN_ERROR, f"{type(error.cause).__name__}: {error.cause}"
        except RayActorError as error:
            if not item.is_call:  # the caller starts again by itself
                ray.kill(actor)  # it may be alive but out of reach
            failure, reason = Failure.WORKER_LOST, f"its worker died {attempts} times: {error}"
        else:
            self._release(actor, item)
            return name, item, result
        most = self._compute.max_attempts
        if after_failure(failure, attempts=attempts, max_attempts=most) is Action.GIVE_UP:
            if failure is Failure.WORKER_LOST and item.on_loss is not None:
                return name, item, item.on_loss
            return name, item, reason
        logger.warning("%s lost its worker (attempt %d); it starts again", item.key, attempts)
        return name, item, Action.RETRY

    def _release(self, actor: ActorHandle, item: WorkItem) -> None:
        if not item.is_call:
            self._idle.append(actor)

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
