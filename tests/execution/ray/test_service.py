"""One actor for all calls. What runs in it is defined inside its test, so it is sent."""

import os
import pickle
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import ray
from rich.console import Console

from tdc_ray.config.proxy import ProxyConfig
from tdc_ray.execution.item import WorkItem
from tdc_ray.execution.ray.cluster import EventCollector, board
from tdc_ray.execution.ray.service import start_caller
from tdc_ray.pruning.llm.transcripts import (
    LLMExchange,
    TokenUsage,
    append_exchange,
    transcript_path,
)
from tdc_ray.pruning.proxies.language_model import AskJob, ask
from tdc_ray.reporting.progress import ProgressView
from tdc_ray.storage.files import read_json
from tests.pruning.llm.openai_server import after, says, serving
from tests.pruning.requests import NAMES, TASK

pytestmark = pytest.mark.ray

CONFIG = ProxyConfig(model="test-model", max_concurrent=2, max_replies=1)
GOOD = f'{{"schemes": [[{{"unit": "{NAMES[0]}", "keep": 3}}]]}}'
KEY = "sk-proj-Zx81-secretSECRET-47pq"


@pytest.fixture
def events(ray_cluster: None, tmp_path: Path) -> Iterator[EventCollector]:
    with (
        ProgressView(tmp_path / "tensorboard", Console(quiet=True)) as view,
        board(view) as events,
    ):
        yield events


@pytest.fixture
def caller(events: EventCollector) -> Iterator[Any]:
    caller = start_caller(CONFIG)
    yield caller
    ray.kill(caller)


def call(folder: Path, key: str, function, job=None) -> WorkItem:
    return WorkItem(key, function, job, folder / f"{key}.json", 0.0, fallback_result={})


def test_a_call_leaves_its_result_and_reads_the_key_where_it_runs(caller, events, tmp_path):
    def set_environment(job, report, budget):
        import os

        os.environ.update(job)
        return {"pid": os.getpid()}

    with serving(says(GOOD)) as server:
        environment = {"OPENAI_API_KEY": KEY, "OPENAI_BASE_URL": server.url}
        item = call(tmp_path, "environment", set_environment, environment)
        pid = ray.get(caller.run.remote(item, events))["pid"]
        item = call(tmp_path, "ask", ask, AskJob(CONFIG, TASK, (), tmp_path / "proxy"))
        assert KEY.encode() not in pickle.dumps(item)
        result = ray.get(caller.run.remote(item, events))
    assert pid != os.getpid()
    assert result == read_json(tmp_path / "ask.json")
    assert result["error"] is None
    assert result["schemes"][0][NAMES[0]] == 3
    assert (tmp_path / "proxy" / "group-02-round-1.jsonl").exists()


def test_what_a_sweeps_finished_trials_spent_counts(events, tmp_path):
    def spent(job, report, budget):
        return {"calls": budget.spent.calls, "tokens": budget.spent.tokens}

    took = TokenUsage(calls=1, prompt_tokens=60, completion_tokens=40)
    for trial in ("a", "b"):
        path = transcript_path(tmp_path / "trials" / trial / "proxy", 0, 0)
        append_exchange(path, LLMExchange({}, "hello", None, took, 1.0))
    caller = start_caller(CONFIG, tmp_path)
    try:
        found = ray.get(caller.run.remote(call(tmp_path, "spent", spent), events))
    finally:
        ray.kill(caller)
    assert found == {"calls": 2, "tokens": 200}


def test_all_trials_share_one_caller_its_budget_and_its_bound(caller, events, tmp_path):
    def set_environment(job, report, budget):
        import os

        os.environ.update(job)
        return {"pid": os.getpid()}

    def spent(job, report, budget):
        import os

        return {"pid": os.getpid(), "calls": budget.spent.calls}

    def trial(number: int) -> dict[str, Any]:
        handle = ray.get(other_trial.remote(start_caller, CONFIG))
        job = AskJob(CONFIG, TASK, (), tmp_path / str(number) / "proxy")
        return ray.get(handle.run.remote(call(tmp_path, str(number), ask, job), events))

    @ray.remote(num_cpus=0)
    def other_trial(start, config):
        """A process of its own, as a trial of a sweep is; it asks for more calls at once."""
        from dataclasses import replace

        return start(replace(config, max_concurrent=50))

    with serving(after(0.3, says(GOOD))) as server, ThreadPoolExecutor(6) as threads:
        environment = {"OPENAI_API_KEY": KEY, "OPENAI_BASE_URL": server.url}
        item = call(tmp_path, "environment", set_environment, environment)
        pid = ray.get(caller.run.remote(item, events))["pid"]
        results = list(threads.map(trial, range(6)))
    assert all(result["error"] is None for result in results)
    assert server.most_under_way == 2
    last = ray.get(caller.run.remote(call(tmp_path, "spent", spent), events))
    assert last == {"pid": pid, "calls": 6}
