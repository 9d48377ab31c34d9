"""The forms of a language model's answer, and its reading. A reply is data, never code."""

import json
from collections.abc import Collection, Mapping
from functools import cache
from typing import Any, Literal

from pydantic import BaseModel, ValidationError

from tdc_ray.errors import ProxyReplyError
from tdc_ray.pruning.llm.answer import Answer, Done, Measure, Predict, Request, Turn

Form = Literal["tools", "schema", "json"]
"""How a model says what to do: see ``proxy.reply_format``."""

MAX_CHARS = 200_000
"""Longest reply that is read."""

FORMAT_BYTES = 50
"""Bytes of a request around each schema of a tool or of an answer, at most."""

TOOLS: Mapping[str, type[Predict | Measure | Done]]
TOOLS = {"predict": Predict, "measure": Measure, "done": Done}


@cache
def format_fields(form: Form) -> dict[str, Any]:
    """Return what tells the client the form of an answer, by whose models it parses."""
    from openai import pydantic_function_tool

    if form == "tools":
        tools = [pydantic_function_tool(model, name=name) for name, model in TOOLS.items()]
        return {"tools": tools}
    return {"response_format": Turn} if form == "schema" else {}


@cache
def num_format_bytes(form: Form) -> int:
    """Return the most bytes that the client adds to a request for the form of an answer."""
    from openai import pydantic_function_tool

    models: Mapping[Form, Collection[type[BaseModel]]]
    models = {"tools": TOOLS.values(), "schema": [Turn], "json": []}
    tools = map(pydantic_function_tool, models[form])
    return sum(len(json.dumps(tool)) + FORMAT_BYTES for tool in tools)


def read_reply(answer: Answer) -> tuple[list[Request], dict[str | None, str]]:
    """Return what an answer asks for, and of calls that cannot be read, by their ids, why.

    What the client has not parsed is read here: streamed and recorded replies, calls of which one
    cannot be read, which discards itself alone, and the JSON object in a text.

    Raises:
        ProxyReplyError: There is nothing that can be used; says what is wrong.
    """
    if len(answer.text) > MAX_CHARS or sum(len(one.arguments) for one in answer.calls) > MAX_CHARS:
        raise ProxyReplyError(f"the reply is longer than {MAX_CHARS:,} characters.")
    requests, problems = list(answer.asked), dict[str | None, str]()
    parsed = {one.call for one in requests}
    wanted: list[tuple[str | None, str, str | None]]
    wanted = [(call.name, call.arguments or "{}", call.id) for call in answer.calls]
    if not wanted and not requests:
        wanted = [(None, _object_in(answer.text), None)]
    for name, text, call in wanted:
        model = Turn if name is None else TOOLS.get(name)
        try:
            if model is None:
                problems[call] = f"there is no tool {str(name)[:80]!r}, only {', '.join(TOOLS)}."
            elif call not in parsed:
                requests.append(Request(model.model_validate_json(text), call))
        except ValidationError as error:
            problems[call] = "\n".join(
                f"{'.'.join(map(str, one['loc']))}: {one['msg']}".removeprefix(": ")
                for one in error.errors(include_url=False)[:10]
            )
    if not requests:
        raise ProxyReplyError("\n".join(problems.values()))
    return requests, problems


def _object_in(text: str) -> str:
    text = text.rpartition("</think>")[2]  # of servers that leave thoughts in
    start, end = text.find("{"), text.rfind("}")
    if start < 0 or end < start:
        raise ProxyReplyError("it calls no tool, and holds no JSON object.")
    return text[start : end + 1]
