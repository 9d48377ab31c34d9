import pickle
from dataclasses import replace

import optuna
import pytest
from optuna.trial import TrialState

from tdc_ray.config.run import RunConfig
from tdc_ray.config.sweep import SweepConfig
from tdc_ray.errors import ConfigError, StorageError
from tdc_ray.runs.sweep.results import open_results, save_sweep, with_rows
from tdc_ray.runs.sweep.space import Range
from tdc_ray.runs.sweep.study import (
    STUDY_FILE,
    STUDY_VARIABLE,
    distribution,
    open_storage,
    reconcile,
)
from tdc_ray.runs.sweep.table import started_row

HOW = SweepConfig(search="tpe")
SPACE = {"plan.min_macs_share": Range(0.3, 0.7)}
DISTRIBUTIONS = {name: distribution(domain) for name, domain in SPACE.items()}


def sweep_of(folder, *, done=(), running=()):
    """A sweep's results, with a score for every k that is done."""
    rows = [
        replace(
            started_row({"plan.min_macs_share": k}, 0),
            status=status,
            **dict.fromkeys(("score", "macs", "num_params", "train_macs", "search_macs"), k),
            seconds=1.0,
        )
        for status, some in (("done", done), ("running", running))
        for k in some
    ]
    return with_rows(open_results(folder, RunConfig(), SPACE, HOW), rows)


def study_in(folder):
    return optuna.create_study(
        storage=open_storage(folder, None),
        study_name="s",
        directions=["minimize"],
        load_if_exists=True,
    )


def test_a_study_goes_on_without_what_a_killed_driver_left_under_way(tmp_path):
    study = study_in(tmp_path)
    study.tell(study.ask(DISTRIBUTIONS), [2.0])
    study.ask(DISTRIBUTIONS)
    study.enqueue_trial({"plan.min_macs_share": 0.4})
    again = study_in(tmp_path)
    done = again.trials[0].params["plan.min_macs_share"]
    assert reconcile(again, sweep_of(tmp_path, done=[done]), DISTRIBUTIONS) == [
        {"plan.min_macs_share": 0.4}
    ]
    states = [trial.state for trial in again.trials]
    assert states == [TrialState.COMPLETE, TrialState.FAIL, TrialState.WAITING]


def test_a_study_whose_file_is_gone_is_told_what_is_done(tmp_path):
    (tmp_path / STUDY_FILE).unlink(missing_ok=True)
    study = study_in(tmp_path)
    reconcile(study, sweep_of(tmp_path, done=[0.4, 0.6], running=[0.5]), DISTRIBUTIONS)
    assert {trial.params["plan.min_macs_share"]: trial.values for trial in study.trials} == {
        0.4: [0.4],
        0.6: [0.6],
    }


@pytest.mark.parametrize("line", [0, 3, -1], ids=["first", "middle", "last"])
def test_a_study_whose_file_has_a_torn_line_goes_on(tmp_path, line, caplog):
    study = study_in(tmp_path)
    for value in (1.0, 2.0):
        study.tell(study.ask(DISTRIBUTIONS), [value])
    lines = (tmp_path / STUDY_FILE).read_bytes().splitlines(keepends=True)
    lines[line] = lines[line][: len(lines[line]) // 2]  # as a kill and a later start leave it
    (tmp_path / STUDY_FILE).write_bytes(b"".join(lines))
    again = study_in(tmp_path)
    assert "holds a torn line" in caplog.text
    done = [trial.params["plan.min_macs_share"] for trial in study.trials]
    reconcile(again, sweep_of(tmp_path, done=done), DISTRIBUTIONS)
    again.tell(again.ask(DISTRIBUTIONS), [3.0])
    complete = [t for t in study_in(tmp_path).trials if t.state is TrialState.COMPLETE]
    assert len(complete) == 3


@pytest.mark.parametrize(
    "url", ["postgresql://me:hidden@nowhere.invalid/db", "hidden", "nosuch://me:hidden@host/db"]
)
def test_a_database_that_cannot_be_opened_is_refused_without_its_password(
    tmp_path, monkeypatch, url
):
    monkeypatch.setenv(STUDY_VARIABLE, url)
    with pytest.raises(ConfigError, match=r"sweep\.study") as error:
        open_storage(tmp_path, None)
    assert "hidden" not in str(error.value)


def test_what_tune_writes_of_a_database_has_no_url(tmp_path):
    url = f"sqlite:///{tmp_path}/study.db"
    storage = open_storage(tmp_path, url)
    assert (tmp_path / "study.db").exists()
    assert url.encode() not in pickle.dumps(storage)


def test_a_folder_with_other_settings_or_fields_is_refused(tmp_path):
    save_sweep(tmp_path, sweep_of(tmp_path, done=[0.4]))
    other = RunConfig(seed=0, preset="mnist")
    with pytest.raises(StorageError, match="preset digits -> mnist"):
        open_results(tmp_path, other, SPACE, HOW)
    with pytest.raises(StorageError, match=r"varies plan\.min_macs_share"):
        open_results(tmp_path, RunConfig(), {"plan.num_groups": Range(2, 4, whole=True)}, HOW)


def test_what_fails_as_a_study_is_told_is_no_damage_of_it(tmp_path, monkeypatch):
    study = study_in(tmp_path)
    study.ask(DISTRIBUTIONS)

    def tell(*_, **__):
        raise ValueError("no space")

    monkeypatch.setattr(study, "tell", tell)
    with pytest.raises(ValueError, match="no space"):
        reconcile(study, sweep_of(tmp_path), DISTRIBUTIONS)


@pytest.mark.parametrize(
    "line",
    [
        '{"op_code": 4}',
        '{"op_code": 9, "worker_id": "w", "trial_id": 0, "system_attr": {"fixed_params": "x"}}',
    ],
)
def test_a_journal_whose_lines_mean_nothing_is_one_error_with_the_way_out(line, tmp_path):
    study_in(tmp_path).enqueue_trial({"plan.min_macs_share": 0.4})
    with (tmp_path / STUDY_FILE).open("a") as file:
        file.write(line + "\n")
    with pytest.raises(
        StorageError, match=r"something else than Optuna's trials .*Remove study\.log"
    ):
        reconcile(study_in(tmp_path), sweep_of(tmp_path), DISTRIBUTIONS)
