"""One request to a server with OpenAI's chat protocol. No key leaves this module.

The openai client makes the schemas, times attempts out, repeats them after its own waits or
Retry-After, and parses tool calls and structured output by the models of ``reply``. Left to this
module are a bound on all of a request's time, the attempts that a server may charge for, and a
check of the rest: the client fills its types with whatever a server sends, and its strict mode
refuses what lenient servers leave out. A streamed reply is received whole, too, so that the
client's timeout bounds each silence, and its attempts cover a stream that breaks off; what the
client has not parsed is read from its text.

The key comes from the environment alone. A server's text that could hold the key is left out, and
nothing is raised from within an ``except``, so that no traceback has it.
"""

import asyncio
import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import (
    AliasChoices,
    AliasPath,
    BaseModel,
    BeforeValidator,
    Field,
    NonNegativeInt,
    ValidationError,
)

from tdc_ray.errors import ProxyError
from tdc_ray.pruning.llm.answer import Answer, Request, TokenUsage, ToolCall
from tdc_ray.pruning.llm.reply import Form, format_fields

logger = logging.getLogger(__name__)

KEY, BASE_URL = "OPENAI_API_KEY", "OPENAI_BASE_URL"

MIN_KEY_LENGTH = 8
"""Shorter keys are placeholders, such as EMPTY, for servers that want none."""

SECONDS_TO_CHECK = 10.0

MAX_PROBLEM_CHARS = 500
"""Most characters of a server's text that are kept."""

STREAMED = ("stream", "stream_options")
"""Fields of a request that ask for a stream."""

NO_COMPLETION = "the server's answer is no chat completion."

NO_KEY = "none"
"""Stands for the key of a server that needs none."""


def _as_text(value: Any) -> Any:
    if isinstance(value, list):  # parts of a text
        value = "".join(str(part.get("text") or "") for part in value if isinstance(part, dict))
    return json.dumps(value) if isinstance(value, dict) else value or ""


_Text = Annotated[str, BeforeValidator(_as_text)]
"""A text, which some servers send in parts, or as an object in place of its JSON, or leave out."""


class _Function(BaseModel):
    name: _Text = ""
    arguments: _Text = ""


class _Call(BaseModel):
    id: str | None = None
    index: int | None = None
    function: _Function = Field(default_factory=_Function)


class _Message(BaseModel):
    content: _Text = ""
    refusal: _Text = ""
    tool_calls: list[_Call] | None = None


class _Tokens(BaseModel):
    prompt_tokens: NonNegativeInt
    completion_tokens: NonNegativeInt


class _Reply(BaseModel):
    """A reply, or what an event adds to a streamed one."""

    message: _Message = Field(
        default_factory=_Message,
        validation_alias=AliasChoices(
            AliasPath("choices", 0, "message"), AliasPath("choices", 0, "delta")
        ),
    )
    finish_reason: str | None = Field(
        default=None, validation_alias=AliasPath("choices", 0, "finish_reason")
    )
    usage: Annotated[_Tokens | Any, Field(union_mode="left_to_right")] = None
    """A reply is good whatever its server counts."""
    choices: Any = None
    error: Any = None


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
    form: Form,
    *,
    base_url: str | None,
    timeout_s: float,
    max_retries: int,
    max_seconds: float,
) -> Answer:
    """Send a request and read the response.

    Args:
        request: Its body, without the form of the answer; may ask for a stream.
        form: The form of the answer.
        base_url: Address of the server; None means the one that the environment names.
        timeout_s: Longest silence of the server before the client tries again.
        max_retries: How often it does, then and after 429 and 5xx.
        max_seconds: Longest time of all of this.
    """
    import openai  # slow to import, and only the process that makes the calls needs it

    attempts = _Attempts(dict(request))
    hooks: dict[str, list[Any]] = {"request": [attempts.begin], "response": [attempts.end]}

    # The client itself is to wait for the whole body, and knows no stream.
    streaming = {name: request[name] for name in STREAMED if name in request}
    others = {name: value for name, value in request.items() if name not in STREAMED}
    others |= format_fields(form)

    async def post() -> Answer:
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
            parse = client.chat.completions.with_raw_response.parse
            response = await parse(**others, extra_body=streaming)
            kind, body = response.headers.get("Content-Type", ""), str(response.text)
            is_stream = kind.startswith("text/event-stream")  # not all servers can stream
            answer = _read(body, is_stream=is_stream)
            is_plain = is_stream or answer.problem is not None
            return answer if is_plain else replace(answer, asked=_parsed(response, answer.calls))

    answer, problem = Answer(status=0), ""
    try:
        answer = asyncio.run(post())
        attempts.unanswered -= 1
    except openai.APIStatusError as error:
        answer = Answer(usage=TokenUsage(calls=1), status=error.status_code)
        if answer.status in (401, 403):  # the body may show a part of the key
            problem = f"the server refused the key (HTTP {answer.status}): check {KEY}."
        else:
            problem = f"the server answered HTTP {answer.status}: {error.message}"
    except (TimeoutError, openai.APITimeoutError):
        problem = f"no answer in time: proxy.timeout_s {timeout_s:g}, {max_seconds:.3g} s left."
    except openai.APIConnectionError as error:
        problem = f"no connection to the server: {error.__cause__ or error}"
    except (openai.OpenAIError, OSError, ValueError, ImportError) as error:
        problem = f"the request failed: {type(error).__name__}: {error}"
    if problem:
        problem = _without_address(redact(problem), _address(base_url))[:MAX_PROBLEM_CHARS]
        answer = replace(answer, problem=problem)
    return replace(answer, request=attempts.request, unanswered=attempts.unanswered)


