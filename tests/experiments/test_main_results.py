import csv
import json
import sys

import numpy as np
import pytest

from tdc_ray.errors import ConfigError
from tests.experiments.conftest import EXPERIMENTS
from tests.images import random_pixels


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(600)
def test_smoke_writes_the_table_and_what_made_it(storage, monkeypatch):
    import main_results
    from common import parse_flags

    np.savez(storage / "pndm.npz", arr_0=random_pixels(100, 8, 8, 1))
    arguments = ["main_results.py", "--smoke", "--num-actors", "1", "--storage", str(storage)]
    arguments += ["--row", f"PNDM={storage}/pndm.npz,macs=6.06e9,steps=800000"]
    monkeypatch.setattr(sys, "argv", arguments)
    flags = parse_flags(main_results.__doc__, main_results.ReleasedFlags)
    main_results.main(flags)

    folder = storage / "main_results-digits-smoke"
    with (folder / "main_results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["row"] for row in rows] == [*main_results.ROWS, "PNDM"]
    theirs = main_results.PAPER["cifar10"]
    for row in rows:
        assert row["the paper's (cifar10)"] == theirs.get(row["row"], "-")
    assert rows[-1]["FLOPs (MACs)"] == "6060.00 M (stated)"
    record = json.loads((folder / "main_results.json").read_text())
    assert float(rows[-1]["fd_digits_cnn"]) == round(record["released"]["PNDM"]["score"], 3)
    assert set(record["made_by"]) == {"command", "commits", "seeds", "machine", "settings"}
    assert (folder / "main_results.png").stat().st_size > 1000
    models = record["seeds"]["0"]
    spent = models["TDC"]["train_macs"]
    assert models["base, macs of TDC"]["train_macs"] >= spent > models["base"]["train_macs"]
    assert models["TDC"]["search_macs"] > models["TDC, no pruning"]["search_macs"]
    assert models["TDC, no pruning"]["macs"] == models["base"]["macs"] > models["TDC"]["macs"]


@pytest.mark.parametrize("text", ["PNDM", "PNDM=a.npz", "PNDM=a.npz,macs=x,steps=1", "=a,macs=1"])
def test_a_row_of_another_method_says_its_images_macs_and_steps(text, monkeypatch):
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    from released_samples import released_row

    with pytest.raises(ConfigError, match=r"--row must be NAME=IMAGES,macs=MACS,steps=STEPS, got"):
        released_row(text)
