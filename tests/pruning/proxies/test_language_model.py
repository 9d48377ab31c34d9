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
from tdc_ray.pruning.changes import Bound, Change, Planner
from tdc_ray.pruning.llm.answer import TokenUsage
from tdc_ray.pruning.llm.budget import Budget
from tdc_ray.pruning.llm.transcripts import LLMExchange, append_exchange, transcript_path
from tdc_ray.pruning.proxies.language_model import (
    AskJob,
    Conversation,
    LanguageModel,
    ProposalReply,
    check_proxy,
    propose_by_llm,
)
from tests.pruning.llm.openai_server import (
    USAGE,
    after,
    calling,
    completion,
    echoes_key,
    events,
    fails,
    falls_silent,
    hangs_up,
    is_silent,
    refuses_format,
    refuses_tools,
    says,
    says_key,
    serving,
    streams,
    trickles,
)
from tests.pruning.requests import NAMES, SPACE, TASK, entry, task

KEY = "sk-proj-Zx81-secretSECRET-47pq"


def pins(*units: tuple[int, int], action: str = "measure", hypothesis: str = "h") -> str:
    """An answer without tools that pins units, given by number and width."""
    bounds = [{"unit": unit, "least": width, "most": width} for unit, width in units]
    turn = {"reasoning": "r", "hypothesis": hypothesis, "bounds": bounds, "action": action}
    return json.dumps(turn | {"distrust": [], "moves": []})


def pin(unit: int, width: int) -> dict[str, Any]:
    """Arguments of a tool that pin one unit."""
    bounds = [{"unit": unit, "least": width, "most": width}]
    return {"reasoning": "r", "hypothesis": "h", "bounds": bounds, "distrust": [], "moves": []}


JOB_MEMORY = (entry(2, 0.06, u0=2), entry(1, 0.03, u3=2))
PLANNER = Planner(TASK, JOB_MEMORY)
GOOD = pins((0, 7))
SCHEMES = (PLANNER.plan(Change(bounds=[Bound(unit=0, least=7, most=7)])).scheme,)


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
    return AskJob(config, TASK, JOB_MEMORY, folder / "proxy")


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
    assert [tool["function"]["name"] for tool in request["tools"]] == [
        "predict",
        "measure",
        "done",
    ]
    assert [message["role"] for message in request["messages"]] == ["system", "user"]
    _, server = run(job_in(tmp_path, reply_format="schema"), monkeypatch, says(GOOD))
    assert server.requests[0]["response_format"]["json_schema"]["strict"] is True
    assert not {"tools", "temperature"} & server.requests[0].keys()
    _, server = run(job_in(tmp_path, reply_format="json"), monkeypatch, says(GOOD))
    assert not {"tools", "response_format"} & server.requests[0].keys()


