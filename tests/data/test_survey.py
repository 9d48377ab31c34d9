import re
import struct
import zlib

import numpy as np
import pytest
from PIL import ExifTags, Image

from tdc_ray.config.data import DataConfig
from tdc_ray.data import survey as survey_module
from tdc_ray.data.load import load_dataset
from tdc_ray.data.summary import summary_lines
from tdc_ray.data.survey import cached_survey, fitting_shape, images_summary, log_summary, survey
from tdc_ray.errors import CorruptFileError
from tests.images import folder_config, npz_config, random_pixels


@pytest.fixture(autouse=True)
def no_cache():
    images_summary.cache_clear()
    cached_survey.cache_clear()
    load_dataset.cache_clear()


def save(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


def png_of_16_bits(pixels):
    """A PNG of 16 bits a colour, which Pillow does not write."""

    def chunk(kind, content):
        checksum = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)

    height, width, _ = pixels.shape
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels.astype(np.uint16) * 257)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def of_sizes(folder, *sizes):
    """Images of these heights and widths, in colour."""
    for index, size in enumerate(sizes):
        save(folder / f"{index:03d}.png", np.zeros((*size, 3), np.uint8))
    return fitting_shape(survey(folder_config(folder)))


def test_what_is_done_to_images_is_counted(tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    save(tmp_path / "as-it-is.png", random_pixels(8, 8, 3))
    save(tmp_path / "grey.png", random_pixels(8, 8))
    save(tmp_path / "deep.png", random_pixels(8, 8).astype(np.uint16))
    save(tmp_path / "transparent.png", random_pixels(16, 16, 4))
    save(tmp_path / "wide.png", random_pixels(8, 12, 3))
    save(tmp_path / "small-and-turned.jpg", random_pixels(4, 6, 3), exif=exif)
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "animated.webp", save_all=True, append_images=frames[1:])
    Image.new("CMYK", (8, 8)).save(tmp_path / "print.jpg")
    Image.new("LAB", (8, 8)).save(tmp_path / "lab.tif")
    (tmp_path / "deep-colour.png").write_bytes(png_of_16_bits(random_pixels(8, 8, 3)))
    for name in ("bad.png", "notes.txt", ".hidden"):
        (tmp_path / name).write_text("no image")
    summary = images_summary(folder_config(tmp_path))
    assert (summary.num_images, summary.num_looked_at, summary.num_classes) == (11, 11, None)
    assert summary.shape == (3, 8, 8)
    assert summary.left_out == {".txt": 1, "hidden": 1}
    assert summary.unreadable == ("bad.png",)
    assert summary.changed == {
        "turned upright": 1,
        "the first of several pictures": 1,
        "scaled to 8 bits": 2,
        "put on white": 1,
        "converted to RGB": 2,
        "grey made colour": 2,
        "enlarged": 1,
        "reduced": 1,
        "cropped to the middle": 2,
    }
    lines = summary_lines("there", summary)
    assert lines[0] == "11 images in there, read as folder, learnt as 8x8 in colour"
    assert re.fullmatch(r"left out: 1 hidden, 1 \.txt", lines[1])
    assert "2 cropped to the middle" in lines[2]
    assert lines[3].endswith("place: 1, bad.png")


def test_files_are_read_once_for_the_settings_and_the_summary(tmp_path, monkeypatch):
    of_sizes(tmp_path, (8, 8), (8, 8))
    monkeypatch.setattr(survey_module, "read_header", lambda _: pytest.fail("it was read again"))
    assert images_summary(folder_config(tmp_path, num_channels=1)).changed == {"made grey": 2}


def test_more_unreadable_images_than_may_be_are_refused_before_work(tmp_path):
    for index in range(3):
        (tmp_path / f"bad{index}.png").write_bytes(b"no image")
    of_sizes(tmp_path, (8, 8))
    assert images_summary(folder_config(tmp_path, max_corrupt=3)).num_unreadable == 3
    message = r"bad0\.png .* 3 of the files .*data\.max_corrupt is 2: bad0\.png, .*Mend or remove"
    with pytest.raises(CorruptFileError, match=message):
        images_summary(folder_config(tmp_path, max_corrupt=2))


