"""Smoke runs of the experiments that are sweeps; they share a base through one store."""

import csv
import importlib
import json
import sys

import pytest

from tdc_ray.config.run import RunConfig
from tdc_ray.config.sweep import SweepConfig
from tdc_ray.runs.sweep.results import load_sweep, open_results, with_rows
from tdc_ray.runs.sweep.space import Range
from tdc_ray.runs.sweep.table import started_row


@pytest.mark.slow
@pytest.mark.usefixtures("importable")
def test_rows_of_other_flags_are_left_out_whatever_the_search(tmp_path):
    from common import asked_for

    params = [{"plan.min_macs_share": k} for k in (0.3, 0.4)]
    space, how = {"plan.min_macs_share": Range(0.3, 0.7)}, SweepConfig(search="tpe", seeds=(0,))
    rows = [started_row(some, seed) for some in params for seed in (0, 1)]
    results = with_rows(open_results(tmp_path, RunConfig(), space, how), rows)
    assert [row.name for row in asked_for(results, None).rows] == ["k=0.3,seed=0", "k=0.4,seed=0"]
    assert [row.name for row in asked_for(results, params[1:]).rows] == ["k=0.4,seed=0"]


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("name", "kind", "folder", "rows"),
    [
        ("ablate_k", "KFlags", "ablate_k-digits-smoke-grid", ["k = 0.3", "k = 0.7"]),
        ("ablate_groups", "GroupsFlags", "ablate_groups-digits-smoke", ["N = 4", "N = 8"]),
        (
            "tdc_pruners",
            "PrunerFlags",
            "tdc_pruners-digits-smoke-offline",
            ["magnitude", "proxy with refit"],
        ),
        ("ablate_schedule", "ScheduleFlags", "ablate_schedule-digits-smoke", ["snr", "constant"]),
    ],
)
def test_the_sweep_runs_and_tells_its_costs(storage, monkeypatch, name, kind, folder, rows):
    monkeypatch.setattr(sys, "argv", [name, "--smoke", "--storage", str(storage)])
    experiment = importlib.import_module(name)
    parse_flags = importlib.import_module("common").parse_flags
    experiment.main(parse_flags(experiment.__doc__, getattr(experiment, kind)))
    with (storage / folder / f"{name}.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [row[""].partition(" (")[0] for row in table] == ["base", *rows]
    assert all(float(row["train macs"]) > 0 for row in table)
    sweep = load_sweep(storage / folder)
    note = (storage / folder / f"{name}.md").read_text()
    assert f"{sweep.computed_share:.0%} were computed" in note
    assert sweep.computed_share < 0.95  # the base is shared
    record = json.loads((storage / folder / f"{name}.json").read_text())
    assert [row["status"] for row in record["rows"]] == ["done", "done"]
    assert record["keys_computed"] > 2
    assert record["keys_computed_twice"] == 0
    assert record["train_macs_computed"] == pytest.approx(record["train_macs_of_keys"])
    assert (storage / folder / f"{name}.png").stat().st_size > 1000
