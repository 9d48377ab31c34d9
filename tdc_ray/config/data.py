"""Which images are learnt, and how they are brought into shape: ``--data.*``."""

import re
from pathlib import Path
from typing import Literal

from tdc_ray.config.hub import hub_dataset
from tdc_ray.config.image_size import ImageSize, size_text
from tdc_ray.config.validation import NonNegativeInt, PositiveInt, refuse, require, settings

Source = Literal[
    "digits",
    "photos",
    "folder",
    "npz",
    "cifar10",
    "imagefolder",
    "parquet",
    "webdataset",
    "datasets",
    "base",
]

BASE_SAMPLES: Source = "base"
"""Images that are drawn from the base itself."""

OF_BASE = ("num_images", "prompts")
"""Settings of images that are drawn from the base alone."""

BUNDLED = {"digits": (1, 8, 8), "photos": (3, 16, 16)}
"""Sources that come with scikit-learn and need no path: channels, height, width of an image."""


@settings("data")
class DataConfig:
    """Which images are learnt, and how they are brought into shape."""

    source: Source = "digits"
    """digits: scikit-learn's 1,797 images of 8x8; photos: 8,216 squares of 16x16 of its two
    photographs, in colour; folder: all images below `path` that Pillow decodes, in links too; npz:
    a file or a folder of files with `images`, `arr_0` or ImageNet-64's `data`; cifar10: as
    torchvision unpacks it; imagefolder: the images that a Hugging Face `metadata.jsonl` or
    `metadata.csv` below `path` names, with its labels, or captions; parquet: a file or a folder of
    files with a column of encoded images; webdataset: a tar file or a folder of them; datasets:
    what Hugging Face's library of that name wrote (`save_to_disk`), or fetches from the hub. Of
    the last four the split train, if there are splits. base: no images are needed, they are drawn
    from the base."""

    path: str | None = None
    """Where the images are, of source datasets also OWNER/NAME, OWNER/NAME@REVISION or
    OWNER/NAME:CONFIG on the Hugging Face hub; every source but digits, photos and base needs
    it."""

    num_images: PositiveInt | None = None
    """How many images are drawn from the base (source base). None means as many as the search and
    the refit of a group ask for, each once, and those that are held out for losses."""

    prompts: str | None = None
    """Text file of prompts, one a line, for a base that is conditioned on text (source base):
    image i is drawn for prompt i modulo their number. None means 48 that come along."""

    image_size: ImageSize = 8
    """What images are brought to, in pixels: 64 for a square, or HEIGHTxWIDTH such as 48x64 (in
    files of settings also `[48, 64]`)."""

    num_channels: Literal[1, 3] = 1
    """Grey (1) or colour (3)."""

    horizontal_flip: bool = False
    """Mirror half of the training images at random."""

    crop_padding: NonNegativeInt = 0
    """Pad by this many pixels (reflected) and crop at random; 0 leaves images as they are."""

    num_workers: NonNegativeInt = 0
    """Processes that load and decode images beside each trainer."""

    labels_from_folders: bool = False
    """An image's class is the subfolder of `path` that it lies in (source folder); classes are
    counted from 0 in the order of their names, and each must hold an image."""

    max_corrupt: NonNegativeInt = 10
    """Most corrupt files that a process and its loader processes leave out, each named in a
    warning. The next image takes an image's place; an npz file, however many images it holds,
    counts as one, and its images are missing altogether."""

    cache_dir: str = "~/.cache/tdc_ray"
    """Where npz files too large for memory are unpacked, or noted as whole, and where parquet and
    tar files are indexed, once. On a cluster either a place that all nodes see, or each node fills
    its own."""

    text_encoder: str | None = None
    """Folder of a diffusers pipeline whose text encoder reads prompts, and captions: the column
    `text` of source imagefolder's metadata, the column `text` or `caption` of parquet and of
    datasets, the `.txt` of an image in webdataset. A base conditioned on text brings its own
    along."""

    first_stage: str | None = None
    """Folder of a diffusers VQModel, AutoencoderKL or AutoencoderDC: the denoisers then learn its
    latents."""

    def __post_init__(self) -> None:
        rule = f"below data.image_size = {size_text(self.image_size)}"
        fits = self.crop_padding < min(self.height, self.width)
        require("data", self, "crop_padding", rule, ok=fits)
        if self.source not in (*BUNDLED, BASE_SAMPLES) and self.path is None:
            refuse(
                f"data.path must be given for data.source {self.source}: where are the images? "
                "Set --data.path."
            )
        if self.source in BUNDLED and self.path is not None:
            refuse(
                "data.path goes with data.source npz, folder, cifar10, imagefolder, parquet, "
                f"webdataset or datasets, got {self.path} with {self.source}. Set --data.source, "
                "or give the path by --data alone, which finds it out."
            )
        if self.num_images is not None and self.source != BASE_SAMPLES:
            refuse(
                f"data.num_images goes with data.source base, got {self.num_images} with "
                f"{self.source}, of which all images are taken. Leave it out, or set --data base."
            )
        if self.prompts is not None and self.source != BASE_SAMPLES:
            refuse(
                f"data.prompts goes with data.source base, got {self.prompts} with {self.source}, "
                "whose captions are read. Leave it out, or set --data base."
            )
        if self.labels_from_folders and self.source != "folder":
            refuse(f"data.labels_from_folders goes with data.source folder, got {self.source}.")

    @property
    def height(self) -> int:
        """Pixels from top to bottom that images are brought to."""
        return self.image_size if isinstance(self.image_size, int) else self.image_size[0]

    @property
    def width(self) -> int:
        """Pixels from left to right that images are brought to."""
        return self.image_size if isinstance(self.image_size, int) else self.image_size[1]

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(C, H, W)`` that images are brought to."""
        return (self.num_channels, self.height, self.width)

    @property
    def is_on_hub(self) -> bool:
        """Whether the path is the name of a data set on the Hugging Face hub."""
        return self.source == "datasets" and hub_dataset(self.path or "") is not None

    @property
    def name(self) -> str:
        """What results call the dataset: its source, or the name of its file or folder."""
        if self.source == BASE_SAMPLES:
            return "base_samples"
        if self.path is None or self.source == "cifar10":
            return self.source
        path = re.sub("@[^:]*", "", self.path) if self.is_on_hub else self.path
        stem = Path(path).resolve().stem
        return "".join(c if c.isalnum() else "_" for c in stem)
