"""Real actors, real kills. What runs in a worker is defined inside its test, so it is sent."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from tdc_ray.distributed.cluster import board
from tdc_ray.distributed.pool import Pool
from tdc_ray.errors import ClusterError, WorkFailedError
from tdc_ray.progress import ProgressView
from tdc_ray.settings import ComputeConfig
from tdc_ray.storage import write_json
from tdc_ray.work import Chain, WorkItem

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def pool(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    folder = tmp_path_factory.mktemp("tensorboard")
    compute = ComputeConfig(num_actors=2, max_attempts=2)
    with (
        ProgressView(folder, Console(quiet=True)) as view,
        board(view) as events,
        Pool(compute, events, view) as pool,
    ):
        yield pool


def chain(folder: Path, name: str, function, numbers) -> Chain[list]:
    values = []
    for number in numbers:
        (result,) = yield [
            WorkItem(
                key=f"{name}/{number}",
                function=function,
                job=(folder, name, number),
                result_path=folder / f"{name}-{number}.json",
                cost=1.0,
            )
        ]
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
        for _ in range(600):  # both chains must be under way at once for either to go on
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
        ProgressView(tmp_path, Console(quiet=True)) as view,
        board(view) as events,
        pytest.raises(ClusterError, match=r"compute\.cpus_per_actor"),
    ):
        Pool(ComputeConfig(cpus_per_actor=1000), events, view).__enter__()
