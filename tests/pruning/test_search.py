import dataclasses
import json
import random
import shutil
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tdc_ray.config.run import RunConfig
from tdc_ray.diffusion.plan import TimestepGroup, plan_groups
from tdc_ray.errors import ConfigError, LimitError
from tdc_ray.execution.chain import Chain, Chains, run_chain
from tdc_ray.execution.item import AnyItem, ItemResult, run_item
from tdc_ray.models.units import keep_everything
from tdc_ray.pruning.criteria.registry import CRITERIA
from tdc_ray.pruning.group import GroupSearch, group_searches
from tdc_ray.pruning.llm.answer import TokenUsage
from tdc_ray.pruning.llm.transcripts import (
    VERSION,
    LLMExchange,
    append_exchange,
    transcript_path,
)
from tdc_ray.pruning.memory import MemoryBank, MemoryEntry
from tdc_ray.pruning.proxies.language_model import AskJob
from tdc_ray.pruning.race import race
from tdc_ray.pruning.result import (
    Candidate,
    SearchCost,
    SearchResult,
    contribution_notes,
    schemes_by_source,
)
from tdc_ray.pruning.search import search_submodel
from tdc_ray.pruning.space import is_tight, space_of
from tdc_ray.pruning.tasks.candidates import CandidateResult
from tdc_ray.storage.run_dir import RunDir
from tests.small import (
    TINY,
    context_of,
    make_run_dir,
    reporting_to,
    small_config,
    task_of,
    widths_of,
    with_run_dir,
)

BASELINES = tuple(CRITERIA)
METHODS = ["offline", *BASELINES]


def config_of(method: str = "magnitude", *, replay: Path | None = None, **prune) -> RunConfig:
    few = {"num_images": 32, "num_refit_images": 32, "num_levels": 2, "sensitivity": "measured"}
    return small_config(
        plan={"min_macs_share": 0.3},
        prune={"method": method, **few, "num_rounds": 2, "num_candidates": 2, **prune},
        proxy={"replay": None if replay is None else str(replay)},
    )


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return make_run_dir(tmp_path_factory.mktemp("base")).base_unet


def new_run_dir(root: Path, base: Path) -> RunDir:
    """A fresh run directory with the module's base."""
    run_dir = RunDir(root)
    run_dir.base_unet.parent.mkdir(parents=True)
    run_dir.base_unet.symlink_to(base)
    return run_dir


@pytest.fixture
def run_dir(base, tmp_path) -> RunDir:
    return new_run_dir(tmp_path / "run", base)


def find(task: GroupSearch) -> SearchResult:
    return run_chain(search_submodel(task, MemoryBank(task.context.run_dir.memory)))


Found = Callable[[str], tuple[GroupSearch, SearchResult]]


@pytest.fixture(scope="module")
def found(base, tmp_path_factory) -> Found:
    """A search by each method, done once."""

    @cache
    def by(method: str) -> tuple[GroupSearch, SearchResult]:
        run_dir = new_run_dir(tmp_path_factory.mktemp("found") / "run", base)
        task = task_of(run_dir, config_of(method))
        return task, find(task)

    return by


def timeless(choice: SearchResult) -> SearchResult:
    cost = dataclasses.replace(choice.cost, seconds=0.0, proxy_seconds=0.0)
    return dataclasses.replace(choice, cost=cost)


def results_of(task: GroupSearch) -> dict[str, int]:
    """When each result of the group was written."""
    folder = task.context.run_dir.group(task.group.index)
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def entries_of(task: GroupSearch) -> list[MemoryEntry]:
    return [
        e for e in MemoryBank(task.context.run_dir.memory).all() if e.group == task.group.index
    ]


# --- one group -------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_the_choice_is_tight_within_the_limit_and_the_best_that_was_measured(found, method):
    task, choice = found(method)
    entries = entries_of(task)
    assert task.space.macs(choice.widths) <= task.max_macs < task.space.macs_base
    assert all(is_tight(task.space, entry.widths, task.max_macs) for entry in entries)
    assert widths_of(choice.kept) == choice.widths
    finalists = [entry for entry in entries if entry.final is not None]
    best = min(finalists, key=lambda entry: entry.final.distance)
    assert len(finalists) == 2
    assert (choice.entry, choice.widths) == (best, best.widths)
    assert (choice.loss_cut, choice.loss_refit) == (best.final.loss_cut, best.final.loss_refit)
    assert choice.loss_base > 0


