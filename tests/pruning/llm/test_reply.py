import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tdc_ray.errors import ProxyReplyError
from tdc_ray.pruning.llm.reply import (
    CHARS_OF_TRY,
    MAX_CHARS,
    MAX_TRIED_CHARS,
    parse_reply,
    response_format,
)
from tests.pruning.requests import NAMES, SPACE, TASK, is_legal

SCHEME = [{"unit": NAMES[0], "keep": 3}, {"unit": NAMES[5], "keep": 1}]
GOOD = json.dumps({"schemes": [SCHEME]})
READ = [SPACE.full | {NAMES[0]: 3, NAMES[5]: 1}]

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["schemes", "unit", "keep"]), inner)
    ),
    max_leaves=12,
)
units = st.sampled_from([*NAMES, "", "unet"])
keeps = st.integers(-2, 10) | st.sampled_from([True, 3.0, 3.5, "3", None, 10**30, float("nan")])
schemes = st.lists(st.fixed_dictionaries({"unit": units, "keep": keeps}), max_size=4)
replies = st.fixed_dictionaries({"schemes": st.lists(schemes | json_values, max_size=4)})
legal = st.lists(
    st.fixed_dictionaries(
        {}, optional={u.name: st.integers(1, u.width) for u in SPACE.units}
    ).filter(len),
    min_size=1,
    max_size=4,
)


@given(st.one_of(replies, json_values).map(json.dumps) | st.text(), st.text(), st.text())
def test_no_bad_width_is_let_through(reply, before, behind):
    try:
        found = parse_reply(before + reply + behind, TASK)
    except ProxyReplyError:
        return
    assert 1 <= len(found) <= TASK.num_candidates
    assert all(is_legal(scheme) for scheme in found)


@given(legal)
def test_every_legal_scheme_is_let_through(wanted):
    rows = [[{"unit": name, "keep": keep} for name, keep in s.items()] for s in wanted]
    expected = []
    for scheme in wanted[: TASK.num_candidates]:
        if SPACE.full | scheme not in expected:
            expected.append(SPACE.full | scheme)
    assert parse_reply(json.dumps({"schemes": rows}), TASK) == expected


@pytest.mark.parametrize(
    "text",
    [
        GOOD,
        f"```json\n{GOOD}\n```",
        f"Here it is: {GOOD} Good luck {{with it}}!",
        f"<think>{{maybe}} {{}} or {json.dumps({'schemes': []})}?</think>{GOOD}",
        f'<think>{{"macs": {"1" * 5_000}}}</think>{GOOD}',
        json.dumps({"why": "{", "schemes": [SCHEME]}),
        json.dumps({"schemes": [SCHEME, SCHEME]}),
        json.dumps({"schemes": [SCHEME, SCHEME, []]}),  # one more than was asked for
    ],
)
def test_what_stands_around_the_json_is_let_pass(text):
    assert parse_reply(text, TASK) == READ


def row(unit: str, keep: object) -> str:
    return json.dumps({"schemes": [[{"unit": unit, "keep": keep}]]})


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "no whole JSON object"),
        ("I cannot do that.", "no whole JSON object"),
        (GOOD[:-3], "no whole JSON object"),
        ("[" * 100_000, "no whole JSON object"),
        ("{" * (MAX_TRIED_CHARS // CHARS_OF_TRY) + GOOD, "no whole JSON object"),
        ('{"a":' * 900 + "[" + "1," * 90_000 + GOOD, "no whole JSON object"),
        ('{"a":' * 20_000, "no whole JSON object"),
        ('{"schemes":' + "1" * 10_000 + "}", "no whole JSON object"),
        (" " * MAX_CHARS + GOOD, "longer than"),
        ('{"schemes": []}', "list of schemes is empty"),
        ('{"schemes": [[]]}', "scheme 1: it cuts nothing"),
        ('{"schemes": {}}', "schemes: Input should be a valid list"),
        ('{"schemes": [[{"unit": "a"}]]}', r"schemes\.0\.0\.keep: Field required"),
        (row("unet.conv_in", 3), "there is no unit 'unet.conv_in'"),
        (row("x" * 10_000, 3), "there is no unit 'x{80}'"),
        (row(NAMES[0], 9), f"scheme 1: {NAMES[0]} can keep 1 to 8, not 9"),
        (row(NAMES[0], 0), "not 0"),
        (row(NAMES[0], -(10**40)), "not that"),
        (row(NAMES[0], True), "keep: Input should be a valid integer"),
        (row(NAMES[0], 3.0), "keep: Input should be a valid integer"),
        (row(NAMES[0], "3"), "keep: Input should be a valid integer"),
        (json.dumps({"schemes": [SCHEME + SCHEME]}), "is named twice"),
        (json.dumps({"schemes": [[{"unit": "a", "keep": 1}] * 30]}), "and 20 more such problems"),
    ],
)
def test_a_bad_reply_is_told_what_is_wrong_with_it(text, problem):
    with pytest.raises(ProxyReplyError, match=problem) as caught:
        parse_reply(text, TASK)
    assert len(str(caught.value)) < 2000


def test_the_schema_names_every_unit_and_is_strict():
    form = response_format(SPACE)["json_schema"]
    width = form["schema"]["properties"]["schemes"]["items"]["items"]
    assert form["strict"] is True
    assert width["properties"]["unit"]["enum"] == NAMES
    for part in (form["schema"], width):  # what OpenAI demands of strict schemas
        assert part["required"] == list(part["properties"])
        assert part["additionalProperties"] is False
