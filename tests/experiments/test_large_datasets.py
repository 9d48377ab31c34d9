import json
import subprocess
import sys
from pathlib import Path

import pytest

EXPERIMENT = Path(__file__).parents[2] / "experiments" / "large_datasets.py"


@pytest.mark.slow
def test_smoke_measures_every_kind_of_data_and_says_what_made_the_numbers(tmp_path):
    path = tmp_path / "large_datasets.json"
    command = [sys.executable, str(EXPERIMENT), "--smoke", "--json", str(path)]
    subprocess.run(command, check=True, cwd=EXPERIMENT.parents[1])
    record = json.loads(path.read_text())
    assert set(record["made_by"]) == {"command", "commit", "machine"}
    results = record["results"]
    assert [found["images"] for found in results.values()] == [4, 40, 60, 60]
    kinds = ["FolderImages"] * 2 + ["ArrayImages"] * 2
    assert [found["read as"] for found in results.values()] == kinds
    for found in results.values():
        assert found["images per CPU s"] > 0
        assert 0 <= found["memory above imports, MiB"] < 500
    lines = (tmp_path / "large_datasets.md").read_text().splitlines()
    assert len(lines) == 2 + len(results)
