import itertools
import random

import pytest

from tdc_ray.execution.chain import Barrier, Chain
from tdc_ray.execution.item import WorkItem
from tdc_ray.execution.simulator import FailureModel, Simulation
from tests.execution.test_scheduler import NO_RUN_DIR


def item(key: str, seconds: float, behind: float = 0.0, num_workers: int = 1) -> WorkItem:
    place = NO_RUN_DIR / f"{key}.json"
    return WorkItem(
        key, dict, None, place, seconds, behind, num_workers=num_workers, result_type=dict
    )


def chain(name: str, stages: list[list[float]]) -> Chain[None]:
    """Stages of items that run side by side, by their seconds."""
    for number, stage in enumerate(stages):
        behind = sum(max(later) for later in stages[number + 1 :])
        yield [item(f"{name}-{number}-{i}", s, behind) for i, s in enumerate(stage)]


def seconds_of(one: WorkItem) -> float:
    return one.cost


def independent(seconds: list[float]) -> dict[str, Chain[None]]:
    return {f"c{i}": chain(f"c{i}", [[s]]) for i, s in enumerate(seconds)}


def optimum(seconds: list[float], num_workers: int) -> float:
    """The shortest makespan of independent items, by trying all."""
    best = float("inf")
    for places in itertools.product(range(num_workers), repeat=len(seconds)):
        loads = [0.0] * num_workers
        for place, s in zip(places, seconds, strict=True):
            loads[place] += s
        best = min(best, max(loads))
    return best


@pytest.mark.parametrize("num_workers", [2, 3])
def test_ten_items_take_at_most_1_15_of_the_exact_optimum(num_workers):
    for seed in range(10):
        draw = random.Random(seed)
        seconds = [draw.uniform(1, 10) for _ in range(8)]
        found = Simulation(independent(seconds), seconds_of, num_workers=num_workers).run()
        assert found.makespan_seconds <= 1.15 * optimum(seconds, num_workers)
        assert found.num_items == len(seconds)


def test_makespan_bound_and_use_are_what_a_hand_reckons():
    chains = {"a": chain("a", [[4.0], [2.0, 2.0]]), "b": chain("b", [[3.0]])}
    found = Simulation(chains, seconds_of, num_workers=2).run()
    assert found.makespan_seconds == 6.0  # a: 4, then 2 beside 2; b beside a's first
    assert found.lower_bound_seconds == 6.0
    assert found.utilisation == pytest.approx(11 / 12)


def test_meetings_hold_in_simulated_time():
    def meeting(name: str, seconds: float) -> Chain[None]:
        yield [item(f"{name}-1", seconds)]
        yield Barrier("half", frozenset({"a", "b"}))
        yield [item(f"{name}-2", 1.0)]

    chains = {"a": meeting("a", 1.0), "b": meeting("b", 5.0)}
    assert Simulation(chains, seconds_of, num_workers=2).run().makespan_seconds == 6.0


@pytest.mark.slow
def test_thousand_workers_share_a_sweep_of_twenty_groups_at_most_1_05_of_the_bound():
    draw = random.Random(0)
    shapes = [
        [[1.0], [5.0] * 4, [8.0], [8.0], *[[3.0] * 3] * 5, [draw.uniform(20, 60)]]
        for _ in range(20)
    ]
    chains = {
        f"{trial}/{group}": chain(f"{group}", shape)
        for trial in range(200)
        for group, shape in enumerate(shapes)
    }
    found = Simulation(chains, seconds_of, num_workers=1000).run()
    assert found.makespan_seconds <= 1.05 * found.lower_bound_seconds
    assert found.num_items == 200 * 20 * (1 + 4 + 2 + 15 + 1)


def test_workers_die_and_join_and_everything_is_finished_and_accounted_for():
    stormy = FailureModel(failures_per_hour=2.0, joins_per_hour=60.0, seed=3)
    calm = Simulation(independent([600.0] * 20), seconds_of, num_workers=4).run()
    found = Simulation(independent([600.0] * 20), seconds_of, num_workers=4, failures=stormy).run()
    assert found.num_failures > 0
    assert found.unfinished == {}
    assert found.num_items == 20
    assert found.lost_seconds > 0
    assert found.makespan_seconds > calm.makespan_seconds
    again = Simulation(independent([600.0] * 20), seconds_of, num_workers=4, failures=stormy).run()
    assert again == found


def test_checkpoints_bound_what_a_failure_costs():
    stormy = FailureModel(failures_per_hour=6.0, joins_per_hour=600.0, seed=1)
    lost = [
        Simulation(
            independent([3600.0] * 4),
            seconds_of,
            num_workers=4,
            failures=stormy,
            checkpoint_every_s=lambda _item, every=every: every,
        ).run()
        for every in (None, 60.0)
    ]
    assert lost[1].unfinished == {}
    assert lost[1].lost_seconds <= 60.0 * lost[1].num_failures
    assert lost[1].makespan_seconds < lost[0].makespan_seconds


def test_without_a_worker_left_the_simulation_ends_and_says_so():
    found = Simulation(
        independent([3600.0] * 3),
        seconds_of,
        num_workers=1,
        failures=FailureModel(failures_per_hour=100.0),
    ).run()
    assert set(found.unfinished.values()) == {"there are too few workers"}


def test_an_item_for_more_workers_than_there_are_ends_the_simulation():
    def wide() -> Chain[None]:
        yield [item("wide", 1.0, num_workers=3)]

    stormy = FailureModel(joins_per_hour=10.0)
    found = Simulation({"a": wide()}, seconds_of, num_workers=2, failures=stormy).run()
    assert found.unfinished == {"a": "there are too few workers"}
