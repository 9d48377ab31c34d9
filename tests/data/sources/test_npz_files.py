import os
import shutil
import tracemalloc
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest

from tdc_ray.config.data import DataConfig
from tdc_ray.data.batches import batches
from tdc_ray.data.dataset import ArrayImages
from tdc_ray.data.detect import data_config
from tdc_ray.data.load import load_dataset
from tdc_ray.data.sources import npz
from tdc_ray.data.sources.npz_files import NpzImages
from tdc_ray.errors import CorruptFileError, DataError
from tests.images import everything, npz_config, random_pixels


def test_npz_with_images_and_labels(tmp_path):
    pixels = random_pixels(5, 8, 8, 3)
    np.savez(tmp_path / "a.npz", images=pixels, labels=np.array([4, 3, 2, 1, 0], np.uint8))
    dataset = load_dataset(npz_config(tmp_path / "a.npz", num_channels=3))
    images, labels = everything(dataset)
    assert np.array_equal(images, pixels)
    assert labels == [4, 3, 2, 1, 0]
    assert dataset.num_classes == 5


def test_grey_images_in_npz_need_no_axis_for_channels(tmp_path):
    pixels = random_pixels(5, 8, 8)
    np.savez(tmp_path / "a.npz", images=pixels)
    images, _ = everything(load_dataset(npz_config(tmp_path / "a.npz")))
    assert np.array_equal(images[..., 0], pixels)


def test_npz_as_openais_samples_without_labels(tmp_path):
    pixels = random_pixels(5, 8, 8, 3)
    np.savez(tmp_path / "a.npz", pixels)  # numpy names it arr_0
    dataset = load_dataset(npz_config(tmp_path / "a.npz", num_channels=3))
    images, labels = everything(dataset)
    assert np.array_equal(images, pixels)
    assert labels == [-1] * 5
    assert dataset.num_classes is None


def test_npz_as_openais_samples_with_labels(tmp_path):
    np.savez(tmp_path / "a.npz", random_pixels(3, 8, 8, 3), np.array([7, 8, 9]))
    _, labels = everything(load_dataset(npz_config(tmp_path / "a.npz", num_channels=3)))
    assert labels == [7, 8, 9]


def test_imagenet_64_batches_are_read_in_the_order_of_their_numbers(tmp_path):
    pixels = random_pixels(6, 8, 8, 3)
    rows = pixels.transpose(0, 3, 1, 2).reshape(6, 3 * 8 * 8)  # as ImageNet-64 has them
    labels = np.array([1, 2, 3, 4, 5, 1000])
    for name, chosen in (
        ("train_data_batch_10", slice(4, 6)),
        ("train_data_batch_1", slice(0, 2)),
        ("train_data_batch_2", slice(2, 4)),
    ):
        np.savez(tmp_path / f"{name}.npz", data=rows[chosen], labels=labels[chosen])
    images, found = everything(load_dataset(npz_config(tmp_path, num_channels=3)))
    assert np.array_equal(images, pixels)
    assert found == [0, 1, 2, 3, 4, 999]  # the files count from 1


def test_labels_of_some_files_only_are_no_labels(tmp_path):
    np.savez(tmp_path / "1.npz", images=random_pixels(2, 8, 8), labels=np.array([1, 2]))
    np.savez(tmp_path / "2.npz", images=random_pixels(2, 8, 8))
    assert load_dataset(npz_config(tmp_path)).num_classes is None


@pytest.mark.parametrize(
    "labels",
    [
        np.array([[2], [0], [1]]),
        np.array([2, 0, 1], np.int8),
        np.array([2, 0, 1], ">u4"),
        np.array([2.0, 0.0, 1.0], np.float32),
        np.array([[2.0], [0.0], [1.0]]),
        np.array([[0, 0, 1], [1, 0, 0], [0, 1, 0]], np.uint8),
        np.array([[0, 0, 1], [1, 0, 0], [0, 1, 0]], bool),
        np.eye(3)[[2, 0, 1]],
    ],
)
def test_labels_in_any_usual_form_are_class_numbers(tmp_path, labels):
    np.savez(tmp_path / "a.npz", images=random_pixels(3, 8, 8), labels=labels)
    dataset = load_dataset(npz_config(tmp_path / "a.npz"))
    assert everything(dataset)[1] == [2, 0, 1]
    assert dataset.num_classes == 3


