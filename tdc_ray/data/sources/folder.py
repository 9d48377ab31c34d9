"""The image files below a folder, decoded when they are asked for."""

import hashlib
import json
import os
from array import array
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor

from tdc_ray.config.data import DataConfig
from tdc_ray.data.sources.encoded import MAX_NAMED, EncodedImages, Names
from tdc_ray.data.sources.image_file import is_plain
from tdc_ray.data.sources.walk import (
    HIDDEN,
    OTHER_SPLIT,
    image_paths,
    in_other_split,
    subfolders,
)
from tdc_ray.data.sources.warn import warn_once
from tdc_ray.errors import DataError

MAX_PROBED = 1000
"""Most images whose headers a fingerprint looks at."""


def open(config: DataConfig) -> "FolderImages":
    """Open the image files below the path.

    Raises:
        DataError: There is none, one lies in no class, none can be decoded, or of one of some that
            are looked at it is unknown what white is.
    """
    images = list_images(config)
    warn_of_others(images)
    return images.checked()


def list_images(config: DataConfig) -> "FolderImages":
    """List the image files below the path, without opening one.

    Raises:
        DataError: There is none, a folder cannot be listed, a link leads to nothing, an image lies
            in no class, or a class has no image.
    """
    assert config.path is not None  # DataConfig's own rule
    root = Path(config.path)
    if not root.is_dir():
        raise DataError(f"data.path {root} must be a folder of images (data.source folder).")
    paths, labels, left_out = Names(), array("q"), Counter[str]()
    classes: list[str] = []
    above, is_other = "", False
    for path in image_paths(root, left_out):
        if (parent := path.rpartition("/")[0]) != above:
            above, is_other = parent, in_other_split(root, parent)
        if is_other:
            left_out[OTHER_SPLIT] += 1
            continue
        paths.append(path)
        if config.labels_from_folders:
            folder, below, _ = path.partition("/")
            if not below:
                raise DataError(
                    f"{root / path} must lie in a subfolder, its class, for "
                    "data.labels_from_folders. Move it into one, or leave the setting off."
                )
            if classes[-1:] != [folder]:
                classes.append(folder)
        labels.append(len(classes) - 1)  # -1: none
    check_found(root, len(paths), left_out)
    if config.labels_from_folders:
        _check_classes(root, classes)
    numbers = torch.frombuffer(labels, dtype=torch.int64)
    return FolderImages(root, config, paths, numbers, len(classes) or None, left_out)


class FolderImages(EncodedImages):
    """Image files below a folder."""

    def __init__(
        self,
        root: Path,
        config: DataConfig,
        paths: Names,
        labels: Tensor,
        num_classes: int | None,
        left_out: Counter[str],
        captions: Names | None = None,
    ) -> None:
        """Wrap the paths of files, relative to ``root``; the rest as in ``EncodedImages``.

        Of captioned images the labels are the numbers of their captions.
        """
        super().__init__(root, config, labels, num_classes, left_out)
        self._paths, self.captions = paths, captions

    def encoded(self, index: int) -> Path:
        """Return an image's file."""
        return self.root / self._paths[index]

    def name(self, index: int) -> str:
        """Return an image's path, relative to the folder."""
        return self._paths[index]

    def fingerprint(self) -> str:
        """Hash the files' places, sizes and times, the shape they are brought to, and labels.

        Files that were once decoded otherwise are told from those by how they are decoded now:
        some of them, evenly spread, tell of what kind a folder's images are.
        """
        labelled = " labels" if self.config.labels_from_folders else ""
        shape = f"{self.config.image_size} {self.config.num_channels}{labelled}"
        digest, root = hashlib.sha256(shape.encode()), self.root.resolve()
        if not all(is_plain(self.encoded(index)) for index in self.spread(MAX_PROBED)):
            digest.update(b" as shown")
        if self.config.source == "imagefolder":
            digest.update(self.labels.numpy().data)
        if self.captions is not None:
            for index in range(len(self)):
                digest.update(json.dumps(self.captions[index]).encode())
        for index in range(len(self)):
            path = root / self.name(index)
            stat = path.stat()
            digest.update(os.fsencode(f"{path} {stat.st_size} {stat.st_mtime_ns}\n"))
        return digest.hexdigest()[:16]


def warn_of_others(images: FolderImages) -> None:
    """Warn of the files that are left out."""
    if images.left_out[OTHER_SPLIT]:
        num_others = images.left_out[OTHER_SPLIT]
        warn_once(f"{num_others} images in {images.root} are left out, being {OTHER_SPLIT}")
    num_others = sum(count for _, count in _other_kinds(images.left_out))
    if num_others:
        warn_once(
            f"{num_others} of {len(images) + num_others} files in {images.root} are left out, "
            f"being of kinds that are not read: {_kinds(images.left_out)}"
        )


def check_found(root: Path, num_images: int, left_out: Counter[str]) -> None:
    """Refuse a folder without images.

    Raises:
        DataError: It is one.
    """
    if not num_images:
        kinds = _kinds(left_out)
        found = f"the files in it are of kinds that are not read: {kinds}" if kinds else "no file"
        raise DataError(f"data.path {root} holds no image, such as a .png or .jpg: {found}.")


def _kinds(left_out: Counter[str]) -> str:
    return ", ".join(f"{count} {suffix}" for suffix, count in _other_kinds(left_out))


def _other_kinds(left_out: Counter[str]) -> list[tuple[str, int]]:
    """Return the suffixes of the files that are not read, and how many have them."""
    return [one for one in left_out.most_common() if one[0] not in (HIDDEN, OTHER_SPLIT)]


def _check_classes(root: Path, classes: list[str]) -> None:
    """Refuse folders of classes that would shift the numbers of the others.

    Raises:
        DataError: One holds no image.
    """
    if empty := [name for name in subfolders(root) if name not in set(classes)]:
        raise DataError(
            f"{', '.join(str(root / name) for name in empty[:MAX_NAMED])} must hold an image, "
            "being a class by data.labels_from_folders. Remove it, or put its images there."
        )
