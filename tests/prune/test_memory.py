import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tdc_ray.errors import StorageError
from tdc_ray.prune.memory import MemoryBank, MemoryEntry, best

counts = st.integers(0, 50)
losses = st.floats(0, 1e6)
entries = st.builds(
    MemoryEntry,
    group=counts,
    round=counts,
    candidate=counts,
    source=st.text(),
    widths=st.dictionaries(st.text(), st.integers(1, 100), max_size=4),
    macs=st.integers(0, 10**15),
    num_params=st.integers(0, 10**12),
    loss_cut=losses,
    loss_refit=st.none() | losses,
)


def entry(group: int = 0, round: int = 0, candidate: int = 0, loss: float = 0.5) -> MemoryEntry:  # noqa: A002
    return MemoryEntry(
        group=group,
        round=round,
        candidate=candidate,
        source="taylor/moved",
        widths={"block": 1 + candidate},
        macs=10,
        num_params=20,
        loss_cut=loss,
    )


@settings(max_examples=25)
@given(st.lists(entries, max_size=8, unique_by=lambda e: e.place))
def test_entries_survive_the_file(tmp_path_factory, found):
    path = tmp_path_factory.mktemp("bank") / "memory.jsonl"
    bank = MemoryBank(path)
    for one in found:
        bank.add(one)
    for group in {one.group for one in found}:
        expected = sorted((e for e in found if e.group == group), key=lambda e: e.place)
        assert MemoryBank(path).of_group(group, before_round=51) == expected
        assert bank.of_group(group, before_round=51) == expected


def test_a_bank_without_a_file_is_empty(tmp_path):
    assert MemoryBank(tmp_path / "memory.jsonl").of_group(0, before_round=99) == []
    assert not (tmp_path / "memory.jsonl").exists()


def test_adding_only_appends(tmp_path):
    path = tmp_path / "memory.jsonl"
    bank = MemoryBank(path)
    content = b""
    for candidate in range(3):
        bank.add(entry(candidate=candidate))
        assert path.read_bytes().startswith(content)
        content = path.read_bytes()
        assert content.count(b"\n") == candidate + 1


def test_an_entry_added_twice_is_there_once_as_it_first_was(tmp_path):
    path = tmp_path / "memory.jsonl"
    bank = MemoryBank(path)
    bank.add(entry(loss=0.5))
    bank.add(entry(loss=0.5))
    MemoryBank(path).add(entry(loss=0.9))
    assert path.read_text().count("\n") == 1
    assert MemoryBank(path).of_group(0, before_round=1) == [entry(loss=0.5)]


@pytest.mark.parametrize("torn", ['{"group": 0, "rou', "{", json.dumps({"group": 1})])
def test_a_torn_last_line_does_not_count_and_is_dropped_by_the_next(tmp_path, torn):
    path = tmp_path / "memory.jsonl"
    MemoryBank(path).add(entry(candidate=0))
    with path.open("a") as file:
        file.write(torn)
    bank = MemoryBank(path)
    assert bank.of_group(0, before_round=1) == [entry(candidate=0)]
    bank.add(entry(candidate=1))
    assert MemoryBank(path).of_group(0, before_round=1) == [entry(candidate=i) for i in range(2)]
    assert torn not in path.read_text().splitlines()


def test_entries_come_in_the_order_of_rounds_and_candidates(tmp_path):
    path = tmp_path / "memory.jsonl"
    bank, places = MemoryBank(path), [(1, 0), (0, 1), (1, 1), (0, 0)]
    for round_, candidate in places:
        bank.add(entry(round=round_, candidate=candidate))
    for found in (bank, MemoryBank(path)):
        in_order = [(e.round, e.candidate) for e in found.of_group(0, before_round=2)]
        assert in_order == sorted(places)


def test_a_round_sees_its_groups_earlier_rounds_alone(tmp_path):
    bank = MemoryBank(tmp_path / "memory.jsonl")
    for group in range(2):
        for round_ in range(3):
            bank.add(entry(group=group, round=round_))
    assert bank.of_group(1, before_round=0) == []
    assert bank.of_group(1, before_round=2) == [entry(group=1, round=i) for i in range(2)]
    assert bank.of_group(2, before_round=9) == []


@pytest.mark.parametrize(
    "line",
    [
        "no json at all",
        "[1, 2]",
        json.dumps({"group": 0}),
        json.dumps(dataclasses.asdict(entry()) | {"loss_cut": "low"}),
        json.dumps(dataclasses.asdict(entry()) | {"widths": {"block": "wide"}}),
    ],
)
def test_a_whole_line_that_is_no_entry_is_an_error_that_names_the_file(tmp_path, line):
    path = tmp_path / "memory.jsonl"
    MemoryBank(path).add(entry())
    with path.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(StorageError, match=str(path)):
        MemoryBank(path)


def test_a_scheme_is_judged_by_its_loss_after_the_refit_where_there_was_one():
    assert entry(loss=0.5).loss == 0.5
    assert dataclasses.replace(entry(loss=0.5), loss_refit=0.2).loss == 0.2


def test_the_best_entry_is_the_earliest_of_the_lowest_loss():
    found = [
        entry(round=1, candidate=0, loss=0.3),
        entry(round=0, candidate=2, loss=0.3),
        entry(round=0, candidate=0, loss=0.4),
        dataclasses.replace(entry(round=2, loss=0.9), loss_refit=0.3),
    ]
    assert best(found).place == (0, 0, 2)
