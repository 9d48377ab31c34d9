"""One request to a server that speaks OpenAI's chat protocol. No key comes out of here.

The key and the address come from the environment alone. Where a server's words could hold the
key they are left out, and nothing is raised from within an ``except``, so that no traceback
carries them along.
"""

import asyncio
import contextlib
import json
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlsplit

from pydantic import BaseModel, Field, ValidationError

from tdc_ray.errors import ProxyError
from tdc_ray.pruning.llm.transcripts import TokenUsage

logger = logging.getLogger(__name__)

KEY, BASE_URL = "OPENAI_API_KEY", "OPENAI_BASE_URL"

MIN_KEY_LENGTH = 8
"""Shorter keys are placeholders, such as EMPTY, for servers that want none."""

SECONDS_TO_CHECK = 10.0

MAX_PROBLEM_CHARS = 500
"""What is kept of a server's words."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What came of a request."""

    text: str = ""
    """What the model said, as far as it came."""

    problem: str | None = None
    """Why that is no use; None: it may be."""

    usage: TokenUsage | None = None
    """What the last attempt took; None: the server did not say."""

    unanswered: int = 0
    """Attempts that no answer came of, though the server may have worked, and charge, for them."""

    status: int = 200
    """HTTP status; 0: no answer came."""


class _Part(BaseModel):
    text: str | None = None


class _Message(BaseModel):
    content: str | list[_Part] | None = None
    refusal: str | None = None

    def words(self) -> str:
        parts = self.content or ""
        return parts if isinstance(parts, str) else "".join(part.text or "" for part in parts)


class _Choice(BaseModel):
    message: _Message
    finish_reason: str | None = None


class _Tokens(BaseModel):
    prompt_tokens: int = Field(ge=0)
    completion_tokens: int = Field(ge=0)


class _Completion(BaseModel):
    choices: list[_Choice] = Field(min_length=1)
    usage: Any = None
    """Checked apart from the rest: a reply is good whatever its server counts."""


def server_host() -> str:
    """Give the host of the server that the environment names.

    Raises:
        ProxyError: The environment holds no key, or a key or an address that cannot be used.
    """
    key = os.environ.get(KEY, "")
    if not key:
        raise ProxyError(
            f"{KEY} is not set on the driver's node. Set it there (servers of your own, such as "
            f"vLLM or Ollama, take any value; {BASE_URL} names them), or use prune.method offline."
        )
    if not key.isascii() or not key.isprintable() or " " in key:
        raise ProxyError(f"{KEY} holds a blank, a line break or a character beyond ASCII.")
    url = os.environ.get(BASE_URL) or "https://api.openai.com/v1"
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and parts.port != 0 and parts.hostname
    except ValueError:  # of the port
        valid = None
    if not valid or not url.isascii() or not url.isprintable():
        raise ProxyError(f"{BASE_URL} must be an address such as http://localhost:8000/v1.")
    return valid


def check_server() -> None:
    """Find out by the list of its models whether the server takes the key.

    One that cannot be reached, or has no such list, passes: a run that goes on may need no more.

    Raises:
        ProxyError: It does not.
    """
    import openai

    refused = False
    try:
        with openai.OpenAI(timeout=SECONDS_TO_CHECK, max_retries=0) as client:
            client.models.with_raw_response.list()
    except openai.AuthenticationError:
        refused = True
    except openai.APIConnectionError:
        logger.warning("the server that %s names cannot be reached", BASE_URL)
    except (openai.OpenAIError, OSError, ValueError, ImportError):
        pass  # asking for schemes will tell
    if refused:
        raise ProxyError(f"the server refuses the key: check {KEY} and {BASE_URL}.")


def token_limit_field(host: str) -> str:
    """Name the setting that bounds a reply's tokens.

    OpenAI's own newer models refuse ``max_tokens``; Ollama ignores and Mistral refuses what OpenAI
    has in its place.
    """
    own = host.endswith(("openai.com", "azure.com"))
    return "max_completion_tokens" if own else "max_tokens"


def upper_bound(
    request: Mapping[str, Any], max_completion_tokens: int, num_attempts: int
) -> TokenUsage:
    """Give the most that a request can take: no token stands for less than a byte."""
    prompt_tokens = len(json.dumps(request))
    return TokenUsage(
        calls=1,
        prompt_tokens=num_attempts * prompt_tokens,
        completion_tokens=num_attempts * max_completion_tokens,
    )


