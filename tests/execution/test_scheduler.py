from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tdc_ray.errors import StorageFailedError
from tdc_ray.execution.chain import Barrier, Chain
from tdc_ray.execution.item import Resources, WorkItem
from tdc_ray.execution.retry import MAX_NODE_LOSSES, Action, Failure
from tdc_ray.execution.scheduler import Scheduler, num_fitting
from tdc_ray.storage.files import read_json, write_json

ONE = Resources(1.0)
NO_RUN_DIR = Path("/nonexistent/tdc-ray-tests")


def item(key: str, cost: float = 1.0, cost_behind: float = 0.0, **details) -> WorkItem:
    place = NO_RUN_DIR / f"{key}.json"
    return WorkItem(key, dict, 8, place, cost, cost_behind, result_type=dict, **details)


def chain(*stages: Sequence[WorkItem] | Barrier) -> Chain[list]:
    results: list = []
    for stage in stages:
        results += yield stage
    return results


def scheduler_of(chains, *, workers: Sequence[str] = (), max_attempts: int = 3) -> Scheduler[list]:
    scheduler: Scheduler[list] = Scheduler(chains, default=ONE, max_attempts=max_attempts)
    for worker in workers:
        scheduler.join(worker, ONE)
    return scheduler


def names(tasks) -> list[str]:
    return [task.item.key for task in tasks]


def test_the_item_with_the_longest_chain_goes_first():
    stages = [item("long now", 5.0), item("long later", 1.0, cost_behind=10.0)]
    scheduler = scheduler_of({"a": chain(stages)}, workers=["w"])
    assert names(scheduler.start()) == ["long later"]


@given(st.permutations(["c", "a", "b"]))
def test_equal_items_go_in_the_order_of_their_names(order):
    scheduler = scheduler_of({"x": chain([item(key) for key in order])}, workers=["w"])
    assert names(scheduler.start()) == ["a"]


def test_chains_go_on_as_results_come_in_and_end_with_their_values():
    chains = {name: chain([item(f"{name}1")], [item(f"{name}2")]) for name in "ab"}
    scheduler = scheduler_of(chains, workers=["v", "w"])
    first, second = scheduler.start()
    assert scheduler.start() == []
    scheduler.finish(first, {"value": 1})
    (third,) = scheduler.start()
    assert (third.chain, third.workers, third.stage) == (first.chain, first.workers, 2)
    for task in (second, third):
        scheduler.finish(task, {})
    (last,) = scheduler.start()
    scheduler.finish(last, {})
    assert scheduler.is_done
    assert scheduler.values == {"a": [{"value": 1}, {}], "b": [{}, {}]}


def test_a_lost_worker_is_forgotten_and_its_item_tried_again_until_attempts_run_out():
    scheduler = scheduler_of({"a": chain([item("i")])}, workers=["u", "v", "w"], max_attempts=2)
    (task,) = scheduler.start()
    assert scheduler.fail(task, Failure.WORKER_LOST, "died", task.workers) is Action.RETRY
    (again,) = scheduler.start()
    assert again.attempt == 2
    assert again.workers != task.workers
    assert scheduler.fail(again, Failure.WORKER_LOST, "died", again.workers) is Action.GIVE_UP
    assert scheduler.is_done
    assert scheduler.failed == {"a": "died"}
    assert set(scheduler.spare()) == {"u", "v", "w"} - {*task.workers, *again.workers}


def test_an_error_of_ours_is_not_tried_again_and_other_errors_are():
    for failure, first in (
        (Failure.PERMANENT, Action.GIVE_UP),
        (Failure.TRANSIENT, Action.RETRY),
    ):
        scheduler = scheduler_of({"a": chain([item("i")])}, workers=["w"])
        (task,) = scheduler.start()
        assert scheduler.fail(task, failure, "wrong") is first


def test_lost_nodes_do_not_count_as_attempts_up_to_a_bound():
    scheduler = scheduler_of({"a": chain([item("i")])}, workers=["w"], max_attempts=1)
    actions = []
    while tasks := scheduler.start():
        actions.append(scheduler.fail(tasks[0], Failure.NODE_LOST, "preempted"))
    assert actions == [Action.RETRY] * MAX_NODE_LOSSES + [Action.GIVE_UP]


def reduce_memory(size: int) -> int | None:
    return size // 2 or None


def test_memory_is_halved_until_there_is_no_less_and_only_then_counts_as_a_failure():
    scheduler = scheduler_of(
        {"a": chain([item("i", reduce_memory=reduce_memory)])}, workers=["w"], max_attempts=2
    )
    tried = []
    while tasks := scheduler.start():
        tried.append(tasks[0].item.job)
        scheduler.fail(tasks[0], Failure.OUT_OF_MEMORY, "out of memory")
    assert tried == [8, 4, 2, 1, 1]
    assert scheduler.failed == {"a": "out of memory"}


def test_a_chain_that_failed_takes_its_ready_items_along_and_others_go_on():
    chains = {"a": chain([item("a1"), item("a2")]), "b": chain([item("b1")])}
    scheduler = scheduler_of(chains, workers=["w"])
    (task,) = scheduler.start()
    scheduler.fail(task, Failure.PERMANENT, "wrong")
    assert scheduler.wanted() == {ONE: 1}
    (last,) = scheduler.start()
    assert last.item.key == "b1"
    scheduler.finish(last, {})
    assert scheduler.is_done
    assert scheduler.values.keys() == {"b"}


