"""What a request to a language model came to."""

from dataclasses import dataclass


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

    problem: str | None = None
    """Why the text is unusable; None means that it may be usable."""

    usage: TokenUsage | None = None
    """Usage of the last attempt; None means that the server did not say."""

    unanswered: int = 0
    """Attempts without an answer, for which the server may charge all the same."""

    status: int = 200
    """HTTP status; 0 means that there was no answer."""
