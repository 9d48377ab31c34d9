import hashlib
import logging
import re
import struct
import sys

import numpy as np
import pytest
from PIL import Image

from tdc_ray.data.batches import batches
from tdc_ray.data.load import load_dataset
from tdc_ray.data.sources import folder
from tdc_ray.data.sources.folder import list_images
from tdc_ray.data.sources.walk import train_folder
from tdc_ray.errors import CorruptFileError, DataError
from tests.images import everything, folder_config, random_pixels


def test_a_folders_images_come_in_the_order_of_their_paths(tmp_path):
    pixels = random_pixels(3, 8, 8, 3)
    for name, image in zip(("b/0.PNG", "a/1.png", "c.bmp"), pixels, strict=True):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(image).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    dataset = load_dataset(folder_config(tmp_path))
    images, labels = everything(dataset)
    assert np.array_equal(images, pixels[[1, 0, 2]])  # a/1.png, b/0.PNG, c.bmp
    assert labels == [-1, -1, -1]
    assert dataset.num_classes is None


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".jpeg", ".webp", ".bmp"])
def test_every_usual_format_is_read(tmp_path, suffix):
    Image.new("RGB", (8, 8), (250, 120, 10)).save(tmp_path / f"one{suffix}")
    images, _ = everything(load_dataset(folder_config(tmp_path)))
    np.testing.assert_allclose(images[0, 4, 4].astype(int), [250, 120, 10], atol=8)  # lossy


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "1"])
@pytest.mark.parametrize("num_channels", [1, 3])
def test_images_of_any_mode_are_brought_to_grey_or_colour(tmp_path, mode, num_channels):
    Image.new("RGB", (8, 8), "white").convert(mode).save(tmp_path / "one.png")
    images, _ = everything(load_dataset(folder_config(tmp_path, num_channels=num_channels)))
    assert images.shape == (1, 8, 8, num_channels)
    assert np.all(images == 255)


def test_of_classes_with_splits_the_images_to_train_on_are_taken(tmp_path, caplog):
    for value, name in enumerate(("cat/train", "cat/test", "dog/train", "dog/val")):
        (tmp_path / name).mkdir(parents=True)
        Image.new("L", (8, 8), value).save(tmp_path / name / "a.png")
    dataset = load_dataset(folder_config(tmp_path, num_channels=1, labels_from_folders=True))
    images, labels = everything(dataset)
    assert (images[:, 0, 0, 0].tolist(), labels) == ([0, 2], [0, 1])
    assert dataset.left_out == {"of another split than train": 2}
    said = f"2 images in {tmp_path} are left out, being of another split than train"
    assert caplog.messages == [said]


@pytest.mark.parametrize(
    ("names", "num_classes"), [(("test", "train", "tram"), 3), (("test", "tram/train"), 2)]
)
def test_a_class_that_is_called_test_is_one_of_several(tmp_path, names, num_classes):
    for name in names:
        (tmp_path / name).mkdir(parents=True)
        Image.new("L", (8, 8)).save(tmp_path / name / "a.png")
    dataset = load_dataset(folder_config(tmp_path, labels_from_folders=True))
    assert (len(dataset), dataset.num_classes) == (len(names), num_classes)


def test_folders_that_link_to_each_other_are_looked_into_once(tmp_path):
    for name, other in (("a", "b"), ("b", "a")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "on").symlink_to(tmp_path / other)
    assert train_folder(tmp_path / "a") is None


def test_images_of_other_sizes_are_brought_to_size(tmp_path):
    for index, size in enumerate([(8, 8), (20, 20), (30, 10), (5, 9), (3, 3)]):
        Image.new("RGB", size, (200, 100, 50)).save(tmp_path / f"{index}.png")
    images, _ = everything(load_dataset(folder_config(tmp_path)))
    assert np.array_equal(images, np.broadcast_to([200, 100, 50], (5, 8, 8, 3)))


