"""Real actors, real kills. What runs in a worker is defined inside its test, so it is sent."""

import dataclasses
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from tdc_ray.config.compute import ComputeConfig
from tdc_ray.errors import ClusterError, WorkFailedError
from tdc_ray.execution.chain import Barrier, Chain
from tdc_ray.execution.item import Resources, WorkItem
from tdc_ray.execution.ray.event_collector import collecting
from tdc_ray.execution.ray.pool import Pool
from tdc_ray.execution.ray.service import Service
from tdc_ray.execution.timeline import Timeline, load_history, usage
from tdc_ray.storage.files import read_json, write_json

pytestmark = pytest.mark.ray


class TimedPool(Pool):
    def __init__(self, compute, events, path, services):
        self.timeline_path, self.timeline = path, Timeline(path)
        super().__init__(compute, events, self.timeline, services=services)


@pytest.fixture(scope="module")
def pool(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    class Waiting:
        def check(self):
            pass

        def run(self, item, report):
            from tdc_ray.execution.item import run_item

            return run_item(item, report)

    folder = tmp_path_factory.mktemp("tensorboard")
    compute = ComputeConfig(num_actors=2, max_attempts=2)
    services = {"waiting": Service(Waiting, max_concurrency=4)}
    with (
        collecting([]) as events,
        TimedPool(compute, events, folder / "timeline.jsonl", services) as pool,
    ):
        yield pool


def item_of(folder: Path, name: str, function, number, service: str | None = None) -> WorkItem:
    return WorkItem(
        key=f"{name}/{number}",
        function=function,
        job=(folder, name, number),
        result_path=folder / f"{name}-{number}.json",
        cost=1.0,
        result_type=dict,
        service=service,
        fallback_result={"lost": True} if service else None,
    )


def chain(folder: Path, name: str, function, numbers, service: str | None = None) -> Chain[list]:
    values = []
    for number in numbers:
        (result,) = yield [item_of(folder, name, function, number, service)]
        values.append(result["value"])
    return values


def test_chains_run_side_by_side_and_each_in_order(pool, tmp_path):
    def work(job, report):
        import os
        import time

        folder, name, number = job
        with open(folder / "log", "a") as file:  # noqa: PTH123
            file.write(f"start {name} {number} {os.getpid()}\n")
        other = folder / ("started-b" if name == "a" else "started-a")
        (folder / f"started-{name}").touch()
        for _ in range(400):  # both chains must run at once for either to advance
            if other.exists():
                break
            time.sleep(0.05)
        else:
            raise TimeoutError("the other chain never started")
        report({"loss": 1.0}, 1)
        return {"value": number}

    done = pool.run({name: chain(tmp_path, name, work, [1, 2]) for name in ("a", "b")})
    assert done == {"a": [1, 2], "b": [1, 2]}
    log = (tmp_path / "log").read_text().splitlines()
    assert [line.split()[2] for line in log if " a " in line] == ["1", "2"]


def test_an_item_whose_result_exists_is_not_run_again(pool, tmp_path):
    def work(job, report):
        folder, _name, number = job
        (folder / f"ran-{number}").touch()
        return {"value": number}

    write_json(tmp_path / "a-1.json", {"value": 100})
    assert pool.run({"a": chain(tmp_path, "a", work, [1, 2])}) == {"a": [100, 2]}
    assert not (tmp_path / "ran-1").exists()
    assert (tmp_path / "ran-2").exists()


def test_a_killed_actor_is_replaced_and_its_item_starts_again(pool, tmp_path):
    def work(job, report):
        import os
        import signal

        folder, _name, number = job
        first = folder / "first"
        if not first.exists():
            first.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return {"value": number}

    assert pool.run({"a": chain(tmp_path, "a", work, [1, 2])}) == {"a": [1, 2]}
    assert (tmp_path / "first").exists()


def test_an_item_that_kills_every_actor_fails_and_the_others_finish(pool, tmp_path):
    def work(job, report):
        import os
        import signal

        folder, name, number = job
        if name == "bad":
            with open(folder / "attempts", "a") as file:  # noqa: PTH123
                file.write("x")
            os.kill(os.getpid(), signal.SIGKILL)
        return {"value": number}

    chains = {name: chain(tmp_path, name, work, [1, 2]) for name in ("bad", "good")}
    with pytest.raises(WorkFailedError, match="bad: its worker died 2 times"):
        pool.run(chains)
    assert (tmp_path / "attempts").read_text() == "xx"
    assert (tmp_path / "good-2.json").exists()


def test_an_item_with_an_error_of_its_own_fails_at_once_and_the_others_finish(pool, tmp_path):
    def work(job, report):
        from tdc_ray.errors import NonFiniteLossError

        _folder, name, number = job
        if name == "bad":
            raise NonFiniteLossError(7, float("nan"))
        return {"value": number}

    chains = {name: chain(tmp_path, name, work, [1, 2]) for name in ("bad", "good")}
    with pytest.raises(WorkFailedError) as caught:
        pool.run(chains)
    assert set(caught.value.reasons) == {"bad"}
    assert "the loss is nan at step 7" in caught.value.reasons["bad"]
    assert (tmp_path / "good-2.json").exists()


def test_a_pool_that_does_not_fit_is_refused(ray_cluster, tmp_path):
    with (
        collecting([]) as events,
        pytest.raises(ClusterError, match=r"compute\.cpus_per_actor"),
    ):
        Pool(ComputeConfig(cpus_per_actor=1000), events).__enter__()


# --- workers that come and go ----------------------------------------------------------------


def test_an_idle_worker_that_died_costs_no_item_an_attempt(pool, tmp_path):
    def where(job, report):
        import os

        return {"value": os.getpid()}

    (pid,) = pool.run({"a": chain(tmp_path, "a", where, [1])})["a"]
    os.kill(pid, signal.SIGKILL)
    time.sleep(1.5)  # so long that its death shows
    pool.timeline.flush()
    before = [span.attempt for span in load_history(pool.timeline_path).spans]
    pids = pool.run({"b": chain(tmp_path, "b", where, [1, 2, 3])})["b"]
    assert pid not in pids
    pool.timeline.flush()
    spans = load_history(pool.timeline_path).spans[len(before) :]
    assert [span.attempt for span in spans] == [1, 1, 1]


@pytest.mark.slow
def test_of_two_kinds_no_more_spare_workers_end_than_others_are_missing(pool):
    workers = pool._workers
    workers.start_workers({workers.default: 2})
    while len(workers.ready()) < 2:
        for ref in ray.wait(workers.starting(), num_returns=1)[0]:
            workers.register(ref)
    spare, other = workers.ready(), Resources(2.0)
    assert workers.removable(spare, {}) == []
    assert workers.removable(spare, {workers.default: 2}) == []
    assert workers.removable(spare, {other: 1, workers.default: 1}) == list(spare)[:1]


def test_an_item_for_two_workers_runs_on_both_at_once(pool, tmp_path):
    def work(job, report):
        import torch
        from torch import distributed

        from tdc_ray.execution.device import worker_rank

        folder, _name, _number = job
        total = torch.tensor([float(worker_rank().rank + 1)])
        distributed.all_reduce(total)
        (folder / f"rank-{worker_rank().rank}").touch()
        return {"value": total.item(), "world_size": worker_rank().world_size}

    def wide():
        item = dataclasses.replace(item_of(tmp_path, "wide", work, 1), num_workers=2)
        (result,) = yield [item]
        return result

    assert pool.run({"wide": wide()}) == {"wide": {"value": 3.0, "world_size": 2}}
    assert (tmp_path / "rank-1").exists()


@pytest.mark.slow
def test_the_wait_of_two_workers_for_each_other_ends_when_one_dies_or_hangs(pool, tmp_path):
    def work(job, report):
        import os
        import signal
        import time
        from datetime import timedelta

        import torch
        from torch import distributed
        from torch.distributed.distributed_c10d import _get_default_group, _set_pg_timeout

        from tdc_ray.execution.device import worker_rank
        from tdc_ray.execution.ray.data_parallel import COLLECTIVE_TIMEOUT

        folder, _name, number = job
        with open(folder / "pids", "a") as file:  # noqa: PTH123
            file.write(f"{os.getpid()} ")
        waiting, failed = folder / f"waiting-{number}", folder / f"failed-{number}"
        if not failed.exists():
            group = _get_default_group()
            assert group._get_backend(torch.device("cpu")).options._timeout == COLLECTIVE_TIMEOUT
            if worker_rank().rank == 0:
                if number == 2:  # nothing but this ends the wait for one that hangs
                    _set_pg_timeout(timedelta(seconds=2), group)
                waiting.touch()
            else:
                while not waiting.exists():
                    time.sleep(0.05)
                time.sleep(0.2)  # the other one waits in all_reduce by now
                failed.touch()
                os.kill(os.getpid(), signal.SIGKILL if number == 1 else signal.SIGSTOP)
        total = torch.ones(1)
        distributed.all_reduce(total)
        return {"value": total.item()}

    def wide(number):
        item = dataclasses.replace(item_of(tmp_path, "wide", work, number), num_workers=2)
        (result,) = yield [item]
        return result["value"]

    for number, outcome in ((1, "worker_lost"), (2, "other_error")):  # the other one's, at last
        assert pool.run({"wide": wide(number)}) == {"wide": 2.0}
        pool.timeline.flush()
        first, second = load_history(pool.timeline_path).spans[-2:]
        assert (first.item, first.outcome, second.outcome) == (
            f"wide/{number}",
            outcome,
            "done",
        )
        assert first.ended - (tmp_path / f"failed-{number}").stat().st_mtime < 30.0
    pids = (tmp_path / "pids").read_text().split()
    assert len(pids) == 8
    assert len(set(pids)) == 6  # both are replaced: a group that failed is not joined again


def test_without_memory_an_item_starts_again_with_half_until_it_fits(pool, tmp_path):
    def work(job, report):
        import torch

        folder, _name, size = job
        with open(folder / "sizes", "a") as file:  # noqa: PTH123
            file.write(f"{size} ")
        if size > 2:
            torch.empty(2**60)  # raises what torch raises
        return {"value": size}

    def reduce_memory(job):
        folder, name, size = job
        return (folder, name, size // 2) if size > 1 else None

    def large():
        item = dataclasses.replace(
            item_of(tmp_path, "large", work, 8), reduce_memory=reduce_memory
        )
        (result,) = yield [item]
        return result["value"]

    assert pool.run({"large": large()}) == {"large": 2}
    assert (tmp_path / "sizes").read_text() == "8 4 2 "


@pytest.mark.slow
def test_of_two_workers_the_error_of_the_one_that_failed_first_counts(pool, tmp_path):
    def work(job, report):
        import torch
        from torch import distributed

        from tdc_ray.execution.device import worker_rank

        _folder, _name, size = job
        if worker_rank().rank == 1 and size > 2:
            torch.empty(2**60)  # the other one then loses its connection
        total = torch.ones(1)
        distributed.all_reduce(total)
        return {"value": size}

    def reduce_memory(job):
        folder, name, size = job
        return (folder, name, size // 2) if size > 1 else None

    def wide():
        item = item_of(tmp_path, "wide", work, 4)
        (result,) = yield [dataclasses.replace(item, num_workers=2, reduce_memory=reduce_memory)]
        return result["value"]

    assert pool.run({"wide": wide()}) == {"wide": 2}


def test_an_error_that_cannot_be_read_here_fails_its_chain_alone(pool, tmp_path):
    def work(job, report):
        class OddError(Exception):
            def __init__(self, one, two):
                super().__init__("odd")

        raise OddError(1, 2)

    with pytest.raises(WorkFailedError) as caught:
        pool.run({"odd": chain(tmp_path, "odd", work, [1])})
    assert set(caught.value.reasons) == {"odd"}


def test_an_error_from_outside_is_tried_again(pool, tmp_path):
    def work(job, report):
        folder, _name, number = job
        if not (folder / "there").exists():
            (folder / "there").touch()
            raise OSError("the network was down")
        return {"value": number}

    assert pool.run({"a": chain(tmp_path, "a", work, [1])}) == {"a": [1]}


def test_the_timeline_says_who_ran_what_and_what_was_lost(pool, tmp_path):
    def work(job, report):
        import os
        import signal
        import time

        folder, _name, number = job
        time.sleep(0.2)
        if number == 2 and not (folder / "first").exists():
            (folder / "first").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return {"value": number}

    pool.run({"timed": chain(tmp_path, "timed", work, [1, 2])}, "timed phase")
    pool.timeline.flush()
    history = load_history(pool.timeline_path)
    spans = [span for span in history.spans if span.phase == "timed phase"]
    assert [(span.item, span.attempt, span.outcome) for span in spans] == [
        ("timed/1", 1, "done"),
        ("timed/2", 1, "worker_lost"),
        ("timed/2", 2, "done"),
    ]
    assert {span.workers[0] for span in spans} <= {stay.worker for stay in history.stays}
    (used,) = [part for part in usage(history) if part.phase == "timed phase"]
    assert 0.4 <= used.lower_bound_seconds <= used.work_seconds
    assert used.makespan_seconds >= used.work_seconds + used.lost_seconds
    assert used.lost_seconds >= 0.2


# --- services --------------------------------------------------------------------------------


def test_items_of_a_service_hold_no_worker(pool, tmp_path):
    """Three items wait, all at once, for work that one of two actors does meanwhile."""

    def wait(job, report):
        import time

        folder, name, number = job
        (folder / f"waiting-{name}").touch()
        for _ in range(400):
            if (folder / "worked").exists():
                return {"value": number}
            time.sleep(0.05)
        raise TimeoutError("nothing worked beside the call")

    def work(job, report):
        import time

        folder, _name, number = job
        for _ in range(400):
            if len(list(folder.glob("waiting-*"))) == 3:
                (folder / "worked").touch()
                return {"value": number}
            time.sleep(0.05)
        raise TimeoutError("the calls are not under way at once")

    calls = {name: chain(tmp_path, name, wait, [1], "waiting") for name in "abc"}
    done = pool.run(calls | {"work": chain(tmp_path, "work", work, [7])})
    assert done == {"a": [1], "b": [1], "c": [1], "work": [7]}


def test_an_item_of_a_service_with_an_error_of_its_own_fails_and_the_others_finish(pool, tmp_path):
    def call(job, report):
        from tdc_ray.errors import ProxyError

        _folder, name, number = job
        if name == "bad":
            raise ProxyError("no answer")
        return {"value": number}

    chains = {name: chain(tmp_path, name, call, [1, 2], "waiting") for name in ("bad", "good")}
    with pytest.raises(WorkFailedError, match="ProxyError: no answer"):
        pool.run(chains)
    assert (tmp_path / "good-2.json").exists()


def test_an_item_whose_service_keeps_dying_has_its_fallback_result(pool, tmp_path):
    def call(job, report):
        import os

        os._exit(1)

    done = pool.run({"call": lost_call(tmp_path, call)})
    assert done == {"call": {"lost": True}}


def lost_call(folder: Path, function) -> Chain[dict]:
    (result,) = yield [item_of(folder, "call", function, 1, "waiting")]
    return result


# --- meetings --------------------------------------------------------------------------------

PARTIES = frozenset({"a", "b", "bad"})


def meeting_chain(folder: Path, name: str, function) -> Chain[list]:
    (first,) = yield [item_of(folder, name, function, 1)]
    yield Barrier("second round", PARTIES)
    (second,) = yield [item_of(folder, name, function, 2)]
    return [first["value"], second["value"]]


def test_chains_meet_and_nobody_waits_for_one_that_failed(pool, tmp_path):
    def work(job, report):
        import time

        folder, name, number = job
        if name == "bad":
            raise ValueError("this one fails")
        if name == "b":
            time.sleep(0.5)  # a waits for b
        found = sorted(path.name for path in folder.glob("[ab]-1.json"))
        return {"value": found if number == 2 else number}

    chains = {name: meeting_chain(tmp_path, name, work) for name in PARTIES}
    with pytest.raises(WorkFailedError) as caught:
        pool.run(chains)
    assert set(caught.value.reasons) == {"bad"}
    for name in "ab":
        assert read_json(tmp_path / f"{name}-2.json") == {"value": ["a-1.json", "b-1.json"]}
