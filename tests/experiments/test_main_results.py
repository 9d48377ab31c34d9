import csv
import json
import sys

import pytest


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(600)
def test_smoke_writes_the_table_and_what_made_it(storage, monkeypatch):
    import main_results
    from common import parse_flags

    arguments = ["main_results.py", "--smoke", "--num-actors", "1", "--storage", str(storage)]
    monkeypatch.setattr(sys, "argv", arguments)
    main_results.main(parse_flags(main_results.__doc__))

    folder = storage / "main_results-digits-smoke"
    with (folder / "main_results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["row"] for row in rows] == list(main_results.ROWS)
    paper = {row["row"]: row["the paper's (cifar10)"] for row in rows}
    assert paper == {"base, macs of TDC": "-"} | main_results.PAPER["cifar10"]
    record = json.loads((folder / "main_results.json").read_text())
    assert set(record["made_by"]) == {"command", "commits", "seeds", "machine", "settings"}
    assert (folder / "main_results.png").stat().st_size > 1000
    models = record["seeds"]["0"]
    spent = models["TDC"]["train_macs"]
    assert models["base, macs of TDC"]["train_macs"] >= spent > models["base"]["train_macs"]
    assert models["TDC"]["search_macs"] > models["TDC, no pruning"]["search_macs"]
    assert models["TDC, no pruning"]["macs"] == models["base"]["macs"] > models["TDC"]["macs"]
