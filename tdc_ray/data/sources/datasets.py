"""Data sets of Hugging Face's ``datasets``: saved by ``save_to_disk``, or named as on the hub.

That library (the extra ``datasets``) finds, fetches and memory-maps them; images are decoded here.
It runs no code that comes with a data set and unpickles nothing.
"""

import hashlib
import json
import os
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from tdc_ray.config.data import DataConfig
from tdc_ray.config.hub import HUB_SECONDS, HubName, hub_dataset, not_available
from tdc_ray.data.sources.encoded import EncodedImages, Names, class_labels
from tdc_ray.data.sources.image_file import Encoded, Member
from tdc_ray.data.sources.imagefolder import caption_of
from tdc_ray.data.sources.parquet import WITHOUT_BYTES, caption_column, columns
from tdc_ray.data.sources.walk import OTHER_SPLIT, in_train, subfolders
from tdc_ray.errors import DataError
from tdc_ray.storage.files import read_json
from tdc_ray.storage.object_store import resolve_path

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict
    from pyarrow import ChunkedArray  # imported where they are needed

STATE, SPLITS = "state.json", "dataset_dict.json"
"""Files that ``save_to_disk`` writes: of one data set, and of its splits."""

INFO = "dataset_info.json"
"""Beside ``state.json``, which other tools write, too."""


def open(config: DataConfig) -> "ArrowImages":
    """Open a data set.

    Raises:
        DataError: It cannot be had or has no column of images, none of the images can be decoded,
            or of one of some that are looked at it is unknown what white is.
    """
    return list_images(config).checked()


def list_images(config: DataConfig) -> "ArrowImages":
    """List the images of a data set; of its splits the one to train on.

    Raises:
        DataError: It cannot be had, or has no column of images.
    """
    assert config.path is not None  # DataConfig's own rule
    if find_spec("datasets") is None:
        raise DataError(
            f"data.path {config.path} (data.source datasets) needs the library datasets, which is "
            "not installed: pip install 'tdc-ray[datasets]'. Parquet files, which the data set's "
            "to_parquet writes, are read without."
        )
    left_out = Counter[str]()
    rows, roots, commit = _load(config.path, left_out)
    return ArrowImages(config, rows, roots, left_out, commit)


def is_saved(folder: Path) -> bool:
    """Whether ``save_to_disk`` wrote a folder."""
    is_one = all((folder / name).is_file() for name in (STATE, INFO))
    return is_one or (folder / SPLITS).is_file()


