"""HParams of a sweep for TensorBoard: a session for every run, in the plugin's own terms."""

from pathlib import Path

from tensorboard.plugins.hparams import summary_v2 as plugin
from torch.utils.tensorboard import SummaryWriter

from tdc_ray.config.run import RunConfig
from tdc_ray.runs.sweep.results import TrialRow
from tdc_ray.runs.sweep.space import ALIASES, Value, labels, value_of
from tdc_ray.storage.files import atomic_path, exists

METRICS = ("macs", "num_params", "train_macs", "seconds")
"""What a session shows of a row after its score, which has the name of its metric."""


def write_session(folder: Path, config: RunConfig, row: TrialRow) -> None:
    """Write a finished run's session: what it was run with and what it came to.

    k, N, schedule, proxy and seed are always there, and every field that is varied.

    Args:
        folder: The sweep's folder of HParams.
        config: The settings that the sweep varies.
        row: The run.
    """
    if exists(folder / row.name):
        return
    settings = {name: value_of(config, name) for name in ALIASES} | dict(row.params)
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
    """Give what a session shows of a row, by tags; TensorBoard orders them by name."""
    values = {str(row.metric): row.score} | {name: getattr(row, name) for name in METRICS}
    return {f"sweep/{name}": float(value) for name, value in values.items() if value is not None}


def _plain(value: Value) -> bool | float | str:
    """Give a value in a kind that HParams knows."""
    return str(value) if value is None else value
