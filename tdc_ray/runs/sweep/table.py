"""The rows of a sweep: begun and ended by its trials, written whenever one changes."""

import logging
import secrets
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tdc_ray.config.run import RunConfig
from tdc_ray.execution.events import EventSink
from tdc_ray.runs.results import load_results
from tdc_ray.runs.sweep.results import (
    TRIALS_DIR,
    SweepResults,
    TrialFinished,
    TrialRow,
    TrialStatus,
    save_sweep,
    with_rows,
)
from tdc_ray.runs.sweep.space import ALIASES, Params, setting_name, trial_name, value_of
from tdc_ray.runs.sweep.trial import failure_of
from tdc_ray.storage.files import exists
from tdc_ray.storage.object_store import display_path
from tdc_ray.storage.run_dir import RunDir

logger = logging.getLogger(__name__)


class SweepTable:
    """The rows of a sweep, which ``sweep.json`` follows."""

    def __init__(
        self, folder: Path, config: RunConfig, results: SweepResults, events: EventSink
    ) -> None:
        self.folder, self.config, self.results, self.events = folder, config, results, events
        self.session = secrets.token_hex(8)
        """Random name of this call of the sweep."""

        self.rows = {row.name: row for row in results.rows}
        for row in self.rows.values():  # the driver may have died before it wrote that they ended
            self._keep(ended_row(row, folder, row.status, row.error))
        self._write()

    def remaining_seeds(self, params: Params, seeds: Sequence[int]) -> list[int]:
        """Return the seeds with which a setting has not been run."""
        rows = {seed: self.rows.get(trial_name(params, seed)) for seed in seeds}
        ended = ("done", "stopped")
        return [seed for seed, row in rows.items() if row is None or row.status not in ended]

    def start(self, params: Params, seeds: Sequence[int]) -> None:
        """Begin the rows of a trial."""
        for seed in self.remaining_seeds(params, seeds):
            row = started_row(params, seed)
            self.rows[row.name] = row
            log = display_path(self.folder / row.run_dir)
            logger.info("%s begins; its log: %s", row.name, log)
        self._write()

    def end(
        self, params: Params, seeds: Sequence[int], status: TrialStatus, reason: str | None = None
    ) -> None:
        """Complete the rows of a trial.

        Args:
            params: Its setting.
            seeds: The seeds that it runs.
            status: That of a run without results.
            reason: Why it has none. None means what the run wrote about it.
        """
        for seed in seeds:
            row = started_row(params, seed)
            error = reason or failure_of(self.folder / row.run_dir, self.session)
            row = ended_row(row, self.folder, status, error)
            self._keep(row)
            outcome = row.error if row.score is None else f"{row.metric} {row.score:.4g}"
            logger.info("%s %s: %s", row.name, row.status, outcome)
        self._write()

    def _keep(self, row: TrialRow) -> None:
        self.rows[row.name] = row
        if row.status == "done":
            fixed = {name: value_of(self.config, name) for name in ALIASES}
            self.events(TrialFinished({**fixed, **row.params}, row))

    def _write(self) -> None:
        self.results = with_rows(self.results, list(self.rows.values()))
        save_sweep(self.folder, self.results)


def started_row(params: Params, seed: int) -> TrialRow:
    """Return the row of a run that begins."""
    name = trial_name(params, seed)
    return TrialRow(
        name=name,
        setting=setting_name(params),
        params=dict(params),
        seed=seed,
        run_dir=f"{TRIALS_DIR}/{name}",
        status="running",
    )


def ended_row(
    row: TrialRow, folder: Path, status: TrialStatus, error: str | None = None
) -> TrialRow:
    """Return a row completed by the results of its run, or by why there are none.

    Args:
        row: The row.
        folder: The sweep's folder.
        status: That of a run without results.
        error: Why it has none.
    """
    path = RunDir(folder / row.run_dir).results
    if not exists(path):
        return replace(row, status=status, error=error)
    results = load_results(path)
    tdc, reuse, search_macs = results.tdc, results.reuse, results.prune.search_macs
    return replace(
        row,
        status="done",
        error=None,
        metric=results.metric,
        score=tdc.score,
        macs=tdc.macs,
        num_params=tdc.num_params,
        train_macs=tdc.train_macs,
        search_macs=search_macs,
        computed_train_macs=tdc.train_macs if reuse is None else reuse.train_macs_computed,
        reused_train_macs=0.0 if reuse is None else reuse.train_macs_reused,
        computed_search_macs=search_macs if reuse is None else reuse.search_macs_computed,
        reused_search_macs=0.0 if reuse is None else reuse.search_macs_reused,
        items_computed=None if reuse is None else reuse.items_computed,
        items_reused=None if reuse is None else reuse.items_reused,
        base_score=results.base.score,
        base_macs=results.base.macs,
        base_num_params=results.base.num_params,
        base_train_macs=results.base.train_macs,
        seconds=results.seconds.wall,
        commit=results.commit,
    )
