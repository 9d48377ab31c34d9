"""Services: named actors that run items which wait for something outside and hold no worker."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import ray
from ray.exceptions import RayActorError, RayTaskError

from tdc_ray.errors import TdcError
from tdc_ray.execution.events import EventSink, reporter
from tdc_ray.execution.item import AnyItem, Report
from tdc_ray.execution.ray.cluster import actor_here

SECONDS_BETWEEN_LOOKS = 0.1


class Servant(Protocol):
    """The object in a service's actor; any number of threads call it."""

    def check(self) -> None:
        """Raise a `TdcError` if something that it needs is missing."""

    def run(self, item: AnyItem, report: Report) -> Any:
        """Run an item and keep its result."""


@dataclass(frozen=True, slots=True)
class Service:
    """A service, which runs the items that name it in ``WorkItem.service``."""

    create: Callable[[], Servant]
    """Called in the actor's process, again after each restart."""

    max_concurrency: int
    """Items that it runs at once."""


class _ServiceActor:
    def __init__(self, create: Callable[[], Servant]) -> None:
        self._servant = create()

    def ping(self) -> None:
        """Return, which shows that the actor is alive."""

    def check(self) -> None:
        self._servant.check()

    def run(self, item: AnyItem, events: EventSink, number: int | None = None) -> Any:
        return self._servant.run(item, reporter(events, item.key, number))


def start_service(name: str, service: Service) -> Any:
    """Return the actor of a service in this Ray job, started if there is none, and checked.

    It runs on the node where it is first started from, which must be the driver's: the keys that a
    service needs are in that node's environment. It lives as long as what this first call
    returned; later calls share it, whatever service they pass.

    Raises:
        TdcError: What the service's check raises.
    """
    actor = actor_here(
        _ServiceActor,
        soft=False,
        name=f"tdc-ray-service-{name}",
        get_if_exists=True,
        max_concurrency=service.max_concurrency,
    )
    while True:
        handle = actor.remote(service.create)
        try:
            ray.get(handle.ping.remote())
        except RayActorError:
            time.sleep(SECONDS_BETWEEN_LOOKS)  # an earlier one that is ending
        else:
            break
    try:
        ray.get(handle.check.remote())
    except RayTaskError as error:
        if isinstance(error.cause, TdcError):
            raise error.cause from None
        raise
    return handle
