from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from tdc_ray.config.data import DataConfig
from tdc_ray.data.images import Images, images_config
from tdc_ray.data.load import load_dataset
from tdc_ray.errors import ConfigError, DataError
from tests.images import everything, random_pixels

COLOUR = DataConfig(image_size=6, num_channels=3)
PIXELS = random_pixels(5, 6, 6, 3)
LABELS = [0, 2, 1, 0, 1]


class Listed(Dataset):
    """A data set of any elements."""

    def __init__(self, elements) -> None:
        self.elements = elements

    def __len__(self) -> int:
        return len(self.elements)

    def __getitem__(self, index):
        return self.elements[index]


class Endless(IterableDataset):
    def __iter__(self):
        yield PIXELS[0]


def tensor(pixels=PIXELS) -> torch.Tensor:
    return torch.from_numpy(pixels).movedim(-1, 1)


def read(images, folder: Path, data: DataConfig = COLOUR):
    config = images_config(images, data, folder, classes=False)
    return everything(load_dataset(config))


@pytest.mark.parametrize(
    "images",
    [
        PIXELS,
        tensor(),
        TensorDataset(tensor()),
        list(PIXELS),
        Listed([(Image.fromarray(image), "no label") for image in PIXELS]),
        Listed([(Image.fromarray(image), None) for image in PIXELS]),
        Listed([{"image": image} for image in tensor()]),
        Images(tensor() / 255, value_range=(0, 1)),
        Images(tensor() / 127.5 - 1, value_range=(-1, 1)),
        Images((PIXELS / 255).astype(np.float64), value_range=(0, 1)),
        Images(Listed([(tensor() / 127.5 - 1)[i] for i in range(5)]), value_range=(-1, 1)),
    ],
)
def test_images_of_every_kind_are_read_as_their_pixels(tmp_path, images):
    found, labels = read(images, tmp_path)
    np.testing.assert_array_equal(found, PIXELS)
    assert labels == [-1] * 5


@pytest.mark.parametrize(
    "images",
    [
        Images(PIXELS, labels=LABELS),
        Images(PIXELS, labels=np.eye(max(LABELS) + 1)[LABELS]),
        Images(PIXELS, labels=[[float(label)] for label in LABELS]),
        Images(tensor(), labels=torch.tensor(LABELS)),
        TensorDataset(tensor(), torch.tensor(LABELS)),
        Listed([{"img": i, "label": n} for i, n in zip(PIXELS, LABELS, strict=True)]),
        Listed(list(zip(PIXELS, np.array(LABELS), strict=True))),
    ],
)
def test_labels_come_along(tmp_path, images):
    assert read(images, tmp_path)[1] == LABELS


@pytest.mark.parametrize("labels", [["cat"] * 5, [0, 1, None, 1, 0], [0, 1, 0, 1, 0.5]])
def test_labels_that_are_left_out_are_said(tmp_path, caplog, labels):
    assert read(Listed(list(zip(PIXELS, labels, strict=True))), tmp_path)[1] == [-1] * 5
    num_others = sum(not isinstance(label, int) for label in labels)
    assert f"labels of the images are left out: {num_others} of 5" in caplog.text


@pytest.mark.parametrize("mode", ["P", "HSV", "YCbCr", "CMYK"])
def test_pillows_numbers_of_other_kinds_than_colours_are_shown_as_colours(tmp_path, mode):
    pictures = [Image.new("RGB", (6, 6), colour).convert(mode) for colour in ("red", "blue")]
    found, _ = read(pictures, tmp_path)
    np.testing.assert_allclose(found[:, 0, 0].astype(int), [[255, 0, 0], [0, 0, 255]], atol=2)


def test_pillows_grey_of_1_or_16_bits_is_brought_to_8(tmp_path):
    pictures = [Image.fromarray(np.full((6, 6), 257 * 9, np.uint16)), Image.new("1", (6, 6), 1)]
    found, _ = read(pictures, tmp_path, DataConfig(image_size=6))
    assert found[:, 0, 0, 0].tolist() == [9, 255]


