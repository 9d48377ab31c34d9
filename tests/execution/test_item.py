import ast
import importlib
import math
import pickle
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

import tdc_ray
from tdc_ray.errors import LimitError, StorageError
from tdc_ray.execution.chain import Barrier, Chains, result_of, run_chain, run_chains
from tdc_ray.execution.item import WorkItem, finished, run_item
from tdc_ray.storage.files import append_json_line, read_json, read_json_lines, write_json
from tests.small import reporting_to

PACKAGE = Path(tdc_ray.__file__).parent


@dataclass(frozen=True)
class CountJob:
    name: str
    calls_path: Path


def count_call(job, report):
    """Write every call down, so that calls can be counted across processes and attempts."""
    append_json_line(job.calls_path, job.name)
    report({"train/loss": 0.5}, 3)
    return {"name": job.name, "call": len(read_json_lines(job.calls_path))}


def fail_once(job, report):
    result = count_call(job, report)
    if result["call"] == 1:
        raise RuntimeError("cut")
    return result


def empty_result(job, report):
    count_call(job, report)
    return {}


def item(folder, name, function=count_call):
    job = CountJob(name, folder / "calls.jsonl")
    return WorkItem(name, function, job, folder / f"{name}.json", cost=1.0, result_type=dict)


def calls(folder):
    return read_json_lines(folder / "calls.jsonl")


def two_stages(folder, function=count_call):
    """Two items side by side, then one that is named after their results."""
    first = yield [item(folder, "a", function), item(folder, "b")]
    assert [result["name"] for result in first] == ["a", "b"]
    total = sum(result["call"] for result in first)
    second = yield [item(folder, f"c{total}")]
    return [*first, *second]


def test_a_chain_gets_the_results_of_its_items_in_order(tmp_path):
    results = run_chain(two_stages(tmp_path))
    assert results == [
        {"name": "a", "call": 1},
        {"name": "b", "call": 2},
        {"name": "c3", "call": 3},
    ]
    assert calls(tmp_path) == ["a", "b", "c3"]


def test_every_result_is_kept_where_its_item_says(tmp_path):
    run_chain(two_stages(tmp_path))
    assert read_json(tmp_path / "a.json") == {"name": "a", "call": 1}
    assert finished(item(tmp_path, "c3")).value == {"name": "c3", "call": 3}


def test_finished_items_are_not_run_again(tmp_path):
    results = run_chain(two_stages(tmp_path))
    assert run_chain(two_stages(tmp_path)) == results
    assert calls(tmp_path) == ["a", "b", "c3"]


def test_a_chain_that_was_cut_goes_on_with_what_is_missing(tmp_path):
    write_json(tmp_path / "a.json", {"name": "a", "call": 40})
    results = run_chain(two_stages(tmp_path))
    assert calls(tmp_path) == ["b", "c41"]
    assert results[-1] == {"name": "c41", "call": 2}


def test_an_item_that_fails_leaves_no_result_and_is_run_again(tmp_path):
    with pytest.raises(RuntimeError, match="cut"):
        run_chain(two_stages(tmp_path, fail_once))
    assert finished(item(tmp_path, "a")) is None
    run_chain(two_stages(tmp_path, fail_once))
    assert calls(tmp_path) == ["a", "a", "b", "c5"]


@dataclass(frozen=True)
class Losses:
    by_width: dict[int, float]
    names: tuple[str, ...]


def measure(job, _report):
    return Losses({8: 0.25, 4: math.inf}, ("a", "b"))


def losses_item(folder):
    return WorkItem("losses", measure, None, folder / "losses.json", cost=1.0, result_type=Losses)


def test_a_result_that_is_read_is_the_very_one_that_was_returned(tmp_path):
    def chain():
        return (yield from result_of(losses_item(tmp_path)))

    first, again = run_chain(chain()), run_chain(chain())
    assert first == again == measure(None, None)
    text = {"by_width": {"8": 0.25, "4": math.inf}, "names": ["a", "b"]}
    assert read_json(tmp_path / "losses.json") == text


def test_a_result_of_other_fields_is_refused_with_its_file(tmp_path):
    for content in ({"by_width": {"wide": 0.5}, "names": []}, {}, [1]):
        write_json(tmp_path / "losses.json", content)
        with pytest.raises(StorageError, match=r"losses\.json is no result of this item"):
            finished(losses_item(tmp_path))


def test_what_a_chain_raises_between_its_items_is_raised(tmp_path):
    def chain():
        yield []
        raise LimitError("too small")

    with pytest.raises(LimitError, match="too small"):
        run_chain(chain())


def test_chains_in_one_process_wait_for_each_other_at_barriers(tmp_path):
    names = frozenset("abc")
    before = {"a": 1, "b": 3, "c": 2}

    def chain(name):
        for number in range(before[name]):
            yield from result_of(item(tmp_path, f"{name}{number}"))
        yield Barrier("round", names)
        behind = len(calls(tmp_path))
        yield from result_of(item(tmp_path, f"{name}-after"))
        return behind

    assert run_chains({name: chain(name) for name in names}) == dict.fromkeys(names, 6)
    assert sorted(calls(tmp_path)[6:]) == ["a-after", "b-after", "c-after"]


def test_an_item_whose_result_is_empty_is_finished_too(tmp_path):
    def chain():
        yield [item(tmp_path, "a", empty_result)]

    run_chain(chain())
    run_chain(chain())
    assert calls(tmp_path) == ["a"]


def test_a_chain_without_items_gives_its_value(tmp_path):
    def chain():
        return tmp_path
        yield

    assert run_chain(chain()) == tmp_path


def test_a_chain_may_yield_no_items_and_gets_no_results():
    def chain():
        return (yield [])

    assert run_chain(chain()) == []


