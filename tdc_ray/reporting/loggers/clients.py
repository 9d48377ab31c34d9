"""What is written to a tracker, by its own client; keys are read by the clients alone.

Each is made with the id of the run that it continues, or None. Where its server is, and whether
it works offline, is said by the client's own environment and configuration.
"""

import os
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tdc_ray.reporting.loggers.names import LoggerName

PROJECT = "tdc-ray"
"""Of a run whose client's environment names no other."""

Status = Literal["finished", "stopped"]


class Client(Protocol):
    """A run of a tracker."""

    run_id: str
    """What a later call continues it by."""

    def settings(self, values: Mapping[str, Any]) -> None:
        """Write a run's settings, by dotted names."""

    def scalars(self, series: str, values: Mapping[str, float], step: int) -> None:
        """Write values by tag."""

    def image(self, series: str, tag: str, image: NDArray[np.uint8], step: int) -> None:
        """Write an image, ``(H, W, C)``."""

    def text(self, series: str, tag: str, text: str, step: int) -> None:
        """Write a text."""

    def summary(self, values: Mapping[str, float | str]) -> None:
        """Write the final results."""

    def close(self, status: Status) -> None:
        """Send what is left, and end."""


class _Wandb:
    """A run of Weights & Biases."""

    def __init__(self, name: str, folder: Path, run_id: str | None) -> None:
        import wandb

        self._wandb, self.run_id = wandb, run_id or uuid.uuid4().hex[:16]
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=name,
            id=self.run_id,
            resume="allow",
            dir=folder,
            # Not what is printed or the machine's load, of which the run directory has its own.
            settings=wandb.Settings(
                console="off", quiet=True, x_disable_stats=True, save_code=False
            ),
        )
        self._series: set[str] = set()

    def settings(self, values: Mapping[str, Any]) -> None:
        nested: dict[str, Any] = {}
        for name, value in values.items():
            stage, _, field = name.rpartition(".")
            (nested.setdefault(stage, {}) if stage else nested)[field] = value
        self._run.config.update(nested, allow_val_change=True)

    def scalars(self, series: str, values: Mapping[str, float], step: int) -> None:
        self._log(series, values, step)

    def image(self, series: str, tag: str, image: NDArray[np.uint8], step: int) -> None:
        self._log(series, {tag: self._wandb.Image(picture(image))}, step)

    def text(self, series: str, tag: str, text: str, step: int) -> None:
        table = self._wandb.Table(columns=["step", "text"], data=[[step, text]])
        self._log(series, {tag: table}, step)

    def summary(self, values: Mapping[str, float | str]) -> None:
        self._run.summary.update(dict(values))

    def close(self, status: Status) -> None:
        self._run.finish(exit_code=0 if status == "finished" else 1)

    def _log(self, series: str, values: Mapping[str, Any], step: int) -> None:
        """Write values with a count of steps of the series' own: W&B's would have to rise."""
        if series not in self._series:
            self._series.add(series)
            self._run.define_metric(f"{series}/*", step_metric=f"{series}/step")
        tags = {f"{series}/{tag}": value for tag, value in values.items()}
        self._run.log({**tags, f"{series}/step": step})


class _Mlflow:
    """A run of MLflow."""

    def __init__(self, name: str, folder: Path, run_id: str | None) -> None:
        del folder  # all goes to the tracking server, or store
        from mlflow import MlflowClient

        self._client = MlflowClient()
        if run_id is None:
            wanted = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
            experiment = self._client.get_experiment_by_name(wanted)
            where = experiment.experiment_id if experiment else None
            where = where or self._client.create_experiment(wanted)
            run_id = str(self._client.create_run(where, run_name=name).info.run_id)
        else:
            self._client.update_run(run_id, status="RUNNING")
        self.run_id = run_id

    def settings(self, values: Mapping[str, Any]) -> None:
        from mlflow.entities import Param
        from mlflow.utils.validation import MAX_PARAM_VAL_LENGTH, MAX_PARAMS_TAGS_PER_BATCH

        known = self._client.get_run(self.run_id).data.params  # which may not change
        new = [
            Param(name, str(value)[:MAX_PARAM_VAL_LENGTH])
            for name, value in values.items()
            if name not in known
        ]
        for first in range(0, len(new), MAX_PARAMS_TAGS_PER_BATCH):
            batch = new[first : first + MAX_PARAMS_TAGS_PER_BATCH]
            self._client.log_batch(self.run_id, params=batch)

    def scalars(self, series: str, values: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(f"{series}/{tag}", value, now, step) for tag, value in values.items()]
        self._client.log_batch(self.run_id, metrics=metrics)

    def image(self, series: str, tag: str, image: NDArray[np.uint8], step: int) -> None:
        self._client.log_image(self.run_id, picture(image), key=f"{series}/{tag}", step=step)

    def text(self, series: str, tag: str, text: str, step: int) -> None:
        self._client.log_text(self.run_id, text, f"{series}/{tag}-{step:04d}.txt")

    def summary(self, values: Mapping[str, float | str]) -> None:
        numbers = {name: value for name, value in values.items() if not isinstance(value, str)}
        self.scalars("results", {n.removeprefix("results/"): v for n, v in numbers.items()}, 0)
        for name in values.keys() - numbers.keys():
            self._client.set_tag(self.run_id, name, values[name])

    def close(self, status: Status) -> None:
        ended = "FINISHED" if status == "finished" else "KILLED"
        self._client.set_terminated(self.run_id, status=ended)


class _Comet:
    """An experiment of Comet."""

    def __init__(self, name: str, folder: Path, run_id: str | None) -> None:
        import comet_ml

        self.run_id = run_id or uuid.uuid4().hex
        self._experiment = comet_ml.start(
            project_name=os.environ.get("COMET_PROJECT_NAME", PROJECT),
            experiment_key=self.run_id,
            mode="get_or_create",
            experiment_config=comet_ml.ExperimentConfig(
                name=name,
                offline_directory=os.environ.get("COMET_OFFLINE_DIRECTORY", str(folder / "comet")),
                # What it would find out by itself: the run directory has it.
                log_code=False,
                log_env_details=False,
                log_git_metadata=False,
                log_git_patch=False,
                parse_args=False,
                auto_output_logging=False,
                auto_param_logging=False,
                auto_metric_logging=False,
                display_summary_level=0,
            ),
        )

    def settings(self, values: Mapping[str, Any]) -> None:
        self._experiment.log_parameters(dict(values))

    def scalars(self, series: str, values: Mapping[str, float], step: int) -> None:
        for tag, value in values.items():
            self._experiment.log_metric(f"{series}/{tag}", value, step=step)

    def image(self, series: str, tag: str, image: NDArray[np.uint8], step: int) -> None:
        self._experiment.log_image(picture(image), name=f"{series}/{tag}", step=step)

    def text(self, series: str, tag: str, text: str, step: int) -> None:
        self._experiment.log_text(text, step=step, metadata={"tag": f"{series}/{tag}"})

    def summary(self, values: Mapping[str, float | str]) -> None:
        self._experiment.log_others(dict(values))

    def close(self, status: Status) -> None:
        self._experiment.log_other("status", status)
        self._experiment.end()


def picture(image: NDArray[np.uint8]) -> Image.Image:
    """Return an image ``(H, W, C)`` as Pillow's, grey with one channel."""
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


CLIENTS: Mapping[LoggerName, Callable[[str, Path, str | None], Client]] = {
    "wandb": _Wandb,
    "mlflow": _Mlflow,
    "comet": _Comet,
}
"""Starts or continues a run: its name, a folder for the client's files, and its id, if any."""
