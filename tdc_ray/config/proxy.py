"""Who proposes pruning schemes, and how a language model is asked: ``--proxy.*``."""

from dataclasses import dataclass
from typing import Literal

from tdc_ray.config.validation import at_least, require
from tdc_ray.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class ProxyConfig:
    """The language model that proposes schemes where `prune.method` is llm.

    The key and the address come from OPENAI_API_KEY and OPENAI_BASE_URL in the environment of the
    driver's node, never from a setting.
    """

    model: str = "gpt-4.1"
    """The model's name as its server knows it."""

    reply_format: Literal["auto", "schema", "json"] = "auto"
    """schema: structured output by a JSON schema; json: the form of the answer is described in the
    prompt only; auto: schema, and json once the server has refused the schema."""

    temperature: float | None = None
    """Sampling temperature, at least 0; None: the server's default."""

    max_completion_tokens: int = 16_000
    """Most tokens of one reply."""

    timeout_s: float = 120.0
    """Longest wait for one reply, in seconds."""

    max_retries: int = 4
    """How often a request is sent again after a timeout, 429 or 5xx; a Retry-After of up to two
    minutes is heeded."""

    max_replies: int = 3
    """Replies per proposal: a bad one is answered with what was wrong with it. After the last the
    offline proxy takes over."""

    max_seconds: float = 900.0
    """Longest that one proposal may take in all before the offline proxy takes over."""

    max_concurrent: int = 4
    """Calls under way at once, over the whole cluster."""

    max_total_tokens: int | None = 2_000_000
    """Most tokens, prompts and replies, of all calls over the whole cluster; then the offline
    proxy takes over. None: no bound."""

    max_cost: float | None = None
    """Most that all calls may cost, in the currency of the two prices; None: no bound."""

    price_per_million_prompt_tokens: float = 0.0
    """What the provider charges for a million prompt tokens."""

    price_per_million_completion_tokens: float = 0.0
    """What the provider charges for a million tokens of replies."""

    max_memory_entries: int = 20
    """Most entries of the memory bank in a prompt."""

    replay: str | None = None
    """A run directory whose transcripts answer in place of the server; no call is made."""

    def __post_init__(self) -> None:
        counts = ("max_completion_tokens", "max_replies", "max_concurrent", "max_total_tokens")
        at_least(1, "proxy", self, *counts)
        prices = ("price_per_million_prompt_tokens", "price_per_million_completion_tokens")
        at_least(0, "proxy", self, "temperature", "max_retries", "max_memory_entries", *prices)
        for name in ("timeout_s", "max_seconds", "max_cost"):
            value = getattr(self, name)
            require("proxy", self, name, "above 0", ok=value is None or value > 0)
        if self.max_cost is not None and not any(getattr(self, name) for name in prices):
            raise ConfigError(
                f"proxy.max_cost {self.max_cost} needs prices: set "
                "--proxy.price-per-million-prompt-tokens and "
                "--proxy.price-per-million-completion-tokens."
            )
