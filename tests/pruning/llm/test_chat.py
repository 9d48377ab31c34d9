"""What the client itself makes of a real server's answers, and what is left to read."""

import json
from typing import Any

import pytest

from tdc_ray.pruning.changes import Bound
from tdc_ray.pruning.llm.answer import Answer, Done, Measure, Predict, Turn
from tdc_ray.pruning.llm.chat import send
from tdc_ray.pruning.llm.reply import Form, num_format_bytes, read_reply
from tests.pruning.llm.openai_server import Step, calling, says, serving

CHANGE = {"reasoning": "r", "hypothesis": "h", "distrust": [], "moves": [], "shares": []}
CHANGE |= {"bounds": [{"unit": "mid", "least": 1, "most": 1}, {"unit": 1, "least": 2, "most": 3}]}
TURN = json.dumps(CHANGE | {"action": "predict"})


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-proj-Zx81-secretSECRET-47pq")
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


def sent(form: Form, step: Step, **fields: Any) -> tuple[Answer, dict[str, Any]]:
    """Send a request to a server that answers by a step; give its answer, and what it got."""
    request = {"model": "m", "messages": [{"role": "user", "content": "?"}], **fields}
    with serving(step) as server:
        limits = {"timeout_s": 20.0, "max_retries": 0, "max_seconds": 20.0}
        answer = send(request, form, base_url=server.url, **limits)
        return answer, server.requests[0]


@pytest.mark.parametrize("form", ["tools", "schema"])
def test_the_client_parses_by_the_models_and_a_bad_entry_discards_itself_alone(form):
    answer, got = sent(
        form,
        calling(("measure", CHANGE), ("predict", {}), ("done", {"reasoning": "r"}))
        if form == "tools"
        else says(TURN),
    )
    kinds = [Measure, Predict, Done] if form == "tools" else [Turn]
    assert [type(one.change) for one in answer.asked] == kinds
    assert [one.call for one in answer.asked] == ([one.id for one in answer.calls] or [None])
    assert read_reply(answer) == (list(answer.asked), {})
    change = answer.asked[0].change
    assert change.bounds == [Bound(unit=1, least=2, most=3)]
    (note,) = change.dropped
    assert "'mid', 'least': 1, 'most': 1} is none: unit: Input should be a valid int" in note
    assert answer.request == got


@pytest.mark.parametrize(
    ("form", "step", "fields"),
    [
        ("tools", calling(("measure", "{"), ("predict", CHANGE)), {}),
        ("tools", calling(("predict", CHANGE), ids=False), {}),
        ("tools", says(TURN), {}),
        ("tools", calling(("predict", CHANGE)), {"stream": True}),
        ("schema", says(f"Sure! {TURN}"), {}),
        ("schema", says([{"type": "text", "text": TURN}]), {}),
        ("json", says(TURN), {}),
    ],
)
def test_what_the_client_cannot_parse_is_read_all_the_same(form, step, fields):
    answer, _ = sent(form, step, **fields)
    assert (answer.problem, answer.asked) == (None, ())
    (asked,), _ = read_reply(answer)
    assert (asked.change.action, asked.change.hypothesis) == ("predict", "h")


def test_a_call_that_the_client_leaves_out_is_told_why():
    answer, _ = sent("tools", calling(("predict", CHANGE), ("cut", {})))
    asked, problems = read_reply(answer)
    assert [one.change.action for one in asked] == ["predict"]
    assert problems == {"call_cut_1": "there is no tool 'cut', only predict, measure, done."}


@pytest.mark.parametrize("form", ["tools", "schema"])
@pytest.mark.parametrize(
    "escape", ["", "\\", "\\\\"], ids=["plain", "escaped", "in the inner JSON"]
)
def test_no_hypothesis_holds_the_key(form, escape, monkeypatch):
    key = "zx-81/secretSECRET-47pq"
    hidden = key.replace("-", f"{escape}u002D").replace("/", f"{escape}/") if escape else key
    monkeypatch.setenv("OPENAI_API_KEY", key)

    def tells(handler: Any) -> None:
        said = CHANGE | {"action": "measure", "hypothesis": handler.headers["Authorization"]}
        plainly = handler.answer
        handler.answer = lambda status, body: plainly(status, body.replace(key, hidden))
        (says(json.dumps(said)) if form == "schema" else calling(("measure", said)))(handler)

    answer, _ = sent(form, tells)
    assert [one.change.hypothesis for one in read_reply(answer)[0]] == ["Bearer [key]"]
    assert hidden.replace("\\\\", "\\") not in answer.text + str(answer.calls)


@pytest.mark.parametrize("form", ["tools", "schema", "json"])
def test_schemas_begin_with_the_reasoning_and_are_strict(form):
    _, got = sent(form, says(TURN))
    tools = [tool["function"] for tool in got.get("tools", ())]
    wanted = got.get("response_format", {}).get("json_schema", {})
    assert [tool["name"] for tool in tools] == ["predict", "measure", "done"] * (form == "tools")
    added = {name: got[name] for name in ("tools", "response_format") if name in got}
    assert 0 <= num_format_bytes(form) - len(json.dumps(added)) * bool(added) < 200
    schemas = [tool["parameters"] for tool in tools]
    if form == "schema":
        assert wanted["strict"] is True
        assert wanted["schema"]["properties"]["action"]["enum"] == ["predict", "measure", "done"]
        schemas.append(wanted["schema"])
    assert len(schemas) == {"tools": 3, "schema": 1, "json": 0}[form]
    for schema in schemas:
        assert next(iter(schema["properties"])) == "reasoning"
        assert sorted(schema["required"]) == sorted(schema["properties"])
        assert not {"default", "dropped"} & set(json.dumps(schema).split('"'))
        assert schema["additionalProperties"] is False