class ArrowImages(EncodedImages):
    """The rows of a memory-mapped data set that have an image."""

    def __init__(
        self,
        config: DataConfig,
        rows: "Dataset",
        roots: list[Path],
        left_out: Counter[str],
        commit: str | None = None,
    ) -> None:
        """Find the columns of images, labels and, where they are read, captions.

        Args:
            config: Names the data set.
            rows: All of its columns.
            roots: Folders whose files a row may name in place of its image's bytes.
            left_out: What was left out before.
            commit: The one that was taken of a data set on the hub, if that is known.

        Raises:
            DataError: There is no column of images, or no image, or it is damaged.
        """
        import datasets

        path = str(config.path)
        image, label = columns(rows.features.arrow_schema, path)
        caption = None
        if config.text_encoder is not None:
            caption = caption_column(rows.features.arrow_schema, path)
        wanted = [name for name in (image, label, caption) if name is not None]
        self._fingerprint, self._image, self._roots = rows._fingerprint, image, roots
        self.commit = commit
        # Of what is not saved but cached it follows from the commit, or the files' times.
        self._files = [] if roots else [Path(file["filename"]) for file in rows.cache_files]
        rows = rows.with_format(None)  # a saved data set keeps its own, such as pandas
        table = rows.data
        try:
            for name in wanted:  # what offsets lead out of a file would read any memory
                table.column(name).validate(full=True)
        except ValueError as error:
            raise DataError(f"{path} is damaged: {error}. Fetch or write it again.") from error
        self._numbers = np.flatnonzero(_has_image(table.column(image), has_files=bool(roots)))
        if lacking := len(rows) - len(self._numbers):
            left_out[WITHOUT_BYTES] += lacking
        if not len(self._numbers):
            found = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
            raise DataError(f"data.path {path} holds no image: {found or 'it has no row'}.")
        known = table.column(label).to_pylist() if label else [None] * len(rows)
        labels, num_classes = class_labels([known[row] for row in self._numbers], Path(path))
        self.captions: Names | None = None
        if caption is not None:
            texts, where = table.column(caption).to_pylist(), f"column {caption} of {path}"
            self.captions = Names(
                caption_of(texts[row], f"row {row}", where) for row in self._numbers
            )
            labels, num_classes = torch.arange(len(self._numbers)), None
        rows = rows.select_columns(image)
        if isinstance(rows.features[image], datasets.Image):
            rows = rows.cast_column(image, datasets.Image(decode=False))
        self._rows = rows
        super().__init__(Path(path), config, labels, num_classes, left_out)

    def encoded(self, index: int) -> Encoded:
        """Return an image's bytes, or the file that its row names.

        Raises:
            DataError: That is none of the data set's own.
        """
        value = self._rows[int(self._numbers[index])][self._image]
        content = value["bytes"] if isinstance(value, dict) else value
        if content:
            return Member(content, lambda: self.name(index))
        path = Path(value["path"]).resolve()
        if not any(path.is_relative_to(root) for root in self._roots):
            raise DataError(
                f"{self.name(index)} names a file outside of the data set, {path}, which is not "
                "opened. Save it with its images, by save_to_disk, and name that folder."
            )
        return path

    def name(self, index: int) -> str:
        """Return the number of an image's row, with the data set."""
        return f"{self.config.path}: row {self._numbers[index]}"

    def fingerprint(self) -> str:
        """Hash the fingerprint of ``datasets``, the files, the labels, and the shape asked for.

        That fingerprint alone follows from the code that made the rows, not from what it read.
        """
        size = f"{self.config.image_size} {self.config.num_channels} {len(self)}"
        digest = hashlib.sha256(f"{size} {self._fingerprint}".encode())
        for file in self._files:
            stat = file.stat()
            digest.update(os.fsencode(f"{file.name} {stat.st_size} {stat.st_mtime_ns}\n"))
        digest.update(self.labels.numpy().data)
        if self.captions is not None:
            for index in range(len(self)):
                digest.update(json.dumps(self.captions[index]).encode())
        return digest.hexdigest()[:16]


def _has_image(stored: "ChunkedArray", *, has_files: bool) -> NDArray[np.bool_]:
    """Whether each row has its image's bytes, or names a file, if it may; reads no image."""
    import pyarrow as pa
    import pyarrow.compute as pc

    is_struct = pa.types.is_struct(stored.type)
    content = pc.struct_field(stored, "bytes") if is_struct else stored
    has_image = pc.fill_null(pc.greater(pc.binary_length(content), 0), False)  # noqa: FBT003
    if has_files and is_struct and stored.type.get_field_index("path") >= 0:
        has_image = pc.or_(has_image, pc.is_valid(pc.struct_field(stored, "path")))
    return np.asarray(has_image)


def _load(path: str, left_out: Counter[str]) -> tuple["Dataset", list[Path], str | None]:
    """Return the split to train on, the folders whose files its rows may name, and the commit.

    Raises:
        DataError: It cannot be had.
    """
    folder, hub = resolve_path(path), hub_dataset(path)
    try:
        if hub is not None:
            return _from_hub(hub, left_out)
        if is_saved(folder):
            return _saved(folder.resolve(), left_out), [], None
        import datasets

        loaded = datasets.load_dataset(str(folder.resolve()), keep_in_memory=False)
        return loaded[_train_split(list(loaded), path, left_out)], [folder.resolve()], None
    except DataError:
        raise
    except Exception as error:
        if hub is not None:
            raise DataError(not_available(f"data.path {path}", "dataset", error)) from error
        words = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise DataError(f"data.path {path} cannot be read by datasets: {words}.") from error