def test_labels_that_are_true_or_false_are_two_classes(tmp_path):
    labels = np.array([True, False, True])
    np.savez(tmp_path / "a.npz", images=random_pixels(3, 8, 8), labels=labels)
    assert everything(load_dataset(npz_config(tmp_path / "a.npz")))[1] == [1, 0, 1]


@pytest.mark.parametrize(
    ("labels", "found"),
    [
        (np.array(["cat", "dog", "cow"]), "whole numbers, got text"),
        (np.array([b"cat", b"dog", b"cow"]), "whole numbers, got text"),
        (np.array(["cat", "dog", None]), "whole numbers, got object"),
        (np.array([0, 1, 2j]), "whole numbers, got complex128"),
        (np.array([0, 0.5, 1]), r"whole numbers, got 0\.5"),
        (np.array([0, np.nan, 1]), "whole numbers, got nan"),
        (np.array([0, np.inf, 1]), "whole numbers, got inf"),
        (np.array([0, 1, 2**40]), "below 1048576, got 1099511627776"),
        (np.array([[1, 1], [1, 0], [0, 1]]), r"one-hot of shape \(3, classes\), got \(3, 2\)"),
        (np.array([[0, 1, 2]]), r"shape \(3,\), .*, got \(1, 3\)"),
        (np.array(1), r"shape \(3,\), .*, got \(\)"),
    ],
)
def test_labels_of_another_kind_are_refused_by_what_they_are(tmp_path, labels, found):
    for name in ("1", "2"):  # it is no damage of one file
        np.savez(tmp_path / f"{name}.npz", images=random_pixels(3, 8, 8), labels=labels)
    with pytest.raises(DataError, match=rf"^labels in {tmp_path}/1\.npz must .*{found}"):
        load_dataset(npz_config(tmp_path))


def test_labels_below_0_are_left_out_with_a_warning(tmp_path, caplog):
    labels = np.array([1, -1, 0])
    np.savez(tmp_path / "a.npz", images=random_pixels(3, 8, 8), labels=labels)
    assert load_dataset(npz_config(tmp_path / "a.npz")).num_classes is None
    assert caplog.messages == [f"labels of {tmp_path}/a.npz are left out: 1 of 3 are below 0"]


def test_classes_without_an_image_are_named_once(tmp_path, caplog):
    path = tmp_path / "a.npz"
    np.savez(path, images=random_pixels(3, 8, 8), labels=np.array([1, 4, 1]))
    for _ in range(2):
        load_dataset.cache_clear()
        assert load_dataset(npz_config(path)).num_classes == 5
    (message,) = caplog.messages
    assert message.startswith(f"3 of 5 classes of {path} have no image: 0, 2, 3. Number ")


def test_hidden_npz_files_are_passed_over_and_upper_case_ones_read(tmp_path):
    np.savez(tmp_path / "2.npz", images=random_pixels(3, 8, 8))
    (tmp_path / "2.npz").rename(tmp_path / "1.NPZ")
    (tmp_path / "._1.npz").write_bytes(b"of a Macintosh")
    assert len(load_dataset(npz_config(tmp_path))) == 3
    assert data_config(str(tmp_path), DataConfig()).source == "npz"
    assert data_config(str(tmp_path / "1.NPZ"), DataConfig()).source == "npz"


