import dataclasses
import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tdc_ray.errors import StorageError
from tdc_ray.pruning.memory import MemoryBank, MemoryEntry, best

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
    loss_tuned=st.none() | losses,
    overshoot=st.integers(0, 10**15),
)


def entry(group: int = 0, round: int = 0, candidate: int = 0, loss: float = 0.5) -> MemoryEntry:  # noqa: A002
    return MemoryEntry(
        group=group,
        round=round,
        candidate=candidate,
        source="offline",
        widths={"block": 1 + candidate},
        macs=10,
        num_params=20,
        loss_cut=loss,
    )


@settings(max_examples=25)
@given(st.lists(entries, max_size=8, unique_by=lambda e: e.key))
def test_entries_survive_the_file(tmp_path_factory, found):
    path = tmp_path_factory.mktemp("bank") / "memory.jsonl"
    bank = MemoryBank(path)
    for one in found:
        bank.add(one)
    expected = sorted(found, key=lambda e: e.key)
    assert MemoryBank(path).all() == bank.all() == expected


def test_a_bank_without_a_file_is_empty(tmp_path):
    assert MemoryBank(tmp_path / "memory.jsonl").all() == []
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
    assert MemoryBank(path).all() == [entry(loss=0.5)]


def test_the_same_scheme_by_another_proxy_replaces_an_entry(tmp_path):
    bank = MemoryBank(tmp_path / "memory.jsonl")
    by_llm, offline = (
        dataclasses.replace(entry(loss=0.5), source=source) for source in ("llm", "offline")
    )
    bank.add(by_llm)
    bank.add(offline)
    assert bank.all() == MemoryBank(bank.path).all() == [offline]


@pytest.mark.parametrize("torn", ['{"group": 0, "rou', "{", json.dumps({"group": 1})])
def test_a_torn_last_line_does_not_count_and_is_dropped_by_the_next(tmp_path, torn):
    path = tmp_path / "memory.jsonl"
    MemoryBank(path).add(entry(candidate=0))
    with path.open("a") as file:
        file.write(torn)
    bank = MemoryBank(path)
    assert bank.all() == [entry(candidate=0)]
    bank.add(entry(candidate=1))
    assert MemoryBank(path).all() == [entry(candidate=i) for i in range(2)]
    assert torn not in path.read_text().splitlines()


# --- losses after a short fine-tune ----------------------------------------------------------


def test_the_loss_after_a_short_fine_tune_replaces_an_entry_by_a_line_of_its_own(tmp_path):
    path = tmp_path / "memory.jsonl"
    bank = MemoryBank(path)
    for candidate in range(2):
        bank.add(entry(candidate=candidate))
    before = path.read_bytes()
    bank.set_tuned_loss((0, 0, 1), 0.25)
    expected = [entry(), dataclasses.replace(entry(candidate=1), loss_tuned=0.25)]
    assert bank.all() == MemoryBank(path).all() == expected
    assert path.read_bytes().startswith(before)
    assert path.read_text().count("\n") == 3


def test_the_same_loss_is_not_remembered_twice_and_another_replaces_it(tmp_path):
    path = tmp_path / "memory.jsonl"
    bank = MemoryBank(path)
    bank.add(entry())
    for loss, num_lines in ((0.25, 2), (0.25, 2), (0.125, 3)):
        bank.set_tuned_loss((0, 0, 0), loss)
        assert path.read_text().count("\n") == num_lines
        assert [e.loss_tuned for e in MemoryBank(path).all()] == [loss]


def test_an_entry_with_a_loss_after_a_fine_tune_is_left_as_it_is_when_added_again(tmp_path):
    bank = MemoryBank(tmp_path / "memory.jsonl")
    bank.add(entry())
    bank.set_tuned_loss((0, 0, 0), 0.25)
    bank.add(entry())  # as a search that is resumed does
    assert MemoryBank(bank.path).all() == [dataclasses.replace(entry(), loss_tuned=0.25)]


