"""How the driver's own work grows: planning, proposing, counting, keeping, scheduling."""

import dataclasses
import tracemalloc
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from benchmark.growth import Axis, ScalingFlags, timed
from benchmark.pruning import random_values
from benchmark.timing import random_scheme
from tdc_ray.config.presets import preset
from tdc_ray.diffusion.plan import plan_groups
from tdc_ray.execution.chain import Chain
from tdc_ray.execution.item import Report, WorkItem
from tdc_ray.execution.simulator import Simulation
from tdc_ray.execution.timeline import Timeline, load_history, usage
from tdc_ray.models.network_config import NetworkConfig
from tdc_ray.models.unet2d.architectures import architecture
from tdc_ray.pruning.memory import MemoryBank, MemoryEntry
from tdc_ray.pruning.proxies.offline import propose_offline
from tdc_ray.pruning.proxy import ProposalRequest
from tdc_ray.pruning.sensitivity import levels
from tdc_ray.pruning.space import Space, fit_to_limit, space_of

CONFIG = preset("digits")


def deeper(layers_per_block: int) -> NetworkConfig:
    """Return the config of a UNet of digits' widths with more blocks, and so more units."""
    return {**architecture("digits"), "layers_per_block": layers_per_block}


def task(space: Space, group: int, num_candidates: int = 3, number: int = 1) -> ProposalRequest:
    """Create a request to a proxy, with sensitivities that grow as widths fall."""
    grown = {
        unit.name: {width: 1e-3 * (unit.width - width) for width in levels(unit, 4)}
        for unit in space.units
    }
    return ProposalRequest(
        space=space,
        group=group,
        timesteps=(0, 99),
        snr_db=(40.0, 20.0),
        limit=(space.macs(space.smallest) + space.macs_base) // 2,
        loss_base=0.01,
        scores={unit.name: [1.0] * unit.width for unit in space.units},
        sensitivities=grown,
        num_candidates=num_candidates,
        round=number,
        num_rounds=number + 1,
        seed=group,
    )


def entry(space: Space, group: int, number: int, candidate: int) -> MemoryEntry:
    """Create an entry of the memory bank."""
    scheme = random_scheme(space.units, 1000 * group + 10 * number + candidate)
    return MemoryEntry(
        group=group,
        round=number,
        candidate=candidate,
        source="offline",
        widths=scheme,
        macs=space.macs(scheme),
        num_params=space.num_params(scheme),
        loss_cut=0.03,
        loss_refit=0.02 + 1e-4 * candidate,
    )


def filled(path: Path, space: Space, num_groups: int, num_rounds: int) -> MemoryBank:
    """Fill a memory bank with three candidates a round."""
    bank = MemoryBank(path)
    for number in range(num_rounds):
        for group in range(num_groups):
            for candidate in range(3):
                bank.add(entry(space, group, number, candidate))
    return bank


def planning(flags: ScalingFlags, _folder: Path) -> list[Axis]:
    """Plan N groups."""

    def plan(count: int) -> None:
        config = dataclasses.replace(CONFIG.plan, num_groups=count)
        plan_groups(CONFIG.diffusion, config, CONFIG.sampler)

    counts = flags.some(10, 20, 40, 80, 160)
    return [timed(flags, "planning", "groups N", [(n, partial(plan, n)) for n in counts])]


def proposing(flags: ScalingFlags, folder: Path) -> list[Axis]:
    """Propose for all groups with a shared bank; with candidates; over rounds; with units."""
    space = space_of(architecture("digits"))

    def groups(bank: MemoryBank, count: int) -> None:
        for group in range(count):
            propose_offline(
                task(space, group), bank.visible_to(group, before_round=1, shared=True)
            )

    def rounds(bank: MemoryBank, count: int) -> None:
        for number in range(count):
            seen = bank.visible_to(0, before_round=number, shared=False)
            propose_offline(task(space, 0, number=number), seen)

    counts, rounds_of = flags.some(4, 8, 16, 32), flags.some(2, 4, 8, 16)
    banks = {n: filled(folder / f"groups-{n}.jsonl", space, n, 1) for n in counts}
    lone = filled(folder / "rounds.jsonl", space, 1, max(rounds_of))
    spaces = [space_of(deeper(depth)) for depth in flags.some(1, 2, 4, 8)]
    candidates = flags.some(3, 6, 12, 24)
    return [
        timed(
            flags,
            "proposing for all groups",
            "groups N",
            [(n, partial(groups, bank, n)) for n, bank in banks.items()],
            reason="with a shared bank every group reads what all others found",
        ),
        timed(
            flags,
            "proposing in all rounds",
            "rounds",
            [(n, partial(rounds, lone, n)) for n in rounds_of],
            reason="every round reads what the rounds before found",
        ),
        timed(
            flags,
            "proposing in a round",
            "candidates",
            [(n, partial(propose_offline, task(space, 0, n), [])) for n in candidates],
        ),
        timed(
            flags,
            "proposing in a round",
            "units",
            [(len(s.units), partial(propose_offline, task(s, 0), [])) for s in spaces],
            reason="a draw takes as many steps as there are units, from a queue of all of them",
        ),
    ]