@pytest.mark.parametrize(
    ("train", "test"),
    [(("x_train", "y_train"), "x_test"), (("train_images", "train_labels"), "test_images")],
)
def test_the_training_images_of_keras_and_medmnist_are_taken(tmp_path, caplog, train, test):
    pixels, labels = random_pixels(6, 8, 8), np.arange(6)[:, None] % 3
    arrays = dict(zip(train, (pixels, labels), strict=True))
    np.savez(tmp_path / "a.npz", **{test: random_pixels(2, 8, 8)}, **arrays)
    dataset = load_dataset(npz_config(tmp_path / "a.npz"))
    assert (len(dataset), dataset.num_classes) == (6, 3)
    assert dataset.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert f"a.npz: the images of {train[0]} are taken" in caplog.text


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (
            {"pixels": random_pixels(2, 8, 8), "y": 1},
            "must hold images in one of images, arr_0, .*; it holds",
        ),
        (
            {"images": np.zeros((2, 8, 8), np.float32)},
            r"images in .*a\.npz must be uint8, got float32",
        ),
        (
            {"images": random_pixels(2, 3, 8, 8)},
            r"images in .* must have shape \(N, H, W\) or .*, got \(2, 3, 8, 8\)",
        ),
        ({"images": random_pixels(2, 0, 8)}, r"images in .* must have pixels, got shape \(2, 0,"),
        ({"images": random_pixels(8, 8)}, r"images in .* must have shape .*, got \(8, 8\)"),
        (
            {"images": random_pixels(2, 8, 8), "labels": np.arange(3)},
            r"labels in .* must have shape \(2,\), \(2, 1\), or be one-hot .*, got \(3,\)",
        ),
        ({"images": random_pixels(2, 8, 8, 4)}, r"images\[\.\.\., :3\]"),
        ({"images": random_pixels(8, 8, 3)}, r"got \(8, 8, 3\)\. Save images\[None\]"),
        ({"images": random_pixels(2, 3, 8, 8)}, r"images\.transpose\(0, 2, 3, 1\)"),
        ({"images": np.zeros((2, 8, 8), np.float16)}, r"got float16.*0 to 1, .*-1 to 1"),
        ({"images": np.zeros((2, 8, 8), np.uint16)}, r"got uint16.*images / 257.* if it is 65535"),
        ({"images": np.zeros((2, 8, 8), bool)}, r"got bool\. Save 255 \*"),
        (
            {"data": random_pixels(2, 100)},
            r"data in .* must have shape \(N, 3 \* H \* H\), got \(2, 100\)",
        ),
        ({"data": random_pixels(2, 8, 12)}, r"data in .* must have shape .*, got \(2, 8, 12\)"),
        ({"images": random_pixels(0, 8, 8)}, r"data\.path .*a\.npz holds no image"),
        ({"images": np.array([None])}, r"images in .*a\.npz must be uint8, got object"),
    ],
)
def test_npz_arrays_of_another_kind_are_refused_with_what_they_must_be(tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(DataError, match=message):
        load_dataset(npz_config(tmp_path / "a.npz"))


def compressed_and_damaged(path):
    np.savez_compressed(path, images=random_pixels(9, 8, 8))
    content = bytearray(path.read_bytes())
    content[100:140] = b"x" * 40
    path.write_bytes(content)


def cut_short(path):
    np.savez(path, images=random_pixels(9, 8, 8))
    path.write_bytes(path.read_bytes()[:300])


def one_bit_off(path):
    np.savez(path, images=random_pixels(9, 8, 8))
    content = bytearray(path.read_bytes())
    content[300] ^= 1
    path.write_bytes(content)


def npy_under_another_name(path):
    with path.open("wb") as file:
        np.save(file, random_pixels(2, 8, 8))


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda path: path.write_bytes(b"no npz"), id="text"),
        pytest.param(
            cut_short,
            id="cut short",
        ),
        pytest.param(one_bit_off, id="one bit off"),
        pytest.param(
            lambda path: path.write_bytes(b""),
            id="empty",
        ),
        pytest.param(
            compressed_and_damaged,
            id="compressed",
        ),
        pytest.param(
            npy_under_another_name,
            id="npy",
        ),
    ],
)
def test_a_damaged_npz_file_is_named(tmp_path, damage):
    path = tmp_path / "a.npz"
    damage(path)
    with pytest.raises(DataError, match=f"^{path} is no readable npz file"):
        load_dataset(npz_config(path))


@pytest.mark.parametrize("other", [(3, 9, 9), (3, 8, 8, 3)])
def test_npz_files_of_other_shapes_are_named(tmp_path, other):
    np.savez(tmp_path / "1.npz", images=random_pixels(3, 8, 8))
    np.savez(tmp_path / "2.npz", images=random_pixels(*other))
    with pytest.raises(DataError, match=r"2\.npz"):
        load_dataset(npz_config(tmp_path))


def test_a_folder_without_npz_files_is_refused(tmp_path):
    with pytest.raises(DataError, match=rf"data\.path {tmp_path} holds no \.npz file"):
        load_dataset(npz_config(tmp_path))


