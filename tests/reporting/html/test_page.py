import base64
import csv
import io
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from tdc_ray.cli.main import run_command
from tdc_ray.config.presets import preset
from tdc_ray.config.sweep import SweepConfig
from tdc_ray.errors import StorageError
from tdc_ray.reporting.html.page import PAPER_URL
from tdc_ray.reporting.html.write import write_report
from tdc_ray.runs.results import TimesResult, load_results, save_results
from tdc_ray.runs.sweep.results import open_results, save_sweep, with_rows
from tdc_ray.runs.sweep.space import Choices
from tdc_ray.runs.sweep.table import started_row
from tests.runs.test_results import RESULTS

VOID = {"meta", "link", "img", "br"}


class Page(HTMLParser):
    """Reads a page and refuses tags that are left open or closed in the wrong order."""

    def __init__(self, path):
        super().__init__()
        self.open, self.ids, self.loaded, self.linked, self.tags = [], [], [], [], set()
        self.text = ""
        self.feed(path.read_text())
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        values = dict(attrs)
        if tag not in VOID:
            self.open.append(tag)
        if "id" in values:
            self.ids.append(values["id"])
        if tag == "a":
            self.linked.append(values["href"])
        else:
            self.loaded += [values[k] for k in ("src", "href", "xlink:href") if k in values]

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text += data


