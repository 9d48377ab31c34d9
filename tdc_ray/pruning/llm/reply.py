"""The form of a language model's answer, and its check. A reply is data, never code."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, ValidationError

from tdc_ray.errors import ProxyReplyError
from tdc_ray.pruning.changes import MAX_HYPOTHESIS, Change
from tdc_ray.pruning.llm.answer import Answer, ToolCall

Action = Literal["predict", "measure"]
Form = Literal["tools", "schema", "json"]
"""How a model says what to do: see ``proxy.reply_format``."""

MAX_CHARS = 200_000
"""Longest reply that is read."""

DESCRIPTIONS: Mapping[Action, str] = {
    "predict": "Free: what the knapsack makes of changes, and what that is predicted to cost.",
    "measure": "Takes one measurement: measures what the knapsack makes of changes.",
}


class Turn(Change):
    """One answer without tools: what to do, and with which changes."""

    action: Action = Field(description="predict (free) or measure (takes one measurement)")


@dataclass(frozen=True, slots=True)
class Request:
    """One thing that a reply asks for."""

    action: Action
    change: Change
    dropped: tuple[str, ...]
    """Parts of it that were no change."""

    call: str | None = None
    """Id of the tool's call; None without tools."""

    @property
    def hypothesis(self) -> str:
        """The hypothesis on one line."""
        return " ".join(self.change.hypothesis.split())[:MAX_HYPOTHESIS]


def format_fields(form: Form) -> dict[str, Any]:
    """Return the fields of a request that tell the server the form of the answer."""
    from openai import pydantic_function_tool

    if form == "tools":
        tools = [
            pydantic_function_tool(Change, name=name, description=text)["function"]
            for name, text in DESCRIPTIONS.items()
        ]
        return {"tools": [{"type": "function", "function": dict(tool)} for tool in tools]}
    if form == "schema":
        schema = pydantic_function_tool(Turn)["function"]["parameters"]
        wanted = {"name": "turn", "strict": True, "schema": schema}
        return {"response_format": {"type": "json_schema", "json_schema": wanted}}
    return {}


def read_reply(answer: Answer) -> list[Request]:
    """Read what an answer asks for: its tool calls, or without any the JSON object in its text.

    A change that cannot be read discards itself alone.

    Raises:
        ProxyReplyError: There is nothing that can be used; says what is wrong.
    """
    if len(answer.text) > MAX_CHARS or sum(len(one.arguments) for one in answer.calls) > MAX_CHARS:
        raise ProxyReplyError(f"the reply is longer than {MAX_CHARS:,} characters.")
    if not answer.calls:
        text = answer.text.rpartition("</think>")[2]  # of servers that leave thoughts in
        start, end = text.find("{"), text.rfind("}")
        if start < 0 or end < start:
            raise ProxyReplyError("it calls no tool, and holds no JSON object.")
        return [_read(text[start : end + 1])]
    requests, problems = [], []
    for call in answer.calls:
        try:
            requests.append(_of_call(call))
        except ProxyReplyError as error:
            problems.append(str(error))
    if not requests:
        raise ProxyReplyError("\n".join(problems))
    return requests


def _of_call(call: ToolCall) -> Request:
    if call.name not in DESCRIPTIONS:
        raise ProxyReplyError(f"there is no tool {call.name[:80]!r}, only predict and measure.")
    return _read(call.arguments or "{}", call)


def _read(text: str, call: ToolCall | None = None) -> Request:
    dropped: list[str] = []
    try:
        if call is None:
            turn = Turn.model_validate_json(text, context=dropped)
            return Request(turn.action, turn, tuple(dropped))
        change = Change.model_validate_json(text, context=dropped)
    except ValidationError as error:
        problems = [
            f"{'.'.join(map(str, one['loc']))}: {one['msg']}".removeprefix(": ")
            for one in error.errors(include_url=False)[:10]
        ]
        raise ProxyReplyError("\n".join(problems)) from None
    action: Action = "predict" if call.name == "predict" else "measure"
    return Request(action, change, tuple(dropped), call.id)
