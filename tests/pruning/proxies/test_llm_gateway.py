"""One budget for all calls, in this process and in an actor of its own."""

import os
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ray
from pydantic_core import to_jsonable_python

from tdc_ray.config.proxy import ProxyConfig
from tdc_ray.execution.item import Report, WorkItem
from tdc_ray.execution.ray.event_collector import collecting
from tdc_ray.execution.ray.service import Service, start_service
from tdc_ray.pruning.llm.answer import TokenUsage
from tdc_ray.pruning.llm.budget import Budget
from tdc_ray.pruning.llm.transcripts import (
    VERSION,
    LLMExchange,
    append_exchange,
    transcript_path,
)
from tdc_ray.pruning.proxies.language_model import AskJob, propose_by_llm
from tdc_ray.pruning.proxies.llm_gateway import LLMGateway
from tdc_ray.storage.files import read_json
from tests.pruning.llm.openai_server import says, serving
from tests.pruning.requests import NAMES, TASK

CONFIG = ProxyConfig(model="test-model", max_concurrent=2, max_replies=1)
GOOD = '{"hypothesis": "h", "bounds": [{"unit": 0, "least": 7, "most": 7}], "action": "measure"}'
KEY = "sk-proj-Zx81-secretSECRET-47pq"


def item(folder: Path, key: str, function: Callable[..., dict], job: Any = None) -> WorkItem:
    path = folder / f"{key}.json"
    return WorkItem(
        key, function, job, path, 0.0, service="llm", fallback_result={}, result_type=dict
    )


def spent(_job: None, _report: Report, budget: Budget) -> dict:
    return {"calls": budget.spent.calls, "tokens": budget.spent.tokens}


def ignore(_metrics: Any, _step: int) -> None:
    pass


def test_all_that_ask_share_one_budget(tmp_path, monkeypatch):
    gateway = LLMGateway(CONFIG)

    def call(number: int) -> dict:
        job = AskJob(CONFIG, TASK, (), tmp_path / str(number) / "proxy")
        return gateway.run(item(tmp_path, str(number), propose_by_llm, job), ignore)

    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with serving(says(GOOD)) as server, ThreadPoolExecutor(6) as threads:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        results = list(threads.map(call, range(6)))
    assert all(result.error is None for result in results)
    assert to_jsonable_python(results[3]) == read_json(tmp_path / "3.json")
    assert (tmp_path / "3" / "proxy" / "group-02-round-1.jsonl").exists()
    assert gateway.run(item(tmp_path, "spent", spent), ignore)["calls"] == 6


def test_what_a_sweeps_finished_trials_spent_counts(tmp_path):
    took = TokenUsage(calls=1, prompt_tokens=60, completion_tokens=40)
    for trial in ("a", "b"):
        path = transcript_path(tmp_path / "trials" / trial / "proxy", 0, 0)
        append_exchange(path, LLMExchange({}, "hello", None, took, 1.0))
    gateway = LLMGateway(CONFIG, tmp_path)
    assert gateway.run(item(tmp_path, "spent", spent), ignore) == {"calls": 2, "tokens": 200}


@pytest.mark.slow
@pytest.mark.ray
def test_as_a_service_it_reads_the_key_where_it_runs(ray_cluster, tmp_path, monkeypatch):
    def set_environment(job, report, budget):
        import os

        os.environ.update(job)
        return {"pid": os.getpid()}

    with (
        serving(says(GOOD)) as server,
        collecting([]) as events,
    ):
        # replayed transcripts need no key before the actor has one
        path = transcript_path(tmp_path / "earlier" / "proxy", 0, 0)
        exchange = LLMExchange({}, "hello", None, TokenUsage(), 1.0, version=VERSION)
        append_exchange(path, exchange)
        replay = ProxyConfig(replay=str(tmp_path / "earlier"))
        actor = start_service("llm-test", Service(partial(LLMGateway, replay), 2))
        environment = {"OPENAI_API_KEY": KEY, "OPENAI_BASE_URL": server.url}
        change = item(tmp_path, "environment", set_environment, environment)
        pid = ray.get(actor.run.remote(change, events))["pid"]
        asking = item(
            tmp_path, "ask", propose_by_llm, AskJob(CONFIG, TASK, (), tmp_path / "proxy")
        )
        assert KEY.encode() not in pickle.dumps(asking)
        result = ray.get(actor.run.remote(asking, events))
        ray.kill(actor)
    assert pid != os.getpid()
    assert to_jsonable_python(result) == read_json(tmp_path / "ask.json")
    assert result.error is None
    assert result.schemes[0][NAMES[0]] == 7
    assert (tmp_path / "proxy" / "group-02-round-1.jsonl").exists()
