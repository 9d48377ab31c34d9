"""One actor for all who name it. What runs in it is defined inside its test, so it is sent."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import ray

from tdc_ray.errors import ProxyError
from tdc_ray.execution.item import WorkItem
from tdc_ray.execution.ray.event_collector import EventCollector, collecting
from tdc_ray.execution.ray.service import Servant, Service, start_service
from tdc_ray.storage.files import read_json

pytestmark = pytest.mark.ray


@pytest.fixture
def events(ray_cluster: None, tmp_path: Path) -> Iterator[EventCollector]:
    with (
        collecting([]) as events,
    ):
        yield events


def servant(problem: str | None = None) -> Callable[[], Servant]:
    class Servant:
        """Gives its items the pid, how often it was asked, and the most at once."""

        def __init__(self):
            import threading

            self.lock, self.asked, self.active, self.most = threading.Lock(), 0, 0, 0

        def check(self):
            from tdc_ray.errors import ProxyError

            if problem:
                raise ProxyError(problem)

        def run(self, item, report):
            import os
            import time

            from tdc_ray.storage.files import write_json

            with self.lock:
                self.asked, self.active = self.asked + 1, self.active + 1
                self.most = max(self.most, self.active)
            time.sleep(item.job)
            with self.lock:
                self.active -= 1
            result = {"pid": os.getpid(), "asked": self.asked, "most": self.most}
            write_json(item.result_path, result)
            return result

    return Servant


def item(folder: Path, key: str, seconds: float = 0.0) -> WorkItem:
    path = folder / f"{key}.json"
    return WorkItem(
        key, dict, seconds, path, 0.0, service="test", fallback_result={}, result_type=dict
    )


@pytest.mark.slow
def test_all_trials_share_one_actor_and_its_bound(events, tmp_path):
    def trial(number: int) -> dict[str, Any]:
        handle = ray.get(other_trial.remote(start_service, Service(servant(), 50)))
        return ray.get(handle.run.remote(item(tmp_path, str(number), 0.3), events))

    @ray.remote(num_cpus=0)
    def other_trial(start, service):
        """A process of its own, as a trial of a sweep is; it asks for more at once."""
        return start("test", service)

    actor = start_service("test", Service(servant(), 2))
    try:
        with ThreadPoolExecutor(6) as threads:
            results = list(threads.map(trial, range(6)))
        last = ray.get(actor.run.remote(item(tmp_path, "last"), events))
    finally:
        ray.kill(actor)
    assert {result["pid"] for result in results} == {last["pid"]}
    assert (last["asked"], last["most"]) == (7, 2)
    assert read_json(tmp_path / "last.json") == last


def test_what_a_check_finds_is_raised_as_it_is(ray_cluster):
    with pytest.raises(ProxyError, match=r"^there is no key$"):
        start_service("poor", Service(servant("there is no key"), 1))
