"""Settings for images of one's own: what ``--data PATH`` finds out.

It is recorded in a run's settings, and a resumed run takes it from there: images that were added
meanwhile are noticed as such, and do not turn it into another run.
"""

import logging
import math
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from tdc_ray.config.data import BUNDLED, DataConfig
from tdc_ray.config.hub import with_recorded_commit
from tdc_ray.config.presets import images
from tdc_ray.config.run import (
    RunConfig,
    default_run_dir,
    recorded_settings,
    with_absolute_paths,
)
from tdc_ray.data.batches import LEAST_HELD_OUT
from tdc_ray.data.detect import data_config, train_split
from tdc_ray.data.sources.walk import image_paths, split_to_take, subfolders
from tdc_ray.data.survey import LARGEST_ALIKE, Survey, fitting_shape, survey
from tdc_ray.errors import DataError
from tdc_ray.storage.object_store import resolve_path
from tdc_ray.storage.run_dir import RunDir

DETECTED = (
    "data.source",
    "data.image_size",
    "data.num_channels",
    "data.labels_from_folders",
    "conditioning.num_classes",
)
"""Settings that are found out, each unless its flag is given; ``data.path`` follows the flag. Of
few images ``prune.held_out_share`` follows, too."""

BY_SIDE = (
    "base.num_steps",
    "base.learning_rate",
    "base.ema_decay",
    "base.micro_batch_size",
    "base.checkpoint_every",
    "finetune.num_steps",
    "finetune.learning_rate",
    "finetune.ema_decay",
    "finetune.micro_batch_size",
    "finetune.checkpoint_every",
    "evaluate.batch_size",
)
"""Settings of the preset ``images`` that follow from the images' side."""

logger = logging.getLogger(__name__)


def undetected(path: str) -> RunConfig:
    """Return settings in which nothing is found out yet, for flags to be read onto."""
    full = images(LARGEST_ALIKE)
    data = replace(full.data, path=path)
    # A number, as label dropout goes with one.
    return replace(full, data=data, conditioning=replace(full.conditioning, num_classes=1))


def own_run_dir(config: RunConfig, path: str, given: Collection[str]) -> Path:
    """Return the directory of a run that names none: one for the same path and flags.

    Args:
        config: The settings, found out or not.
        path: What ``--data`` names.
        given: Dotted names of the settings that flags give.
    """
    if path in BUNDLED:
        return default_run_dir(config)
    named = replace(config, data=replace(config.data, path=path))
    if "prune.held_out_share" not in given:
        usual = images().prune.held_out_share
        named = replace(named, prune=replace(named.prune, held_out_share=usual))
    return default_run_dir(named, [name for name in (*DETECTED, *BY_SIDE) if name not in given])


def own_images(
    asked: RunConfig, path: str, given: Collection[str], run_dir: Path | None = None
) -> RunConfig:
    """Return the preset ``images`` for the images at a path.

    Args:
        asked: The settings as flags have them, elsewhere :func:`undetected`.
        path: What ``--data`` names.
        given: Dotted names of the settings that flags give.
        run_dir: Where a run goes; one that is there and has the same path says what was found.

    Raises:
        ConfigError: The path holds no data of a known kind, or of several kinds.
        DataError: The data is malformed, or no image can be read.
    """
    before = None if run_dir is None else _recorded(run_dir, path)
    if before is None:
        data, found = _found(asked, path, given)
        num_classes = found.num_classes
        held_out = _held_out_share(asked.prune.held_out_share, found.num_images)
    else:
        data = replace(
            asked.data,
            source=before.data.source,
            path=before.data.path,
            image_size=before.data.image_size,
            num_channels=before.data.num_channels,
            labels_from_folders=before.data.labels_from_folders,
        )
        num_classes = before.conditioning.num_classes
        held_out = before.prune.held_out_share
    full = images(max(data.height, data.width))
    return replace(
        full,
        data=data,
        conditioning=replace(full.conditioning, num_classes=num_classes),
        prune=replace(full.prune, held_out_share=held_out),
    )


def _recorded(run_dir: Path, path: str) -> RunConfig | None:
    """Return the settings of a run that has the same data; None where there is none."""
    before = recorded_settings(RunDir(run_dir).config)
    data = None if before is None else with_absolute_paths(before).data.path
    if data is None:
        return None
    root = resolve_path(path).resolve()
    is_same = data in (path, with_recorded_commit(path, data), str(root))
    return before if is_same or data == str(_train_folder(root)) else None


def _train_folder(root: Path) -> Path | None:
    """Return the folder that images are taken from where the folders of a path are splits."""
    train = split_to_take(root) if root.is_dir() else None
    return None if train is None else train.resolve()


def _held_out_share(share: float, num_images: int) -> float:
    """Return the share of so many images that is held out: at least as many as losses need."""
    least = math.ceil(100 * LEAST_HELD_OUT / num_images) / 100
    return max(share, min(0.5, least))


def _found(asked: RunConfig, path: str, given: Collection[str]) -> tuple[DataConfig, Survey]:
    """Find out what images at a path are, and return their settings, too."""
    data, root = asked.data, resolve_path(path)
    if "data.source" not in given:
        # "./digits" is a path, which a Path would write as the name of a bundled source.
        data = data_config(str(root) if path.startswith("~") else path, data)
    elif data.source == "folder":
        taken = train_split(str(root), has_classes=data.labels_from_folders)
        data = replace(data, path=taken)
    if data.source == "folder" and "data.labels_from_folders" not in given:
        assert data.path is not None  # DataConfig's own rule
        data = replace(data, labels_from_folders=_are_classes(Path(data.path)))
    # Absolute as in a run, whose warnings about the same data are not to come again.
    found = survey(with_absolute_paths(replace(asked, data=data)).data)
    shape = fitting_shape(found)
    if shape is None:
        raise DataError(f"--data {path} holds no image that can be read. Mend or replace them.")
    channels, height, width = shape
    if "data.num_channels" in given:
        channels = data.num_channels
    size = data.image_size if "data.image_size" in given else (height, width)
    data = replace(data, image_size=size, num_channels=1 if channels == 1 else 3)
    return data, found


def _are_classes(root: Path) -> bool:
    """Whether all images lie in subfolders, of which there are at least two; warn if nearly so."""
    folders, outside, within = set[str](), "", set[str]()
    for path in image_paths(root):
        folder, below, name = path.partition("/")
        if not below:
            if not outside and len(subfolders(root)) < 2:  # no need to list a flat folder's rest
                return False
            outside = outside or path
            continue
        folders.add(folder)
        within.add(name.partition("/")[0] if "/" in name else "")
    if len(folders) > 1 and outside:
        logger.warning(
            "no classes: %s lies outside of the subfolders of %s, which would else be classes",
            outside,
            root,
        )
    if len(folders) == 1 and not outside and len(within) > 1 and "" not in within:
        (lone,) = folders
        logger.warning("no classes: name %s for its subfolders to be classes", root / lone)
    return len(folders) > 1 and not outside
