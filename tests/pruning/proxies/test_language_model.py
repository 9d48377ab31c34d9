"""A real server on loopback answers well and badly; nothing of the client is replaced."""

import json
import logging
import pickle
import re
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic_core import to_jsonable_python

from tdc_ray.config.proxy import ProxyConfig
from tdc_ray.errors import ProxyError
from tdc_ray.execution.item import checked_result
from tdc_ray.pruning.llm.budget import Budget
from tdc_ray.pruning.llm.transcripts import TokenUsage
from tdc_ray.pruning.proxies.language_model import (
    AskJob,
    LanguageModel,
    ProposalReply,
    check_proxy,
    propose_by_llm,
)
from tdc_ray.pruning.space import fit_to_limit
from tests.pruning.llm.openai_server import (
    USAGE,
    after,
    completion,
    echoes_key,
    fails,
    hangs_up,
    is_silent,
    refuses_format,
    says,
    says_key,
    serving,
    trickles,
)
from tests.pruning.requests import NAMES, SPACE, TASK, entry, is_legal, task

KEY = "sk-proj-Zx81-secretSECRET-47pq"


def answer(*schemes: dict[int, int]) -> str:
    """A good reply; units are given by their number."""
    rows = [[{"unit": NAMES[n], "keep": k} for n, k in scheme.items()] for scheme in schemes]
    return json.dumps({"schemes": rows})


GOOD = answer({0: 4, 10: 2}, {6: 1})
SCHEMES = [SPACE.full | {NAMES[0]: 4, NAMES[10]: 2}, SPACE.full | {NAMES[6]: 1}]


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


@pytest.fixture(autouse=True)
def no_key_is_left_anywhere(tmp_path, caplog):
    """After every test of this file."""
    caplog.set_level(logging.DEBUG)
    yield
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or KEY not in path.read_text(), path
    for record in caplog.get_records("call"):
        assert KEY not in logging.Formatter().format(record)
        assert KEY not in str(record.args)


def job_in(folder: Path, **settings: Any) -> AskJob:
    config = ProxyConfig(
        **{
            "model": "test-model",
            "timeout_s": 20.0,
            "max_retries": 1,
            "max_completion_tokens": 500,
            "max_seconds": 40.0,
        }
        | settings
    )
    return AskJob(config, TASK, (entry(2, 0.06, u0=2), entry(1, 0.03, u3=2)), folder / "proxy")


def run(job: AskJob, monkeypatch, *script, budget: Budget | None = None):
    """Ask a server that follows a script; give the result and the server."""
    with serving(*script) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        return propose_by_llm(job, lambda _metrics, _step: None, budget), server


def transcript(job: AskJob) -> list[dict[str, Any]]:
    path = job.transcripts / "group-02-round-1.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_good_reply_gives_its_schemes_and_what_it_took(tmp_path, monkeypatch):
    prices = {"price_per_million_prompt_tokens": 1.0, "price_per_million_completion_tokens": 5.0}
    job = pickle.loads(pickle.dumps(job_in(tmp_path, **prices)))
    reports = []
    with serving(says(GOOD)) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        result = propose_by_llm(job, lambda metrics, step: reports.append((metrics, step)))
    assert result.seconds > 0
    assert result.schemes == SCHEMES
    assert (result.prompt_tokens, result.completion_tokens, result.calls) == (1000, 200, 1)
    assert (result.cost, result.error) == (pytest.approx(0.002), None)
    kept = json.loads(json.dumps(to_jsonable_python(result)))
    assert checked_result(kept, ProposalReply) == result
    ((metrics, step),) = reports
    assert (metrics["proxy_tokens"], step) == (1200, 2)


def test_a_request_holds_the_prompt_the_schema_and_the_settings(tmp_path, monkeypatch):
    _, server = run(job_in(tmp_path, temperature=0.5), monkeypatch, says(GOOD))
    (request,) = server.requests
    assert (request["model"], request["temperature"], request["max_tokens"]) == (
        "test-model",
        0.5,
        500,
    )
    assert request["response_format"]["json_schema"]["strict"] is True
    assert [message["role"] for message in request["messages"]] == ["system", "user"]
    assert all(name in request["messages"][1]["content"] for name in NAMES)
    _, server = run(job_in(tmp_path, reply_format="json"), monkeypatch, says(GOOD))
    assert not {"response_format", "temperature"} & server.requests[0].keys()


