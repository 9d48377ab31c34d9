"""Trackers beside TensorBoard, by their own clients, offline; skipped where they are missing."""

import json
import logging
import struct
import sys
import threading
import zipfile

import pytest
from rich.console import Console

from tdc_ray.cli.main import run_command
from tdc_ray.config.presets import preset
from tdc_ray.config.run import to_json
from tdc_ray.errors import ConfigError
from tdc_ray.execution.events import Reported, listening
from tdc_ray.pruning.memory import MemoryBank
from tdc_ray.reporting.loggers import sink
from tdc_ray.reporting.loggers.clients import CLIENTS
from tdc_ray.reporting.loggers.names import MODULES
from tdc_ray.reporting.loggers.sink import LoggerSink
from tdc_ray.reporting.sinks import default_sinks
from tdc_ray.runs.events import CandidateMeasured, PlanMade, RunFinished, SettingsSaved
from tdc_ray.storage.files import read_json
from tdc_ray.storage.run_dir import RunDir
from tests.reporting.test_sinks import IMAGES, PLAN, entry
from tests.runs.test_results import RESULTS

SETTINGS = SettingsSaved(to_json(preset("digits-smoke")))


@pytest.fixture
def run_dir(tmp_path):
    return RunDir(tmp_path / "a run")


def log_twice(run_dir, name):
    """Log the first half of a run, and all of it in a second call, as a resumed run does."""
    bank = MemoryBank(run_dir.memory)
    for events_of_call in (
        [
            SETTINGS,
            PlanMade(PLAN),
            Reported("base", 1, {"loss": 0.5}),
            Reported("base", 1, {}, IMAGES),
        ],
        [SETTINGS, Reported("base", 2, {"loss": 0.25}), RunFinished(RESULTS)],
    ):
        with listening(default_sinks(run_dir, Console(quiet=True), [name, name])) as events:
            for one in bank.all():  # as every start does
                events(CandidateMeasured(one, 1))
            for event in events_of_call:
                events(event)
            new = entry(len(bank.all()), 0.25)
            bank.add(new)
            events(CandidateMeasured(new, 1 + new.candidate))