def send(
    request: Mapping[str, Any], *, timeout_s: float, max_retries: int, max_seconds: float
) -> Answer:
    """Send a request and read what comes back.

    Args:
        request: Its body.
        timeout_s: Longest silence of the server before the client tries again.
        max_retries: How often it does, then and after 429 and 5xx; it heeds Retry-After.
        max_seconds: Longest that all of this may take.
    """
    import openai  # slow to load, and only the process that makes the calls needs it

    status, usage, count = 0, None, _Count()
    try:
        body = asyncio.run(
            _post(request, min(timeout_s, max_seconds), max_retries, max_seconds, count)
        )
    except openai.APIStatusError as error:
        status, usage = error.status_code, TokenUsage(calls=1)
        if status in (401, 403):  # the body may show a part of the key
            problem = f"the server refused the key (HTTP {status}): check {KEY}."
        else:
            problem = f"the server answered HTTP {status}: {error.message}"
    except (TimeoutError, openai.APITimeoutError):
        problem = f"no answer in time: proxy.timeout_s {timeout_s:g}, {max_seconds:.3g} s left."
    except openai.APIConnectionError as error:
        problem = f"no connection to the server: {error.__cause__ or error}"
    except (openai.OpenAIError, OSError, ValueError, ImportError) as error:
        problem = f"the request failed: {type(error).__name__}: {error}"
    else:
        return replace(_read(body), unanswered=count.unanswered - 1)
    problem = _without_address(redact(problem))[:MAX_PROBLEM_CHARS]
    return Answer(problem=problem, usage=usage, unanswered=count.unanswered, status=status)


@dataclass(slots=True)
class _Count:
    """Counts the client's attempts at one request that got to a server and were not refused."""

    unanswered: int = 0

    async def begin(self, request: Any) -> None:
        request.extensions["trace"] = self._trace

    async def _trace(self, event: str, info: Mapping[str, Any]) -> None:
        sent = event.endswith("send_request_headers.started")
        self.unanswered += sent and info["request"].method != b"CONNECT"  # that is a proxy's

    async def end(self, response: Any) -> None:
        self.unanswered -= response.status_code != 200  # 200 may yet break off


async def _post(
    request: Mapping[str, Any],
    timeout_s: float,
    max_retries: int,
    max_seconds: float,
    count: _Count,
) -> str:
    """Give the body of the answer. Asynchronous, for the client's waits end at once when cut."""
    import openai

    hooks: dict[str, list[Any]] = {"request": [count.begin], "response": [count.end]}
    async with (
        asyncio.timeout(max_seconds),
        openai.DefaultAsyncHttpxClient(event_hooks=hooks) as http,
        openai.AsyncOpenAI(timeout=timeout_s, max_retries=max_retries, http_client=http) as client,
    ):
        response = await client.chat.completions.with_raw_response.create(**request)
        return str(response.text)


def _read(body: str) -> Answer:
    """Check the answer here, for the client takes what a server sends for what it should be."""
    try:
        completion = _Completion.model_validate_json(body)
    except ValidationError:
        return Answer(problem="the server's answer is no chat completion.")
    usage = None
    with contextlib.suppress(ValidationError):
        tokens = _Tokens.model_validate(completion.usage)
        usage = TokenUsage(
            calls=1,
            prompt_tokens=tokens.prompt_tokens,
            completion_tokens=tokens.completion_tokens,
        )
    choice = completion.choices[0]
    text, problem = choice.message.words(), None
    if choice.message.refusal:
        text, problem = choice.message.refusal, "it is a refusal, but schemes were asked for."
    elif choice.finish_reason == "length":
        problem = "it was cut off at the most tokens that a reply may have."
    elif choice.finish_reason == "content_filter":
        problem = "it was withheld by a content filter."
    elif not text.strip():
        problem = "it is empty."
    return Answer(text=redact(text), problem=problem, usage=usage)


def _without_address(text: str) -> str:
    """Take the server's address out of what went wrong."""
    url = os.environ.get(BASE_URL)
    if not url:
        return text
    parts = urlsplit(url)
    for words in (url.rstrip("/"), parts.netloc, parts.hostname):
        if words:
            text = re.sub(rf"(?<![\w.-]){re.escape(words)}(?![\w-])", "[server]", text)
    return text


def redact(text: str) -> str:
    """Take the key out of a text, and whatever looks like one."""
    key = os.environ.get(KEY, "")
    if len(key) >= MIN_KEY_LENGTH:
        text = text.replace(key, "[key]")
    return re.sub(r"\bsk-[\w*-]{3,}", "[key]", text)
