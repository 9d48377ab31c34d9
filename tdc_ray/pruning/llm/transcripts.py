"""Transcripts of a language model: one file of JSON lines per group and round.

A transcript holds bodies of requests, never their headers, and so no key.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from tdc_ray.errors import ProxyError, StorageError
from tdc_ray.storage.files import append_json_line, listing, read_json_lines
from tdc_ray.storage.object_store import display_path, resolve_path


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenUsage:
    """Usage of calls."""

    calls: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    @property
    def tokens(self) -> int:
        """Tokens of prompts and replies."""
        return self.prompt_tokens + self.completion_tokens

    def __add__(self, other: "TokenUsage") -> "TokenUsage":
        return TokenUsage(
            calls=self.calls + other.calls,
            prompt_tokens=self.prompt_tokens + other.prompt_tokens,
            completion_tokens=self.completion_tokens + other.completion_tokens,
        )


@dataclass(frozen=True, slots=True)
class LLMExchange:
    """One request and its outcome."""

    request: Mapping[str, Any]
    """Body of the request."""

    reply: str
    """The model's reply, empty if there was none."""

    error: str | None
    """Why the reply is unusable; None means that its schemes were used."""

    usage: TokenUsage
    """As the server counted; where it did not, the most that it can be."""

    seconds: float


_ADAPTER = TypeAdapter(LLMExchange)


def transcript_path(folder: Path, group: int, round_: int) -> Path:
    """Return the path of one proposal's transcript."""
    return folder / f"group-{group:02d}-round-{round_}.jsonl"


def find_transcripts(folder: Path) -> Path:
    """Find the transcripts of a run, or of what ``tdc-ray prune`` wrote.

    Raises:
        ProxyError: There are none, or those of several searches.
    """
    folder = resolve_path(folder)
    patterns = ("proxy/group-*.jsonl", "search/*/proxy/group-*.jsonl")
    folders = {path.parent for pattern in patterns for path in listing(folder, pattern)}
    if len(folders) != 1:
        raise ProxyError(
            f"proxy.replay must be a run directory with transcripts of one search in its folder "
            f"proxy, got {display_path(folder)} with {len(folders)}. Set --proxy.replay."
        )
    return folders.pop()


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
            f"## Call {number}: {exchange.error or 'its schemes were taken'}\n\n"
            f"{exchange.usage.tokens:,} tokens, {exchange.seconds:.1f} s"
        )
        messages = [*exchange.request["messages"], {"role": "reply", "content": exchange.reply}]
        for message in messages:
            quoted = message["content"].replace("\n", "\n    ")
            parts.append(f"**{message['role']}**\n\n    {quoted}")
    return "\n\n".join(parts)


def recorded_reply(path: Path) -> str:
    """Return the reply whose schemes were used: the last one of all attempts.

    Raises:
        ProxyError: There is no transcript, or it ends in a failure.
        StorageError: The file holds a line that is no exchange.
    """
    exchanges = _read(path)
    if not exchanges:
        raise ProxyError(f"proxy.replay: there is no transcript {display_path(path)}.")
    last = exchanges[-1]
    if last.error is not None:
        raise ProxyError(f"proxy.replay: {path.name} ends in a failure: {last.error}")
    return last.reply


def total_usage(folder: Path) -> TokenUsage:
    """Sum the usage of the calls in a folder of transcripts.

    Raises:
        StorageError: A file holds a line that is no exchange.
    """
    paths = listing(folder, "group-*.jsonl")
    return sum((exchange.usage for path in paths for exchange in _read(path)), start=TokenUsage())


def _read(path: Path) -> list[LLMExchange]:
    try:
        return [_ADAPTER.validate_python(line) for line in read_json_lines(path)]
    except ValidationError as error:
        raise StorageError(
            f"{display_path(path)} holds a line that is no exchange: {error}"
        ) from error
