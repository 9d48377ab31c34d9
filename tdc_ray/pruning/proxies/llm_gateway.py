"""The single process that makes all calls of a run, or of a sweep, to a language model."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from tdc_ray.config.proxy import ProxyConfig
from tdc_ray.execution.item import AnyItem, Report, run_item
from tdc_ray.pruning.llm.budget import Budget
from tdc_ray.pruning.proxies.language_model import check_proxy
from tdc_ray.storage.files import listing


class LLMGateway:
    """Runs items that ask a language model within one budget; for any number of threads.

    The key is in the environment of its own process alone.

    Args:
        config: The model, and the bounds.
        sweep: The folder of a sweep, whose trials' earlier calls count as well.
    """

    def __init__(self, config: ProxyConfig, sweep: Path | None = None) -> None:
        self._config, self._sweep, self._budget = config, sweep, Budget(config)

    def check(self) -> None:
        """Check that there is an API key, or a transcript to replay: `check_proxy`."""
        check_proxy(self._config)

    def run(self, item: AnyItem, report: Report) -> Any:
        """Run an item whose function takes the budget, and keep its result."""
        for folder in listing(self._sweep, "trials/*/proxy") if self._sweep else ():
            self._budget.count_earlier(folder)
        function: Any = item.function
        return run_item(replace(item, function=partial(function, budget=self._budget)), report)