def test_equal_content_has_an_equal_fingerprint(tmp_path):
    pixels, labels = random_pixels(3, 8, 8), np.arange(3)
    changed = pixels.copy()
    changed[1, 2, 3] ^= 1
    np.savez(tmp_path / "a.npz", images=pixels, labels=labels)
    np.savez(tmp_path / "same.npz", arr_0=pixels[..., None], arr_1=labels)
    np.savez(tmp_path / "pixel.npz", images=changed, labels=labels)
    np.savez(tmp_path / "labels.npz", images=pixels, labels=labels + 1)
    names = ("a", "same", "pixel", "labels")
    found = {
        name: load_dataset(npz_config(tmp_path / f"{name}.npz")).fingerprint() for name in names
    }
    assert found["a"] == found["same"]
    assert len({found["a"], found["pixel"], found["labels"]}) == 3


# --- corrupt files among several -------------------------------------------------------------


@pytest.fixture(params=["in memory", "too large"])
def any_size(request, monkeypatch):
    """Whether npz files pass for too large for memory."""
    if request.param == "too large":
        monkeypatch.setattr(npz, "IN_MEMORY_BYTES", 0)


def labelled(path, *, seed=0, first_label=0, save=np.savez):
    labels = np.arange(first_label, first_label + 4)
    save(path, images=random_pixels(4, 8, 8, seed=seed), labels=labels)


@pytest.mark.usefixtures("any_size")
@pytest.mark.parametrize(
    "damage",
    [cut_short, one_bit_off, compressed_and_damaged, npy_under_another_name],
)
def test_a_corrupt_npz_file_of_several_is_named_and_left_out(tmp_path, caplog, damage):
    for index in (1, 3):
        labelled(tmp_path / f"{index}.npz", seed=index, first_label=10 * index)
    damage(tmp_path / "2.npz")
    config = npz_config(tmp_path, max_corrupt=1, cache_dir=str(tmp_path / "cache"))
    images, labels = everything(load_dataset(config))
    assert np.array_equal(images[:4, ..., 0], random_pixels(4, 8, 8, seed=1))
    assert np.array_equal(images[4:, ..., 0], random_pixels(4, 8, 8, seed=3))
    assert labels == [10, 11, 12, 13, 30, 31, 32, 33]
    warning, empty_classes = caplog.messages
    assert empty_classes.startswith("26 of 34 classes")
    assert str(tmp_path / "2.npz") in warning
    assert warning.endswith("Its images are left out.")


@pytest.mark.usefixtures("any_size")
def test_one_corrupt_npz_file_more_than_allowed_is_an_error_that_names_all(tmp_path):
    labelled(tmp_path / "1.npz")
    cut_short(tmp_path / "2.npz")  # found when it is opened
    one_bit_off(tmp_path / "3.npz")  # found when its pixels are read
    config = npz_config(tmp_path, max_corrupt=1, cache_dir=str(tmp_path / "cache"))
    message = (
        r"^2 of 3 npz files are corrupt, and data\.max_corrupt, which counts files, is 1: "
        r".*/2\.npz .*/3\.npz .*or raise --data\.max-corrupt"
    )
    with pytest.raises(CorruptFileError, match=message):
        load_dataset(config)


def test_npz_files_of_which_none_can_be_read_are_an_error(tmp_path):
    for name in ("1.npz", "2.npz"):
        cut_short(tmp_path / name)
    with pytest.raises(CorruptFileError, match=r"^2 of 2 npz files are .*remove them\.$"):
        load_dataset(npz_config(tmp_path))  # no other limit would do


# --- too large for memory --------------------------------------------------------------------


@pytest.fixture
def too_large(monkeypatch, tmp_path):
    """All npz files pass for too large; gives a maker of configs whose cache is empty."""
    monkeypatch.setattr(npz, "IN_MEMORY_BYTES", 0)

    def config(path, **settings):
        load_dataset.cache_clear()  # as in another process
        return npz_config(path, cache_dir=str(tmp_path / "cache"), **settings)

    return config


def cached(tmp_path):
    return sorted(
        path for path in (tmp_path / "cache" / "npz").iterdir() if path.suffix != ".lock"
    )