def test_the_square_is_cut_from_the_middle_of_the_longer_side(tmp_path):
    pixels = random_pixels(8, 14, 3)  # its shorter side has the size already
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    Image.fromarray(pixels.transpose(1, 0, 2)).save(tmp_path / "tall.png")
    images, _ = everything(load_dataset(folder_config(tmp_path)))
    assert np.array_equal(images[1], pixels[:, 3:11])
    assert np.array_equal(images[0], pixels[:, 3:11].transpose(1, 0, 2))


def test_the_order_of_any_names_is_that_of_sorted_paths(tmp_path):
    names = ("a/2.png", "a/10.png", "a-b/1.png", "a b/1.png", "a.png", "B/a/1.png", "B/a.jpg")
    for name in (*names, "ä/1.PNG", "a/.png", "a/notes.txt", "x.png/1.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    dataset = list_images(folder_config(tmp_path))
    found = [tmp_path / dataset.name(number) for number in range(len(dataset))]
    suffixes = (".png", ".jpg")
    every = (path for path in tmp_path.rglob("*") if path.suffix.lower() in suffixes)
    assert found == sorted(path for path in every if path.is_file())
    assert len(found) == 9


# --- links, and names that are nobody's data -------------------------------------------------


def dots(folder, *names):
    """Image i is i grey."""
    for index, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), index).save(folder / name)


def values(dataset):
    images, _ = everything(dataset)
    return images[:, 0, 0, 0].tolist()


def test_folders_and_files_that_are_links_are_read(tmp_path):
    dots(tmp_path, "data/cat/1.png", "elsewhere/dog/1.png", "elsewhere/2.png")
    (tmp_path / "data/dog").symlink_to("../elsewhere/dog")
    (tmp_path / "data/cat/2.png").symlink_to(tmp_path / "elsewhere/2.png")
    dataset = load_dataset(folder_config(tmp_path / "data", labels_from_folders=True))
    assert values(dataset) == [0, 2, 1]
    assert dataset.labels.tolist() == [0, 0, 1]


@pytest.mark.parametrize("target", [".", "..", "../..", "../../beside"])
def test_links_to_folders_that_they_lie_in_are_left_out_with_a_warning(tmp_path, caplog, target):
    dots(tmp_path, "data/a/1.png", "data/b/1.png", "other/1.png")
    (tmp_path / "beside").symlink_to(tmp_path)  # a link to what holds the folder
    (tmp_path / "data/b/back").symlink_to(target)
    dataset = load_dataset(folder_config(tmp_path / "data", labels_from_folders=True))
    assert values(dataset) == [0, 1]
    assert caplog.messages == [
        f"{tmp_path}/data/b/back is left out: it links to a folder that it lies in"
    ]


def test_folders_that_link_to_each_other_end(tmp_path):
    dots(tmp_path, "a/1.png", "b/1.png")
    (tmp_path / "a/other").symlink_to(tmp_path / "b")
    (tmp_path / "b/other").symlink_to(tmp_path / "a")
    assert values(load_dataset(folder_config(tmp_path))) == [0, 1, 1, 0]


@pytest.mark.parametrize("name", ["2.png", "dog", "loop.png"])
def test_a_link_to_nothing_is_refused_before_any_work(tmp_path, name):
    dots(tmp_path, "a/1.png")
    (tmp_path / "a" / name).symlink_to("loop.png")
    with pytest.raises(DataError, match=rf"^{tmp_path}/a/{name} is a link to nothing\. Mend or"):
        load_dataset(folder_config(tmp_path))


def test_hidden_names_and_those_of_systems_are_nobodys_data(tmp_path, caplog):
    hidden = (".ipynb_checkpoints/1.png", "__MACOSX/cat/._1.png", "@eaDir/1.png", "cat/.2.png")
    dots(tmp_path, "cat/1.png", "dog/1.png", *hidden)
    for name in (".DS_Store", "cat/Thumbs.db", "dog/desktop.ini"):
        (tmp_path / name).touch()
    (tmp_path / ".gone").symlink_to("nowhere")
    dataset = load_dataset(folder_config(tmp_path, labels_from_folders=True))
    assert values(dataset) == [0, 1]
    assert dataset.num_classes == 2
    assert not caplog.messages