@pytest.mark.parametrize("method", METHODS)
def test_the_candidates_are_all_that_was_measured_best_first(found, method):
    task, choice = found(method)
    finalists = sorted(
        (entry for entry in entries_of(task) if entry.final), key=lambda e: e.final.distance
    )
    others = sorted(
        (entry for entry in entries_of(task) if not entry.final), key=lambda e: e.distance
    )
    assert [candidate.entry for candidate in choice.candidates] == finalists + others
    for candidate in choice.candidates:
        assert widths_of(candidate.kept) == candidate.entry.widths
        assert candidate.entry.macs == task.space.macs(candidate.entry.widths)
        assert candidate.entry.num_params == task.space.num_params(candidate.entry.widths)


def test_the_offline_proxy_proposes_other_schemes_in_every_round(found):
    task, _ = found("offline")
    entries = entries_of(task)
    assert [entry.key for entry in entries] == [(0, r, c) for r in range(2) for c in range(2)]
    assert {entry.source for entry in entries} == {"offline"}
    assert len({tuple(sorted(entry.widths.items())) for entry in entries}) == 4
    assert task.context.run_dir.memory.read_text().count("\n") == 4 + 2  # finalists once more


@pytest.mark.parametrize("method", BASELINES)
def test_a_baseline_measures_its_schemes_in_one_round(found, method):
    task, _ = found(method)
    entries = entries_of(task)
    assert [entry.key for entry in entries] == [(0, 0, c) for c in range(3)]
    uses = ("uniform", "global", "global-per-mac")
    assert [entry.source for entry in entries] == [f"{method}/{use}" for use in uses]


@pytest.mark.slow
def test_a_rivals_scheme_is_that_of_its_criterion_and_wins_where_it_is_better(run_dir, found):
    task = task_of(run_dir, config_of("offline", rivals=("diff-pruning", "magnitude")))
    result, (_, alone) = find(task), found("offline")
    _, by_criterion = found("magnitude")
    schemes = {one.entry.source: one for one in by_criterion.candidates}
    rival = next(c for c in result.candidates if c.entry.source == "magnitude/global")
    assert rival.kept == schemes["magnitude/global"].kept
    assert rival.entry.key == (task.group.index, 2, 1)
    own = [one.entry.widths for one in result.candidates if one.entry.source == "offline"]
    assert sorted(map(str, own)) == sorted(str(one.entry.widths) for one in alone.candidates)
    finals = [one.entry for one in result.candidates if one.entry.final]
    assert result.entry == min(finals, key=lambda entry: entry.final.distance)


def test_the_uniform_rival_has_the_channels_that_the_search_ranks_highest(run_dir, found):
    few = {"num_rounds": 1, "num_candidates": 1, "num_passes": 1}
    config = config_of("offline", refit="none", rivals=("uniform",), **few)
    candidates = find(task_of(run_dir, config)).candidates
    kept = {one.entry.source: one.kept for one in candidates}
    _, by_taylor = found("taylor")  # which ranks channels where nothing is refitted
    (same,) = (one for one in by_taylor.candidates if one.entry.source == "taylor/uniform")
    assert kept.keys() == {"offline", "uniform"}
    assert kept["uniform"] == same.kept != kept["offline"]


def test_a_criterion_has_no_rivals():
    with pytest.raises(ConfigError, match=r"prune\.rivals must be"):
        config_of("magnitude", rivals=("taylor",))


def test_rounds_choose_on_few_images_and_finalists_are_measured_on_held_out_ones(found):
    for method in METHODS:
        _, choice = found(method)
        first, second, *others = (candidate.entry for candidate in choice.candidates)
        assert {entry.noise for entry in (first, second, *others)} == {"choice"}
        assert {entry.num_images for entry in (first, second, *others)} == {8}
        assert first.final.num_images == second.final.num_images == 32
        assert first.final.standard_error > 0
        assert all(0 < entry.distance_error < entry.distance for entry in (first, *others))
        assert all(entry.final is None for entry in others)


@pytest.mark.slow
def test_no_more_candidates_than_finalists_are_measured_on_held_out_images_at_once(run_dir):
    task = task_of(run_dir, config_of("offline", num_rounds=1))
    choice, entries = find(task), entries_of(task)
    assert {(entry.noise, entry.num_images) for entry in entries} == {("held-out", 32)}
    assert choice.loss_refit == min(entries, key=lambda entry: entry.distance).loss_refit
    assert not any("first" in name for name in results_of(task))