def test_npz_files_are_held_in_memory_only_where_they_are_small(tmp_path, monkeypatch):
    np.savez(tmp_path / "a.npz", images=random_pixels(5, 8, 8))
    monkeypatch.setattr(npz, "IN_MEMORY_BYTES", 5 * 8 * 8)
    config = npz_config(tmp_path / "a.npz", cache_dir=str(tmp_path / "cache"))
    assert isinstance(load_dataset(config), ArrayImages)
    larger = npz_config(tmp_path / "a.npz", image_size=9, cache_dir=str(tmp_path / "cache"))
    assert isinstance(load_dataset(larger), NpzImages)  # 5 x 9 x 9 bytes would be


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize(("image_size", "num_channels"), [(8, 3), (8, 1), (5, 3), (11, 1)])
def test_images_read_one_by_one_are_those_held_in_memory(
    tmp_path, too_large, monkeypatch, save, image_size, num_channels
):
    pixels = random_pixels(9, 8, 8, 3)
    rows = pixels.transpose(0, 3, 1, 2).reshape(9, -1)
    save(tmp_path / "1.npz", data=rows[:4], labels=np.arange(1, 5))
    save(tmp_path / "2.npz", images=pixels[4:5], labels=np.array([4]))
    save(tmp_path / "3.npz", pixels[5:], np.arange(5, 9))
    shape = {"image_size": image_size, "num_channels": num_channels}
    dataset = load_dataset(too_large(tmp_path, **shape))
    assert isinstance(dataset, NpzImages)
    monkeypatch.setattr(npz, "IN_MEMORY_BYTES", 2**20)
    in_memory = load_dataset(too_large(tmp_path, **shape))
    assert isinstance(in_memory, ArrayImages)
    for chosen in (range(9), [8, 0, 4, 4, 3, 7]):
        (images, labels), (others, other_labels) = (
            each.__getitems__(chosen) for each in (dataset, in_memory)
        )
        assert np.array_equal(images, others)
        assert np.array_equal(labels, other_labels)
    assert dataset.num_classes == in_memory.num_classes == 9
    assert len(dataset) == 9


def test_images_without_labels_are_read_one_by_one_in_loader_processes_too(tmp_path, too_large):
    np.savez_compressed(tmp_path / "a.npz", images=random_pixels(30, 8, 8))
    dataset = load_dataset(too_large(tmp_path / "a.npz"))
    assert dataset.num_classes is None
    common = {"batch_size": 8, "seed": 0, "num_steps": 5}
    alone = list(batches(dataset, **common))
    beside = list(batches(dataset, **common, num_workers=1))
    for (images, labels), (others, _) in zip(alone, beside, strict=True):
        assert np.array_equal(images, others)
        assert labels.tolist() == [-1] * 8


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_memory_holds_no_more_than_a_block_and_a_batch(tmp_path, too_large, save):
    rows = np.zeros((2000, 3 * 64 * 64), np.uint8)  # 25 MB
    rows[:, :5] = 7
    save(tmp_path / "a.npz", data=rows, labels=np.arange(1, 2001))
    del rows
    config = too_large(tmp_path / "a.npz", image_size=64, num_channels=3)
    tracemalloc.start()
    try:
        for images, _ in batches(load_dataset(config), batch_size=50, seed=0, num_steps=40):
            assert images[:, 0, 0, 4].tolist() == [7] * 50
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 8e6


def test_compressed_images_are_unpacked_once_and_others_are_read_where_they_are(
    tmp_path, too_large
):
    labelled(tmp_path / "1.npz", save=np.savez_compressed)
    labelled(tmp_path / "2.npz", save=np.savez)
    load_dataset(too_large(tmp_path))
    copy, note = cached(tmp_path)
    assert np.array_equal(np.load(copy), random_pixels(4, 8, 8))
    assert note.stat().st_size == 0
    before = [path.stat().st_mtime_ns for path in (copy, note)]
    everything(load_dataset(too_large(tmp_path)))
    assert [path.stat().st_mtime_ns for path in cached(tmp_path)] == before


def test_processes_that_start_together_unpack_once(tmp_path, too_large):
    labelled(tmp_path / "a.npz", save=np.savez_compressed)
    config = too_large(tmp_path / "a.npz")
    with ProcessPoolExecutor(3) as pool:
        found = list(pool.map(fingerprint_of, [config] * 6))
    assert len(set(found)) == 1
    assert len(cached(tmp_path)) == 1  # nothing unfinished beside it


