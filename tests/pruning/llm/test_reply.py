import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tdc_ray.errors import ProxyReplyError
from tdc_ray.pruning.changes import MAX_HYPOTHESIS, Bound, Planner
from tdc_ray.pruning.llm.answer import Answer, ToolCall
from tdc_ray.pruning.llm.reply import MAX_CHARS, read_reply
from tests.pruning.requests import TASK, is_legal

TURN = {"reasoning": "r", "hypothesis": "a\nb", "action": "measure"}
TURN |= {"bounds": [{"unit": 1, "least": 2, "most": 3}], "distrust": [], "moves": []}
GOOD = json.dumps(TURN)
PLANNER = Planner(TASK, ())

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["unit", "least", "most", "where", "factor", "points"]), inner
        )
    ),
    max_leaves=12,
)
turns = st.fixed_dictionaries(
    {"action": st.just("measure")},
    optional=dict.fromkeys(("bounds", "distrust", "moves", "hypothesis"), json_values),
)


def call(name: str, arguments: str) -> ToolCall:
    return ToolCall(id=f"id-{name}", name=name, arguments=arguments)


@pytest.mark.parametrize(
    "text",
    [GOOD, f"Sure!\n```json\n{GOOD}\n```\nDone.", f"<think>{{maybe}}</think>{GOOD}"],
)
def test_the_object_in_a_text_is_read(text):
    (asked,), _ = read_reply(Answer(text=text))
    assert (asked.change.action, asked.call, asked.change.hypothesis) == ("measure", None, "a b")
    assert asked.change.bounds == [Bound(unit=1, least=2, most=3)]


def test_calls_of_tools_are_read_in_order_and_an_unreadable_one_discards_itself():
    calls = (call("predict", GOOD), call("cut", "{}"), call("measure", ""), call("done", "{"))
    asked, problems = read_reply(Answer(text="Let me see {", calls=calls))
    assert [(one.change.action, one.call) for one in asked] == [
        ("predict", "id-predict"),
        ("measure", "id-measure"),
    ]
    assert asked[1].change.bounds == []
    assert problems["id-cut"] == "there is no tool 'cut', only predict, measure, done."
    assert problems["id-done"].startswith("Invalid JSON: EOF while parsing")
    assert len(problems) == 2


@pytest.mark.parametrize(
    "answer",
    [
        Answer(calls=(call("done", '{"reasoning": "all is\\nnoise"}'),)),
        Answer(text='{"reasoning": "all is\\nnoise", "action": "done"}'),
    ],
    ids=["tools", "plain"],
)
def test_a_model_may_be_done(answer):
    (asked,), _ = read_reply(answer)
    assert (asked.change.action, asked.change.reasoning) == ("done", "all is\nnoise")


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (Answer(text="I would cut the middle."), "calls no tool, and holds no JSON"),
        (Answer(text="} {"), "holds no JSON"),
        (Answer(text='{"schemes": []}'), "action: Field required"),
        (
            Answer(text='{"action": "cut"}'),
            "action: Input should be 'predict', 'measure' or 'done'",
        ),
        (Answer(text="{" * 5000 + "}"), "Invalid JSON"),
        (Answer(text="x" * (MAX_CHARS + 1)), "longer than"),
        (Answer(calls=(call("cut", "{}"),)), "no tool 'cut'"),
        (Answer(calls=(call("measure", "[1]"),)), "object"),
    ],
)
def test_what_cannot_be_used_is_told(answer, problem):
    with pytest.raises(ProxyReplyError, match=problem):
        read_reply(answer)


@settings(max_examples=25)
@given(turns)
def test_whatever_passes_is_safe_to_prune_with(turn):
    try:
        (asked,), _ = read_reply(Answer(text=json.dumps(turn)))
    except ProxyReplyError:
        return
    planned = PLANNER.plan(asked.change)
    assert is_legal(planned.scheme)
    assert TASK.space.macs(planned.scheme) <= TASK.limit


def test_a_hypothesis_is_one_short_line():
    (asked,), _ = read_reply(Answer(text=json.dumps(TURN | {"hypothesis": "x\n" * 9999})))
    assert len(asked.change.hypothesis) == MAX_HYPOTHESIS
    assert "\n" not in asked.change.hypothesis