def test_a_chain_that_fails_between_its_items_fails_alone():
    def breaks() -> Chain[list]:
        yield [item("a1")]
        raise StorageFailedError("the store is down")

    scheduler = scheduler_of({"a": breaks(), "b": chain([item("b1")])}, workers=["v", "w"])
    for task in scheduler.start():
        scheduler.finish(task, {})
    assert scheduler.is_done
    assert scheduler.failed == {"a": "the store is down"}
    assert scheduler.values.keys() == {"b"}


def test_calls_take_no_worker_and_stand_in_for_what_is_lost(tmp_path):
    call = replace(
        item("ask", service="llm", fallback_result={"lost": True}),
        result_path=tmp_path / "ask.json",
    )
    scheduler = scheduler_of({"a": chain([call])}, max_attempts=2)
    (task,) = scheduler.start()
    assert task.workers == ()
    assert scheduler.wanted() == {}
    assert scheduler.fail(task, Failure.WORKER_LOST, "died") is Action.RETRY
    (task,) = scheduler.start()
    assert scheduler.fail(task, Failure.WORKER_LOST, "died") is Action.USE_FALLBACK
    assert scheduler.values == {"a": [{"lost": True}]}
    assert read_json(call.result_path) == {"lost": True}  # so a resume goes the same way


def test_an_item_for_several_workers_waits_for_them_and_smaller_ones_behind_it():
    wide, small = item("wide", 9.0, num_workers=2), item("small")
    scheduler = scheduler_of({"a": chain([wide, small])}, workers=["v", "w"])
    assert scheduler.wanted() == {ONE: 3}
    (task,) = scheduler.start()
    assert set(task.workers) == {"v", "w"}
    scheduler.fail(task, Failure.WORKER_LOST, "died", ["v"])
    scheduler.join("x", ONE)
    (task,) = scheduler.start()
    assert set(task.workers) == {"w", "x"}
    scheduler.finish(task, {})
    assert names(scheduler.start()) == ["small"]


def test_where_too_few_workers_are_there_smaller_items_pass_a_wide_one():
    wide, small = item("wide", 9.0, num_workers=3), [item(f"small-{n}") for n in range(2)]
    scheduler = scheduler_of({"a": chain([wide, *small])}, workers=["v", "w"])
    assert names(scheduler.start()) == ["small-0", "small-1"]
    scheduler.join("x", ONE)
    assert scheduler.start() == []  # three are there by now: the wide one is next


def test_an_item_that_is_put_off_frees_its_worker_and_counts_no_attempt():
    chains = {"a": chain([item("long", 5.0)]), "b": chain([item("short")])}
    scheduler = scheduler_of(chains, workers=["w"])
    (task,) = scheduler.start()
    scheduler.defer(task)
    (other,) = scheduler.start()
    assert (task.item.key, other.item.key, other.workers) == ("long", "short", ("w",))
    scheduler.finish(other, {})
    assert not scheduler.is_done
    assert scheduler.wanted() == {}
    assert scheduler.start() == []
    assert scheduler.resume_deferred()
    (again,) = scheduler.start()
    assert (again.item.key, again.attempt) == ("long", 1)
    scheduler.finish(again, {})
    assert scheduler.is_done
    assert not scheduler.resume_deferred()


def test_a_chain_that_failed_takes_what_was_put_off_along():
    scheduler = scheduler_of({"a": chain([item("i", 2.0), item("j")])}, workers=["v", "w"])
    one, other = scheduler.start()
    scheduler.defer(one)
    scheduler.fail(other, Failure.PERMANENT, "wrong")
    assert scheduler.is_done


def test_a_result_that_a_dying_worker_left_is_taken(tmp_path):
    left = WorkItem("i", dict, None, tmp_path / "i.json", 1.0, result_type=dict)
    scheduler = scheduler_of({"a": chain([left])}, workers=["w"])
    (task,) = scheduler.start()
    write_json(left.result_path, {"value": 7})
    scheduler.fail(task, Failure.WORKER_LOST, "died", ["w"])
    assert scheduler.is_done
    assert scheduler.values == {"a": [{"value": 7}]}


def test_items_go_to_workers_of_their_kind_and_others_are_spare():
    gpu = Resources(1.0, 1.0)
    scheduler = scheduler_of({"a": chain([item("train", resources=gpu)])}, workers=["cpu"])
    assert scheduler.start() == []
    assert scheduler.wanted() == {gpu: 1}
    assert scheduler.spare() == {"cpu": ONE}
    scheduler.join("gpu", gpu)
    assert scheduler.next_workers() == ["gpu"]
    (task,) = scheduler.start()
    assert task.workers == ("gpu",)


@pytest.mark.parametrize(
    ("nodes", "needed", "fits"),
    [
        ([{"CPU": 8.0}], {"CPU": 2.0, "GPU": 0.0}, 4),
        ([{"CPU": 64.0, "GPU": 2.0}], {"CPU": 1.0, "GPU": 0.5}, 4),
        ([{"CPU": 4.0}, {"CPU": 4.0}, {"CPU": 9.0}], {"CPU": 3.0}, 1 + 1 + 3),
        ([{"CPU": 4.0}, {"CPU": 4.0}], {"CPU": 8.0}, 0),
        ([{"CPU": 8.0}], {"CPU": 1.0, "GPU": 1.0}, 0),
    ],
)
def test_processes_are_counted_node_by_node(nodes, needed, fits):
    assert num_fitting(nodes, needed) == fits
