import dataclasses
from pathlib import Path

import pytest

from tdc_ray.config import RunConfig
from tdc_ray.errors import LimitError
from tdc_ray.layout import RunDir
from tdc_ray.models.units import keep_all
from tdc_ray.plan import Group
from tdc_ray.prune.memory import MemoryBank
from tdc_ray.prune.rounds import Choice, GroupTask, search
from tdc_ray.prune.space import is_tight
from tdc_ray.work import run_chain
from tests.small import make_run_dir, small_config, task_of, widths_of

METHODS = ["random", "magnitude", "taylor"]


def config_of(method: str = "magnitude", **prune: int) -> RunConfig:
    return small_config(prune={"method": method, "num_images": 16, **prune})


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return make_run_dir(tmp_path_factory.mktemp("base")).base_unet


@pytest.fixture
def run_dir(base, tmp_path) -> RunDir:
    """A fresh run directory with the module's base."""
    run_dir = RunDir(tmp_path)
    run_dir.base_unet.parent.mkdir(parents=True)
    run_dir.base_unet.symlink_to(base)
    return run_dir


def find(task: GroupTask) -> Choice:
    return run_chain(search(task, MemoryBank(task.run_dir.memory)))


def timeless(choice: Choice) -> Choice:
    return dataclasses.replace(choice, seconds=0.0)


def results_of(task: GroupTask) -> dict[str, int]:
    """When each result of the group was written."""
    folder = task.run_dir.group(task.group.index)
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def entries_of(task: GroupTask):
    return MemoryBank(task.run_dir.memory).of_group(task.group.index, before_round=99)


@pytest.mark.parametrize("method", METHODS)
def test_the_choice_is_tight_within_the_limit_and_the_best_that_was_measured(run_dir, method):
    task = task_of(run_dir, config_of(method))
    choice, entries = find(task), entries_of(task)
    assert task.space.macs(choice.widths) <= task.max_macs < task.space.macs_base
    assert all(is_tight(task.space, entry.widths, task.max_macs) for entry in entries)
    assert widths_of(choice.kept) == dict(choice.widths)
    best = min(entries, key=lambda entry: entry.loss)
    assert (choice.loss_cut, choice.widths) == (best.loss, best.widths)
    assert choice.loss_base > 0
    assert choice.seconds > 0


@pytest.mark.parametrize("method", METHODS)
def test_the_memory_bank_holds_every_candidate_of_every_round(run_dir, method):
    task = task_of(run_dir, config_of(method, num_rounds=3, num_candidates=2))
    find(task)
    entries = entries_of(task)
    assert [entry.place for entry in entries] == [(0, r, c) for r in range(3) for c in range(2)]
    assert task.run_dir.memory.read_text().count("\n") == 6
    assert len({tuple(sorted(entry.widths.items())) for entry in entries}) == 6
    for entry in entries:
        assert entry.source.startswith(f"{method}/")
        assert entry.macs == task.space.macs(entry.widths)
        assert entry.num_params == task.space.num_params(entry.widths)


def test_without_pruning_the_choice_is_the_base_and_nothing_is_remembered(run_dir):
    task = task_of(run_dir, config_of("none"))
    choice = find(task)
    assert choice.widths == task.space.full
    assert choice.kept == keep_all(task.space.units)
    assert choice.loss_cut == choice.loss_base
    assert not task.run_dir.memory.exists()
    assert list(results_of(task)) == ["base.json"]


def test_a_group_limited_to_the_base_keeps_all_of_it(run_dir):
    task = task_of(run_dir, config_of(num_rounds=2), index=3)
    assert task.max_macs == task.space.macs_base
    choice = find(task)
    assert choice.widths == task.space.full
    assert choice.loss_cut == choice.loss_base
    assert len(entries_of(task)) == 1  # there is nothing else to try


def test_losses_are_reported_by_their_place_in_the_search(run_dir):
    task, seen = task_of(run_dir, config_of(num_rounds=2, num_candidates=3)), []
    chain = search(task, MemoryBank(run_dir.memory))
    choice = run_chain(chain, lambda metrics, step: seen.append((step, dict(metrics))))
    losses = [choice.loss_base] + [entry.loss_cut for entry in entries_of(task)]
    found = [(step, metrics["loss_cut"]) for step, metrics in seen if metrics]
    assert found == list(enumerate(losses))


@pytest.mark.parametrize("method", ["none", *METHODS])
def test_a_finished_search_is_not_done_again(run_dir, method):
    task = task_of(run_dir, config_of(method))
    choice, written = find(task), results_of(task)
    memory = run_dir.memory.read_bytes() if method != "none" else b""
    assert find(task) == choice
    assert results_of(task) == written
    assert method == "none" or run_dir.memory.read_bytes() == memory


def lose_the_last_result(run_dir: RunDir, folder: Path) -> None:
    (folder / "round-1-candidate-1.json").unlink()


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


def lose_the_scores(_run_dir: RunDir, folder: Path) -> None:
    (folder / "scores.json").unlink()


def lose_every_result(_run_dir: RunDir, folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


LOSSES = [
    lose_the_last_result,
    lose_the_last_line,
    tear_the_last_line,
    lose_the_last_round,
    lose_the_memory,
    lose_the_scores,
    lose_every_result,
]


@pytest.mark.parametrize("lose", LOSSES)
def test_a_search_that_lost_its_end_comes_to_the_same_choice(run_dir, lose):
    task = task_of(run_dir, config_of("taylor"))
    choice, entries = find(task), entries_of(task)
    lose(run_dir, run_dir.group(0))
    assert timeless(find(task)) == timeless(choice)
    assert entries_of(task) == entries


def test_groups_share_the_memory_bank_without_seeing_each_other(run_dir):
    config = config_of()
    alone = find(task_of(run_dir, config, index=1))
    run_dir.memory.unlink()
    bank = MemoryBank(run_dir.memory)
    found = [run_chain(search(task_of(run_dir, config, index), bank)) for index in (0, 1)]
    assert timeless(found[1]) == timeless(alone)
    assert [entry.group for entry in bank.of_group(1, before_round=9)] == [1] * 4


def test_search_macs_count_every_forward_and_backward_of_the_search(run_dir):
    for method, passes in [("magnitude", 1), ("taylor", 1 + 3)]:
        task = task_of(run_dir, config_of(method))
        run_dir.memory.unlink(missing_ok=True)
        choice = find(task)
        measured = sum(entry.macs for entry in entries_of(task))
        assert choice.search_macs == 16 * (passes * task.space.macs_base + measured)
        lose_every_result(run_dir, run_dir.group(0))


def test_a_limit_that_no_scheme_meets_is_an_error(run_dir):
    task = task_of(run_dir, config_of())
    tight: Group = dataclasses.replace(task.group, limit_share=0.05)
    with pytest.raises(LimitError):
        find(dataclasses.replace(task, group=tight))