GOES_ON = {
    "prose around it": ([says(f"Sure!\n```json\n{GOOD}\n```\nDone.")], 1),
    "prose": ([says("I would cut the middle."), says(GOOD)], 2),
    "an unknown unit": ([says(GOOD.replace(NAMES[6], "mid")), says(GOOD)], 2),
    "too wide": ([says(answer({0: 9})), says(GOOD)], 2),
    "no width": ([says(answer({0: 0})), says(GOOD)], 2),
    "a refusal": ([says(None, refusal="I must not."), says(GOOD)], 2),
    "cut off": ([says(GOOD[:40], finish_reason="length"), says(GOOD)], 2),
    "withheld": ([says("", finish_reason="content_filter"), says(GOOD)], 2),
    "empty": ([says(None), says(GOOD)], 2),
    "half a JSON": ([fails(200, completion(GOOD)[:90]), says(GOOD)], 2),
    "no JSON": ([fails(200, "<html>Busy</html>", Content_Type="text/html"), says(GOOD)], 2),
    "another JSON": ([fails(200, '{"error": "overloaded"}'), says(GOOD)], 2),
    "too many requests": ([fails(429, Retry_After="0.1"), says(GOOD)], 2),
    "an error of the server": ([fails(500, Retry_After="0.01"), says(GOOD)], 2),
    "a broken connection": ([hangs_up, says(GOOD)], 2),
    "no structured output, 400": ([refuses_format(says(GOOD))], 2),
    "no structured output, 422": ([refuses_format(says(GOOD), 422)], 2),
    "its key": ([says_key, says(GOOD)], 2),
}


@pytest.mark.parametrize("case", GOES_ON)
def test_a_bad_answer_is_survived(case, tmp_path, monkeypatch):
    script, num_requests = GOES_ON[case]
    job = job_in(tmp_path, max_total_tokens=100_000)
    budget = Budget(job.config)
    result, server = run(job, monkeypatch, *script, budget=budget)
    assert result.error is None
    assert result.schemes == SCHEMES
    assert len(server.requests) == num_requests
    assert budget.spent.tokens <= 100_000


def test_silence_is_survived(tmp_path, monkeypatch):
    result, server = run(job_in(tmp_path, timeout_s=1.0), monkeypatch, is_silent, says(GOOD))
    assert result.schemes == SCHEMES
    assert len(server.requests) == 2


GIVES_UP = {
    "prose": (says("No."), r"test-model, reply 2: the reply holds no whole JSON", 2),
    "refusals": (says(None, refusal="No."), "reply 2: it is a refusal", 2),
    "half a JSON": (fails(200, "{"), "reply 2: the server's answer is no chat completion", 2),
    "errors of the server": (fails(503), "reply 1: the server answered HTTP 503", 2),
    "too many requests": (fails(429, Retry_After="0.05"), "HTTP 429", 2),
    "a wrong key": (echoes_key(401), r"refused the key \(HTTP 401\): check OPENAI_API_KEY", 1),
    "no rights": (echoes_key(403), r"refused the key \(HTTP 403\)", 1),
    "a key in another error": (echoes_key(400), r"HTTP 400.*\[key\]", 2),
    "no such model": (fails(404, '{"error": {"message": "no test-model"}}'), "no test-model", 2),
    "broken connections": (hangs_up, "no connection to the server", 2),
}


@pytest.mark.parametrize("case", GIVES_UP)
def test_an_answer_that_stays_bad_ends_in_an_error(case, tmp_path, monkeypatch):
    step, error, num_requests = GIVES_UP[case]
    job = job_in(tmp_path, max_replies=2)
    result, server = run(job, monkeypatch, step)
    assert result.schemes == []
    assert re.search(error, result.error)
    assert len(server.requests) == num_requests
    assert KEY[:12] not in result.error
    assert transcript(job)[-1]["error"] in result.error


def test_no_traceback_of_an_error_shows_the_key(tmp_path, monkeypatch):
    job = job_in(tmp_path)
    with serving(echoes_key(401)) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        model = LanguageModel(job, Budget(job.config))
        with pytest.raises(ProxyError) as caught:
            model.propose()
    shown = "".join(traceback.format_exception(caught.value, chain=True))
    assert KEY[:12] not in shown
    assert caught.value.__context__ is None


@pytest.mark.parametrize(
    ("step", "tokens"), [(is_silent, 500), (trickles, 500), (fails(429, Retry_After="60"), 0)]
)
def test_a_proposal_ends_in_its_time_whatever_the_server_does(step, tokens, tmp_path, monkeypatch):
    started = time.monotonic()
    job = job_in(tmp_path, max_seconds=0.7, max_retries=9)
    result, _ = run(job, monkeypatch, step)
    assert time.monotonic() - started < 5
    assert "no answer in time" in result.error
    assert result.completion_tokens == tokens  # the server may have charged for them


