"""A whole run with a language model as the proxy, in real processes, against a real server."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tdc_ray.cli.run import run
from tdc_ray.errors import ProxyError
from tdc_ray.runs.results import load_results
from tdc_ray.storage.run_dir import RunDir
from tests.pruning.llm.openai_server import Handler, calling, echoes_key, fails, says, serving

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

KEY = "sk-proj-Vw52-secretSECRET-18dn"
COMMAND = [sys.executable, "-m", "tdc_ray", "run", "--preset", "digits-smoke"]
COMMAND += ["--plan.num-groups", "3", "--finetune.num-steps", "2"]
COMMAND += ["--evaluate.num-images", "20", "--evaluate.batch-size", "20", "--verbose"]
COMMAND += ["--compute.num-actors", "1", "--prune.method", "llm"]
COMMAND += ["--proxy.max-replies", "2", "--proxy.max-seconds", "20"]


@pytest.fixture
def ray_dir() -> Iterator[Path]:
    """Where Ray logs; a short path, as its sockets' names may not be long."""
    folder = Path(tempfile.mkdtemp(prefix="tdc", dir="/tmp"))
    yield folder
    shutil.rmtree(folder)


def doubt_unit_by_unit(handler: Handler) -> None:
    """Predicts and measures in turn, each time with a doubt of another unit."""
    asked = len(handler.server.requests)
    doubt = {"where": str(asked % 12), "factor": 0.4 + asked % 3}
    change = {"hypothesis": "h", "distrust": [doubt]}
    calling(("measure" if asked % 2 else "predict", change))(handler)


@pytest.mark.slow
def test_a_run_asks_counts_and_keeps_the_key_to_itself(finished_run, cache_dir, ray_dir, tmp_path):
    script = [fails(429, Retry_After="0"), says("I would cut a lot."), echoes_key(401)]
    with serving(*script, doubt_unit_by_unit) as server:
        environment = os.environ | {"OPENAI_API_KEY": KEY, "OPENAI_BASE_URL": server.url}
        environment |= {"RAY_TMPDIR": str(ray_dir), "OMP_NUM_THREADS": "1"}
        flags = ["--run-dir", str(tmp_path / "run"), "--evaluate.cache-dir", str(cache_dir)]
        flags += ["--model.base", str(RunDir(finished_run).base_unet)]
        done = subprocess.run(
            [*COMMAND, *flags], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        asked = len(server.requests)
    shown = EventAccumulator(
        str(tmp_path / "run" / "tensorboard" / "proxy"), {"tensors": 0}
    ).Reload()
    told = [
        one.tensor_proto.string_val[0]
        for tag in shown.Tags()["tensors"]
        for one in shown.Tensors(tag)
    ]
    assert any(b"I would cut a lot." in text for text in told)
    assert any(b"its answer was taken" in text for text in told)
    results = load_results(tmp_path / "run" / "results.json")
    memory = (tmp_path / "run" / "memory.jsonl").read_text().splitlines()
    assert {json.loads(line)["source"] for line in memory} == {"llm", "offline"}
    assert results.prune.schemes["llm"] > 0
    assert "the language model" in results.prune.notes[0]
    assert all(group.macs <= group.macs_limit for group in results.groups)
    assert any("the language model was given up" in note for note in results.prune.notes)
    assert 0 < results.prune.prompt_tokens <= 1000 * asked
    transcripts = list((tmp_path / "run" / "proxy").iterdir())
    assert transcripts
    seen = [path for root in (tmp_path, ray_dir) for path in root.rglob("*") if path.is_file()]
    assert any("driver" in path.name or "worker" in path.name for path in seen)  # Ray's logs
    for text in (
        done.stdout,
        done.stderr,
        *(p.read_bytes().decode(errors="replace") for p in seen),
    ):
        assert KEY not in text
        assert KEY[8:] not in text


@pytest.mark.slow
def test_without_a_key_the_base_is_not_trained(ray_cluster, cache_dir, smoke_config, tmp_path):
    config = replace(smoke_config, prune=replace(smoke_config.prune, method="llm"))
    config = replace(config, proxy=replace(config.proxy, replay=str(tmp_path / "nowhere")))
    with pytest.raises(ProxyError, match=r"proxy\.replay must be a run directory .*nowhere"):
        run(config, tmp_path / "run", Console(quiet=True))
    assert not (tmp_path / "run" / "base").exists()