def fingerprint_of(config):
    npz.IN_MEMORY_BYTES = 0
    dataset = load_dataset(config)
    everything(dataset)
    return dataset.fingerprint()


def test_an_npz_file_that_was_replaced_is_unpacked_again(tmp_path, too_large):
    for seed in (1, 2):
        labelled(tmp_path / "a.npz", seed=seed, save=np.savez_compressed)
        os.utime(tmp_path / "a.npz", ns=(seed, seed))
        images, _ = everything(load_dataset(too_large(tmp_path / "a.npz")))
        assert np.array_equal(images[..., 0], random_pixels(4, 8, 8, seed=seed))


def test_a_copy_that_was_cut_short_is_noticed_and_made_again(tmp_path, too_large):
    labelled(tmp_path / "a.npz", save=np.savez_compressed)
    dataset = load_dataset(too_large(tmp_path / "a.npz"))
    (copy,) = cached(tmp_path)
    os.truncate(copy, copy.stat().st_size - 1)
    assert len(dataset.__getitems__([0, 1, 2])[0]) == 3
    with pytest.raises(DataError, match=rf"^{copy} has been cut short\. Start again"):
        dataset.__getitems__([0, 3])
    everything(load_dataset(too_large(tmp_path / "a.npz")))
    copy.unlink()
    with pytest.raises(DataError, match=rf"^{copy} can no longer be read: .*No such file"):
        dataset.__getitems__([0])


@pytest.mark.parametrize("damage", [one_bit_off, compressed_and_damaged, cut_short])
def test_damaged_files_leave_nothing_in_the_cache(tmp_path, too_large, damage):
    damage(tmp_path / "a.npz")
    for _ in range(2):
        with pytest.raises(CorruptFileError, match=rf"^{tmp_path}/a\.npz is no readable npz file"):
            load_dataset(too_large(tmp_path / "a.npz"))
    assert not (tmp_path / "cache").exists() or cached(tmp_path) == []


def test_a_cache_that_cannot_be_written_is_named_with_the_flag_to_set(tmp_path, too_large):
    labelled(tmp_path / "a.npz", save=np.savez_compressed)
    (tmp_path / "cache").write_text("no folder")
    message = rf"data\.cache_dir {tmp_path}/cache cannot take .*: .*Set --data\.cache-dir"
    with pytest.raises(DataError, match=message):
        load_dataset(too_large(tmp_path / "a.npz"))


def test_what_is_unpacked_must_fit_on_the_disk(tmp_path, too_large, monkeypatch):
    labelled(tmp_path / "a.npz", save=np.savez_compressed)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100))
    with pytest.raises(DataError, match=r"data\.cache_dir .* cannot take .*0\.0 GB are free.*Set"):
        load_dataset(too_large(tmp_path / "a.npz"))


def test_images_in_fortrans_order_must_fit_into_memory(tmp_path, too_large, monkeypatch):
    pixels = np.asfortranarray(random_pixels(5, 8, 8))
    np.savez(tmp_path / "a.npz", images=pixels)
    with pytest.raises(DataError, match=r"a\.npz is too large for memory .*ascontiguousarray"):
        load_dataset(too_large(tmp_path / "a.npz"))
    monkeypatch.setattr(npz, "IN_MEMORY_BYTES", 2**20)
    images, _ = everything(load_dataset(too_large(tmp_path / "a.npz")))
    assert np.array_equal(images[..., 0], pixels)


def test_fingerprints_of_large_files_tell_content_and_shape(tmp_path, too_large):
    labelled(tmp_path / "a.npz", save=np.savez)
    labelled(tmp_path / "same.npz", save=np.savez_compressed)
    labelled(tmp_path / "pixels.npz", seed=1)
    labelled(tmp_path / "labels.npz", first_label=1)
    names = ("a", "same", "pixels", "labels")
    found = {
        name: load_dataset(too_large(tmp_path / f"{name}.npz")).fingerprint() for name in names
    }
    assert found["a"] == found["same"]
    larger = load_dataset(too_large(tmp_path / "a.npz", image_size=9)).fingerprint()
    assert len({*found.values(), larger}) == 4