def test_every_attempt_that_a_server_may_have_charged_for_counts(tmp_path, monkeypatch):
    script = [hangs_up, is_silent, fails(500, Retry_After="0.01"), says(GOOD)]
    job = job_in(tmp_path, timeout_s=0.5, max_retries=5)
    result, server = run(job, monkeypatch, *script)
    assert (result.error, len(server.requests)) == (None, 4)
    assert result.completion_tokens == 2 * 500 + 200


def test_retry_after_is_heeded(tmp_path, monkeypatch):
    _, server = run(job_in(tmp_path), monkeypatch, fails(429, Retry_After="0.8"), says(GOOD))
    first, second = server.times
    assert second - first >= 0.8  # its own first wait is half a second at most


def test_a_bad_reply_is_answered_with_what_was_wrong(tmp_path, monkeypatch):
    job = job_in(tmp_path)
    _, server = run(job, monkeypatch, says(answer({0: 99})), says(GOOD))
    *prompt, said, told = server.requests[1]["messages"]
    assert prompt == server.requests[0]["messages"]
    assert said == {"role": "assistant", "content": answer({0: 99})}
    assert f"{NAMES[0]} can keep 1 to 8, not 99" in told["content"]


def test_the_transcript_holds_requests_replies_and_what_they_took(tmp_path, monkeypatch):
    job = job_in(tmp_path)
    _, server = run(job, monkeypatch, says("Hm."), says_key, says(GOOD))
    lines = transcript(job)
    assert [line["request"] for line in lines] == server.requests
    assert [line["reply"] for line in lines] == ["Hm.", "Your key is Bearer [key].", GOOD]
    assert [line["error"] is None for line in lines] == [False, False, True]
    took = {name: USAGE[name] for name in ("prompt_tokens", "completion_tokens")}
    assert all(line["usage"] == {"calls": 1} | took for line in lines)


def test_schemes_above_the_limit_are_given_as_they_are(tmp_path, monkeypatch):
    job = job_in(tmp_path)
    result, _ = run(job, monkeypatch, says(GOOD))
    values = {unit.name: [1.0] * unit.width for unit in SPACE.units}
    for scheme in result.schemes:
        assert is_legal(scheme)
        assert SPACE.macs(scheme) > TASK.limit
        assert SPACE.macs(fit_to_limit(SPACE, scheme, TASK.limit, values)) <= TASK.limit


def test_a_replay_makes_no_call_and_gives_the_same_schemes(tmp_path, monkeypatch):
    job = job_in(tmp_path / "first")
    result, _ = run(job, monkeypatch, says("Hm."), fails(503), fails(503))
    again, _ = run(job, monkeypatch, says("Hm."), says(GOOD))
    assert (result.schemes, again.schemes) == ([], SCHEMES)
    monkeypatch.delenv("OPENAI_API_KEY")
    for folder in ("first", "second"):
        replay = job_in(tmp_path / folder, replay=str(tmp_path / "first"))
        replayed, server = run(replay, monkeypatch, says(answer({0: 1})))
        assert server.requests == []
        assert replayed.schemes == SCHEMES
        assert (replayed.calls, replayed.prompt_tokens, replayed.cost) == (0, 0, 0)
    missing = replace(replay, request=task(round=2))
    replayed, _ = run(missing, monkeypatch, says(GOOD))
    assert str(tmp_path / "first" / "proxy" / "group-02-round-2.jsonl") in replayed.error


def test_the_replay_of_a_failure_is_a_failure(tmp_path, monkeypatch):
    run(job_in(tmp_path), monkeypatch, fails(401))
    result, server = run(job_in(tmp_path, replay=str(tmp_path)), monkeypatch, says(GOOD))
    assert server.requests == []
    assert "group-02-round-1.jsonl ends in a failure: the server refused" in result.error


def test_the_budget_holds_while_many_ask_at_once(tmp_path, monkeypatch):
    """Each asks for ever, 1,200 tokens a reply; none of them takes more than is left."""
    jobs = [
        job_in(tmp_path / str(n), max_replies=9, max_concurrent=2, max_total_tokens=30_000)
        for n in range(6)
    ]
    budget = Budget(jobs[0].config)
    with serving(after(0.05, says("No."))) as server, ThreadPoolExecutor(6) as threads:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        results = list(threads.map(lambda job: propose_by_llm(job, lambda *_: None, budget), jobs))
    assert server.most_under_way == 2
    assert 10_000 < budget.spent.tokens == 1200 * len(server.requests) <= 30_000
    assert any("proxy.max_total_tokens 30,000" in result.error for result in results)
    total = sum(result.prompt_tokens + result.completion_tokens for result in results)
    assert total == budget.spent.tokens