def test_with_a_quadratic_model_nothing_is_measured_but_candidates(run_dir):
    task = task_of(run_dir, config_of("offline", sensitivity="second-order"))
    choice, entries = find(task), entries_of(task)
    names = {name.partition("-")[0] for name in results_of(task) if name.endswith(".json")}
    assert names == {"base", "second", "round"}
    assert len({tuple(sorted(entry.widths.items())) for entry in entries}) == 4
    assert all(is_tight(task.space, entry.widths, task.max_macs) for entry in entries)
    assert timeless(find(task)) == timeless(choice)


@pytest.mark.slow
@pytest.mark.parametrize("other", [{"refit": "none"}, {"space": "full"}])
def test_without_a_refit_and_with_streams_sensitivities_are_measured_in_any_case(run_dir, other):
    task = task_of(run_dir, config_of("offline", sensitivity="second-order", **other))
    find(task)
    assert any(name.startswith("sensitivities") for name in results_of(task))


def test_without_pruning_the_choice_is_the_base_and_nothing_is_remembered(run_dir):
    task = task_of(run_dir, config_of("none"))
    choice = find(task)
    assert choice.widths == task.space.full
    assert choice.kept == keep_everything(task.space.units)
    assert choice.loss_cut == choice.loss_base
    assert (choice.entry, choice.loss_refit, choice.candidates) == (None, None, ())
    assert not task.context.run_dir.memory.exists()
    assert [name.partition("-")[0] for name in results_of(task)] == ["base"]


@pytest.mark.parametrize("method", ["offline", "llm", "taylor"])
def test_a_group_limited_to_the_base_keeps_all_of_it_without_a_search(run_dir, method):
    task = task_of(run_dir, config_of(method), index=3)
    assert task.max_macs == task.space.macs_base
    choice = find(task)
    assert choice.kept == keep_everything(task.space.units)
    assert choice.loss_cut == choice.loss_base
    assert choice.entry is None
    assert [name.partition("-")[0] for name in results_of(task)] == ["base"]


def test_the_paper_s_way_judges_by_the_loss_after_the_cut(run_dir):
    task = task_of(run_dir, config_of("magnitude", refit="none"))
    choice, entries = find(task), entries_of(task)
    assert all(entry.loss_refit is None for entry in entries)
    assert choice.loss_cut == min(entry.final.loss_cut for entry in entries if entry.final)
    assert choice.loss_refit is None


@pytest.mark.slow
@pytest.mark.parametrize("method", ["offline", "magnitude"])
def test_in_the_full_space_streams_are_cut_too(run_dir, method):
    task = task_of(run_dir, config_of(method, space="full"))
    choice = find(task)
    assert is_tight(task.space, choice.widths, task.max_macs)
    streams = [unit for unit in task.space.units if unit.kind == "stream"]
    assert any(choice.widths[unit.name] < unit.width for unit in streams)


@pytest.mark.slow
def test_losses_are_reported_by_their_place_in_the_search(run_dir):
    task, seen = task_of(run_dir, config_of("offline")), []
    chain = search_submodel(task, MemoryBank(run_dir.memory))
    choice = run_chain(
        chain, reporting_to(lambda metrics, step: seen.append((step, dict(metrics))))
    )
    entries, (base, base_of_heat, *reported) = (
        entries_of(task),
        [(step, metrics) for step, metrics in seen if metrics],
    )
    assert base == (0, {"loss_cut": choice.loss_base, "loss_refit": choice.loss_base})
    assert base_of_heat[0] == 0
    losses = [(entry.loss_cut, entry.loss_refit) for entry in entries]
    assert reported[:4] == [
        (place, {"loss_cut": loss_cut, "loss_refit": loss_refit})
        for place, (loss_cut, loss_refit) in enumerate(losses, start=1)
    ]
    finals = {(entry.final.loss_cut, entry.final.loss_refit) for entry in entries if entry.final}
    assert [step for step, _ in reported[4:]] == [5, 6]
    assert {(metrics["loss_cut"], metrics["loss_refit"]) for _, metrics in reported[4:]} == finals


