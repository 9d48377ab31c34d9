"""A disk that fails at any write of a whole job: the command repeated ends as undisturbed."""

import errno
import itertools
import json
import os
from pathlib import Path

import pytest

from tdc_ray.cli.main import run_command
from tests.small import make_run_dir

FEW = ("--prune.num-images", "16", "--prune.num-refit-images", "16", "--prune.num-levels", "1")
FEW += ("--prune.num-rounds", "2", "--prune.num-candidates", "1", "--method", "offline")
ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)


def prune(model: Path, out: Path) -> int:
    return run_command(["prune", str(model), "--out", str(out), "--data", "digits", *FEW])


def results_of(out: Path) -> tuple[dict, bytes, list]:
    report = json.loads((out / "report.json").read_text())
    (memory,) = out.glob("search/*/memory.jsonl")
    entries = [json.loads(line) for line in memory.read_text().splitlines()]
    kept = {name: value for name, value in report.items() if not name.endswith("seconds")}
    return kept, (out / "model.safetensors").read_bytes(), entries


class Disk:
    """Counts what puts a file in its place or a line on the disk, and fails at one of them."""

    def __init__(self, patch: pytest.MonkeyPatch, fails_at: int) -> None:
        self.count, self.fails_at = 0, fails_at
        for owner, name in ((Path, "replace"), (os, "fsync")):
            patch.setattr(owner, name, self.failing(getattr(owner, name)))

    def failing(self, function):
        def call(*arguments):
            self.count += 1
            if self.count == self.fails_at:
                number = ERRORS[self.count % len(ERRORS)]
                raise OSError(number, os.strerror(number))
            return function(*arguments)

        return call


@pytest.mark.slow
def test_a_disk_that_fails_at_any_write_changes_no_result(tmp_path, monkeypatch, capsys):
    model = make_run_dir(tmp_path / "model").base_unet
    assert prune(model, tmp_path / "whole") == 0
    expected = results_of(tmp_path / "whole")
    for fails_at in itertools.count(1):
        out = tmp_path / f"out-{fails_at}"
        capsys.readouterr()
        with monkeypatch.context() as patch:
            disk = Disk(patch, fails_at)
            code = prune(model, out)
        if disk.count < fails_at:
            break
        assert code == 1
        assert "cannot be written" in capsys.readouterr().err
        assert prune(model, out) == 0
        assert results_of(out) == expected
        assert not list(out.rglob(".*.tmp"))
    assert fails_at > 10
