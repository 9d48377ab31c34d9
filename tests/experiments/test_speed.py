"""Smoke runs of the benchmarks: what they write, and that they would say what is slow."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tdc_ray.execution.timeline import Timeline
from tdc_ray.storage.files import read_json_lines, write_json
from tdc_ray.storage.run_dir import RunDir

ROOT = Path(__file__).parents[2]


def record_of(name: str, folder: Path, *sections: str) -> dict:
    command = [sys.executable, f"experiments/{name}.py", "--smoke", "--sections", *sections]
    path = folder / f"{name}.json"
    subprocess.run([*command, "--json", str(path)], check=True, cwd=ROOT)
    assert (folder / f"{name}.md").stat().st_size > 100
    return json.loads(path.read_text())


@pytest.mark.slow
def test_speed_holds_us_against_diffusers_and_against_the_aims(tmp_path):
    record = record_of("speed", tmp_path, "training", "update", "counting", "sampling")
    assert {"command", "commit", "machine", "versions"} < set(record["made_by"])
    rows = {(row["section"], row["name"]): row for row in record["rows"]}
    ours = rows["training step", "ours, fp32"]
    theirs = rows["training step", "diffusers' example"]
    assert ours["ratio"] == ours["median"] / theirs["median"] > 0
    assert (ours["precision"], ours["batch"], ours["threads"] > 0) == ("fp32", 8, True)
    assert rows["training step", "ours, bf16"]["precision"] == "bf16"
    same = rows["sampling", "images, ours, base"]  # DDIMPipeline's, from the same noise
    largest = same["median"] * (4 * 8 * 8) ** 0.5  # of so many pixels none is further off
    assert largest < 1e-4 < rows["sampling", same["against"]]["median"]
    assert len(record["verdicts"]) == 11
    assert sum("aim at" in verdict for verdict in record["verdicts"]) == 11


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_gpus_measurements_are_kept_one_by_one(tmp_path):
    path = tmp_path / "gpu.jsonl"
    sections = ["training", "sampling", "experts", "search"]
    sections += [f"{section}, compiled" for section in sections[:3]]
    command = [sys.executable, "experiments/gpu.py", "--smoke", "--out", str(path), "--sections"]
    for seconds in ("0", "900"):  # the first call begins nothing new
        subprocess.run([*command, *sections, "--seconds", seconds], check=False, cwd=ROOT)
    rows = read_json_lines(path)
    assert [row.get("error") for row in rows] == [None] * len(rows)
    assert {row["section"] for row in rows} == set(sections)
    assert len({(row["section"], row["name"]) for row in rows}) == len(rows) == 22
    assert all(row["seconds"] > 0 for row in rows)
    subprocess.run([*command, *sections], check=True, cwd=ROOT)
    assert read_json_lines(path) == rows


@pytest.mark.slow
def test_scaling_fits_exponents_to_every_cost(tmp_path):
    record = record_of("scaling", tmp_path, "planning", "keeping", "scheduling", "training")
    costs = {(cost["what"], cost["over"], cost["unit"]): cost for cost in record["costs"]}
    memory = costs["reading the memory bank", "entries", "MB"]
    assert [x for x, _ in memory["points"]] == [150, 600]
    assert 0.8 < memory["exponent"] < 1.2
    assert ("a training step", "images in a batch", "CPU s") in costs
    assert (tmp_path / "scaling.png").stat().st_size > 1000


@pytest.fixture
def experiments(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))


def test_an_exponent_is_the_power_that_the_cost_grows_with(experiments):
    from benchmark.growth import Axis

    points = tuple((x, (0.9 * x**2, x**2, 7.0 * x**2)) for x in (10, 20, 80))
    square = Axis(what="a", over="b", unit="s", points=points)
    assert square.exponent == pytest.approx(2)
    assert square.last_exponent == pytest.approx(2)
    assert not square.is_linear


def test_a_runs_wall_time_is_told_by_what_its_workers_did(experiments, tmp_path, monkeypatch):
    from benchmark import system

    run_dir = RunDir(tmp_path)
    write_json(run_dir.group(0) / "base-0123abcd.json", {"seconds": 2.0})
    write_json(run_dir.group(0) / "finetune-0123abcd.json", {"seconds": 3.0})
    now = 100.0
    monkeypatch.setattr("time.time", lambda: now)
    timeline = Timeline(run_dir.timeline)
    now = 112.0
    timeline.add("phase", name="experts")
    timeline.add("join", worker="worker-0", node="node")
    items = {"group-00/base": 5.0, "group-00/finetune": 3.0, "evaluate-base/0": 1.0}
    for task, (item, seconds) in enumerate(items.items()):  # the first one's worker starts for 3 s
        about = {"chain": "chain", "stage": task, "item": item, "attempt": 1}
        timeline.add("start", task=task, workers=["worker-0"], **about)
        now += seconds
        timeline.add("end", task=task, outcome="done")
    timeline.flush()
    assert system.seconds_of(run_dir, 4.0) == pytest.approx(
        {"training": 7.0, "measuring": 2.0, "sampling": 1.0, "scoring": 0.0, "before": 8.0}
    )