def test_a_folder_that_is_itself_hidden_is_read(tmp_path):
    dots(tmp_path / ".data", "1.png")
    assert values(load_dataset(folder_config(tmp_path / ".data"))) == [0]


def test_files_of_other_kinds_are_counted_in_one_warning(tmp_path, caplog):
    dots(tmp_path, "a.png", "b.tif", "c.gif")
    for name in ("a.txt", "b.TXT", "c.heic", "README"):
        (tmp_path / name).touch()
    assert values(load_dataset(folder_config(tmp_path))) == [0, 1, 2]
    assert caplog.messages == [
        f"4 of 7 files in {tmp_path} are left out, being of kinds that are not read: "
        "2 .txt, 1 without a suffix, 1 .heic"
    ]


def test_files_of_any_name_are_read(tmp_path):
    names = ["[x] {y} %s.png", "a b/c\nd.PNG", "é/日本.JPEG", "weird\udcff.png"]
    dots(tmp_path, *sorted(names))
    dataset = load_dataset(folder_config(tmp_path))
    np.testing.assert_allclose(values(dataset), range(4), atol=1)
    assert len(dataset.fingerprint()) == 16


# --- labels ----------------------------------------------------------------------------------


def test_labels_are_the_subfolders_in_the_order_of_their_names(tmp_path):
    for index, name in enumerate(("n02/1.png", "n01/x/1.png", "n01/2.png", "n10/1.png")):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), index).save(tmp_path / name)
    dataset = load_dataset(folder_config(tmp_path, labels_from_folders=True))
    images, labels = everything(dataset)
    assert images[:, 0, 0, 0].tolist() == [2, 1, 0, 3]
    assert labels == [0, 0, 1, 2]
    assert dataset.num_classes == 3
    without = load_dataset(folder_config(tmp_path))
    assert everything(without)[1] == [-1] * 4
    assert dataset.fingerprint() != without.fingerprint()


def test_classes_without_an_image_are_refused_by_name(tmp_path):
    dots(tmp_path, "a/1.png", "c/1.png")
    for name in ("b", "d"):
        (tmp_path / name / "below").mkdir(parents=True)
    (tmp_path / "b/1.heic").touch()
    message = rf"^{tmp_path}/b, {tmp_path}/d must hold an image, being a class by .*Remove it"
    with pytest.raises(DataError, match=message):
        load_dataset(folder_config(tmp_path, labels_from_folders=True))
    assert len(load_dataset(folder_config(tmp_path))) == 2