def wandb_records(path):
    """Read a file of W&B's: protobuf messages in LevelDB's log format."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, message, records = path.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        message += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            records.append(Record.FromString(message))
            message = b""
    return records


def test_wandb_has_curves_images_settings_and_results(run_dir, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    log_twice(run_dir, "wandb")
    folders = sorted((run_dir.root / "wandb").glob("offline-run-*"))
    run_id = read_json(run_dir.loggers)["wandb"]
    assert [folder.name.rpartition("-")[2] for folder in folders] == [run_id] * 2
    records = [record for one in folders for record in wandb_records(next(one.glob("*.wandb")))]
    rows = [
        {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in row}
        for row in (record.history.item for record in records if record.HasField("history"))
    ]
    losses = [
        (row["base/step"], row["base/train/loss"]) for row in rows if "base/train/loss" in row
    ]
    assert losses == [(1, 0.5), (2, 0.25)]
    memory = [row["memory/step"] for row in rows if "memory/group-00/loss" in row]
    assert memory == [1, 2]  # none twice
    assert sum(any(key.startswith("base/samples") for key in row) for row in rows) == 1
    text = "".join(map(str, records))
    for word in ("num_groups", "results/tdc/score", "a run"):
        assert word in text


@pytest.mark.filterwarnings("default")  # MLflow's own
def test_mlflow_has_curves_images_settings_and_results(run_dir, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    log_twice(run_dir, "mlflow")
    client = mlflow.MlflowClient()
    [experiment] = [one for one in client.search_experiments() if one.name == "tdc-ray"]
    [run] = client.search_runs([experiment.experiment_id])
    assert run.info.run_id == read_json(run_dir.loggers)["mlflow"]
    assert (run.info.status, run.info.run_name) == ("FINISHED", "a run")
    losses = client.get_metric_history(run.info.run_id, "base/train/loss")
    assert [(one.step, one.value) for one in losses] == [(1, 0.5), (2, 0.25)]
    best = client.get_metric_history(run.info.run_id, "memory/group-00/best_loss")
    assert [one.step for one in best] == [1, 2]
    assert run.data.params["plan.num_groups"] == "4"
    assert run.data.metrics["results/tdc/score"] == RESULTS.tdc.score
    assert run.data.tags["results/metric"] == RESULTS.metric
    images = [one.path for one in client.list_artifacts(run.info.run_id, "images")]
    assert any("base~samples" in path for path in images)


def test_comet_has_curves_images_settings_and_results(run_dir, monkeypatch):
    pytest.importorskip("comet_ml")
    monkeypatch.setenv("COMET_START_ONLINE", "false")
    log_twice(run_dir, "comet")
    key = read_json(run_dir.loggers)["comet"]
    archives = sorted((run_dir.root / "comet").glob("*.zip"), key=lambda one: one.stat().st_mtime)
    assert [one.name.startswith(key) for one in archives] == [True] * 2
    messages = []
    for archive in archives:
        with zipfile.ZipFile(archive) as file:
            messages += map(json.loads, file.read("messages.json").splitlines())
    metrics = [m["payload"]["metric"] for m in messages if m["type"] == "metric_msg"]
    values = [
        (m["step"], m["metricValue"]) for m in metrics if m["metricName"] == "base/train/loss"
    ]
    assert values == [(1, 0.5), (2, 0.25)]
    text = json.dumps(messages)
    for word in ("plan.num_groups", "results/tdc/score", "base/samples", "a run"):
        assert word in text


def test_a_client_that_is_missing_is_refused_by_its_extra(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, module in MODULES.items():
        monkeypatch.setitem(sys.modules, module, None)  # as find_spec sees what is missing
        monkeypatch.setattr("tdc_ray.reporting.loggers.names.find_spec", lambda _: None)
        for arguments in (["run"], ["sweep", "--vary", "k=0.5"]):
            assert run_command([*arguments, "--log-to", "tensorboard", name]) == 1
            assert f"pip install 'tdc-ray[{name}]'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


class Broken:
    """A client that starts, and then fails."""

    def __init__(self, name, folder, run_id):
        self.run_id = run_id or "1"

    def settings(self, values):
        raise ConnectionError("https://me:secret@host/ is away\nTraceback")

    scalars = image = text = summary = lambda *_: 1 / 0

    def close(self, status):
        raise SystemError


def test_a_failure_in_the_middle_is_one_warning_without_a_password(run_dir, monkeypatch, caplog):
    monkeypatch.setitem(CLIENTS, "wandb", Broken)
    with listening([LoggerSink(run_dir, "wandb")]) as events:
        events(SETTINGS)
        events(Reported("base", 1, {"loss": 0.5}))
        events(RunFinished(RESULTS))
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage().endswith("are not shown: https://host/ is away")


def test_a_server_that_hangs_delays_no_event_and_not_the_end_for_ever(
    run_dir, monkeypatch, caplog
):
    answered = threading.Event()

    class Hanging(Broken):
        settings = close = lambda *_: answered.wait(60)

    monkeypatch.setattr(sink, "SECONDS_TO_END", 0.1)
    monkeypatch.setitem(CLIENTS, "wandb", Hanging)
    with listening([LoggerSink(run_dir, "wandb")]) as events:
        events(SETTINGS)
    assert not answered.is_set()
    assert "took too long to end" in caplog.text
    answered.set()


def test_a_client_that_cannot_start_is_refused_before_work(run_dir, monkeypatch):
    def start(*_):
        raise RuntimeError("no key")

    monkeypatch.setitem(CLIENTS, "comet", start)
    with pytest.raises(ConfigError, match="--log-to comet cannot start: no key"):
        LoggerSink(run_dir, "comet").__enter__()
    assert not run_dir.loggers.exists()