def test_search_macs_count_every_forward_and_backward_of_the_search(run_dir):
    for method, passes in [("magnitude", 1), ("taylor", 1 + 3)]:
        task = task_of(run_dir, config_of(method, refit="none"))
        run_dir.memory.unlink(missing_ok=True)
        choice = find(task)
        base, entries = task.space.macs_base, entries_of(task)
        most = sum(8 * (base + entry.macs) for entry in entries)  # beside the base, in the heat
        most += sum(32 * (base + entry.macs) for entry in entries if entry.final)
        measured = choice.cost.macs - 32 * passes * base
        assert 0.7 * most < measured <= most  # what precedes all pruned units runs once
        assert choice.cost.seconds > 0
        lose_every_result(run_dir, run_dir.group(0))


def test_a_limit_that_no_scheme_meets_is_an_error(run_dir):
    for method in ("offline", "magnitude"):
        task = task_of(run_dir, config_of(method))
        tight: TimestepGroup = dataclasses.replace(task.group, limit_share=0.05)
        with pytest.raises(LimitError):
            find(dataclasses.replace(task, group=tight))


# --- resuming --------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["none", "offline", "taylor"])
def test_a_finished_search_is_not_done_again(found, method):
    task, choice = found(method)
    written = results_of(task)
    memory = task.context.run_dir.memory.read_bytes() if method != "none" else b""
    assert timeless(find(task)) == timeless(choice)
    assert find(task).cost.seconds == choice.cost.seconds  # of the attempt that did the work
    assert results_of(task) == written
    assert method == "none" or task.context.run_dir.memory.read_bytes() == memory


def lose_the_last_result(run_dir: RunDir, folder: Path) -> None:
    (last,) = folder.glob("round-1-candidate-1-*.json")
    last.unlink()


def lose_the_last_line(run_dir: RunDir, _folder: Path) -> None:
    lines = run_dir.memory.read_text().splitlines(keepends=True)
    run_dir.memory.write_text("".join(lines[:-1]))


def tear_the_last_line(run_dir: RunDir, _folder: Path) -> None:
    run_dir.memory.write_bytes(run_dir.memory.read_bytes()[:-20])


def lose_the_last_round(run_dir: RunDir, folder: Path) -> None:
    lines = run_dir.memory.read_text().splitlines(keepends=True)
    run_dir.memory.write_text("".join(lines[:2]))
    for path in folder.glob("round-1-*.json"):
        path.unlink()


def lose_the_memory(run_dir: RunDir, _folder: Path) -> None:
    run_dir.memory.unlink()


def lose_a_sensitivity(_run_dir: RunDir, folder: Path) -> None:
    (folder / "sensitivities-0-2.json").unlink()