def test_a_tensor_of_bfloat16_is_read(tmp_path):
    images = Images((tensor() / 255).bfloat16(), value_range=(0, 1))
    np.testing.assert_allclose(read(images, tmp_path)[0].astype(int), PIXELS, atol=1)


def test_grey_images_need_no_channels(tmp_path):
    grey = DataConfig(image_size=6)
    for images in (PIXELS[..., 0], list(torch.from_numpy(PIXELS[..., 0]))):
        np.testing.assert_array_equal(read(images, tmp_path, grey)[0], PIXELS[..., :1])


def test_a_file_is_named_by_its_content_so_that_the_same_images_are_the_same_data(tmp_path):
    shape = (3, 6, 6)
    one = Images(PIXELS).save(tmp_path, shape)
    assert Images(tensor()).save(tmp_path, shape) == one
    others = [Images(PIXELS, labels=LABELS), Images(255 - PIXELS), Images(PIXELS[:4])]
    paths = {one, *(other.save(tmp_path, shape) for other in others)}
    assert set(tmp_path.iterdir()) == paths
    assert len(paths) == 4


def test_a_path_is_read_as_the_command_line_reads_it(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        Image.fromarray(PIXELS[0]).save(tmp_path / name / "0.png")
    data = DataConfig(image_size=6, num_channels=3, horizontal_flip=True)
    for classes in (False, True):
        found = images_config(tmp_path, data, tmp_path / "unused", classes=classes)
        expected = DataConfig(
            source="folder",
            path=str(tmp_path),
            image_size=6,
            num_channels=3,
            horizontal_flip=True,
            labels_from_folders=classes,
        )
        assert found == expected
    assert images_config("digits", data, tmp_path, classes=True).source == "digits"
    assert not (tmp_path / "unused").exists()
    with pytest.raises(ConfigError, match="images must be digits or photos, a folder of images"):
        images_config("nowhere", data, tmp_path, classes=False)


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (tensor() / 255, r"say what black and white are, got float32.*value_range=\(-1, 1\)"),
        (Images(tensor() / 127.5 - 1, value_range=(0, 1)), r"lie in value_range \(0, 1\), got -"),
        (Images(tensor() * float("nan"), value_range=(0, 1)), "got nan to nan"),
        (PIXELS.astype(np.int64), "uint8 or floating-point, got int64"),
        (np.moveaxis(PIXELS, -1, 1), r"\(6, 6, 3\) for this base.*got \(3, 6, 6\)"),
        (tensor(random_pixels(5, 7, 7, 3)), r"got \(7, 7, 3\): resize"),
        (Listed([Image.fromarray(PIXELS[0]).convert("RGBA")]), r"got \(6, 6, 4\)"),
        (Listed([*PIXELS[:2], PIXELS[0][:5]]), r"got \(5, 6, 3\)"),
        (PIXELS[0, :, :, 0], r"got shape \(6, 6\)"),
        (torch.from_numpy(PIXELS[..., 0]), r"tensor \(N, C, H, W\) .*got shape \(5, 6, 6\)"),
        (PIXELS[:0], "at least one"),
        (Endless(), "a data set with a length, got a Endless"),
        (7, "got a int"),
        ({"image": PIXELS}, "got a dict"),
        (Listed([{"pixels": PIXELS[0]}]), "must have one of image, img, .*got pixels"),
        (Listed(["a.png"]), "or Pillow's, got a str"),
        (
            Images(PIXELS, labels=[0, 1]),
            r"labels in tdc_ray\.Images must have shape \(5,\).*\(2,\)",
        ),
        (Images(PIXELS, labels=[0.5] * 5), r"labels in .* must be whole numbers, got 0\.5"),
    ],
)
def test_what_is_not_clearly_images_is_refused_and_nothing_is_left(tmp_path, images, words):
    with pytest.raises(DataError, match=words):
        images_config(images, COLOUR, tmp_path, classes=False)
    assert list(tmp_path.iterdir()) == []
