"""What listens to a run: files and lines follow from events alone."""

import logging

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tdc_ray.config.presets import preset
from tdc_ray.diffusion.plan import plan_groups
from tdc_ray.execution.events import Finished, Reported, Started, listening
from tdc_ray.execution.timeline import History, Span, Stay, usage
from tdc_ray.pruning.memory import MemoryEntry
from tdc_ray.reporting import progress
from tdc_ray.reporting.sinks import default_sinks
from tdc_ray.runs.events import CandidateMeasured, ImagesSampled, PlanMade, WorkersUsed
from tdc_ray.storage.files import read_json
from tdc_ray.storage.run_dir import RunDir

PLAN = plan_groups(*(getattr(preset("digits"), name) for name in ("diffusion", "plan", "sampler")))
IMAGES = np.full((2, 8, 8, 3), 7, np.uint8)


def entry(candidate, loss):
    return MemoryEntry(
        group=0,
        round=0,
        candidate=candidate,
        source="offline",
        widths={"unit": 1},
        macs=1,
        num_params=1,
        loss_cut=loss,
        loss_refit=None,
        overshoot=0,
    )


def history():
    span = Span("experts", "group-00", 0, "group-00/base", ("worker-0",), 1, 10.0, 12.0, "done")
    return History((span,), (Stay("worker-0", "node", 9.0, 13.0),), {})


def emit_all(run_dir):
    samples = run_dir.root / "first.npz"
    np.savez(samples, arr_0=IMAGES)
    with listening(default_sinks(run_dir, Console(quiet=True))) as events:
        for event in (
            PlanMade(PLAN),
            Started("base", 2),
            Reported("base", 1, {"loss": 0.5}),
            Reported("base", 1, {}, IMAGES),
            Finished("base"),
            Reported("group-00/round-0-candidate-0", 1, {"loss_cut": 0.25}, number=3),
            CandidateMeasured(entry(0, 0.25), 1),
            CandidateMeasured(entry(1, 0.75), 2),
            ImagesSampled("tdc", samples),
            WorkersUsed(history(), usage(history())),
        ):
            events(event)


def scalars(run_dir, run, tag):
    shown = EventAccumulator(str(run_dir.tensorboard / run)).Reload()
    return [(event.step, event.value) for event in shown.Scalars(tag)]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    run_dir = RunDir(tmp_path_factory.mktemp("run"))
    emit_all(run_dir)
    return run_dir


def test_reports_and_candidates_are_curves(run_dir):
    assert scalars(run_dir, "base", "train/loss") == [(1, 0.5)]
    assert scalars(run_dir, "group-00", "prune/loss_cut") == [(1, 0.25)]
    assert scalars(run_dir, "memory", "group-00/loss") == [(1, 0.25), (2, 0.75)]
    assert scalars(run_dir, "memory", "group-00/best_loss") == [(1, 0.25), (2, 0.25)]
    assert scalars(run_dir, "workers", "experts/utilisation") == [(0, 1.0)]


def test_plots_are_files_and_shown_beside_images(run_dir):
    for path in (run_dir.plan_plot, run_dir.timeline_plot):
        with Image.open(path) as picture:
            assert picture.size[0] > 500
    for run, tag in (
        ("plan", "plan"),
        ("workers", "timeline"),
        ("samples", "tdc"),
        ("base", "samples"),
    ):
        shown = EventAccumulator(str(run_dir.tensorboard / run)).Reload()
        assert tag in shown.Tags()["images"], run


def test_the_first_images_of_a_model_are_a_picture(run_dir):
    with Image.open(run_dir.root / "samples-tdc.png") as picture:
        assert picture.mode == "RGB"
        assert max(picture.size) >= 512
        assert picture.getpixel((2, 2)) == (7, 7, 7)


def test_without_a_terminal_work_writes_lines(caplog, monkeypatch):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.5)
    bars, clock = progress.ProgressBars(Console(quiet=True)), [0.0]
    bars._bars.get_time = lambda: clock[0]
    with caplog.at_level(logging.INFO), listening([bars]) as events:
        events(Started("a/b", 4))
        for clock[0], step, loss in ((1.0, 1, 0.5), (1.1, 1, 0.4), (3.0, 2, 0.25)):
            events(Reported("a/b", step, {"loss": loss}))
        events(Reported("other", 2, {"loss": 0.25}))
        events(Finished("a/b"))
    assert caplog.messages == [
        "a/b step 1/4 loss 0.5000",
        "a/b step 2/4 loss 0.2500, 4 s left",
        "a/b ended after 3 s",
    ]


def test_a_trace_is_written(run_dir):
    events = read_json(run_dir.trace)["traceEvents"]
    assert [event["name"] for event in events if event["ph"] == "X"] == ["group-00/base"]


def test_a_plan_that_was_drawn_stays(run_dir):
    before = run_dir.plan_plot.stat().st_mtime_ns
    emit_all(run_dir)
    assert run_dir.plan_plot.stat().st_mtime_ns == before