def test_what_an_earlier_attempt_spent_counts(tmp_path, monkeypatch):
    job = job_in(tmp_path, max_replies=2)
    run(job, monkeypatch, says("No."))
    budget = Budget(job.config)
    result, _ = run(job, monkeypatch, says(GOOD), budget=budget)
    assert result.calls == 1
    assert budget.spent == TokenUsage(calls=3, prompt_tokens=3000, completion_tokens=600)


@pytest.mark.parametrize("key", [None, "", f"{KEY}\n", f"“{KEY}”", f"Bearer {KEY}"])
def test_a_key_that_is_missing_or_unusable_is_told(key, tmp_path, monkeypatch):
    if key is None:
        monkeypatch.delenv("OPENAI_API_KEY")
    else:
        monkeypatch.setenv("OPENAI_API_KEY", key)
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    error = propose_by_llm(job_in(tmp_path), lambda *_: None).error
    assert error.startswith("OPENAI_API_KEY")
    if not key:
        assert "any value" in error
        assert "prune.method offline" in error


@pytest.mark.parametrize(
    "url",
    ["localhost:8000", "ftp://a/v1", "http://", "http://a:99999/v1", "http://[::1", "http://ü"],
)
def test_an_address_that_cannot_be_used_is_told(url, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", url)
    error = propose_by_llm(job_in(tmp_path), lambda *_: None).error
    assert error.startswith("OPENAI_BASE_URL must be")


@pytest.mark.parametrize("status", [200, 401, 403, 404, 500])
def test_a_server_that_refuses_the_key_is_told_before_any_work(monkeypatch, status):
    with serving(says(GOOD)) as server:
        server.models_status = status
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        told = pytest.raises(ProxyError, match="refuses the key: check OPENAI_API_KEY")
        with told if status == 401 else nullcontext():  # 403: the key is not for the list
            check_proxy(ProxyConfig())
    check_proxy(ProxyConfig())  # nobody is there: what is asked already may be all that is needed
    assert server.requests == []


def test_the_servers_address_is_in_no_message(tmp_path, monkeypatch):
    def tells(handler: Any) -> None:
        message = f"no route for {handler.server.url}/chat on {handler.headers['Host']}"
        handler.answer(404, json.dumps({"error": {"message": message}}))

    result, server = run(job_in(tmp_path, reply_format="json"), monkeypatch, tells)
    assert "no route for [server]/chat on [server]" in result.error
    for path in tmp_path.rglob("*.jsonl"):
        assert "127.0.0.1" not in path.read_text()
    assert len(server.requests) == 1


def test_a_server_that_is_not_there_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    result = propose_by_llm(job_in(tmp_path), lambda *_: None)
    assert "no connection to the server" in result.error
    assert (result.calls, result.completion_tokens) == (0, 0)


def test_a_bound_below_one_call_says_what_a_call_can_take(tmp_path, monkeypatch):
    job = job_in(tmp_path, max_total_tokens=900)
    result, server = run(job, monkeypatch, says(GOOD))
    assert server.requests == []
    found = re.search(r"max_total_tokens 900: so far 0 .* one can take ([\d,]+) at", result.error)
    assert int(found[1].replace(",", "")) > 2 * 500
    assert "lower proxy.max_retries or proxy.max_completion_tokens" in result.error


@pytest.mark.parametrize(
    "usage", [{}, {"prompt_tokens": 15}, {"prompt_tokens": 15, "completion_tokens": None}, 3, None]
)
def test_a_reply_is_good_whatever_its_server_counts(usage, tmp_path, monkeypatch):
    result, _ = run(job_in(tmp_path), monkeypatch, says(GOOD, usage=usage))
    assert (result.error, result.schemes) == (None, SCHEMES)
    assert result.completion_tokens == 500  # the most that it can be


def test_a_reply_in_parts_is_put_together(tmp_path, monkeypatch):
    parts = [{"type": "text", "text": text} for text in (GOOD[:20], None, GOOD[20:])]
    result, _ = run(job_in(tmp_path), monkeypatch, says(parts))
    assert (result.error, result.schemes) == (None, SCHEMES)