def test_items_report_their_metrics(tmp_path):
    reported: list[tuple[Mapping[str, float], int]] = []
    run_item(item(tmp_path, "a"), lambda metrics, step: reported.append((metrics, step)))
    assert reported == [({"train/loss": 0.5}, 3)]


def test_items_of_a_chain_report_to_whoever_watches_them(tmp_path):
    steps = []
    run_chain(two_stages(tmp_path), reporting_to(lambda _metrics, step: steps.append(step)))
    assert steps == [3, 3, 3]


# --- meetings --------------------------------------------------------------------------------

PARTIES = frozenset({"a", "b", "c"})


def meeting_chain(folder, name, log, *, rounds=(0, 1, 2)):
    """An item per round, and a meeting before every round but the first."""
    for number in rounds:
        if number > 0:
            yield Barrier(f"round {number}", PARTIES)
        log.append((name, "begins", number))
        yield [item(folder, f"{name}{number}")]
        log.append((name, "ends", number))
    return name


def run_shuffled(chains, draw):
    """Run the items that are ready in any order."""
    ready = chains.advance()
    while ready:
        name, one = ready.pop(draw.randrange(len(ready)))
        chains.deliver(name, one, run_item(one, lambda _metrics, _step: None))
        ready += chains.advance()
    return chains.values


@pytest.mark.parametrize("seed", range(5))
def test_nobody_begins_a_round_before_all_parties_ended_the_one_before(tmp_path, seed):
    log = []
    chains = Chains({name: meeting_chain(tmp_path, name, log) for name in "abc"})
    assert run_shuffled(chains, random.Random(seed)) == {"a": "a", "b": "b", "c": "c"}
    for name, what, number in log:
        begun = log.index((name, what, number))
        if what == "begins" and number > 0:
            assert all(log.index((party, "ends", number - 1)) < begun for party in PARTIES)


def test_whoever_is_no_party_holds_nobody_up(tmp_path):
    log = []
    chains = {name: meeting_chain(tmp_path, name, log) for name in "abc"}
    active = Chains({**chains, "other": two_stages(tmp_path / "other")})
    ready = active.advance()
    while met := [entry for entry in ready if entry[0] != "other"]:  # it is left to wait
        ready = [entry for entry in ready if entry[0] == "other"]
        for name, one in met:
            active.deliver(name, one, run_item(one, lambda _metrics, _step: None))
        ready += active.advance()
    assert active.values == {"a": "a", "b": "b", "c": "c"}


def test_a_party_that_has_ended_is_not_waited_for(tmp_path):
    log = []
    chains = {
        "a": meeting_chain(tmp_path, "a", log),
        "b": meeting_chain(tmp_path, "b", log, rounds=(0,)),
    }
    assert run_shuffled(Chains(chains), random.Random(0)) == {"a": "a", "b": "b"}
    assert ("a", "ends", 2) in log


def test_a_party_that_was_dropped_is_not_waited_for(tmp_path):
    log = []
    chains = Chains({name: meeting_chain(tmp_path, name, log) for name in "ab"})
    (first, _second) = chains.advance()
    chains.deliver(*first, run_item(first[1], lambda _metrics, _step: None))
    assert chains.advance() == []  # a waits for b
    chains.cancel("b")
    assert [one.key for _, one in chains.advance()] == ["a1"]


def test_a_result_for_a_chain_that_was_dropped_is_ignored(tmp_path):
    chains = Chains({"a": meeting_chain(tmp_path, "a", [])})
    ((name, one),) = chains.advance()
    chains.cancel("a")
    chains.deliver(name, one, {"value": 1})
    assert chains.advance() == []
    assert chains.values == {}


def test_a_chain_that_meets_only_itself_goes_on(tmp_path):
    log = []
    assert run_chain(meeting_chain(tmp_path, "a", log)) == "a"
    assert log[-1] == ("a", "ends", 2)


def test_chains_whose_items_are_finished_meet_without_running_any(tmp_path):
    def chains():
        return Chains({name: meeting_chain(tmp_path, name, []) for name in "abc"})

    values = run_shuffled(chains(), random.Random(0))
    again = chains()
    assert again.advance() == []
    assert again.values == values


def test_an_item_can_be_sent_to_another_process(tmp_path):
    one = item(tmp_path, "a")
    assert pickle.loads(pickle.dumps(one)) == one


def functions_of_work_items():
    """Find what every ``WorkItem(...)``, and fine-tuning's ``_item(...)``, in the source calls."""
    for path in sorted(PACKAGE.rglob("*.py")):
        module = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            if getattr(node.func, "id", None) == "WorkItem" and path.stem != "finetune":
                function = next(k.value for k in node.keywords if k.arg == "function")
                yield module, ast.unparse(function)
            if getattr(node.func, "id", None) == "_item":
                yield module, ast.unparse(node.args[2])


FUNCTIONS = sorted(set(functions_of_work_items()))


def test_the_packages_work_items_are_found():
    assert {
        ("tdc_ray.runs.stages.finetune", "finetune_expert"),
        ("tdc_ray.runs.stages.finetune", "short_finetune"),
        ("tdc_ray.pruning.tasks.sensitivities", "measure_sensitivities"),
        ("tdc_ray.pruning.proxies.language_model", "propose_by_llm"),
        ("tdc_ray.runs.evaluation.evaluate", "sample_images"),
    } <= set(FUNCTIONS)


@pytest.mark.parametrize(("module", "name"), FUNCTIONS)
def test_functions_of_work_items_are_module_level(module, name):
    function = getattr(importlib.import_module(module), name)
    assert function.__qualname__ == name
    assert pickle.loads(pickle.dumps(function)) is function