GOES_ON = {
    "prose around it": ([says(f"Sure!\n```json\n{GOOD}\n```\nDone.")], 1),
    "prose": ([says("I would cut the middle."), says(GOOD)], 2),
    "a call of a tool": ([calling(("measure", pin(0, 7)))], 1),
    "a call without an id": ([calling(("measure", pin(0, 7)), ids=False)], 1),
    "a call of another tool": ([calling(("cut", {})), says(GOOD)], 2),
    "a call of half a JSON": ([calling(("measure", "{")), says(GOOD)], 2),
    "another form": ([says('{"schemes": []}'), says(GOOD)], 2),
    "no tools, 400": ([refuses_tools(says(GOOD))], 2),
    "no tools, 404": ([refuses_tools(says(GOOD), 404)], 2),
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
    "no structured output, 400": ([refuses_format(says(GOOD))], 3),
    "no structured output, 422": ([refuses_format(says(GOOD), 422)], 3),
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


def call_event(number: int) -> str:
    """An event that holds a whole call of measure, each under the same index."""
    function = {"name": "measure", "arguments": json.dumps(pin(0, 8 - number))}
    delta = {"tool_calls": [{"index": 0, "id": f"call_{number}", "function": function}]}
    return f"data: {json.dumps({'choices': [{'delta': delta}]})}"


WHOLE = events(completion(GOOD))
STREAMED = {
    "text": ([says(GOOD)], 1),
    "calls of tools": ([calling(("predict", pin(1, 7)), ("measure", pin(0, 7)))], 1),
    "calls under one index": ([streams(call_event(1), call_event(2), *WHOLE[-3:])], 1),
    "comments and other ends of lines": ([streams(": ping", "event: x\r", *WHOLE, "\r")], 1),
    "all the same in one piece": ([fails(200, completion(GOOD))], 1),
    "a refusal": ([says(None, refusal="I must not, for it is bad."), says(GOOD)], 2),
    "cut off": ([says(GOOD[:60], finish_reason="length"), says(GOOD)], 2),
    "no end": ([streams(*WHOLE[:-3]), says(GOOD)], 2),
    "an error in the midst": (
        [streams(*WHOLE[:2], 'data: {"error": {"message": "out of memory"}}'), says(GOOD)],
        2,
    ),
    "no JSON": ([streams(*WHOLE[:2], "data: oops"), says(GOOD)], 2),
    "silence in the midst": ([falls_silent(*WHOLE[:2]), says(GOOD)], 2),
    "no tools": ([refuses_tools(says(GOOD))], 2),
}


@pytest.mark.parametrize("case", STREAMED)
def test_a_streamed_answer_is_as_good_as_a_whole_one(case, tmp_path, monkeypatch):
    script, num_requests = STREAMED[case]
    job = job_in(tmp_path, stream=True, timeout_s=1.0 if "silence" in case else 20.0)
    result, server = run(job, monkeypatch, *script)
    assert result.error is None
    assert result.schemes[0] == SCHEMES[0]
    assert len(server.requests) == num_requests
    assert server.requests[-1]["stream_options"] == {"include_usage": True}
    if num_requests == 1:
        assert (result.prompt_tokens, result.completion_tokens) == (1000, 200)
    if case == "calls under one index":
        assert [scheme[NAMES[0]] for scheme in result.schemes] == [7, 6]


def test_a_stream_may_take_longer_than_the_timeout(tmp_path, monkeypatch):
    slow, started = streams(*events(completion(GOOD), 20), pause=0.12), time.monotonic()
    result, server = run(job_in(tmp_path, stream=True, timeout_s=1.2), monkeypatch, slow)
    assert time.monotonic() - started > 1.2
    assert (result.error, result.schemes, len(server.requests)) == (None, SCHEMES, 1)


def test_silence_is_survived(tmp_path, monkeypatch):
    result, server = run(job_in(tmp_path, timeout_s=1.0), monkeypatch, is_silent, says(GOOD))
    assert result.schemes == SCHEMES
    assert len(server.requests) == 2


GIVES_UP = {
    "prose": (says("No."), r"test-model, reply 2: it calls no tool, and holds no JSON", 2),
    "refusals": (says(None, refusal="No."), "reply 2: it is a refusal", 2),
    "half a JSON": (fails(200, "{"), "reply 2: the server's answer is no chat completion", 2),
    "other JSON": (fails(200, '{"detail": "x"}'), "the server's answer is no chat completion", 2),
    "errors of the server": (fails(503), "reply 1: the server answered HTTP 503", 2),
    "too many requests": (fails(429, Retry_After="0.05"), "HTTP 429", 2),
    "a wrong key": (echoes_key(401), r"refused the key \(HTTP 401\): check OPENAI_API_KEY", 1),
    "no rights": (echoes_key(403), r"refused the key \(HTTP 403\)", 1),
    "a key in another error": (echoes_key(400), r"HTTP 400.*\[key\]", 3),
    "no such model": (fails(404, '{"error": {"message": "no test-model"}}'), "no test-model", 3),
    "broken connections": (hangs_up, "no connection to the server", 2),
}


@pytest.mark.parametrize("case", GIVES_UP)
def test_an_answer_that_stays_bad_ends_in_an_error(case, tmp_path, monkeypatch):
    step, error, num_requests = GIVES_UP[case]
    job = job_in(tmp_path, max_replies=2)
    result, server = run(job, monkeypatch, step)
    assert result.schemes == ()
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
    _, server = run(job, monkeypatch, says("I would."), calling(("cut", {})), says(GOOD))
    *prompt, said, told = server.requests[1]["messages"]
    assert prompt == server.requests[0]["messages"]
    assert said == {"role": "assistant", "content": "I would."}
    assert "it calls no tool" in told["content"]
    *_, said, told = server.requests[2]["messages"]
    assert said["tool_calls"][0]["function"]["name"] == "cut"
    assert (told["role"], told["tool_call_id"]) == ("tool", "call_cut_0")
    assert "no tool 'cut'" in told["content"]


@pytest.mark.parametrize("form", ["tools", "json"])
def test_predictions_are_free_and_answered_and_what_is_measured_ends_the_turn(
    form, tmp_path, monkeypatch
):
    script = [says(pins((0, 7), action="predict")), says(GOOD)]
    if form == "tools":
        both = calling(("predict", pin(1, 7)), ("measure", pin(0, 7)), text="Let me see.")
        script = [calling(("predict", pin(0, 7)), ("predict", pin(99, 1))), both]
    job = job_in(tmp_path, reply_format=form)
    result, server = run(job, monkeypatch, *script)
    told = [json.loads(m["content"]) for m in server.requests[1]["messages"][3:]]
    planned = PLANNER.plan(Change(bounds=[Bound(unit=0, least=7, most=7)]))
    assert told[0]["predicted_increase"] == pytest.approx(planned.increase, rel=1e-4)
    assert (result.error, result.schemes, result.hypotheses) == (None, SCHEMES, ("h",))
    assert (result.repaired, result.notes) == ((False,), ())
    if form == "tools":
        assert told[1]["not_done_as_asked"] == ["unit 99 within 1 to 1: there is no such unit"]
        assert [m["role"] for m in server.requests[1]["messages"][2:]] == [
            "assistant",
            "tool",
            "tool",
        ]
        assert result.conversation.pending == ("call_measure_1",)
        assert result.conversation.messages[-1]["tool_call_id"] == "call_predict_0"
    assert (result.conversation.turn, result.conversation.form) == (1, form)


@pytest.mark.parametrize("form", ["tools", "schema"])
def test_the_next_turn_tells_what_was_measured(form, tmp_path, monkeypatch):
    measure = calling(("measure", pin(0, 7))) if form == "tools" else says(GOOD)
    first, _ = run(job_in(tmp_path, reply_format=form), monkeypatch, measure)
    came_to = replace(entry(2, 0.0571), widths=first.schemes[0], predicted=0.004, candidate=2)
    kept = json.loads(json.dumps(to_jsonable_python(first)))
    job = replace(
        job_in(tmp_path, reply_format=form),
        request=task(num_candidates=1),
        conversation=checked_result(kept, ProposalReply).conversation,
        measured=(came_to,),
    )
    other = calling(("measure", pin(0, 6))) if form == "tools" else says(pins((0, 6)))
    second, server = run(job, monkeypatch, measure, other)
    assert second.error is None
    *_, told = server.requests[0]["messages"]
    told_of = json.loads(told["content"])
    assert told_of["measured_increase"] == pytest.approx(0.0071)
    assert told_of["widths_changed"]["0"][1] == 7  # what predict tells stands beside it
    assert told_of["cost_in_percent"] <= told_of["limit_in_percent"] == 70
    assert told["role"] == ("tool" if form == "tools" else "user")
    *_, refused = server.requests[1]["messages"]  # it asked for the same again
    assert "measured this scheme already" in json.loads(refused["content"])["not_measured"]
    assert second.schemes[0][NAMES[0]] == 6
    assert [line["turn"] for line in transcript(job)] == [0, 1, 1]


def test_what_was_measured_is_told_with_the_changes_that_did_not_count(tmp_path, monkeypatch):
    asks = says(pins((0, 7), (77, 1)))
    first, _ = run(job_in(tmp_path, reply_format="json"), monkeypatch, asks)
    came_to = replace(entry(2, 0.0571), widths=first.schemes[0], candidate=2)
    before = json.loads(json.dumps(to_jsonable_python(first)))
    del before["conversation"]["planned"]  # as it was saved before
    for reply in (first, checked_result(before, ProposalReply)):
        job = replace(
            job_in(tmp_path, reply_format="json"),
            conversation=reply.conversation,
            measured=(came_to,),
        )
        _, server = run(job, monkeypatch, says(pins((0, 6))))
        told = json.loads(server.requests[0]["messages"][-1]["content"])
        assert told["measured_increase"] == pytest.approx(0.0071)
        assert told.get("not_done_as_asked") == (
            ["unit 77 within 1 to 1: there is no such unit"] if reply is first else None
        )


def test_in_every_turn_of_a_round_the_same_pin_makes_the_same_scheme(tmp_path, monkeypatch):
    """What was measured in it would correct the predictions, and so the scheme."""
    first, _ = run(job_in(tmp_path), monkeypatch, says(GOOD))
    far_off = replace(entry(2, 0.9), widths=first.schemes[0], candidate=2)
    pinned = Change(bounds=[Bound(unit=8, least=6, most=6)])
    moved = Planner(TASK, (*JOB_MEMORY, far_off)).plan(pinned).scheme
    job = replace(job_in(tmp_path), conversation=first.conversation, measured=(far_off,))
    second, _ = run(job, monkeypatch, says(pins((8, 6))))
    assert second.schemes == (PLANNER.plan(pinned).scheme,)
    assert second.schemes != (moved,)


@pytest.mark.parametrize("form", ["tools", "schema", "json"])
def test_a_model_that_is_done_ends_the_round_and_what_it_asked_for_before_is_measured(
    form, tmp_path, monkeypatch
):
    because = {"reasoning": "all is\nnoise"}
    job = job_in(tmp_path / "a", reply_format=form)
    is_done = calling(("done", because)) if form == "tools" else says(pins(action="done"))
    result, server = run(job, monkeypatch, is_done)
    assert (result.error, result.schemes, len(server.requests)) == (None, (), 1)
    assert result.done == ("all is noise" if form == "tools" else "r")
    kept = json.loads(json.dumps(to_jsonable_python(result)))
    assert checked_result(kept, ProposalReply) == result
    if form == "tools":
        both = calling(("measure", pin(0, 7)), ("done", {}))
        result, _ = run(job_in(tmp_path / "b"), monkeypatch, both)
        assert (result.schemes, result.done) == (SCHEMES, "")


def test_a_call_that_cannot_be_read_beside_others_is_told_why(tmp_path, monkeypatch):
    mixed = calling(("predict", pin(0, 7)), ("measure", "{"), ("cut", {}))
    _, server = run(job_in(tmp_path), monkeypatch, mixed, says(GOOD))
    told = {
        m["tool_call_id"]: json.loads(m["content"]) for m in server.requests[1]["messages"][3:]
    }
    assert told["call_predict_0"]["predicted_increase"] > 0
    assert "Invalid JSON" in told["call_measure_1"]["error"]
    assert "there is no tool 'cut'" in told["call_cut_2"]["error"]


def test_more_than_is_left_and_what_is_far_worse_is_not_measured(tmp_path, monkeypatch):
    narrow = pin(2, 1) | {"bounds": [{"unit": n, "least": 1, "most": 1} for n in range(1, 12)]}
    wanted = [("measure", narrow), *(("measure", pin(0, width)) for width in (7, 6, 5))]
    result, _ = run(job_in(tmp_path), monkeypatch, calling(*wanted))
    assert [scheme[NAMES[0]] for scheme in result.schemes] == [7, 6]
    told = [json.loads(m["content"])["not_measured"] for m in result.conversation.messages[3:]]
    assert told == [
        "it is predicted to be far worse than the knapsack's",
        "no measurement is left in this round",
    ]


def test_a_scheme_of_changes_that_were_dropped_is_repaired_and_said(tmp_path, monkeypatch):
    result, _ = run(job_in(tmp_path), monkeypatch, says(pins((0, 7), (0, 3), (77, 1))))
    assert (result.schemes, result.repaired) == (SCHEMES, (True,))
    assert [note.partition(":")[0] for note in result.notes] == [
        "unit 0 within 3 to 3",
        "unit 77 within 1 to 1",
    ]


def test_who_only_predicts_is_left_alone(tmp_path, monkeypatch):
    predicts = says(pins((0, 7), action="predict"))
    result, server = run(job_in(tmp_path, max_predictions=2), monkeypatch, predicts)
    assert "had nothing measured in 3 replies: proxy.max_predictions" in result.error
    left = [
        json.loads(request["messages"][-1]["content"])["replies_that_may_only_predict"]
        for request in server.requests[1:]
    ]
    assert left == [1, 0]


def test_a_measurement_begins_the_count_of_predictions_anew(tmp_path, monkeypatch):
    predicts = calling(("predict", pin(0, 6)))
    both = calling(("predict", pin(0, 5)), ("measure", pin(0, 7)))
    result, _ = run(job_in(tmp_path, max_predictions=1), monkeypatch, predicts, both)
    assert result.error is None
    told = json.loads(result.conversation.messages[-1]["content"])
    assert told["replies_that_may_only_predict"] == 1


def test_an_address_among_the_settings_needs_no_key(tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    with serving(says(GOOD)) as server:
        job = job_in(tmp_path, base_url=server.url)
        check_proxy(job.config)
        assert propose_by_llm(job, lambda *_: None).schemes == SCHEMES
    with pytest.raises(ProxyError, match=r"proxy\.base_url must be an address"):
        check_proxy(replace(job.config, base_url="localhost:8000"))


def test_the_transcript_holds_requests_replies_and_what_they_took(tmp_path, monkeypatch):
    job = job_in(tmp_path)
    _, server = run(job, monkeypatch, says("Hm."), says_key, says(GOOD))
    lines = transcript(job)
    assert [line["request"] for line in lines] == server.requests
    assert [line["reply"] for line in lines] == ["Hm.", "Your key is Bearer [key].", GOOD]
    assert [line["error"] is None for line in lines] == [False, False, True]
    took = {name: USAGE[name] for name in ("prompt_tokens", "completion_tokens")}
    assert all(line["usage"] == {"calls": 1} | took for line in lines)


def test_a_form_that_the_server_refuses_is_asked_for_once_a_run(tmp_path, monkeypatch, caplog):
    jobs = [job_in(tmp_path), replace(job_in(tmp_path), request=task(round=2))]
    budget = Budget(jobs[0].config)
    with serving(refuses_format(says(GOOD))) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        for job in jobs:
            result = propose_by_llm(job, lambda *_: None, budget)
            assert result.conversation.form == "json"
    assert len(server.requests) == 3 + 1
    _, server = run(job_in(tmp_path / "b", model="b"), monkeypatch, says(GOOD), budget=budget)
    assert "tools" in server.requests[0]
    for job in jobs:
        replay = replace(job, config=replace(job.config, replay=str(tmp_path)))
        replayed = propose_by_llm(replay, lambda *_: None, budget)
        assert (replayed.error, replayed.schemes) == (None, SCHEMES)
    assert [line for line in caplog.messages if "takes no" in line] == [
        "test-model takes no tools: asked for schema from now on",
        "test-model takes no schema: asked for json from now on",
    ]


def test_a_replay_makes_no_call_and_gives_the_same_schemes(tmp_path, monkeypatch):
    job = job_in(tmp_path / "first")
    result, _ = run(job, monkeypatch, says("Hm."), fails(503), fails(503))
    script = [says("Hm."), calling(("predict", pin(0, 7))), calling(("measure", pin(0, 7)))]
    again, _ = run(job, monkeypatch, *script)
    assert (result.schemes, again.schemes) == ((), SCHEMES)
    monkeypatch.delenv("OPENAI_API_KEY")
    for folder in ("first", "second"):
        replay = job_in(tmp_path / folder, replay=str(tmp_path / "first"))
        replayed, server = run(replay, monkeypatch, says(pins((0, 1))))
        assert server.requests == []
        assert (replayed.schemes, replayed.conversation) == (SCHEMES, again.conversation)
        assert (replayed.calls, replayed.prompt_tokens, replayed.cost) == (0, 0, 0)
    for missing in (
        replace(replay, request=task(round=2)),
        replace(replay, conversation=Conversation(turn=1)),
    ):
        replayed, _ = run(missing, monkeypatch, says(GOOD))
        assert "group-02-round-" in replayed.error
        assert "has no replies" in replayed.error


def test_the_replay_of_a_scheme_that_every_measurement_changed_is_refused_with_why(tmp_path):
    path = transcript_path(tmp_path / "proxy", 2, 1)
    append_exchange(path, LLMExchange({}, GOOD, None, TokenUsage(), 1.0, version=2))
    told = r"changes of a scheme that every measurement changed.*\(version 2 .* 3 now\).*no answer"
    with pytest.raises(ProxyError, match=told):
        check_proxy(ProxyConfig(replay=str(tmp_path)))


def test_the_replay_of_whole_schemes_is_refused_with_why(tmp_path):
    path = transcript_path(tmp_path / "proxy", 2, 1)
    exchange = LLMExchange({}, '{"schemes": []}', None, TokenUsage(), 1.0)
    append_exchange(path, exchange)
    line = json.loads(path.read_text())
    for later in ("calls", "status", "turn", "number", "version"):  # as 0.1.0 wrote it
        del line[later]
    path.write_text(json.dumps(line) + "\n")
    with pytest.raises(ProxyError, match=r"asked for whole schemes, .*\(version 1 .*no answer"):
        check_proxy(ProxyConfig(replay=str(tmp_path)))


def test_a_reply_of_0_1_0_still_loads():
    kept = {"schemes": [SPACE.full], "prompt_tokens": 1, "completion_tokens": 2, "calls": 1}
    reply = checked_result(kept | {"cost": 0.0, "error": None, "seconds": 1.0}, ProposalReply)
    assert (reply.schemes, reply.conversation) == ((SPACE.full,), Conversation())


def test_the_replay_of_a_failure_is_a_failure(tmp_path, monkeypatch):
    run(job_in(tmp_path), monkeypatch, fails(401))
    result, server = run(job_in(tmp_path, replay=str(tmp_path)), monkeypatch, says(GOOD))
    assert server.requests == []
    assert "reply 1: the server refused" in result.error


def test_the_budget_holds_while_many_ask_at_once(tmp_path, monkeypatch):
    """Each asks for ever, 1,200 tokens a reply; none of them takes more than is left."""
    jobs = [
        job_in(tmp_path / str(n), max_replies=9, max_concurrent=2, max_total_tokens=60_000)
        for n in range(6)
    ]
    budget = Budget(jobs[0].config)
    with serving(after(0.05, says("No."))) as server, ThreadPoolExecutor(6) as threads:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        results = list(threads.map(lambda job: propose_by_llm(job, lambda *_: None, budget), jobs))
    assert server.most_under_way == 2
    assert 10_000 < budget.spent.tokens == 1200 * len(server.requests) <= 60_000
    assert any("proxy.max_total_tokens 60,000" in result.error for result in results)
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
        assert "--proxy.base-url" in error
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