@dataclass(slots=True)
class _Attempts:
    """Notes a request, and counts the attempts at it that reached a server and were not refused.

    The client's own count of retries includes those that reached no server or were answered by
    429.
    """

    request: dict[str, Any]
    """The body, as it was sent; until then without the form of the answer."""
    unanswered: int = 0

    async def begin(self, request: Any) -> None:
        self.request = json.loads(request.content)
        request.extensions["trace"] = self._trace

    async def _trace(self, event: str, info: Mapping[str, Any]) -> None:
        sent = event.endswith("send_request_headers.started")
        self.unanswered += sent and info["request"].method != b"CONNECT"  # that is a proxy's

    async def end(self, response: Any) -> None:
        self.unanswered -= response.status_code != 200  # a 200 may still break off


def _parsed(response: Any, calls: Sequence[ToolCall]) -> tuple[Request, ...]:
    """Return what the client parses of an answer.

    Nothing if any of it is not as it has to be, or could hold the key: that is read once redacted.
    """
    import openai
    from openai.types.chat import ChatCompletion

    try:
        ChatCompletion.model_validate_json(response.content)
        message = response.parse().choices[0].message
        pairs = list(zip(calls, message.tool_calls or (), strict=True))
    except (openai.OpenAIError, ValueError):
        return ()
    texts = [message.content or "", *(one.function.arguments for _, one in pairs)]
    if any(redact(text) != text for text in texts):
        return ()
    if message.parsed is not None and not pairs:
        return (Request(message.parsed),)
    parsed = [(one.function.parsed_arguments, call.id) for call, one in pairs]
    return tuple(Request(change, call) for change, call in parsed if change is not None)


def _read(body: str, *, is_stream: bool) -> Answer:
    """Check an answer, whose events are joined if it is a stream."""
    texts = [body]
    if is_stream:
        fields = (line.partition(":") for line in re.split(r"\r\n|\r|\n", body))
        # Comments keep the connection alive.
        texts = [data for name, _, data in fields if name == "data" and data.strip() != "[DONE]"]
    try:
        parts = [_Reply.model_validate_json(text) for text in texts]
    except ValidationError:
        return Answer(problem=NO_COMPLETION)
    text = "".join(part.message.content for part in parts)
    refusal = "".join(part.message.refusal for part in parts)
    reason = next((part.finish_reason for part in reversed(parts) if part.finish_reason), None)
    usages = [part.usage for part in parts if isinstance(part.usage, _Tokens)]
    errors = [f": {part.error}" for part in parts if part.error]
    calls, problem = _calls(parts), None
    if refusal:
        text, problem = refusal, "it is a refusal, but changes were asked for."
    elif reason == "length":
        problem = "it was cut off at the most tokens that a reply may have."
    elif errors or (is_stream and reason is None):
        problem = redact(f"the server broke it off{''.join(errors)}")[:MAX_PROBLEM_CHARS]
    elif not is_stream and parts[0].choices is None:
        problem = NO_COMPLETION
    elif reason == "content_filter":
        problem = "it was withheld by a content filter."
    elif not text.strip() and not calls:
        problem = "it is empty."
    usage = TokenUsage(calls=1, **dict(usages[-1])) if usages else None
    return Answer(text=redact(text), calls=calls, problem=problem, usage=usage)


def _calls(parts: Sequence[_Reply]) -> tuple[ToolCall, ...]:
    """Join the parts of each call of a tool."""
    calls: list[_Call] = []
    latest: dict[int, _Call] = {}
    for reply in parts:
        for place, part in enumerate(reply.message.tool_calls or ()):
            index = place if part.index is None else part.index
            call = latest.get(index)
            # Some servers send every call whole, and all under one index.
            if call is None or (part.id and call.id and part.id != call.id):
                call = latest[index] = _Call(id=part.id)
                calls.append(call)
            call.function.name = call.function.name or part.function.name
            call.function.arguments += part.function.arguments
    return tuple(
        ToolCall(
            id=redact(call.id or f"call_{number}"),
            name=redact(call.function.name),
            arguments=redact(call.function.arguments),
        )
        for number, call in enumerate(calls)
    )


def _without_address(text: str, url: str) -> str:
    """Replace the server's address in an error's text."""
    parts = urlsplit(url)
    for words in filter(None, (url.rstrip("/"), parts.netloc, parts.hostname)):
        text = re.sub(rf"(?<![\w.-]){re.escape(words)}(?![\w-])", "[server]", text)
    return text


def redact(text: str) -> str:
    """Replace the key, also where JSON escapes its characters, and whatever looks like one."""
    key = os.environ.get(KEY, "")
    if len(key) >= MIN_KEY_LENGTH:
        # As many backslashes as JSON within JSON has; without a bound, they could take all time.
        one_of_each = (rf"\\{{0,3}}(?:{re.escape(one)}|u(?i:{ord(one):04x}))" for one in key)
        text = re.sub("".join(one_of_each), "[key]", text)
    return re.sub(r"\bsk-[\w*-]{3,}", "[key]", text)
