"""How a language model that proposes pruning schemes is asked: ``--proxy.*``."""

from typing import Literal

from tdc_ray.config.validation import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    refuse,
    settings,
)


@settings("proxy")
class ProxyConfig:
    """The language model that proposes schemes where `prune.method` is llm.

    The key comes from OPENAI_API_KEY in the environment of the driver's node, never from a
    setting.
    """

    model: str = "gpt-4.1"
    """The model's name as its server knows it."""

    base_url: str | None = None
    """Address of a server that speaks OpenAI's chat protocol, such as http://localhost:8000/v1; it
    needs no key then, unless the server wants one. None means OPENAI_BASE_URL of the environment,
    or OpenAI's own."""

    reply_format: Literal["auto", "tools", "schema", "json"] = "auto"
    """How the model predicts and measures. tools: by calls of tools; schema: by structured output
    of a JSON schema; json: the form of the answer is described in the prompt only; auto: tools,
    schema once the server has refused these, and then json."""

    temperature: NonNegativeFloat | None = None
    """Sampling temperature, at least 0; None means the server's default."""

    max_completion_tokens: PositiveInt = 16_000
    """Most tokens of one reply."""

    timeout_s: PositiveFloat = 120.0
    """Longest wait for one reply, or with stream for its next part, in seconds."""

    stream: bool = False
    """Have replies sent in parts as they come, so that a server may take longer than timeout_s for
    a reply as long as it is not silent."""

    max_retries: NonNegativeInt = 4
    """How often a request is sent again after a timeout, 429 or 5xx; a Retry-After of up to two
    minutes is used."""

    max_replies: PositiveInt = 3
    """Replies of which nothing can be used before the round goes on without the model, for each
    time that it is asked: a bad one is answered with what was wrong with it."""

    max_predictions: PositiveInt = 12
    """Replies that only predict before the model has to have something measured, or be done."""

    max_seconds: PositiveFloat = 900.0
    """Longest time that the model is asked until it has something measured; then the round goes on
    without it."""

    max_concurrent: PositiveInt = 4
    """Most concurrent calls, over the whole cluster."""

    max_total_tokens: PositiveInt | None = 2_000_000
    """Most tokens, prompts and replies, of all calls over the whole cluster; then rounds go on
    without the model. None means no bound."""

    max_cost: PositiveFloat | None = None
    """Most that all calls may cost, in the currency of the two prices; None means no bound."""

    price_per_million_prompt_tokens: NonNegativeFloat = 0.0
    """What the provider charges for a million prompt tokens."""

    price_per_million_completion_tokens: NonNegativeFloat = 0.0
    """What the provider charges for a million tokens of replies."""

    max_memory_entries: NonNegativeInt = 20
    """Most entries of the memory bank in a prompt, which says how many it leaves out."""

    replay: str | None = None
    """A run directory whose transcripts answer in place of the server; no call is made."""

    def __post_init__(self) -> None:
        if self.base_url is not None and "@" in self.base_url:
            refuse(
                "proxy.base_url must have no user or password, for settings are saved with a run: "
                "set OPENAI_API_KEY, or OPENAI_BASE_URL, in the environment."
            )
        prices = (self.price_per_million_prompt_tokens, self.price_per_million_completion_tokens)
        if self.max_cost is not None and not any(prices):
            refuse(
                f"proxy.max_cost {self.max_cost} needs prices: set "
                "--proxy.price-per-million-prompt-tokens and "
                "--proxy.price-per-million-completion-tokens."
            )
