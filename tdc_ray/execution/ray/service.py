"""The one actor through which a cluster's calls to a language model go."""

import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from tdc_ray.config.proxy import ProxyConfig
from tdc_ray.errors import ProxyError
from tdc_ray.execution.item import Result, WorkItem, run_item
from tdc_ray.execution.ray.cluster import EventCollector
from tdc_ray.pruning.llm.budget import Budget
from tdc_ray.pruning.proxies.language_model import check_proxy
from tdc_ray.storage.files import listing

NAME = "tdc-ray-caller"

SECONDS_BETWEEN_LOOKS = 0.1


class _Caller:
    """Runs calls, several at once, within one budget; the key is in its own environment."""

    def __init__(self, config: ProxyConfig, sweep: Path | None) -> None:
        self.config, self.budget, self.sweep = config, Budget(config), sweep

    def is_there(self) -> None:
        """Answer, and be alive."""

    def check(self) -> None:
        check_proxy(self.config)

    def run(self, item: WorkItem, board: EventCollector, task: int | None = None) -> Result:
        for folder in listing(self.sweep, "trials/*/proxy") if self.sweep else ():
            self.budget.count_earlier(folder)
        function: Any = item.function
        shared = replace(item, function=partial(function, budget=self.budget))
        return run_item(shared, board.reporter(item.key, task))


def start_checked_caller(config: ProxyConfig, sweep: Path | None = None) -> Any:
    """Start the caller and make sure that it has what it needs: see :func:`start_caller`.

    Raises:
        ProxyError: Its environment holds no key, or the server refuses it, or there is nothing to
            replay.
    """
    caller = start_caller(config, sweep)
    try:
        ray.get(caller.check.remote())
    except RayTaskError as error:
        raise ProxyError(str(error.cause)) from None
    return caller


def start_caller(config: ProxyConfig, sweep: Path | None = None) -> Any:
    """Give the caller of this Ray job, starting it if there is none.

    It runs on the node where it is first started from, which must be the driver's: the key comes
    from that node's environment. It lives as long as what this first call returned, and all that
    come later share it, its budget and its bound on calls at once, whatever their config says.

    Args:
        config: What is asked, and the bounds.
        sweep: The folder of a sweep, whose trials' earlier calls count too.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    remote = ray.remote(num_cpus=0, max_restarts=-1)(_Caller)
    options = remote.options(
        name=NAME,
        get_if_exists=True,
        max_concurrency=config.max_concurrent,
        scheduling_strategy=here,
    )
    while True:
        handle: Any = options.remote(config, sweep)
        try:
            ray.get(handle.is_there.remote())
        except RayActorError:
            time.sleep(SECONDS_BETWEEN_LOOKS)  # an earlier one, on its way out: not yet gone
        else:
            return handle
