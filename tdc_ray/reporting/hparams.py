"""HParams of a sweep for TensorBoard: a session for every run, in the plugin's own terms."""

from pathlib import Path

from tensorboard.plugins.hparams import summary_v2 as plugin
from torch.utils.tensorboard import SummaryWriter

from tdc_ray.runs.sweep.results import TrialFinished, TrialRow
from tdc_ray.runs.sweep.space import Params, Value, labels
from tdc_ray.storage.files import atomic_path, exists
from tdc_ray.storage.object_store import resolve_path

HPARAMS_DIR = "hparams"

METRICS = ("macs", "num_params", "train_macs", "search_macs", "seconds")
"""Values of a row that a session shows after its score, which has the name of its metric."""


class HParams:
    """A sink that writes a session for every run of a sweep that is done."""

    def __init__(self, sweep_dir: Path) -> None:
        self._folder = resolve_path(sweep_dir).resolve() / HPARAMS_DIR

    def __call__(self, event: object) -> None:
        """Write a run's session: its settings and its results."""
        match event:
            case TrialFinished(settings, row) if not exists(self._folder / row.name):
                _write_session(self._folder, settings, row)


def _write_session(folder: Path, settings: Params, row: TrialRow) -> None:
    """Write settings, seed and metrics."""
    short = labels(list(settings))
    values = {short[name]: _plain(value) for name, value in settings.items()}
    session = plugin.hparams_pb(values | {"seed": row.seed}, trial_id=row.name)
    with (
        atomic_path(folder / row.name) as temporary,
        SummaryWriter(str(temporary)) as writer,
    ):
        writer._get_file_writer().add_summary(session)
        for tag, value in metrics_of(row).items():
            writer.add_scalar(tag, value, 0)


def metrics_of(row: TrialRow) -> dict[str, float]:
    """Return a row's values in a session, by tags; TensorBoard orders them by name."""
    values = {str(row.metric): row.score} | {name: getattr(row, name) for name in METRICS}
    return {f"sweep/{name}": float(value) for name, value in values.items() if value is not None}


def _plain(value: Value) -> bool | float | str:
    """Convert a value to a type that HParams supports."""
    return str(value) if value is None else value