def test_a_torn_line_of_a_fine_tune_leaves_the_entry_without_it(tmp_path):
    path = tmp_path / "memory.jsonl"
    bank = MemoryBank(path)
    bank.add(entry())
    bank.set_tuned_loss((0, 0, 0), 0.25)
    path.write_bytes(path.read_bytes()[:-5])
    torn = MemoryBank(path)
    assert torn.all() == [entry()]
    torn.set_tuned_loss((0, 0, 0), 0.25)
    assert MemoryBank(path).all() == [dataclasses.replace(entry(), loss_tuned=0.25)]


def test_a_loss_after_a_fine_tune_does_not_change_what_an_entry_is_judged_by():
    assert dataclasses.replace(entry(loss=0.5), loss_tuned=0.1).loss == 0.5


# --- order -----------------------------------------------------------------------------------


def test_entries_come_in_the_order_of_rounds_and_candidates(tmp_path):
    path = tmp_path / "memory.jsonl"
    bank, places = MemoryBank(path), [(1, 0), (0, 1), (1, 1), (0, 0)]
    for round_, candidate in places:
        bank.add(entry(round=round_, candidate=candidate))
    for found in (bank, MemoryBank(path)):
        in_order = [(e.round, e.candidate) for e in found.all()]
        assert in_order == sorted(places)


@settings(max_examples=25)
@given(st.lists(entries, max_size=20, unique_by=lambda e: e.key), counts, counts)
def test_a_round_sees_what_was_found_before_it_by_all_groups_or_its_own(
    tmp_path_factory, found, group, before_round
):
    bank = MemoryBank(tmp_path_factory.mktemp("bank") / "memory.jsonl")
    for one in found:
        bank.add(one)
    earlier = [e for e in sorted(found, key=lambda e: e.key) if e.round < before_round]
    own = [e for e in earlier if e.group == group]
    assert bank.visible_to(group, before_round=before_round, shared=True) == earlier
    assert bank.visible_to(group, before_round=before_round, shared=False) == own


def test_the_order_in_which_entries_were_found_is_not_seen(tmp_path):
    found = [entry(group=group, round=round_) for group in range(3) for round_ in range(2)]
    orders = found, found[::-1], found[1::2] + found[::2]
    banks = [MemoryBank(tmp_path / f"{number}.jsonl") for number in range(3)]
    for bank, order in zip(banks, orders, strict=True):
        for one in order:
            bank.add(one)
    views = [bank.visible_to(1, before_round=1, shared=True) for bank in banks]
    assert views == [[entry(group=group) for group in range(3)]] * 3


@pytest.mark.parametrize(
    "line",
    [
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


def test_the_error_of_an_increase_is_that_of_what_ranks():
    by_loss = dataclasses.replace(entry(), standard_error=0.2, distance_error=0.1)
    by_distance = dataclasses.replace(by_loss, loss_refit=0.4, distance=0.3)
    assert (by_loss.increase(0.1), by_loss.increase_error) == (0.4, 0.2)
    assert (by_distance.increase(0.1), by_distance.increase_error) == (0.3, 0.1)


def test_entries_from_before_distances_had_an_error_are_read(tmp_path):
    line = dataclasses.asdict(dataclasses.replace(entry(), loss_refit=0.4, distance=0.3))
    del line["distance_error"]
    path = tmp_path / "memory.jsonl"
    path.write_text(json.dumps(line) + "\n")
    (found,) = MemoryBank(path).all()
    assert (found.rank, found.increase_error) == (0.3, None)


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
    assert best(found).key == (0, 0, 2)


def test_a_loss_that_is_no_number_is_the_highest_and_survives_the_file(tmp_path):
    nan = float("nan")
    bank = MemoryBank(tmp_path / "memory.jsonl")
    for candidate, loss in enumerate([nan, 1e30, float("inf")]):
        bank.add(entry(candidate=candidate, loss=loss))
    found = MemoryBank(bank.path).all()
    assert [math.isnan(e.loss) for e in found] == [True, False, False]
    assert best(found).candidate == 1
    assert best(found[:1] + found[2:]).candidate == 2
    assert best(found[:1]).candidate == 0
