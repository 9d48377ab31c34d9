"""Bounds on calls to a language model: concurrency, tokens and cost."""

import threading
from pathlib import Path

from tdc_ray.config.proxy import ProxyConfig
from tdc_ray.errors import ProxyError
from tdc_ray.pruning.llm.answer import TokenUsage
from tdc_ray.pruning.llm.reply import Form
from tdc_ray.pruning.llm.transcripts import total_usage


class Budget:
    """Keeps all calls of a process within the bounds of `ProxyConfig`; for any number of threads.

    Every call reserves the most that it can use before it begins, so that concurrent calls
    together stay within the bounds too.
    """

    def __init__(self, config: ProxyConfig) -> None:
        self._config = config
        self._changed = threading.Condition()
        self._spent = TokenUsage()
        self._reserved: list[TokenUsage] = []
        self._folders: set[Path] = set()
        self.forms: dict[tuple[str | None, str], Form] = {}
        """The form of answers that a server's model takes, by its address and name."""

    @property
    def spent(self) -> TokenUsage:
        """Usage of the calls that ended."""
        with self._changed:
            return self._spent

    def cost(self, usage: TokenUsage) -> float:
        """Compute the price of calls, in the currency of the config's prices."""
        config = self._config
        prompts = usage.prompt_tokens * config.price_per_million_prompt_tokens
        replies = usage.completion_tokens * config.price_per_million_completion_tokens
        return (prompts + replies) / 1e6

    def count_earlier(self, folder: Path) -> None:
        """Add the usage of an earlier attempt, by its transcripts; once for each folder.

        Raises:
            StorageError: A transcript is malformed.
        """
        folder = folder.resolve()
        with self._changed:
            if folder not in self._folders:
                self._spent += total_usage(folder)
                self._folders.add(folder)

    def reserve(self, bound: TokenUsage, timeout_s: float) -> None:
        """Wait until one call of at most ``bound`` fits beside the running ones, and reserve it.

        Args:
            bound: The most that the call can use.
            timeout_s: Longest wait.

        Raises:
            ProxyError: The call would break a bound even alone, or the wait was too long.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._broken(bound) or self._fits(bound), timeout_s)
            if broken := self._broken(bound):
                spent = self._spent
                raise ProxyError(
                    f"another call could break proxy.{broken}: so far {spent.calls} calls took "
                    f"{spent.tokens:,} tokens at a cost of {self.cost(spent):.4g}, and one can "
                    f"take {bound.tokens:,} at {self.cost(bound):.4g}, each attempt counted. "
                    "Raise the bound, or lower proxy.max_retries or proxy.max_completion_tokens."
                )
            if not self._fits(bound):
                raise ProxyError(
                    f"no call became free within {timeout_s:.3g} s: raise proxy.max_concurrent "
                    "or proxy.max_seconds."
                )
            self._reserved.append(bound)

    def settle(self, bound: TokenUsage, used: TokenUsage) -> None:
        """Replace what was reserved for a call by its usage."""
        with self._changed:
            self._reserved.remove(bound)
            self._spent += used
            self._changed.notify_all()

    def _fits(self, bound: TokenUsage) -> bool:
        free = len(self._reserved) < self._config.max_concurrent
        return free and self._broken(sum(self._reserved, start=bound)) is None

    def _broken(self, more: TokenUsage) -> str | None:
        """Return the bound that this usage would break, if any."""
        config, usage = self._config, self._spent + more
        if config.max_total_tokens is not None and usage.tokens > config.max_total_tokens:
            return f"max_total_tokens {config.max_total_tokens:,}"
        if config.max_cost is not None and self.cost(usage) > config.max_cost:
            return f"max_cost {config.max_cost:g}"
        return None
