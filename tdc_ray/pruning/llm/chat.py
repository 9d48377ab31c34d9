"""One request to a server with OpenAI's chat protocol. No key leaves this module.

The openai client times attempts out, and repeats them after its own waits or Retry-After. Left to
this module are a bound on all of a request's time, the attempts that a server may charge for, and
a check of the answer: the client fills its types with whatever a server sends, and its strict
mode refuses what lenient servers leave out. A streamed reply is received whole, too, so that the
client's timeout bounds each silence, and its attempts cover a stream that breaks off.

The key comes from the environment alone. A server's text that could hold the key is left out, and
nothing is raised from within an ``except``, so that no traceback has it.
"""

import asyncio
import json
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import (
    AliasPath,
    BaseModel,
    BeforeValidator,
    Field,
    NonNegativeInt,
    ValidationError,
)

from tdc_ray.errors import ProxyError
from tdc_ray.pruning.llm.answer import Answer, TokenUsage, ToolCall

logger = logging.getLogger(__name__)

KEY, BASE_URL = "OPENAI_API_KEY", "OPENAI_BASE_URL"

MIN_KEY_LENGTH = 8
"""Shorter keys are placeholders, such as EMPTY, for servers that want none."""

SECONDS_TO_CHECK = 10.0

MAX_PROBLEM_CHARS = 500
"""Most characters of a server's text that are kept."""

STREAMED = ("stream", "stream_options")
"""Fields of a request that ask for a stream."""

NO_KEY = "none"
"""Stands for the key of a server that needs none."""


def _as_text(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, dict) else value or ""


class _Part(BaseModel):
    text: str | None = None


class _Function(BaseModel):
    name: Annotated[str, BeforeValidator(_as_text)] = ""
    arguments: Annotated[str, BeforeValidator(_as_text)] = ""
    """Some servers send an object in place of its JSON."""


class _ToolCall(BaseModel):
    id: str | None = None
    function: _Function


class _CallPart(_ToolCall):
    """What an event adds to a call."""

    index: int | None = None
    function: _Function = Field(default_factory=_Function)


class _Message(BaseModel):
    content: str | list[_Part] | None = None
    tool_calls: list[_ToolCall] | None = None
    refusal: str | None = None


class _Tokens(BaseModel):
    prompt_tokens: NonNegativeInt
    completion_tokens: NonNegativeInt


class _Completion(BaseModel):
    message: _Message = Field(validation_alias=AliasPath("choices", 0, "message"))
    finish_reason: str | None = Field(
        default=None, validation_alias=AliasPath("choices", 0, "finish_reason")
    )
    usage: Annotated[_Tokens | Any, Field(union_mode="left_to_right")] = None
    """A reply is good whatever its server counts."""


class _Delta(BaseModel):
    content: str | list[_Part] | None = None
    tool_calls: list[_CallPart] | None = None
    refusal: str | None = None


class _Event(BaseModel):
    """What an event adds to a streamed reply."""

    delta: _Delta = Field(
        default_factory=_Delta, validation_alias=AliasPath("choices", 0, "delta")
    )
    finish_reason: str | None = Field(
        default=None, validation_alias=AliasPath("choices", 0, "finish_reason")
    )
    usage: Any = None
    error: Any = None


BROKEN_OFF = "broken off"
"""Stands for the finish_reason of a stream that ended without one; an error may follow."""


def server_host(base_url: str | None) -> str:
    """Return the host of a server, or of the one that the environment names.

    Raises:
        ProxyError: The environment holds no key that is needed, or a key or an address that cannot
            be used.
    """
    key = _key(base_url)
    if not key:
        raise ProxyError(
            f"{KEY} is not set on the driver's node. Set it there, name a server of your own that "
            "needs none, such as vLLM or Ollama, by proxy.base_url (--proxy.base-url), or use "
            "prune.method offline."
        )
    if not key.isascii() or not key.isprintable() or " " in key:
        raise ProxyError(f"{KEY} holds a blank, a line break or a character beyond ASCII.")
    url = _address(base_url)
    try:
        parts = urlsplit(url)
        host = parts.scheme in ("http", "https") and parts.port != 0 and parts.hostname
    except ValueError:  # of the port
        host = None
    if not host or not url.isascii() or not url.isprintable():
        name = BASE_URL if base_url is None else "proxy.base_url"
        raise ProxyError(f"{name} must be an address such as http://localhost:8000/v1.")
    return host


