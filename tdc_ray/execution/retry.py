"""The retry policy: what the failure of a work item leads to."""

from enum import Enum

from tdc_ray.execution.item import AnyItem

MAX_NODE_LOSSES = 20
"""Most times that an item may lose its node: on preemptible machines that is not its fault."""


class Failure(Enum):
    """Why an item did not finish; the values are in timelines."""

    WORKER_LOST = "worker_lost"
    NODE_LOST = "node_lost"
    OUT_OF_MEMORY = "out_of_memory"
    PERMANENT = "own_error"
    """An error raised by this package: it would recur."""

    TRANSIENT = "other_error"
    """Any other error: a full disk, a network that was down."""


class Action(Enum):
    """The action after an item did not finish."""

    RETRY = "retry"
    REDUCE_MEMORY = "reduce_memory"
    """It is retried with half the memory."""

    USE_FALLBACK = "use_fallback"
    """Its chain advances with the item's fallback result."""

    GIVE_UP = "give_up"


def after_failure(item: AnyItem, failure: Failure, times: int, max_attempts: int) -> Action:
    """Decide what follows a failure.

    A lost worker is not the item's fault, and less so a lost node; a permanent error would recur;
    an item that ran out of memory is retried with less before that counts.

    Args:
        item: What failed.
        failure: How.
        times: How often in this way, this time included.
        max_attempts: How often an item may be started.
    """
    if failure is Failure.OUT_OF_MEMORY and item.reduced_memory() is not None:
        return Action.REDUCE_MEMORY
    if failure is Failure.NODE_LOST and times <= MAX_NODE_LOSSES:
        return Action.RETRY
    if failure is Failure.PERMANENT:
        return Action.GIVE_UP
    if times < max_attempts:
        return Action.RETRY
    return Action.GIVE_UP if item.fallback_result is None else Action.USE_FALLBACK
