"""Which item runs next, and what a failure leads to: pure decisions, no Ray."""

from collections.abc import Iterable, Mapping, Sequence
from enum import Enum

from tdc_ray.errors import ClusterError
from tdc_ray.work import WorkItem

MAX_ACTORS = 64
"""Most actors that are started unasked."""


class Failure(Enum):
    """Why an item did not finish."""

    WORKER_LOST = "worker_lost"
    OWN_ERROR = "own_error"


class Action(Enum):
    """What the pool does with an item that did not finish."""

    RETRY = "retry"
    GIVE_UP = "give_up"


def next_item(ready: Iterable[WorkItem]) -> WorkItem:
    """Choose the item with the most work in it and behind it; of equals, the first by name.

    Longest chain first: the group that will take longest never waits for a shorter one.
    """
    return min(ready, key=lambda item: (-(item.cost + item.cost_behind), item.key))


def after_failure(failure: Failure, *, attempts: int, max_attempts: int) -> Action:
    """Decide what follows a failure: a lost worker is not the item's fault, its own error is.

    Args:
        failure: What happened.
        attempts: How often the item was started, this time included.
        max_attempts: How often an item may be started.
    """
    if failure is Failure.WORKER_LOST and attempts < max_attempts:
        return Action.RETRY
    return Action.GIVE_UP


def num_actors(
    wanted: int | None, nodes: Sequence[Mapping[str, float]], per_actor: Mapping[str, float]
) -> int:
    """Decide how many actors to start at the most.

    Args:
        wanted: The configured number; None: as many as fit.
        nodes: Resources of every node, such as ``[{"CPU": 8.0}]``.
        per_actor: Resources of one actor.

    Raises:
        ClusterError: Not one actor fits on any node.
    """
    fits = num_fitting(nodes, per_actor)
    if fits < 1:
        raise ClusterError(
            f"an actor needs {dict(per_actor)}, which no node has; the nodes have "
            f"{[dict(node) for node in nodes]}. Lower compute.cpus_per_actor or "
            "compute.gpus_per_actor, or add larger nodes."
        )
    return min(fits, MAX_ACTORS if wanted is None else wanted)


def num_fitting(nodes: Sequence[Mapping[str, float]], needed: Mapping[str, float]) -> int:
    """Count the processes that fit on the nodes, each of them on one node.

    Args:
        nodes: Resources of every node.
        needed: Resources of one process.
    """
    return sum(
        min(int(node.get(name, 0.0) / amount) for name, amount in needed.items() if amount > 0)
        for node in nodes
    )
