"""What a request to a language model came to."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, Field

from tdc_ray.pruning.changes import Change, Words

Action = Literal["predict", "measure", "done"]


class Predict(Change):
    """Free: what the knapsack makes of changes, and what that is predicted to cost."""

    action: ClassVar[Action] = "predict"


class Measure(Change):
    """Takes one measurement: measures what the knapsack makes of changes."""

    action: ClassVar[Action] = "measure"


class Done(BaseModel):
    """Ends the round without the measurements that are left, where nothing seems worth one."""

    action: ClassVar[Action] = "done"
    reasoning: Words = Field(default_factory=str, description="why, in a sentence")


class Turn(Change):
    """One answer without tools: what to do, and with which changes."""

    action: Action = Field(
        description="predict (free), measure (takes one measurement) or done (ends the round)"
    )


@dataclass(frozen=True, slots=True)
class Request:
    """One thing that an answer asks for."""

    change: Predict | Measure | Done | Turn
    call: str | None = None
    """Id of the tool's call; None without tools."""


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


@dataclass(frozen=True, kw_only=True, slots=True)
class ToolCall:
    """A call of a tool."""

    id: str
    name: str
    arguments: str
    """JSON, as far as the model can."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """The outcome of a request."""

    text: str = ""
    """The model's text, as far as it was received."""

    calls: tuple[ToolCall, ...] = ()
    """Its calls of tools."""

    asked: tuple[Request, ...] = ()
    """What it asks for, where the client has parsed it."""

    problem: str | None = None
    """Why the text is unusable; None means that it may be usable."""

    usage: TokenUsage | None = None
    """Usage of the last attempt; None means that the server did not say."""

    request: Mapping[str, Any] = field(default_factory=dict)
    """Body of the request, as it was sent."""

    unanswered: int = 0
    """Attempts without an answer, for which the server may charge all the same."""

    status: int = 200
    """HTTP status; 0 means that there was no answer."""