def test_each_image_is_counted_once_for_each_thing_done_to_it(tmp_path):
    for index, size in enumerate([(8, 8), (8, 9), (16, 16), (20, 10), (7, 7), (3, 30)]):
        save(tmp_path / f"{index}.png", random_pixels(*size))
    config = folder_config(tmp_path, num_channels=1)
    assert images_summary(config).changed == {
        "cropped to the middle": 3,
        "reduced": 2,
        "enlarged": 2,
    }


def test_colour_that_is_learnt_in_grey_is_said(tmp_path):
    save(tmp_path / "a.png", random_pixels(8, 8, 3))
    changed = images_summary(folder_config(tmp_path, num_channels=1)).changed
    assert changed == {"made grey": 1}


def test_of_very_many_images_some_are_looked_at_and_that_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(survey_module, "MOST_HEADERS", 4)
    of_sizes(tmp_path, *[(8, 8)] * 7, (9, 9))
    summary = images_summary(folder_config(tmp_path))
    assert (summary.num_images, summary.num_looked_at) == (8, 4)
    assert summary_lines("there", summary)[1] == "changed of 4 that were looked at: none"


def test_arrays_and_bundled_images_are_all_alike(tmp_path, caplog):
    caplog.set_level("INFO")
    np.savez(tmp_path / "a.npz", images=random_pixels(3, 12, 10, 3), labels=np.arange(3))
    log_summary(npz_config(tmp_path / "a.npz", image_size=16))
    assert caplog.messages == [
        f"3 images of 3 classes in {tmp_path}/a.npz, read as npz, learnt as 16x16 in grey",
        "changed: 3 made grey, 3 enlarged, 3 cropped to the middle",
    ]
    log_summary(DataConfig())  # as they are
    assert len(caplog.messages) == 2
    log_summary(DataConfig(image_size=16))
    assert caplog.messages[3] == "changed: 1797 enlarged"


def test_the_part_of_a_split_that_is_not_taken_is_said(tmp_path):
    of_sizes(tmp_path / "train", (8, 8))
    of_sizes(tmp_path / "test", (8, 8))
    left_out = images_summary(folder_config(tmp_path / "train")).left_out
    assert left_out == {"folders of other splits than train (test)": 1}


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ([(8, 8)] * 3, (3, 8, 8)),
        ([(24, 40)] * 3, (3, 24, 40)),  # the model decides what it takes of that
        ([(28, 28)] * 3, (3, 28, 28)),
        ([(37, 37)] * 3, (3, 36, 36)),
        ([(5, 5)] * 3, (3, 8, 8)),
        ([(256, 256)] * 2, (3, 256, 256)),
        ([(300, 300)] * 2, (3, 64, 64)),
        ([(32, 32)] * 19 + [(500, 700)], (3, 32, 32)),  # one that is unlike the others
        ([(100, 200), (300, 90), (80, 80)], (3, 64, 64)),
        ([(48, 64)] * 19 + [(64, 48)], (3, 48, 64)),
        ([(480, 640)] * 2, (3, 48, 64)),  # as large as mixed ones are brought to
        ([(100, 200), (301, 600), (90, 180)], (3, 32, 64)),  # sizes differ, the aspect does not
        ([(40, 20), (44, 22), (60, 30)], (3, 40, 20)),
        ([(64, 62), (66, 64), (128, 126)], (3, 60, 60)),  # nearly square
        ([(20, 24), (21, 24), (22, 30)], (3, 20, 20)),
    ],
)
def test_the_shape_is_what_the_images_have_or_nearly_all_can_be_cut_to(tmp_path, sizes, shape):
    assert of_sizes(tmp_path, *sizes) == shape


def test_images_are_grey_if_all_are(tmp_path):
    save(tmp_path / "a.png", random_pixels(8, 8))
    save(tmp_path / "b.png", random_pixels(8, 8).astype(np.uint16))
    assert fitting_shape(survey(folder_config(tmp_path))) == (1, 8, 8)
    save(tmp_path / "c.png", random_pixels(8, 8, 3))
    assert fitting_shape(survey(folder_config(tmp_path))) == (3, 8, 8)


def test_without_a_readable_image_there_is_no_shape(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no image")
    assert fitting_shape(survey(folder_config(tmp_path))) is None
