"""The runs below a folder, and the settings in which runs differ."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tdc_ray.config.image_size import size_text
from tdc_ray.config.run import from_json, to_json
from tdc_ray.errors import ConfigError, StorageError
from tdc_ray.runs.results import Results, load_results
from tdc_ray.runs.status import status
from tdc_ray.storage.digest import json_digest
from tdc_ray.storage.files import exists, listing, read_json
from tdc_ray.storage.object_store import display_path
from tdc_ray.storage.run_dir import RunDir


@dataclass(frozen=True, kw_only=True, slots=True)
class RunOverview:
    """A run in short."""

    root: Path
    settings: Mapping[str, object]
    """By dotted name, such as ``plan.num_groups``."""

    results: Results | None
    """None means that the run is not finished."""

    progress: str
    """In words; ``finished`` where there are results."""


def find_runs(folder: Path) -> list[Path]:
    """Find the run directories in a folder and all below it, trials of sweeps included; sorted."""
    paths = listing(folder, "**/config.json")  # in the folder itself, too
    return [path.parent for path in paths if _is_run(path)]


def load_overview(root: Path) -> RunOverview:
    """Load a run in short.

    Raises:
        StorageError: It is no run directory, or a file of it is damaged.
        ConfigError: Its settings are of another version.
    """
    run_dir = RunDir(root)
    if not exists(run_dir.config) or not _is_run(run_dir.config):
        raise StorageError(f"{display_path(root)} is no run directory: it has no settings of one.")
    document = to_json(from_json(read_json(run_dir.config)))
    if (network := document["model"]["network"]) is not None:  # of dozens of values
        document["model"]["network"] = _network_text(network)
    document["data"]["image_size"] = size_text(document["data"]["image_size"])
    settings = _dotted(document)
    results = load_results(run_dir.results) if exists(run_dir.results) else None
    progress = "finished" if results is not None else _progress(run_dir)
    return RunOverview(root=root, settings=settings, results=results, progress=progress)


def load_overviews(roots: Sequence[Path]) -> list[RunOverview]:
    """Load runs in short; one that cannot be read says so as its progress."""
    found = []
    for root in roots:
        try:
            found.append(load_overview(root))
        except (StorageError, ConfigError) as error:
            unreadable = f"unreadable: {error}"
            found.append(RunOverview(root=root, settings={}, results=None, progress=unreadable))
    return found


def differing(runs: Sequence[RunOverview]) -> dict[str, list[object]]:
    """Return the settings that are not the same in all runs, each with its value in every run."""
    names = dict.fromkeys(name for run in runs for name in run.settings)
    values = {name: [run.settings.get(name) for run in runs] for name in names}
    return {name: found for name, found in values.items() if any(v != found[0] for v in found)}


def _is_run(path: Path) -> bool:
    """Whether a file holds a run's settings: networks' folders have a file of this name, too."""
    try:
        document = read_json(path)
    except StorageError:
        return False
    return isinstance(document, dict) and {"preset", "plan", "finetune"} <= document.keys()


def _progress(run_dir: RunDir) -> str:
    try:
        found = status(run_dir)
    except (StorageError, ConfigError) as error:
        return f"unreadable: {error}"
    done = sum(group.loss_finetuned is not None for group in found.groups)
    if done or any(group.num_candidates for group in found.groups):
        return f"{done} of {len(found.groups)} experts"
    return f"base: {found.base}"


def _network_text(network: Mapping[str, Any]) -> str:
    """Write what tells a network from others in a word: its channels, and a digest of the rest."""
    channels = network.get("block_out_channels", network.get("_class_name"))
    return f"{channels} ({json_digest(network)[:6]})"


def _dotted(document: Mapping[str, Any], prefix: str = "") -> dict[str, object]:
    """Flatten nested settings."""
    flat: dict[str, object] = {}
    for name, value in document.items():
        nested = isinstance(value, dict)
        flat |= _dotted(value, f"{prefix}{name}.") if nested else {f"{prefix}{name}": value}
    return flat
