from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tdc_ray.distributed.policy import (
    MAX_ACTORS,
    Action,
    Failure,
    after_failure,
    next_item,
    num_actors,
)
from tdc_ray.errors import ClusterError
from tdc_ray.work import WorkItem


def item(key: str, cost: float, cost_behind: float = 0.0) -> WorkItem:
    return WorkItem(key, lambda _job, _report: {}, None, Path(key), cost, cost_behind)


def test_the_item_with_the_longest_chain_goes_first():
    short_now_long_later = item("a", 1.0, cost_behind=10.0)
    long_now = item("b", 5.0)
    assert next_item([long_now, short_now_long_later]) is short_now_long_later


@given(st.permutations(["c", "a", "b"]))
def test_equal_items_go_in_the_order_of_their_names(order):
    assert next_item([item(key, 1.0) for key in order]).key == "a"


def test_a_lost_worker_is_retried_until_attempts_run_out():
    lost = Failure.WORKER_LOST
    assert after_failure(lost, attempts=1, max_attempts=3) is Action.RETRY
    assert after_failure(lost, attempts=2, max_attempts=3) is Action.RETRY
    assert after_failure(lost, attempts=3, max_attempts=3) is Action.GIVE_UP


def test_an_error_of_its_own_is_never_retried():
    assert after_failure(Failure.OWN_ERROR, attempts=1, max_attempts=3) is Action.GIVE_UP


def test_as_many_actors_as_fit_are_started_unless_fewer_are_wanted():
    assert num_actors(None, [{"CPU": 8.0}], {"CPU": 2.0, "GPU": 0.0}) == 4
    assert num_actors(3, [{"CPU": 8.0}], {"CPU": 2.0}) == 3
    assert num_actors(9, [{"CPU": 8.0}], {"CPU": 2.0}) == 4
    assert num_actors(None, [{"CPU": 64.0, "GPU": 2.0}], {"CPU": 1.0, "GPU": 0.5}) == 4
    assert num_actors(None, [{"CPU": 1000.0}], {"CPU": 1.0}) == MAX_ACTORS


def test_actors_are_counted_node_by_node():
    nodes = [{"CPU": 4.0}, {"CPU": 4.0}, {"CPU": 9.0}]
    assert num_actors(None, nodes, {"CPU": 3.0}) == 1 + 1 + 3
    with pytest.raises(ClusterError, match="no node has"):
        num_actors(None, nodes[:2], {"CPU": 8.0})


def test_an_actor_that_fits_nowhere_is_an_error_that_names_the_setting():
    with pytest.raises(ClusterError, match=r"GPU.*compute\.gpus_per_actor"):
        num_actors(None, [{"CPU": 8.0}], {"CPU": 1.0, "GPU": 1.0})
