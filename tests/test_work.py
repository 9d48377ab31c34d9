import ast
import importlib
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

import tdc_ray
from tdc_ray.storage import append_json_line, read_json, read_json_lines, write_json
from tdc_ray.work import WorkItem, finished, run_chain, run_item

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
    return WorkItem(name, function, job, folder / f"{name}.json", cost=1.0)


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
    assert finished(item(tmp_path, "c3")) == {"name": "c3", "call": 3}


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


def test_an_item_can_be_sent_to_another_process(tmp_path):
    one = item(tmp_path, "a")
    assert pickle.loads(pickle.dumps(one)) == one


def functions_of_work_items():
    """Find ``function=...`` of every ``WorkItem(...)`` in the package's source."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "WorkItem":
                module = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
                function = next(k.value for k in node.keywords if k.arg == "function")
                yield module, ast.unparse(function)


FUNCTIONS = sorted(set(functions_of_work_items()))


def test_the_packages_work_items_are_found():
    assert ("tdc_ray.finetune", "finetune_expert") in FUNCTIONS
    assert len(FUNCTIONS) >= 5


@pytest.mark.parametrize(("module", "name"), FUNCTIONS)
def test_functions_of_work_items_are_module_level(module, name):
    function = getattr(importlib.import_module(module), name)
    assert function.__qualname__ == name
    assert pickle.loads(pickle.dumps(function)) is function
