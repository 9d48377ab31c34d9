"""The form of a language model's answer, and its check. A reply is data, never code."""

import json
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from tdc_ray.errors import ProxyReplyError
from tdc_ray.pruning.proxy import ProposalRequest
from tdc_ray.pruning.space import Scheme, Space

MAX_CHARS = 200_000
"""Longest reply that is searched for JSON; a proposal for the largest UNet takes a tenth of it."""

MAX_TRIED_CHARS = 3 * MAX_CHARS
"""Most characters that are read in vain in search of JSON, so that a hostile reply takes no
time."""

CHARS_OF_TRY = 100
"""Characters that a brace counts for that opens no object."""

MAX_PROBLEMS = 10
"""Most problems that one message names."""


class _Width(BaseModel, strict=True):
    """Neither true nor 3.0 nor "3" is a width."""

    unit: str
    keep: int


class _Reply(BaseModel, strict=True):
    schemes: list[list[_Width]]


def response_format(space: Space) -> dict[str, Any]:
    """Return the ``response_format`` of a request: a strict JSON schema of all units' names.

    It has no ranges of widths, since not every server knows ``minimum``; if some unit has illegal
    widths, it lists those that are legal for any. `parse_reply` checks each unit's.
    """
    keep: dict[str, Any] = {"type": "integer", "description": "the width that the unit keeps"}
    if any(len(widths) < widths[-1] for widths in space.legal.values()):
        keep["enum"] = sorted({width for widths in space.legal.values() for width in widths})
    width = _object(
        unit={"type": "string", "enum": [unit.name for unit in space.units]}, keep=keep
    )
    scheme = {"type": "array", "items": width}
    schema = _object(schemes={"type": "array", "items": scheme})
    return {
        "type": "json_schema",
        "json_schema": {"name": "schemes", "strict": True, "schema": schema},
    }


def _object(**properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def parse_reply(text: str, request: ProposalRequest) -> list[Scheme]:
    """Read the schemes of a reply; whatever passes here is safe to prune with.

    Prose and a fence around the JSON are ignored, units that are left out keep their full width,
    and of more schemes than were asked for the first are used. A scheme may be above the limit.

    Args:
        text: The model's reply.
        request: The request that it answers.

    Returns:
        At least one scheme, no two of them equal, with a legal width for every unit.

    Raises:
        ProxyReplyError: There is no scheme, or one that is not valid; says what is wrong.
    """
    schemes: list[Scheme] = []
    problems: list[str] = []
    for number, widths in enumerate(_read(text).schemes[: request.num_candidates], start=1):
        problems += [f"scheme {number}: {problem}" for problem in _problems(widths, request.space)]
        scheme = request.space.full | {width.unit: width.keep for width in widths}
        if scheme not in schemes:
            schemes.append(scheme)
    if problems:
        raise ProxyReplyError(_listed(problems))
    if not schemes:
        raise ProxyReplyError("the list of schemes is empty.")
    return schemes


def _read(text: str) -> _Reply:
    """Read the last object that has schemes: what precedes it is reasoning or prose."""
    if len(text) > MAX_CHARS:
        raise ProxyReplyError(f"the reply is longer than {MAX_CHARS:,} characters.")
    candidates = [value for value in _objects(text) if "schemes" in value]
    if not candidates:
        raise ProxyReplyError('the reply holds no whole JSON object with the key "schemes".')
    try:
        return _Reply.model_validate(candidates[-1])
    except ValidationError as error:
        problems = [
            f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}"
            for problem in error.errors(include_url=False)
        ]
        raise ProxyReplyError(_listed(problems)) from None


def _objects(text: str) -> Iterator[dict[str, Any]]:
    """Yield the JSON objects in a text, none of which lies inside another."""
    decoder = json.JSONDecoder()
    start, tried = text.find("{"), 0
    while start >= 0 and tried < MAX_TRIED_CHARS:
        end = start + 1
        try:
            value, end = decoder.raw_decode(text, start)
        except (ValueError, RecursionError) as error:  # no JSON, too many digits, too deep
            tried += getattr(error, "pos", len(text)) - start + CHARS_OF_TRY
        else:
            yield value
        start = text.find("{", end)


def _problems(widths: list[_Width], space: Space) -> Iterator[str]:
    """Yield the problems of a scheme."""
    if not widths:
        yield "it cuts nothing; name the units that are cut."
    seen: set[str] = set()
    for width in widths:
        legal = space.legal.get(width.unit)
        if legal is None:
            yield f"there is no unit {width.unit[:80]!r}."
        elif width.unit in seen:
            yield f"{width.unit} is named twice."
        elif width.keep not in legal:
            keep = width.keep if abs(width.keep) < 10**9 else "that"
            yield f"{width.unit} can keep {widths_text(legal, ' to ')}, not {keep}."
        seen.add(width.unit)


def widths_text(legal: Sequence[int], to: str) -> str:
    """Format a unit's legal widths: from the first to the last, or one by one."""
    if len(legal) == legal[-1]:
        return f"{legal[0]}{to}{legal[-1]}"
    return ", ".join(str(width) for width in legal)


def _listed(problems: list[str]) -> str:
    remaining = len(problems) - MAX_PROBLEMS
    more = [f"and {remaining} more such problems."] if remaining > 0 else []
    return "\n".join([*problems[:MAX_PROBLEMS], *more])
