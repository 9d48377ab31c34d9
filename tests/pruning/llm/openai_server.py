"""A chat server on loopback that answers by a script."""

import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

USAGE = {"prompt_tokens": 1000, "completion_tokens": 200, "total_tokens": 1200}

Step = Callable[["Handler"], None]
"""Answers one request."""


class Server(ThreadingHTTPServer):
    """Answers each request by one step of its script; the last one repeats for ever."""

    daemon_threads = True

    def __init__(self, *script: Step) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.script = list(script)
        self.models_status = 404
        """Of the list of its models, which not every server has."""
        self.requests: list[dict[str, Any]] = []
        self.times: list[float] = []
        self.under_way = self.most_under_way = 0
        self.lock = threading.Lock()
        self.closing = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def next_step(self, request: dict[str, Any]) -> Step:
        with self.lock:
            step = self.script[min(len(self.requests), len(self.script) - 1)]
            self.requests.append(request)
            self.times.append(time.monotonic())
            return step

    def begin(self) -> None:
        with self.lock:
            self.under_way += 1
            self.most_under_way = max(self.most_under_way, self.under_way)

    def end(self) -> None:
        with self.lock:
            self.under_way -= 1

    def handle_error(self, *_: object) -> None:
        """A client that hangs up is what some tests are about."""


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        assert self.path == "/v1/chat/completions"
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.begin()
        self.ended, request = False, json.loads(body)
        self.streams = request.get("stream", False)
        try:
            self.server.next_step(request)(self)
        finally:
            self.end()

    def do_GET(self) -> None:
        assert self.path == "/v1/models"
        self.ended = True
        self.answer(self.server.models_status, '{"object": "list", "data": []}')

    def end(self) -> None:
        """Once, and before the client has the answer: it may ask again at once."""
        if not self.ended:
            self.ended = True
            self.server.end()

    def answer(self, status: int, body: str, **headers: str) -> None:
        content = body.encode()
        headers = {"Content-Type": "application/json", "Content-Length": str(len(content))} | {
            name.replace("_", "-"): value for name, value in headers.items()
        }
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end()
        self.end_headers()
        self.wfile.write(content)

    def complete(self, body: str) -> None:
        """Send a good answer, in parts if they were asked for."""
        if self.streams:
            self.stream(events(body))
        else:
            self.answer(200, body)

    def stream(self, parts: Iterable[str], pause: float = 0.0) -> None:
        """Send events, with a pause before each."""
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.end_headers()
        for part in parts:
            self.server.closing.wait(pause)
            self.wfile.write(f"{part}\n\n".encode())
            self.wfile.flush()
        self.end()

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serving(*script: Step) -> Iterator[Server]:
    with Server(*script) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.closing.set()
            server.shutdown()
            thread.join()


def completion(
    content: object,
    *,
    finish_reason: str = "stop",
    refusal: str | None = None,
    usage: object = USAGE,
) -> str:
    """Body of a good answer."""
    message = {"role": "assistant", "content": content, "refusal": refusal}
    choice = {"index": 0, "message": message, "finish_reason": finish_reason}
    top = {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "usage": usage}
    return json.dumps(top | {"choices": [choice]})


def events(body: str, size: int = 40) -> list[str]:
    """An answer as the events of a stream, whose texts come in pieces of some characters."""
    whole = json.loads(body)
    (choice,) = whole["choices"]

    def pieces(text: str) -> list[str]:
        return [text[start : start + size] for start in range(0, len(text), size)]

    deltas: list[dict[str, Any]] = [{"role": "assistant", "content": ""}]
    for name in ("content", "refusal"):
        deltas += [{name: piece} for piece in pieces(choice["message"][name] or "")]
    for index, call in enumerate(choice["message"].get("tool_calls", ())):
        function = call["function"]
        begun = {**call, "index": index, "function": {**function, "arguments": ""}}
        deltas.append({"tool_calls": [begun]})
        for piece in pieces(function["arguments"]):
            part = {"index": index, "function": {"name": None, "arguments": piece}}
            deltas.append({"tool_calls": [part]})
    chunks = [{"choices": [{"delta": delta, "finish_reason": None}]} for delta in deltas]
    chunks.append({"choices": [{"delta": {}, "finish_reason": choice["finish_reason"]}]})
    chunks.append({"choices": [], "usage": whole["usage"]})
    return [f"data: {json.dumps(chunk)}" for chunk in chunks] + ["data: [DONE]"]


def streams(*parts: str, pause: float = 0.0) -> Step:
    return lambda handler: handler.stream(parts, pause)


def falls_silent(*parts: str) -> Step:
    """Sends some events and no more, without an end."""

    def step(handler: Handler) -> None:
        handler.stream(parts)
        is_silent(handler)

    return step


def says(content: object, **how: Any) -> Step:
    return lambda handler: handler.complete(completion(content, **how))


def fails(status: int, body: str = '{"error": {"message": "no"}}', **headers: str) -> Step:
    return lambda handler: handler.answer(status, body, **headers)


def echoes_key(status: int) -> Step:
    """An error whose text holds the key, whole and in part."""

    def step(handler: Handler) -> None:
        key = handler.headers["Authorization"].removeprefix("Bearer ")
        message = f"Incorrect API key provided: {key} ({key[:12]}****{key[-6:]})"
        handler.answer(status, json.dumps({"error": {"message": message}}))

    return step


def says_key(handler: Handler) -> None:
    handler.complete(completion(f"Your key is {handler.headers['Authorization']}."))


def after(seconds: float, step: Step) -> Step:
    def late(handler: Handler) -> None:
        time.sleep(seconds)
        step(handler)

    return late


def is_silent(handler: Handler) -> None:
    handler.server.closing.wait(20)


def trickles(handler: Handler) -> None:
    """Sends a blank again and again, so that no read ever times out."""
    handler.send_response(200)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", "100000")
    handler.end_headers()
    while not handler.server.closing.wait(0.05):
        handler.wfile.write(b" ")


def hangs_up(handler: Handler) -> None:
    """Breaks off in the middle of the body."""
    handler.answer(200, completion("late"), Content_Length="100000")


def refuses_format(then: Step, status: int = 400) -> Step:
    """Knows neither tools nor structured output."""

    def step(handler: Handler) -> None:
        if {"tools", "response_format"} & handler.server.requests[-1].keys():
            handler.answer(status, '{"error": {"message": "unknown field response_format"}}')
        else:
            then(handler)

    return step


def calling(*calls: tuple[str, object], text: str | None = None, ids: bool = True) -> Step:
    """Calls tools, each with a dict of arguments or their text."""
    made = [
        {
            **({"id": f"call_{name}_{number}"} if ids else {}),
            "type": "function",
            "function": {
                "name": name,
                "arguments": wanted if isinstance(wanted, str) else json.dumps(wanted),
            },
        }
        for number, (name, wanted) in enumerate(calls)
    ]

    def step(handler: Handler) -> None:
        body = json.loads(completion(text, finish_reason="tool_calls"))
        body["choices"][0]["message"]["tool_calls"] = made
        handler.complete(json.dumps(body))

    return step


def refuses_tools(then: Step, status: int = 400) -> Step:
    """Knows no tools."""

    def step(handler: Handler) -> None:
        if "tools" in handler.server.requests[-1]:
            handler.answer(status, '{"error": {"message": "this model does not support tools"}}')
        else:
            then(handler)

    return step
