"""A model of drivers on one store: pauses, lost requests and replies, clocks of other rates."""

import json
import threading
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from tdc_ray.errors import StorageError, StorageFailedError
from tdc_ray.storage.lease import Lease


class Killed(BaseException):
    """Ends a driver's thread."""


class World:
    def __init__(self):
        self.time, self.files = 0.0, {}
        self.published, self.drivers = [], []

    def publish(self, driver):
        if self.published[-1:] != [driver]:
            assert driver not in self.published, "it wrote after another one did"
            self.published.append(driver)


class Driver:
    """Runs one lease in a thread that goes on, from one request's end to another's, when told."""

    is_exclusive = True

    def __init__(self, world, run_dir, offset=0.0, rate=1.0):
        world.drivers.append(self)
        self.world, self.offset, self.rate = world, offset, rate
        self.action, self.fault, self.over, self.killed = "publish", None, False, False
        self.lease = Lease(run_dir, self, self.now, self.sleep)
        self.told, self.waits = threading.Semaphore(0), threading.Semaphore(0)
        self.error, self.requests = None, 0
        self.thread = threading.Thread(target=self.main, daemon=True)
        self.thread.start()
        self.waits.acquire()

    # --- what the scheduler does

    def go_on(self):
        self.told.release()
        self.waits.acquire()
        if self.error is not None:
            raise self.error

    def go_on_until(self, condition):
        for _ in range(200):
            if condition() or self.over:
                return
            self.go_on()
        raise AssertionError("it never came to that")

    def kill(self):
        self.killed = True
        self.told.release()
        self.thread.join()

    # --- what runs in the thread

    def pause(self):
        self.waits.release()
        self.told.acquire()
        if self.killed:
            raise Killed

    def main(self):
        try:
            self.pause()
            self.work()
        except Killed:
            pass
        except StorageError:
            pass  # refused, or lost
        except BaseException as error:  # noqa: BLE001  raised where the scheduler is
            self.error = error
        self.over = True
        self.waits.release()

    def work(self):
        self.lease.acquire()
        while True:
            self.pause()
            try:
                if self.action == "publish":
                    self.lease.check()
                    self.world.publish(self)
                elif self.action == "renew":
                    self.lease.renew()
                else:
                    self.lease.release()
                    return
            except StorageFailedError:
                continue

    # --- its clock, and the store as it sees it

    def now(self):
        return self.offset + self.rate * self.world.time

    def sleep(self, seconds):
        until = self.now() + seconds
        while self.now() < until:
            self.pause()

    def request(self, effect):
        self.pause()
        self.lose("request")
        result = effect()
        self.requests += 1
        self.pause()
        self.lose("reply")
        return result

    def lose(self, what):
        if self.fault == what:
            self.fault = None
            raise StorageFailedError(f"the {what} is lost")

    def last(self):
        return self.request(lambda: max(self.world.files, default=0))

    def create(self, number, content):
        if not self.request(lambda: self.world.files.setdefault(number, self) is self):
            return False
        return self.write(number, content)

    def read(self, number):
        content = self.request(lambda: self.world.files.get(number))
        if content is None:
            return None
        return {} if isinstance(content, Driver) else json.loads(content)

    def write(self, number, content):
        self.request(lambda: self.world.files.__setitem__(number, content))
        return True


@pytest.fixture
def world():
    world = World()
    yield world
    for driver in world.drivers:
        if not driver.over:
            driver.kill()


def holder_and_rival(world):
    """One that writes, and one that looked at its lease once."""
    holder, rival = Driver(world, Path("/runs/one")), Driver(world, Path("/runs/one"))
    holder.go_on_until(lambda: world.published)
    rival.go_on_until(lambda: rival.requests == 2)
    rival.go_on()
    return holder, rival


def test_a_check_that_was_long_ago_allows_no_write(world):
    holder, rival = holder_and_rival(world)
    begun = holder.requests
    holder.go_on_until(lambda: holder.requests > begun)  # nobody was there
    world.time += 9.0
    rival.go_on_until(lambda: world.published[-1] is rival)
    holder.go_on_until(lambda: False)
    assert holder.over
    assert world.published == [holder, rival]


def test_a_renewal_after_the_rivals_last_look_is_seen(world):
    holder, rival = holder_and_rival(world)
    world.time += 6.5  # it still holds
    rival.go_on_until(lambda: rival.requests == 3)
    holder.action, begun = "renew", holder.requests
    holder.go_on_until(lambda: holder.requests == begun + 4)
    world.time += 2.0  # the answer to the rival comes now
    for _ in range(40):
        rival.go_on()
    assert world.published == [holder]
    world.time += 9.0
    rival.go_on_until(lambda: world.published[-1] is rival)


class Drivers(RuleBasedStateMachine):
    """Three hosts, each with a driver after another."""

    def __init__(self):
        super().__init__()
        self.world = World()
        self.drivers = [self.new_driver(host) for host in range(3)]

    def new_driver(self, host):
        return Driver(self.world, Path("/runs/one"), offset=1e6 * host, rate=0.95 + 0.05 * host)

    @rule(
        host=st.integers(0, 2),
        steps=st.sampled_from([1, 2, 3, 30]),
        action=st.sampled_from(["publish", "publish", "publish", "renew", "release"]),
        fault=st.sampled_from([None, None, None, None, "request", "reply"]),
    )
    def go_on(self, host, steps, action, fault):
        driver = self.drivers[host]
        if driver.over:
            driver = self.drivers[host] = self.new_driver(host)
        driver.action, driver.fault = action, fault
        for _ in range(steps):
            if not driver.over:
                driver.go_on()

    @rule(seconds=st.sampled_from([1.0, 3.0, 9.0]))
    def wait(self, seconds):
        self.world.time += seconds

    def teardown(self):
        for driver in self.drivers:
            if not driver.over:
                driver.kill()


Drivers.TestCase.settings = settings(max_examples=80, stateful_step_count=50, deadline=None)
test_no_two_drivers_write = Drivers.TestCase
