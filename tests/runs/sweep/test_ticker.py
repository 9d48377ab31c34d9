import io
import logging
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
from rich.console import Console

from tdc_ray.config.presets import preset
from tdc_ray.config.sweep import SweepConfig
from tdc_ray.errors import ConfigError
from tdc_ray.execution.events import listening
from tdc_ray.reporting.progress import SweepLine
from tdc_ray.runs.sweep import sweep as sweeping
from tdc_ray.runs.sweep import ticker
from tdc_ray.runs.sweep.results import SweepProgress
from tdc_ray.runs.sweep.space import Choices
from tdc_ray.runs.sweep.table import started_row
from tdc_ray.runs.sweep.ticker import Ticker


def rows():
    done = [
        replace(started_row({"plan.min_macs_share": k}, 0), status="done", metric="fid", score=s)
        for k, s in ((0.3, 5.5), (0.4, 4.25))
    ]
    failed = replace(started_row({"plan.min_macs_share": 0.5}, 0), status="failed", error="x")
    return (*done, failed, started_row({"plan.min_macs_share": 0.6}, 0))


def test_something_is_said_every_few_seconds_from_before_there_are_rows(monkeypatch):
    monkeypatch.setattr(ticker, "SECONDS_BETWEEN_EVENTS", 0.05)
    seen = []
    with Ticker(seen.append, 6) as ticking:
        time.sleep(0.2)
        before = len(seen)
        ticking.table = SimpleNamespace(results=SimpleNamespace(rows=rows()))
        time.sleep(0.2)
    count = len(seen)
    assert before >= 1
    assert seen[0].rows == ()
    assert len(seen[-1].rows) == 4
    assert 0 < seen[0].seconds < seen[-1].seconds
    time.sleep(0.2)
    assert len(seen) == count  # and nothing afterwards


def test_a_console_hears_it_within_ten_seconds():
    assert ticker.SECONDS_BETWEEN_EVENTS < 10


def test_without_a_terminal_it_is_a_line_of_the_log(caplog):
    with caplog.at_level(logging.INFO), listening([SweepLine(Console(quiet=True))]) as events:
        events(SweepProgress((), 6, 8.0))
        events(SweepProgress(rows(), 6, 75.0))
    assert caplog.messages == [
        "0 of 6 runs done, 0 running, 8.0 s so far",
        "2 of 6 runs done, 1 running, 1 failed, best fid 4.25 of k=0.4,seed=0, 1 min 15 s so far",
    ]


@pytest.mark.parametrize("text", ["2 of 6 runs done", "k=0.4,seed=0"])
def test_in_a_terminal_it_is_a_line_that_stays(text, caplog):
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=120)
    with caplog.at_level(logging.INFO), listening([SweepLine(console)]) as events:
        events(SweepProgress(rows(), 6, 75.0))
        time.sleep(0.3)  # some frames
    assert text in file.getvalue()
    assert not caplog.messages


def test_something_is_said_while_settings_are_checked(tmp_path, monkeypatch):
    def check(*_: object) -> None:
        time.sleep(0.2)
        raise ConfigError("such")

    monkeypatch.setattr(ticker, "SECONDS_BETWEEN_EVENTS", 0.05)
    monkeypatch.setattr(sweeping, "_check_trials", check)
    seen: list[object] = []
    space = {"plan.num_groups": Choices((2, 4))}
    with pytest.raises(ConfigError, match="such"):
        sweeping.sweep(preset("digits-smoke"), space, SweepConfig(), tmp_path, sinks=[seen.append])
    assert isinstance(seen[0], SweepProgress)
    assert seen[0].num_runs == 2
