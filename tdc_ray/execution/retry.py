"""What a failure of a work item leads to."""

from enum import Enum

from tdc_ray.execution.item import AnyItem

MAX_NODE_LOSSES = 20
"""How often an item may lose its node: on machines that may be taken away no fault of its own."""


class Failure(Enum):
    """Why an item did not finish."""

    WORKER_LOST = "worker_lost"
    NODE_LOST = "node_lost"
    OUT_OF_MEMORY = "out_of_memory"
    OWN_ERROR = "own_error"
    """An error of ours: it would come again."""

    OTHER_ERROR = "other_error"
    """Any other error: a full disk, a network that was down."""


class Action(Enum):
    """What becomes of an item that did not finish."""

    RETRY = "retry"
    HALVE = "halve"
    """It starts again with half the memory."""

    STAND_IN = "stand_in"
    """Its chain goes on with what the item gives where it is lost."""

    GIVE_UP = "give_up"


def after_failure(item: AnyItem, failure: Failure, times: int, max_attempts: int) -> Action:
    """Decide what follows a failure.

    A lost worker is not the item's fault, and less so a lost node; an error of ours would recur;
    one without memory is tried with less of it before that counts.

    Args:
        item: What failed.
        failure: How.
        times: How often in this way, this time included.
        max_attempts: How often an item may be started.
    """
    if failure is Failure.OUT_OF_MEMORY and item.reduced_memory() is not None:
        return Action.HALVE
    if failure is Failure.NODE_LOST and times <= MAX_NODE_LOSSES:
        return Action.RETRY
    if failure is not Failure.OWN_ERROR and times < max_attempts:
        return Action.RETRY
    if failure is not Failure.OWN_ERROR and item.fallback_result is not None:
        return Action.STAND_IN
    return Action.GIVE_UP
