"""Transcripts of a language model: one file of JSON lines per group and round.

A transcript holds bodies of requests, never their headers, and so no key.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from tdc_ray.errors import ProxyError, StorageError
from tdc_ray.pruning.llm.answer import Answer, TokenUsage, ToolCall
from tdc_ray.storage.files import append_json_line, listing, read_json_lines
from tdc_ray.storage.object_store import display_path, resolve_path


@dataclass(frozen=True, slots=True)
class LLMExchange:
    """One request and its outcome."""

    request: Mapping[str, Any]
    """Body of the request."""

    reply: str
    """The model's reply, empty if there was none."""

    error: str | None
    """Why the reply is unusable; None means that what it asks for was done."""

    usage: TokenUsage
    """As the server counted; where it did not, the most that it can be."""

    seconds: float

    calls: tuple[ToolCall, ...] = ()
    """Calls of tools in the reply."""

    status: int = 200
    """As of `Answer`."""

    turn: int = 0
    """How often the model had been asked in the round before, measurements between them."""

    number: int = 0
    """Which reply of its turn it is, counted from 0: a resume begins its turn again."""

    version: int = 1
    """Of the question; see `EARLIER_QUESTIONS`."""


T = TypeVar("T")

VERSION = 3
"""Of the question that is asked now."""

EARLIER_QUESTIONS: Mapping[int, str] = {
    1: "whole schemes, and is asked for changes of the knapsack's now",
    2: "changes of a scheme that every measurement changed, and of the round's first one now",
}
"""What earlier versions of the question asked for."""


@dataclass(frozen=True, slots=True)
class _Message:
    """A message of a request, as far as it is shown."""

    role: str
    content: str | None = None


_ADAPTER, _MESSAGES = TypeAdapter(LLMExchange), TypeAdapter(list[_Message])


def transcript_path(folder: Path, group: int, round_: int) -> Path:
    """Return the path of one proposal's transcript."""
    return folder / f"group-{group:02d}-round-{round_}.jsonl"


def find_transcripts(folder: Path) -> Path:
    """Find the transcripts of a run, or of what ``tdc-ray prune`` wrote.

    Raises:
        ProxyError: There are none, those of several searches, or those of an older question.
        StorageError: A file holds a line that is no exchange.
    """
    folder = resolve_path(folder)
    patterns = ("proxy/group-*.jsonl", "search/*/proxy/group-*.jsonl")
    folders = {path.parent for pattern in patterns for path in listing(folder, pattern)}
    if len(folders) != 1:
        raise ProxyError(
            f"proxy.replay must be a run directory with transcripts of one search in its folder "
            f"proxy, got {display_path(folder)} with {len(folders)}. Set --proxy.replay."
        )
    (found,) = folders
    for path in listing(found, "group-*.jsonl"):
        exchanges = _read(path)
        if exchanges and exchanges[0].version != VERSION:
            version = exchanges[0].version
            asked = EARLIER_QUESTIONS.get(version, "what only a later tdc_ray knows")
            raise ProxyError(
                f"proxy.replay cannot be {display_path(folder)}: its model was asked for {asked} "
                f"(version {version} of the question, and {VERSION} now), to which those replies "
                "are no answer. Replay it with the commit in its results.json, or ask again "
                "without --proxy.replay."
            )
    return found


def append_exchange(path: Path, exchange: LLMExchange) -> None:
    """Append an exchange to a transcript."""
    append_json_line(path, dataclasses.asdict(exchange))


def transcript_text(path: Path) -> str:
    """Return a transcript as Markdown.

    Raises:
        StorageError: The file holds a line that is no exchange.
    """
    parts = []
    for number, exchange in enumerate(_read(path), 1):
        parts.append(
            f"## Call {number}: {exchange.error or 'its answer was taken'}\n\n"
            f"{exchange.usage.tokens:,} tokens, {exchange.seconds:.1f} s"
        )
        messages = [
            *_validated(_MESSAGES, exchange.request.get("messages"), path),
            _Message("reply", exchange.reply),
            *(_Message(f"calls {call.name}", call.arguments) for call in exchange.calls),
        ]
        for message in messages:
            quoted = (message.content or "").replace("\n", "\n    ")
            parts.append(f"**{message.role}**\n\n    {quoted}")
    return "\n\n".join(parts)


def recorded_answers(path: Path, turn: int) -> list[Answer]:
    """Return the answers of a turn's last attempt, as they came.

    Raises:
        ProxyError: There is no transcript, or not of this turn.
        StorageError: The file holds a line that is no exchange.
    """
    exchanges = [exchange for exchange in _read(path) if exchange.turn == turn]
    if not exchanges:
        raise ProxyError(
            f"proxy.replay: {display_path(path)} has no replies after {turn} measurements."
        )
    starts = [place for place, exchange in enumerate(exchanges) if exchange.number == 0]
    return [
        Answer(text=one.reply, calls=one.calls, problem=one.error, status=one.status)
        for one in exchanges[starts[-1] if starts else 0 :]
    ]


def total_usage(folder: Path) -> TokenUsage:
    """Sum the usage of the calls in a folder of transcripts.

    Raises:
        StorageError: A file holds a line that is no exchange.
    """
    paths = listing(folder, "group-*.jsonl")
    return sum((exchange.usage for path in paths for exchange in _read(path)), start=TokenUsage())


def _read(path: Path) -> list[LLMExchange]:
    return [_validated(_ADAPTER, line, path) for line in read_json_lines(path)]


def _validated(adapter: TypeAdapter[T], value: object, path: Path) -> T:
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        raise StorageError(
            f"{display_path(path)} holds a line that is no exchange: {error}"
        ) from error