def rows_of(folder, name):
    with (folder / "tables" / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def finished(folder, **changes):
    """A run directory without a plan or images, that has the results of a test."""
    save_results(folder / "results.json", replace(RESULTS, **changes))
    return folder


@pytest.mark.ray
def test_a_finished_runs_page_is_whole_and_its_tables_hold_its_results(finished_run, tmp_path):
    assert run_command(["report", str(finished_run), "--out", str(tmp_path)]) == 0
    page, results = Page(tmp_path / "index.html"), load_results(finished_run / "results.json")
    sections = ["At a glance", "Scores and samples", "Plan", "Groups", "Rounds", "Cost and time"]
    for section in [*sections, "Who ran what, when", "the paper's FID", "Widths that are left"]:
        assert section in page.text
    assert len(page.ids) == len(set(page.ids))
    assert "script" not in page.tags
    assert all(place.startswith(("data:", "#")) for place in page.loaded)
    assert {link for link in page.linked if not link.startswith("#")} == {PAPER_URL}
    assert all(link[1:] in page.ids for link in page.linked if link.startswith("#"))
    assert sum(place.startswith("data:image/png") for place in page.loaded) == 3  # one real
    (base, _, tdc) = rows_of(tmp_path, "models")
    assert float(base[results.metric]) == results.base.score
    assert float(tdc["kd_digits_cnn"]) == results.tdc.metrics["kd_digits_cnn"]
    assert float(tdc["FLOPs (MACs)"]) == results.tdc.macs
    assert (tdc["the paper's FID"], tdc["the paper's data"]) == ("3.76", "CIFAR-10")
    groups = rows_of(tmp_path, "groups")
    assert [float(row["fine-tuned"]) for row in groups] == [
        group.loss_finetuned for group in results.groups
    ]
    text = (tmp_path / "report.md").read_text()
    assert f"| {results.base.score:.3f} | 4.08 |" in text
    for group in results.groups:
        assert f"| {group.loss_base:#.4g} | {group.loss_cut:#.4g} |" in text


@pytest.mark.ray
def test_a_run_that_is_not_finished_is_shown_as_far_as_it_is(finished_run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished_run, folder)
    (folder / "results.json").unlink()
    shutil.rmtree(folder / "evaluation" / "tdc")
    text = Page(write_report([folder])).text
    assert "This run is not finished" in text
    assert "4 of 4 experts are fine-tuned" in text
    assert "Losses over the rounds" in text
    assert (folder / "report" / "tables" / "rounds.csv").exists()
    assert not (folder / "report" / "tables" / "models.csv").exists()


def test_macs_stand_against_the_time_that_was_measured(tmp_path):
    groups = tuple(replace(g, milliseconds_limit=7.5, milliseconds=7.25) for g in RESULTS.groups)
    times = TimesResult(device="<cpu>", batch_size=16, base_ms=10.0, experts_ms=(9.0, 8.0))
    limited = replace(RESULTS.prune, objective="latency")
    run = finished(tmp_path / "run", groups=groups, times=times, prune=limited)
    text = Page(write_report([run], tmp_path / "out")).text
    assert "Time against macs" in text
    assert "(<cpu>)" in text
    base, *experts = rows_of(tmp_path / "out", "times")
    assert [float(row["time / the base's"]) for row in (base, *experts)] == [1.0, 0.9, 0.8]
    share = RESULTS.groups[0].macs / RESULTS.base.macs
    assert [float(row["macs / F"]) for row in experts] == [share, share]
    assert {(row["ms by the table"], row["limit in ms"]) for row in experts} == {("7.25", "7.5")}
    assert rows_of(tmp_path / "out", "groups")[0]["limit in ms"] == "7.5"
    assert "Time against macs" not in Page(write_report([finished(tmp_path / "old")])).text


def test_training_images_stand_beside_the_samples(tmp_path):
    run = finished(tmp_path / "run")
    for name in ("base/0000000", "tdc/0000000"):
        path = run / "evaluation" / f"{name}.npz"
        path.parent.mkdir(parents=True)
        np.savez(path, arr_0=np.full((9, 8, 8, 1), 50, np.uint8))
    assert "drawn at random" not in Page(write_report([run], tmp_path / "old")).text
    np.savez(run / "evaluation" / "real.npz", arr_0=np.full((64, 8, 8, 1), 200, np.uint8))
    page = Page(write_report([run], tmp_path / "out"))
    assert "Training images are drawn at random" in page.text
    grids = [one for one in page.loaded if one.startswith("data:image/png")]
    brightest = [
        int(np.asarray(Image.open(io.BytesIO(base64.b64decode(one.split(",")[1]))))[..., 0].max())
        for one in grids
    ]
    assert brightest == [50, 50, 200]


def test_names_from_files_stay_text(tmp_path):
    evil = "<script>alert(1)</script> $\\frac$ | =1"
    groups = tuple(replace(group, source=evil) for group in RESULTS.groups)
    run = finished(tmp_path / "run", preset=evil, metric=evil, groups=groups)
    page = Page(write_report([run, finished(tmp_path / "other")], tmp_path / "out"))
    assert "script" not in page.tags
    assert evil in page.text
    text = (tmp_path / "out" / "report.md").read_text()
    assert "<script>" not in text
    tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert sum("alert" in table for table in tables) >= 3
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1


def test_losses_stand_beside_no_fid_of_the_paper(tmp_path):
    losses = [finished(tmp_path / name, metric="held_out_loss") for name in "ab"]
    write_report(losses, tmp_path / "losses")
    assert "the paper's FID" not in (tmp_path / "losses/report.md").read_text()
    write_report([losses[0], finished(tmp_path / "scored")], tmp_path / "both")
    name = "the paper's FID of TDC (CIFAR-10)"
    assert [bool(row[name]) for row in rows_of(tmp_path / "both", "runs")] == [False, True]


def test_a_sweep_has_a_row_for_each_trial_and_its_pareto_front(tmp_path):
    finished(tmp_path / "sweep" / "a", preset="digits")
    rows = []
    for name, schedule, seed, score in (
        ("a", "constant", 0, 2.0),
        ("b", "snr", 0, 3.0),
        ("c", "uni-increasing", 1, None),
    ):
        row = replace(started_row({"plan.schedule": schedule}, seed), name=name, run_dir=name)
        figures = {"score": score, "macs": 5e6, "metric": "fid", "train_macs": 1e12}
        figures |= {"num_params": 2e6, "search_macs": 1e9, "seconds": 3.0}
        failed = {"status": "failed", "error": "no disk"}
        rows.append(replace(row, **figures, **({"status": "done"} if score else failed)))
    config, space = preset("digits"), {"plan.schedule": Choices(("snr", "constant"))}
    sweep = with_rows(open_results(tmp_path / "sweep", config, space, SweepConfig()), rows)
    save_sweep(tmp_path / "sweep", sweep)
    page = Page(write_report([tmp_path / "sweep"]))
    found = rows_of(tmp_path / "sweep" / "report", "trials")
    assert [row["trial"] for row in found] == ["a", "b", "c"]
    assert [row["fid"] for row in found] == ["2.0", "3.0", ""]
    assert [row["Pareto front"] for row in found] == ["yes", "", ""]
    assert [row["the paper's FID (CIFAR-10)"] for row in found] == ["3.91", "3.76", "3.88"]
    assert found[2]["error"] == "no disk"
    assert "#run-0" in page.linked
    losses = [replace(row, metric="held_out_loss") for row in rows]
    save_sweep(tmp_path / "sweep", with_rows(sweep, losses))
    write_report([tmp_path / "sweep"])
    assert "paper" not in str(rows_of(tmp_path / "sweep" / "report", "trials"))
    rows[0] = replace(rows[0], run_dir="../elsewhere")
    save_sweep(tmp_path / "sweep", with_rows(sweep, rows))
    with pytest.raises(StorageError, match=r"trial a must lie below the sweep's folder"):
        write_report([tmp_path / "sweep"])


def test_what_is_damaged_is_one_clear_error(tmp_path, capsys):
    run = finished(tmp_path / "run")
    (run / "evaluation" / "base").mkdir(parents=True)
    np.savez(run / "evaluation" / "base" / "0000000.npz", arr_0=np.zeros((2, 4, 4, 7), np.uint8))
    with pytest.raises(StorageError, match=r"must hold uint8 images of shape"):
        write_report([run])
    finished(run, base=replace(RESULTS.base, macs=0.0))
    with pytest.raises(StorageError, match=r"base\.macs must be above 0, got 0"):
        write_report([run])
    assert run_command(["report", str(tmp_path)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "is neither a run directory nor a sweep: it has no config.json" in line
    assert not (run / "report").exists()
