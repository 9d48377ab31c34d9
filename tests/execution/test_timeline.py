import json

import pytest

from tdc_ray.execution.timeline import Timeline, load_history, usage


def write(path, *events):
    """Write events of several drivers; a tuple is (time, event, details)."""
    lines = [{"event": event, "time": time, **details} for time, event, details in events]
    path.write_text("".join(json.dumps([line]) + "\n" for line in lines))


def start(time, task, chain, item, worker, stage=1, attempt=1):
    details = {"task": task, "chain": chain, "stage": stage, "item": item, "attempt": attempt}
    return (time, "start", details | {"workers": [worker]})


def end(time, task, outcome="done"):
    return (time, "end", {"task": task, "outcome": outcome})


def join(time, worker):
    return (time, "join", {"worker": worker, "node": "n"})


DRIVER, PHASE = (0, "driver", {}), (0, "phase", {"name": "experts"})


def test_events_are_kept_in_lines_and_read_back(tmp_path):
    timeline = Timeline(tmp_path / "timeline.jsonl")
    timeline.add("join", worker="w", node="n")
    timeline.flush()
    timeline.add("leave", worker="w")
    timeline.flush(max_age_s=60)  # that was a moment ago
    (stay,) = load_history(tmp_path / "timeline.jsonl").stays
    assert (stay.worker, stay.node, stay.left) == ("w", "n", None)
    timeline.flush()
    (stay,) = load_history(tmp_path / "timeline.jsonl").stays
    assert stay.left >= stay.joined


def test_macs_are_those_of_the_item_and_0_in_older_timelines(tmp_path):
    path = tmp_path / "timeline.jsonl"
    time, event, details = start(1, 1, "a", "a1", "v")
    write(path, DRIVER, PHASE, (time, event, details | {"macs": 7.0}), start(2, 2, "b", "b1", "v"))
    assert [span.macs for span in load_history(path).spans] == [7.0, 0.0]


def test_nothing_is_kept_without_a_file(tmp_path):
    timeline = Timeline(None)
    timeline.add("join")
    timeline.flush()
    assert list(tmp_path.iterdir()) == []


def test_use_and_bound_are_what_a_hand_reckons(tmp_path):
    path = tmp_path / "timeline.jsonl"
    write(
        path,
        DRIVER,
        PHASE,
        join(0, "v"),
        join(0, "w"),
        start(0, 1, "a", "a1", "v"),
        start(0, 2, "b", "b1", "w"),
        end(4, 1),
        end(3, 2, "worker_lost"),
        start(4, 3, "a", "a2", "v", stage=2),
        start(4, 4, "b", "b1", "w", attempt=2),
        end(6, 3),
        end(9, 4),
    )
    (used,) = usage(load_history(path))
    assert used.num_workers == 2
    assert used.makespan_seconds == 9
    assert used.work_seconds == 4 + 2 + 5
    assert used.lost_seconds == 3
    assert used.lower_bound_seconds == 6  # chain a; all work side by side takes 5.5
    assert used.utilisation == pytest.approx(14 / 18)


def test_what_is_side_by_side_in_a_chain_is_no_longer_chain(tmp_path):
    path = tmp_path / "timeline.jsonl"
    starts = [start(0, n, "a", f"a{n}", f"w{n}") for n in range(4)]
    write(path, DRIVER, PHASE, *[join(0, f"w{n}") for n in range(4)], *starts)
    with path.open("a") as file:
        file.writelines(
            json.dumps([{"event": "end", "time": 2, "task": n, "outcome": "done"}]) + "\n"
            for n in range(4)
        )
    (used,) = usage(load_history(path))
    assert used.lower_bound_seconds == 2


def test_what_a_suspended_driver_writes_after_another_took_over_is_not_heeded(tmp_path):
    path = tmp_path / "timeline.jsonl"
    first = Timeline(path)
    first.add("join", worker="worker-0", node="n")
    first.flush()
    second = Timeline(path)
    second.flush()
    first.add("leave", worker="worker-0")
    first.flush()
    (stay,) = load_history(path).stays
    assert stay.left is not None


def test_what_a_killed_driver_left_open_is_lost_with_it(tmp_path):
    path = tmp_path / "timeline.jsonl"
    write(
        path,
        DRIVER,
        PHASE,
        join(0, "w"),
        start(1, 1, "a", "a1", "w"),
        (2, "failed", {"chain": "b", "reason": "no"}),
        (50, "driver", {}),
        PHASE,
        join(60, "w"),
        start(61, 1, "a", "a1", "w"),
    )
    history = load_history(path)
    assert [(span.outcome, span.ended) for span in history.spans] == [
        ("driver_lost", 2),
        ("running", None),
    ]
    assert [stay.left for stay in history.stays] == [2, None]
    assert history.failed == {}


def test_what_a_torn_line_leaves_without_a_start_is_left_out(tmp_path):
    path = tmp_path / "timeline.jsonl"
    write(path, DRIVER, PHASE, join(0, "w"), start(0, 1, "a", "a1", "w"), end(4, 1))
    lines = path.read_text().splitlines(keepends=True)
    lines += [json.dumps([{"event": "leave", "time": 5, "worker": "w"}]) + "\n"]
    lines[2] = lines[3] = "torn\n"
    path.write_text("".join(lines))
    history = load_history(path)
    assert (history.spans, history.stays) == ((), ())