def _address(base_url: str | None) -> str:
    return base_url or os.environ.get(BASE_URL) or "https://api.openai.com/v1"


def _key(base_url: str | None) -> str:
    return os.environ.get(KEY, "") or (NO_KEY if base_url else "")


def check_server(base_url: str | None) -> None:
    """Check by the list of its models that the server accepts the key.

    One that cannot be reached, or has no such list, passes: a run that resumes may need no more.

    Raises:
        ProxyError: It does not.
    """
    import openai

    refused = False
    try:
        with openai.OpenAI(
            timeout=SECONDS_TO_CHECK,
            max_retries=0,
            base_url=_address(base_url),
            api_key=_key(base_url),
        ) as client:
            client.models.with_raw_response.list()
    except openai.AuthenticationError:
        refused = True
    except openai.APIConnectionError:
        name = BASE_URL if base_url is None else "proxy.base_url"
        logger.warning("the server that %s names cannot be reached", name)
    except (openai.OpenAIError, OSError, ValueError, ImportError):
        pass  # asking will tell
    if refused:
        raise ProxyError(f"the server refuses the key: check {KEY} and the server's address.")


def token_limit_field(host: str) -> str:
    """Return the name of the field that bounds a reply's tokens.

    OpenAI's own newer models refuse ``max_tokens``; Ollama ignores and Mistral refuses what OpenAI
    has in its place.
    """
    own = host.endswith(("openai.com", "azure.com"))
    return "max_completion_tokens" if own else "max_tokens"


def send(
    request: Mapping[str, Any],
    *,
    base_url: str | None,
    timeout_s: float,
    max_retries: int,
    max_seconds: float,
) -> Answer:
    """Send a request and read the response.

    Args:
        request: Its body; may ask for a stream.
        base_url: Address of the server; None means the one that the environment names.
        timeout_s: Longest silence of the server before the client tries again.
        max_retries: How often it does, then and after 429 and 5xx.
        max_seconds: Longest time of all of this.
    """
    import openai  # slow to import, and only the process that makes the calls needs it

    attempts = _Attempts()
    hooks: dict[str, list[Any]] = {"request": [attempts.begin], "response": [attempts.end]}

    # The client itself is to wait for the whole body, and knows no stream.
    streaming = {name: request[name] for name in STREAMED if name in request}
    others = {name: value for name, value in request.items() if name not in STREAMED}

    async def post() -> tuple[str, bool]:
        async with (
            asyncio.timeout(max_seconds),  # ends the client's waits, too, as no thread could
            openai.DefaultAsyncHttpxClient(event_hooks=hooks) as http,
            openai.AsyncOpenAI(
                base_url=_address(base_url),
                api_key=_key(base_url),
                timeout=min(timeout_s, max_seconds),
                max_retries=max_retries,
                http_client=http,
            ) as client,
        ):
            create = client.chat.completions.with_raw_response.create
            response = await create(**others, extra_body=streaming)
            kind = response.headers.get("Content-Type", "")  # not all servers can stream
            return str(response.text), kind.startswith("text/event-stream")

    status, usage = 0, None
    try:
        body, is_stream = asyncio.run(post())
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
        return replace(_read(body, is_stream=is_stream), unanswered=attempts.unanswered - 1)
    problem = _without_address(redact(problem), _address(base_url))[:MAX_PROBLEM_CHARS]
    return Answer(problem=problem, usage=usage, unanswered=attempts.unanswered, status=status)


