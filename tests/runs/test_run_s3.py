"""A whole run in an object store, and what the commands make of it on another machine."""

import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tdc_ray.cli.main import run_command
from tdc_ray.pruning.memory import MemoryBank
from tdc_ray.runs.results import comparable, load_results
from tdc_ray.storage.files import exists, fetch, listing
from tdc_ray.storage.lease import lease_holder
from tdc_ray.storage.object_store import resolve_path

pytestmark = [pytest.mark.ray, pytest.mark.timeout(3600)]


@pytest.mark.slow
def test_a_run_in_a_store_ends_as_one_on_a_disk(
    finished_run, cache_dir, bucket, tmp_path, monkeypatch, capsys
):
    def tdc_ray(*arguments: str) -> str:
        assert run_command(arguments) == 0
        return " ".join(capsys.readouterr().out.split())

    uri = f"{bucket}/runs/smoke"
    command = ["run", "--preset", "digits-smoke", "--evaluate.cache-dir", str(cache_dir)]
    command += ["--run-dir", uri, "--compute.num-actors", "1"]
    done = subprocess.run(  # a Ray of its own, whose workers have this environment
        [sys.executable, "-m", "tdc_ray", *command],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    printed = " ".join(done.stdout.split())
    assert f"run directory {uri};" in printed
    assert f"more by tdc-ray sample {uri}" in printed
    assert "tdc_ray-mirror" not in printed

    monkeypatch.setenv("TDC_RAY_MIRROR", str(tmp_path / "another node"))
    run_dir = resolve_path(uri)
    results = load_results(run_dir / "results.json")
    assert comparable(results) == comparable(load_results(finished_run / "results.json"))
    assert MemoryBank(run_dir / "memory.jsonl").all() == (
        MemoryBank(finished_run / "memory.jsonl").all()
    )
    for pattern in (
        "*",
        "experts/*",
        "base/*",
        "groups/*/*",
        "evaluation/base/*",
        "evaluation/tdc/*",
    ):
        expected = {path.relative_to(finished_run) for path in finished_run.glob(pattern)}
        found = {path.relative_to(run_dir) for path in listing(run_dir, pattern)}
        # A run from Python, as the fixture's, keeps no log; only paths have a lock.
        hidden = {path for path in expected | found if path.name.startswith(".")}
        assert found - hidden - {Path("run.log")} == expected - hidden
    assert lease_holder(run_dir) is None
    assert list(tmp_path.rglob("*.tmp")) == []

    events = EventAccumulator(str(fetch(run_dir / "tensorboard") / "base"))
    events.Reload()
    assert events.Scalars("train/loss")
    (log,) = listing(run_dir / "run.log", "*.log")
    assert "stage 1: training the base" in fetch(log).read_text()

    assert "is finished; nothing is done again" in tdc_ray(*command)
    assert "round" in tdc_ray("memory", uri)
    assert "done:" in tdc_ray("status", uri)
    tdc_ray("sample", uri, "--num-images", "4", "--num-inference-steps", "2")
    assert exists(run_dir / "samples" / "samples.npz")
    tdc_ray("export", uri, str(tmp_path / "exported"))
    assert (tmp_path / "exported" / "README.md").exists()
    pruned = f"{bucket}/pruned"
    tdc_ray("prune", uri, "--macs", "0.7", "--method", "magnitude", "--out", pruned)
    assert exists(resolve_path(f"{pruned}/report.json"))
    assert exists(resolve_path(f"{pruned}/model.safetensors"))