def lose_every_result(_run_dir: RunDir, folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


LOSSES = [
    lose_the_last_result,
    lose_the_last_line,
    tear_the_last_line,
    lose_the_last_round,
    lose_the_memory,
    lose_a_sensitivity,
    lose_every_result,
]


@pytest.mark.parametrize("lose", LOSSES)
def test_a_search_that_lost_its_end_comes_to_the_same_choice(found, tmp_path, lose):
    whole, choice = found("offline")
    shutil.copytree(whole.context.run_dir.root, tmp_path / "run", symlinks=True)
    run_dir = RunDir(tmp_path / "run")
    task = with_run_dir(whole, run_dir)
    lose(run_dir, run_dir.group(0))
    assert timeless(find(task)) == timeless(choice)
    assert entries_of(task) == entries_of(whole)


# --- several groups --------------------------------------------------------------------------


class Loop:
    """Runs chains in this process; a job that ran before returns its earlier result."""

    def __init__(self) -> None:
        self.known: dict[str, Any] = {}
        self.asked: list[AskJob] = []

    def run(self, chains: Chains, take: Callable[[list], tuple[str, AnyItem]]) -> dict:
        ready = chains.advance()
        while ready:
            name, item = take(ready)
            ready.remove((name, item))
            chains.deliver(name, item, self._result(item))
            ready += chains.advance()
        return chains.values

    def _result(self, item: AnyItem) -> Any:
        if isinstance(item.job, AskJob):
            self.asked.append(item.job)
        key = f"{item.key} {getattr(item.job, 'kept', None)}"  # all else is the same
        if key not in self.known or isinstance(item.job, AskJob):
            self.known[key] = run_item(item, lambda _metrics, _step: None)
        return self.known[key]


def tasks_in(run_dir: RunDir, config: RunConfig) -> list[GroupSearch]:
    """The tasks of all four groups, the last of which keeps the whole base."""
    groups = plan_groups(config.diffusion, config.plan, config.sampler).groups
    return group_searches(context_of(run_dir, config), space_of(TINY), groups)


def chains_of(tasks: list[GroupSearch], memory: MemoryBank) -> Chains[SearchResult]:
    return Chains({task.name: search_submodel(task, memory) for task in tasks})


@pytest.fixture(scope="module")
def loop() -> Loop:
    return Loop()


def in_order(ready: list) -> tuple[str, AnyItem]:
    return ready[0]


@pytest.mark.slow
def test_nobodys_choice_depends_on_the_order_in_which_items_finish(loop, base, tmp_path):
    outcomes = []
    for number in range(4):
        run_dir = new_run_dir(tmp_path / str(number), base)
        memory = MemoryBank(run_dir.memory)
        draw = random.Random(number)
        take = in_order if number == 0 else draw.choice
        values = loop.run(chains_of(tasks_in(run_dir, config_of("offline")), memory), take)
        choices = {name: timeless(choice) for name, choice in values.items()}
        outcomes.append((choices, memory.all()))
        assert memory.all() == MemoryBank(run_dir.memory).all()
    assert len(outcomes[0][1]) > 3 * 2
    assert all(outcome == outcomes[0] for outcome in outcomes)


@pytest.mark.parametrize("memory", ["shared", "own"])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_round_sees_what_all_groups_or_its_own_had_found_by_the_end_of_the_one_before(
    loop, run_dir, tmp_path, memory, seed
):
    config = config_of("llm", replay=tmp_path / "nothing", memory=memory)
    bank = MemoryBank(run_dir.memory)
    loop.asked.clear()
    loop.run(chains_of(tasks_in(run_dir, config), bank), random.Random(seed).choice)
    assert len(loop.asked) == 3 * 2
    for job in loop.asked:
        group, number = job.request.group, job.request.round
        expected = bank.visible_to(group, before_round=number, shared=memory == "shared")
        own = [entry.key for entry in bank.all() if entry.key[:2] == (group, number)]
        assert [entry.key for entry in job.memory] == [*(entry.key for entry in expected), *own]
        groups = {entry.group for entry in expected}
        assert len(groups) == job.request.round * (3 if memory == "shared" else 1)


def left_alone(tasks: list[GroupSearch], names: set[str], loop: Loop) -> dict[str, SearchResult]:
    """What ends while the items of some chains are never run."""
    chains = chains_of(tasks, MemoryBank(tasks[0].context.run_dir.memory))
    ready = chains.advance()
    while running := [entry for entry in ready if entry[0] not in names]:
        name, item = running[0]
        ready.remove((name, item))
        chains.deliver(name, item, loop._result(item))
        ready += chains.advance()
    return chains.values


def test_a_group_that_failed_before_leaves_no_loss_with_another_scheme(loop, base, tmp_path):
    run_dir = new_run_dir(tmp_path, base)
    tasks, memory = tasks_in(run_dir, config_of("offline")), MemoryBank(run_dir.memory)
    chains = chains_of(tasks, memory)
    chains.cancel("group-01")
    ready = chains.advance()
    while ready:
        name, item = ready.pop(0)
        ItemResult(loop._result(item)).save(item.result_path)
        chains.deliver(name, item, loop._result(item))
        ready += chains.advance()
    without = memory.all()
    loop.run(chains_of(tasks, memory), in_order)  # now with the group that failed
    whole = MemoryBank(new_run_dir(tmp_path / "whole", base).memory)
    loop.run(
        chains_of(tasks_in(RunDir(tmp_path / "whole"), config_of("offline")), whole), in_order
    )
    assert memory.all() == MemoryBank(run_dir.memory).all() == whole.all()
    assert without != [entry for entry in whole.all() if entry.group != 1]


def test_nobody_waits_for_a_group_that_keeps_the_whole_base(loop, run_dir):
    tasks = tasks_in(run_dir, config_of("offline"))
    assert tasks[3].max_macs == tasks[3].space.macs_base
    assert set(left_alone(tasks, {"group-03"}, loop)) == {"group-00", "group-01", "group-02"}


def test_groups_that_share_wait_for_each_other_and_those_that_do_not_do_not(loop, base, tmp_path):
    for memory, ended in (("shared", {"group-03"}), ("own", {"group-00", "group-02", "group-03"})):
        tasks = tasks_in(new_run_dir(tmp_path / memory, base), config_of("offline", memory=memory))
        assert set(left_alone(tasks, {"group-01"}, loop)) == ended


def test_a_group_alone_shares_with_nobody(loop, run_dir):
    task = tasks_in(run_dir, config_of("offline"))[0]
    alone = dataclasses.replace(task, participants=frozenset({task.name}))
    assert left_alone([alone], set(), loop).keys() == {"group-00"}


# --- the language model ----------------------------------------------------------------------


def by_others(choice: SearchResult) -> list[MemoryEntry]:
    """What was measured of others than a language model, and what came of it, best first."""
    return [one.entry for one in choice.candidates if not one.entry.is_by_llm]


def test_where_the_language_model_fails_the_result_is_the_offline_proxys_and_it_is_noted(
    found, run_dir, tmp_path
):
    _, offline = found("offline")
    task = task_of(run_dir, config_of("llm", replay=tmp_path / "nothing"))
    choice = find(task)
    assert choice.candidates == offline.candidates
    assert len(choice.cost.notes) == 2
    for number, note in enumerate(choice.cost.notes):
        assert note.startswith(f"group-00, round {number}: the language model was given up: ")
        assert str(tmp_path / "nothing") in note
    assert timeless(find(task)) == timeless(choice)  # the notes too


def answer_of(*bounds: tuple[int, int, int], hypothesis: str = "h", **more: Any) -> str:
    """An answer that has the knapsack's scheme within some bounds measured."""
    rows = [{"unit": unit, "least": least, "most": most} for unit, least, most in bounds]
    return json.dumps({"hypothesis": hypothesis, "bounds": rows, "action": "measure", **more})


def record(folder: Path, number: int, *replies: str) -> None:
    """A transcript of one turn for each of some replies."""
    path = transcript_path(folder / "proxy", 0, number)
    for turn, reply in enumerate(replies):
        exchange = LLMExchange({}, reply, None, TokenUsage(), 0.0, turn=turn, version=VERSION)
        append_exchange(path, exchange)


def test_changes_of_the_language_model_are_measured_beside_the_offline_proxys_schemes(
    found, run_dir, tmp_path
):
    offline, alone = found("offline")
    record(tmp_path, 0, answer_of((1, 3, 3)))
    record(tmp_path, 1, answer_of((1, 5, 5), (99, 1, 1)), answer_of((1, 6, 6), hypothesis="i"))
    choice = find(task_of(run_dir, config_of("llm", replay=tmp_path)))
    asked = [one for one in entries_of(task_of(run_dir, config_of("llm"))) if one.is_by_llm]
    assert [one.key for one in asked] == [(0, 0, 2), (0, 1, 2), (0, 1, 3)]
    assert [one.source for one in asked] == ["llm", "llm/repaired", "llm"]
    assert [one.hypothesis for one in asked] == ["h", "h", "i"]
    names = list(offline.space.full)
    assert [one.widths[names[1]] for one in asked] == [3, 5, 6]
    assert all(one.macs <= offline.max_macs and one.overshoot == 0 for one in asked)
    assert all(one.predicted > 0 for one in asked)
    assert by_others(choice) == [one.entry for one in alone.candidates]
    assert sum(one.entry.final is not None for one in choice.candidates) == 4  # two of each
    assert any(
        "unit 99 within 1 to 1: there is no such unit" in note for note in choice.cost.notes
    )


def test_what_a_language_model_contributed_is_said(found, run_dir, tmp_path):
    _, offline = found("offline")
    assert schemes_by_source([offline, offline]) == {"offline": 8}
    (note,) = contribution_notes([offline])
    assert "the language model contributed nothing" in note
    record(tmp_path, 0, answer_of((1, 3, 3)))
    choice = find(task_of(run_dir, config_of("llm", replay=tmp_path)))
    assert schemes_by_source([choice]) == {"llm": 1, "offline": 4}
    (note,) = contribution_notes([choice])
    chosen = choice.entry.source == "llm"
    assert ("1 of 1 pruned experts" in note) is chosen
    assert ("no expert is the language model's: 1 of its" in note) is not chosen


def test_a_language_model_that_is_done_is_noted_and_that_it_contributed_nothing_is_said(
    found, base, run_dir, tmp_path
):
    _, offline = found("offline")
    is_done = json.dumps({"action": "done", "reasoning": "all is noise"})
    record(tmp_path, 0, is_done)
    record(tmp_path, 1, answer_of((1, 5, 5)), is_done)
    choice = find(task_of(run_dir, config_of("llm", replay=tmp_path)))
    assert choice.cost.notes == [
        "group-00, round 0: the language model left 2 of 2 measurements unused: all is noise",
        "group-00, round 1: the language model left 1 of 2 measurements unused: all is noise",
    ]
    assert schemes_by_source([choice]) == {"llm": 1, "offline": 4}
    record(tmp_path / "never", 0, is_done)
    record(tmp_path / "never", 1, is_done)
    other_run = new_run_dir(tmp_path / "other", base)
    never = find(task_of(other_run, config_of("llm", replay=tmp_path / "never")))
    assert never.candidates == offline.candidates
    (note,) = contribution_notes([never])
    assert "the language model contributed nothing" in note


def answered(chain: Chain[Any], answer: Callable[[Sequence[AnyItem]], Sequence[Any]]) -> Any:
    """What a chain returns whose items are answered by a function."""
    try:
        items = next(chain)
        while True:
            items = chain.send(answer(items))
    except StopIteration as ended:
        return ended.value


@pytest.mark.parametrize("seed", range(10))
def test_whatever_a_language_model_has_measured_it_never_ends_behind_the_race_without_it(
    seed, found, tmp_path
):
    """Every heat ranks at random, with ties: who leads in one may be last in the next."""
    task, choice = found("offline")
    draw, memory = random.Random(seed), MemoryBank(tmp_path / "memory.jsonl")
    distances: dict[str, float] = {}
    candidates: list[Candidate] = []

    def drawn() -> float:
        return draw.choice([0.25, 0.5, 0.75])

    for number in range(12):
        source = "offline" if number % 2 else draw.choice(["llm", "llm/repaired"])
        entry = dataclasses.replace(
            choice.entry, candidate=number, source=source, distance=drawn(), final=None
        )
        memory.add(entry)
        candidates.append(Candidate(entry, choice.kept))

    def measured(items: Sequence[AnyItem]) -> list[CandidateResult]:
        return [
            CandidateResult(
                loss_cut=1.0,
                loss_refit=1.0,
                macs=0.0,
                seconds=0.0,
                distance=distances.setdefault(item.key, drawn()),
            )
            for item in items
        ]

    def winner(of: Sequence[Candidate]) -> MemoryEntry:
        return answered(race(task, memory, SearchCost(), of), measured)[0].entry

    alone = winner([one for one in candidates if not one.entry.is_by_llm])
    both = winner(candidates)
    assert both == alone or (both.is_by_llm and both.final.rank < alone.final.rank)


NONSENSE = {
    "prose": "Cut everything!",
    "a whole table, as once was asked for": '{"schemes": [[{"unit": "mid", "keep": 1}]]}',
    "the knapsack's own scheme": answer_of(),
    "contradictions": answer_of(*((number, 9, 3) for number in range(12))),
    "all units at random widths": answer_of(*((n, 1 + n % 2, 1 + n % 2) for n in range(5, 12))),
    "names of nothing": answer_of(
        distrust=[{"where": "the mid", "factor": 3}],
        moves=[{"from_block": "a", "to_block": "b", "points": 4}],
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", NONSENSE)
def test_nonsense_never_ends_behind_the_offline_proxy(case, found, run_dir, tmp_path):
    _, offline = found("offline")
    for number in range(2):
        record(tmp_path, number, NONSENSE[case], NONSENSE[case])
    choice = find(task_of(run_dir, config_of("llm", replay=tmp_path)))
    assert by_others(choice) == [one.entry for one in offline.candidates]
    assert choice.entry.final.rank <= offline.entry.final.rank
    assert any("the language model was given up" in note for note in choice.cost.notes)


def test_what_a_language_model_found_changes_no_other_groups_offline_schemes(loop, base, tmp_path):
    outcomes = []
    record(tmp_path, 0, answer_of((1, 3, 3)))  # of group 0
    for method in ("offline", "llm"):
        run_dir = new_run_dir(tmp_path / method, base)
        memory, config = MemoryBank(run_dir.memory), config_of(method, replay=tmp_path)
        loop.run(chains_of(tasks_in(run_dir, config), memory), in_order)
        outcomes.append(memory.all())
    alone, beside = outcomes
    assert {entry.group for entry in beside if entry.is_by_llm} == {0}
    assert [entry for entry in beside if not entry.is_by_llm] == alone