@dataclass(slots=True)
class _Attempts:
    """Counts the client's attempts at one request that reached a server and were not refused.

    The client's own count of retries includes those that reached no server or were answered by
    429.
    """

    unanswered: int = 0

    async def begin(self, request: Any) -> None:
        request.extensions["trace"] = self._trace

    async def _trace(self, event: str, info: Mapping[str, Any]) -> None:
        sent = event.endswith("send_request_headers.started")
        self.unanswered += sent and info["request"].method != b"CONNECT"  # that is a proxy's

    async def end(self, response: Any) -> None:
        self.unanswered -= response.status_code != 200  # a 200 may still break off


def _read(body: str, *, is_stream: bool) -> Answer:
    """Check an answer."""
    try:
        completion = _joined(body) if is_stream else _Completion.model_validate_json(body)
    except ValidationError:
        return Answer(problem="the server's answer is no chat completion.")
    counted, message = completion.usage, completion.message
    usage = TokenUsage(calls=1, **dict(counted)) if isinstance(counted, _Tokens) else None
    text, problem = _text_of(message.content), None
    calls = tuple(
        ToolCall(
            id=call.id or f"call_{number}",
            name=call.function.name,
            arguments=redact(call.function.arguments),
        )
        for number, call in enumerate(message.tool_calls or ())
    )
    if message.refusal:
        text, problem = message.refusal, "it is a refusal, but changes were asked for."
    elif completion.finish_reason == "length":
        problem = "it was cut off at the most tokens that a reply may have."
    elif (reason := completion.finish_reason or "").startswith(BROKEN_OFF):
        problem = redact(f"the server broke it off{reason.removeprefix(BROKEN_OFF)}.")
    elif completion.finish_reason == "content_filter":
        problem = "it was withheld by a content filter."
    elif not text.strip() and not calls:
        problem = "it is empty."
    return Answer(text=redact(text), calls=calls, problem=problem, usage=usage)


def _text_of(content: str | list[_Part] | None) -> str:
    if isinstance(content, list):
        return "".join(part.text or "" for part in content)
    return content or ""


def _joined(body: str) -> _Completion:
    """Join the events of a stream to what the reply would have been in one piece.

    Raises:
        ValidationError: An event is none of a chat completion's.
    """
    text = refusal = ""
    calls: list[_CallPart] = []
    latest: dict[int | None, _CallPart] = {}
    finish_reason, usage = BROKEN_OFF, None
    for line in re.split(r"\r\n|\r|\n", body):
        name, _, data = line.partition(":")
        if name != "data" or data.strip() == "[DONE]":  # comments keep the connection alive
            continue
        event = _Event.model_validate_json(data)
        text += _text_of(event.delta.content)
        refusal += event.delta.refusal or ""
        finish_reason = event.finish_reason or finish_reason
        if event.error:
            finish_reason = f"{BROKEN_OFF}: {event.error}"[:MAX_PROBLEM_CHARS]
        usage = event.usage or usage
        for part in event.delta.tool_calls or ():
            call = latest.get(part.index)
            # Some servers send every call whole, and all under one index.
            if call is None or (part.id and call.id and part.id != call.id):
                call = latest[part.index] = _CallPart(id=part.id)
                calls.append(call)
            call.function.name = call.function.name or part.function.name
            call.function.arguments += part.function.arguments
    message = {"content": text, "refusal": refusal, "tool_calls": [c.model_dump() for c in calls]}
    choice = {"message": message, "finish_reason": finish_reason}
    return _Completion.model_validate({"choices": [choice], "usage": usage})


def _without_address(text: str, url: str) -> str:
    """Replace the server's address in an error's text."""
    parts = urlsplit(url)
    for words in filter(None, (url.rstrip("/"), parts.netloc, parts.hostname)):
        text = re.sub(rf"(?<![\w.-]){re.escape(words)}(?![\w-])", "[server]", text)
    return text


def redact(text: str) -> str:
    """Replace the key, and whatever looks like one, in a text."""
    key = os.environ.get(KEY, "")
    if len(key) >= MIN_KEY_LENGTH:
        text = text.replace(key, "[key]")
    return re.sub(r"\bsk-[\w*-]{3,}", "[key]", text)