def _from_hub(hub: HubName, left_out: Counter[str]) -> tuple["Dataset", list[Path], str | None]:
    """Fetch a data set, or find it in the cache.

    Raises:
        DataError: The cache has another commit alone, or none of several splits is to train on.
    """
    import datasets
    from huggingface_hub import HfApi, constants, try_to_load_from_cache

    name, newest, loaded = hub.repository, None, None
    try:  # Once: load_dataset asks for half a minute, where there is no network.
        api = HfApi(endpoint=datasets.config.HF_ENDPOINT)
        newest = api.dataset_info(name, revision=hub.revision, timeout=HUB_SECONDS).sha
    except Exception:
        loaded = _cached(hub)
        known = loaded or try_to_load_from_cache(
            name, "README.md", revision=hub.revision, repo_type="dataset"
        )
        if known is None:
            raise
    # By the revision as it is named, under which the cache then knows it without a network.
    loaded = loaded or datasets.load_dataset(
        name, hub.config_name, revision=hub.revision, keep_in_memory=False
    )
    rows = loaded[_train_split(list(loaded), name, left_out)]
    # Without a network it takes the commit that was cached last, in a folder of that name.
    kept = HubName(name, Path(rows.cache_files[0]["filename"]).parent.name).commit
    if None not in (kept, hub.commit) and kept != hub.commit:
        raise DataError(f"data.path {hub} is not cached, but commit {kept}: name that.")
    caches = (constants.HF_HUB_CACHE, datasets.config.HF_DATASETS_CACHE)
    return rows, [Path(cache).expanduser().resolve() for cache in caches], kept or newest


def _cached(hub: HubName) -> "DatasetDict | None":
    """Return a commit that is named from the cache, of which ``datasets`` takes the last alone."""
    import datasets
    from datasets.naming import camelcase_to_snakecase
    from datasets.packaged_modules.cache.cache import Cache

    owner, _, name = hub.repository.partition("/")
    cache = Path(datasets.config.HF_DATASETS_CACHE).expanduser()
    pattern = f"{hub.config_name or '*'}/*/{hub.commit}"
    found = list((cache / f"{owner}___{camelcase_to_snakecase(name)}").glob(pattern))
    if hub.commit is None or len(found) != 1:
        return None
    *_, config_name, version, commit = found[0].parts
    builder = Cache(
        repo_id=hub.repository,
        dataset_name=name,
        config_name=config_name,
        version=version,
        hash=commit,
    )
    return builder.as_dataset()


def _saved(folder: Path, left_out: Counter[str]) -> "Dataset":
    """Map what ``save_to_disk`` wrote.

    Raises:
        DataError: It names files outside of the folder, or none of several splits is to train on.
    """
    import datasets

    if not (folder / STATE).exists():
        splits = [name for name in subfolders(folder) if (folder / name / STATE).exists()]
        folder /= _train_split(splits, str(folder), left_out)
    for file in read_json(folder / STATE)["_data_files"]:
        if (name := file["filename"]) != Path(name).name:
            raise DataError(f"{folder / STATE} names {name}, which is no file beside it.")
    return datasets.Dataset.load_from_disk(str(folder), keep_in_memory=False)


def _train_split(names: list[str], path: str, left_out: Counter[str]) -> str:
    """Return the name of the split to train on.

    Raises:
        DataError: It is none of several.
    """
    train = names if len(names) == 1 else [name for name in names if in_train(name)]
    if len(train) != 1:
        raise DataError(
            f"data.path {path} must have one split to train on, such as train, got "
            f"{', '.join(names) or 'none'}. Save the one to take by its save_to_disk, and name "
            "that folder."
        )
    if len(names) > 1:
        left_out[f"splits {OTHER_SPLIT}"] = len(names) - 1
    return train[0]