def test_an_image_outside_of_all_subfolders_has_no_class(tmp_path):
    (tmp_path / "a").mkdir()
    for name in ("a/1.png", "b.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    message = rf"{tmp_path}/b\.png must lie in a subfolder, its class, for data\.labels_from_fo"
    with pytest.raises(DataError, match=message):
        load_dataset(folder_config(tmp_path, labels_from_folders=True))


# --- corrupt files ---------------------------------------------------------------------------


MORE_PROCESSES = "ignore:This DataLoader will create .* worker processes:UserWarning"
"""torch's warning on machines with fewer cores."""


def cut_short(path):
    Image.fromarray(random_pixels(64, 64, 3)).save(path)
    path.write_bytes(path.read_bytes()[:-100])


def bomb(path):
    """A bitmap that claims 60,000 x 60,000 pixels."""
    Image.new("RGB", (8, 8)).save(path, "BMP")
    content = bytearray(path.read_bytes())
    content[18:26] = struct.pack("<II", 60_000, 60_000)
    path.write_bytes(content)


def bad_chunk(path):
    Image.fromarray(random_pixels(256, 256, 3)).save(path, "PNG")  # in several chunks
    start, end = path.read_bytes().rsplit(b"IDAT", 1)
    path.write_bytes(start + b"I\x00AT" + end)


def numbered_folder(path, num_images, corrupt=()):
    """Image i is i grey; its class is its number."""
    for index in range(num_images):
        folder = path / f"{index:02d}"
        folder.mkdir(parents=True)
        if index in corrupt:
            cut_short(folder / "1.jpg")
        else:
            Image.new("L", (8, 8), index).save(folder / "1.png")


def numbered_config(path, **settings):
    return folder_config(path, num_channels=1, labels_from_folders=True, **settings)


@pytest.mark.parametrize(
    ("name", "damage", "reason"),
    [
        ("1.jpg", cut_short, "image file is truncated"),
        ("1.png", cut_short, "truncated"),
        ("1.png", lambda path: path.write_bytes(b""), "cannot identify image file"),
        ("1.png", lambda path: path.write_bytes(b"no image"), "cannot identify image file"),
        ("1.png", bad_chunk, "broken PNG file"),
        ("1.gif", lambda path: path.write_bytes(b"GIF89a"), "cannot identify|truncated"),
        ("1.tif", cut_short, "truncated"),
        ("1.bmp", bomb, "3600000000 pixels.* decompression bomb"),
    ],
)
def test_a_corrupt_file_is_named_and_the_next_image_takes_its_place(
    tmp_path, caplog, name, damage, reason
):
    for index in (0, 2):
        Image.new("L", (8, 8), index).save(tmp_path / f"{index}.png")
    damage(tmp_path / name)
    dataset = load_dataset(folder_config(tmp_path, max_corrupt=1))
    images, _ = everything(dataset)
    assert images[:, 0, 0, 0].tolist() == [0, 2, 2]
    everything(dataset)
    (warning,) = caplog.messages  # once
    assert re.match(rf"{tmp_path}/{name} is no readable image: .*{reason}", warning)
    with pytest.raises(CorruptFileError, match=rf"^{re.escape(warning.split('.')[0])}"):
        everything(load_dataset(folder_config(tmp_path, max_corrupt=0)))


def test_the_replacement_comes_with_its_own_label_and_the_last_ones_from_the_start(tmp_path):
    numbered_folder(tmp_path, 6, corrupt=(1, 2, 5))
    images, labels = everything(load_dataset(numbered_config(tmp_path)))
    assert labels == [0, 3, 3, 3, 4, 0]
    assert images[:, 0, 0, 0].tolist() == labels


@pytest.mark.filterwarnings(MORE_PROCESSES)
def test_training_that_goes_on_sees_the_same_images_despite_corrupt_files(tmp_path):
    numbered_folder(tmp_path, 10, corrupt=(3, 7))
    common = {"batch_size": 4, "seed": 1, "num_steps": 8}

    def labels(**more):
        load_dataset.cache_clear()  # as in another process, which has met no corrupt file yet
        dataset = load_dataset(numbered_config(tmp_path))
        return [label.tolist() for _, label in batches(dataset, **common, **more)]

    unbroken = labels()
    assert [labels(start_step=step) for step in (1, 5)] == [unbroken[1:], unbroken[5:]]
    assert labels(num_workers=2) == unbroken


@pytest.mark.filterwarnings(MORE_PROCESSES)
@pytest.mark.parametrize("num_workers", [0, 2])
def test_one_corrupt_file_more_than_allowed_is_an_error_that_names_all(tmp_path, num_workers):
    numbered_folder(tmp_path, 12, corrupt=(2, 5, 9))
    dataset = load_dataset(numbered_config(tmp_path, max_corrupt=2))
    common = {"batch_size": 1, "seed": 0, "num_steps": 12, "num_workers": num_workers}
    with pytest.raises(CorruptFileError) as raised:  # no loader process meets them all
        list(batches(dataset, **common))
    text = str(raised.value)
    assert f"With it 3 of the files in {tmp_path} are corrupt, and data.max_corrupt is 2: " in text
    assert {name for name in ("02", "05", "09") if f"{name}/1.jpg" in text} == {"02", "05", "09"}
    assert "Mend or remove them, or raise --data.max-corrupt." in text


@pytest.mark.slow
@pytest.mark.filterwarnings(MORE_PROCESSES)
def test_as_many_corrupt_files_as_allowed_are_named_once_by_all_loader_processes(tmp_path, capfd):
    numbered_folder(tmp_path, 12, corrupt=(2, 5, 9))
    dataset = load_dataset(numbered_config(tmp_path, max_corrupt=3))
    common = {"batch_size": 2, "seed": 0, "num_steps": 18, "num_workers": 2}
    handler = logging.StreamHandler(sys.stderr)
    logging.getLogger("tdc_ray").addHandler(handler)
    try:
        assert len(list(batches(dataset, **common))) == 18  # three epochs
    finally:
        logging.getLogger("tdc_ray").removeHandler(handler)
    assert capfd.readouterr().err.count("The next image takes its place.") == 3


def test_an_image_must_be_readable_before_any_work_starts(tmp_path):
    for name in ("0.png", "1.png"):
        (tmp_path / name).write_bytes(b"no image")
    message = rf"{tmp_path}/1\.png is no readable image.* No image in {tmp_path} can be\. Mend or"
    with pytest.raises(CorruptFileError, match=message):
        load_dataset(folder_config(tmp_path))


def test_grey_whose_white_is_unknown_is_refused_before_any_work(tmp_path):
    dots(tmp_path, "0.png", "1.png")
    Image.fromarray(random_pixels(8, 8).astype(np.float32)).save(tmp_path / "2.tif")
    with pytest.raises(DataError, match=rf"^{tmp_path}/2\.tif holds grey from \d+ to 2\d\d"):
        load_dataset(folder_config(tmp_path))


def test_one_such_image_among_many_is_refused_before_any_work(tmp_path):
    dots(tmp_path, *(f"{index:03}.png" for index in range(250)))
    Image.fromarray(random_pixels(8, 8).astype(np.float32)).save(tmp_path / "100a.tif")
    with pytest.raises(DataError, match=r"100a\.tif holds grey from"):
        load_dataset(folder_config(tmp_path))


def test_a_file_that_is_gone_is_no_corrupt_one(tmp_path):
    for name in ("0.png", "1.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    dataset = load_dataset(folder_config(tmp_path))
    (tmp_path / "1.png").unlink()
    with pytest.raises(DataError, match=rf"{tmp_path}/1\.png cannot be opened: .*No such file"):
        dataset.__getitems__([0, 1])


# --- what is no folder of images -------------------------------------------------------------


def test_a_folder_without_images_is_refused_with_what_was_looked_for(tmp_path):
    (tmp_path / "notes.txt").write_text("no image")
    message = rf"data\.path {tmp_path} holds no image, such as a \.png .* not read: 1 \.txt\."
    with pytest.raises(DataError, match=message):
        load_dataset(folder_config(tmp_path))


def test_a_file_is_no_folder(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    with pytest.raises(DataError, match=r"0\.png must be a folder of images"):
        load_dataset(folder_config(tmp_path / "0.png"))


def test_a_folders_fingerprint_tells_files_and_shape(tmp_path):
    Image.fromarray(random_pixels(8, 8, 3)).save(tmp_path / "0.png")
    first = load_dataset(folder_config(tmp_path)).fingerprint()
    load_dataset.cache_clear()  # as in a later process
    assert load_dataset(folder_config(tmp_path)).fingerprint() == first
    assert load_dataset(folder_config(tmp_path, image_size=16)).fingerprint() != first
    Image.fromarray(random_pixels(8, 8, 3)).save(tmp_path / "1.png")
    load_dataset.cache_clear()
    assert load_dataset(folder_config(tmp_path)).fingerprint() != first


def test_the_fingerprint_of_plain_images_is_that_of_earlier_versions(tmp_path):
    Image.fromarray(random_pixels(8, 8, 3)).save(tmp_path / "0.png")
    stat = (tmp_path / "0.png").stat()
    content = f"8 3{tmp_path.resolve()}/0.png {stat.st_size} {stat.st_mtime_ns}\n"
    expected = hashlib.sha256(content.encode()).hexdigest()[:16]
    assert list_images(folder_config(tmp_path)).fingerprint() == expected


def test_the_fingerprint_of_images_that_were_once_read_wrongly_is_another(tmp_path, monkeypatch):
    Image.fromarray(random_pixels(8, 8, 4)).save(tmp_path / "0.png")
    found = list_images(folder_config(tmp_path)).fingerprint()
    monkeypatch.setattr(folder, "is_plain", lambda _path: True)
    assert list_images(folder_config(tmp_path)).fingerprint() != found
