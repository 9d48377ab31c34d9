"""Which item runs next, and what a failure leads to: pure decisions, no Ray."""

from collections.abc import Iterable, Mapping
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
    wanted: int | None, available: Mapping[str, float], per_actor: Mapping[str, float]
) -> int:
    """Decide how many actors to start.

    Args:
        wanted: The configured number; None: as many as fit.
        available: Resources of the cluster, such as ``{"CPU": 8.0}``.
        per_actor: Resources of one actor.

    Raises:
        ClusterError: Not one actor fits.
    """
    needed = {name: amount for name, amount in per_actor.items() if amount > 0}
    fits = min(int(available.get(name, 0.0) / amount) for name, amount in needed.items())
    if fits < 1:
        raise ClusterError(
            f"an actor needs {needed}, but the cluster has {dict(available)}. Lower "
            "compute.cpus_per_actor or compute.gpus_per_actor, or add nodes."
        )
    return min(fits, MAX_ACTORS if wanted is None else wanted)