def counting(flags: ScalingFlags, _folder: Path) -> list[Axis]:
    """Count and repair schemes of models with more blocks."""

    def macs(space: Space, scheme: Mapping[str, int]) -> None:
        for _ in range(200):
            space.macs(scheme)

    def bring(space: Space, scheme: Mapping[str, int], values: Any) -> None:
        for _ in range(10):
            fit_to_limit(
                space, scheme, (space.macs(space.smallest) + space.macs_base) // 2, values
            )

    spaces = [space_of(deeper(depth), "full") for depth in flags.some(1, 2, 4, 8)]
    schemes = [(space, random_scheme(space.units, 0)) for space in spaces]
    return [
        timed(
            flags,
            "counting 200 schemes, full space",
            "units",
            [(len(s.units), partial(macs, s, scheme)) for s, scheme in schemes],
            reason="a skip connection's units multiply with each other: one term for each pair",
        ),
        timed(
            flags,
            "repairing 10 schemes, full space",
            "units",
            [
                (len(s.units), partial(bring, s, scheme, random_values(s, 0)))
                for s, scheme in schemes
            ],
            reason="as many steps as units, each from a queue and with its partners' widths",
        ),
    ]


def keeping(flags: ScalingFlags, folder: Path) -> list[Axis]:
    """Read memory banks and timelines."""
    space = space_of(architecture("digits"))
    paths = {n: folder / f"bank-{n}.jsonl" for n in flags.some(10, 40, 160)}
    for count, path in paths.items():
        filled(path, space, count, 5)
    timelines = {n: folder / f"timeline-{n}.jsonl" for n in flags.some(250, 1000, 4000)}
    for count, path in timelines.items():
        _fill(path, count)

    def read(path: Path) -> None:
        usage(load_history(path))

    def peak(path: Path) -> float:
        tracemalloc.start()
        MemoryBank(path)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most / 1e6

    return [
        timed(
            flags,
            "reading the memory bank",
            "entries",
            [(15 * n, partial(MemoryBank, path)) for n, path in paths.items()],
        ),
        Axis(
            what="reading the memory bank",
            over="entries",
            unit="MB",
            points=tuple((15 * n, (peak(path),)) for n, path in paths.items()),
        ),
        timed(
            flags,
            "reading the timeline",
            "items",
            [(n, partial(read, path)) for n, path in timelines.items()],
        ),
    ]


def _fill(path: Path, num_items: int) -> None:
    timeline = Timeline(path)
    timeline.add("phase", name="experts")
    timeline.add("join", worker="worker-0", node="node")
    for number in range(num_items):
        chain, stage = f"group-{number // 20:02d}", number % 20
        about = {"chain": chain, "stage": stage, "item": f"{chain}/{stage}", "attempt": 1}
        timeline.add("start", task=number, workers=["worker-0"], **about)
        timeline.add("end", task=number, outcome="done")
    timeline.flush()


def scheduling(flags: ScalingFlags, _folder: Path) -> list[Axis]:
    """Schedule the items of more and more groups on 100 workers."""

    def run(num_groups: int) -> None:
        chains = {f"group-{n}": _chain(f"group-{n}") for n in range(num_groups)}
        Simulation(chains, lambda item: item.cost, num_workers=100).run()

    counts = flags.some(10, 40, 160, 640)
    reason = "the next item is the one with the most work in and behind it: a sorted choice"
    ways = [(15 * n, partial(run, n)) for n in counts]
    return [timed(flags, "the policy, 100 workers", "items", ways, reason=reason)]


def _chain(name: str) -> Chain[None]:
    def item(stage: int, place: int) -> WorkItem:
        path = Path("/nonexistent/tdc-ray-scaling") / f"{name}-{stage}-{place}.json"
        return WorkItem(
            f"{name}/{stage}-{place}", _do_nothing, None, path, cost=1.0, result_type=dict
        )

    for stage in range(5):
        yield [item(stage, place) for place in range(3)]


def _do_nothing(_job: object, _report: Report) -> dict[str, Any]:
    return {}
