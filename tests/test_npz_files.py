import numpy as np
import pytest

from tdc_ray.datasets import load_dataset
from tdc_ray.errors import DataError
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
    ("arrays", "message"),
    [
        ({"pixels": random_pixels(2, 8, 8), "y": 1}, "must hold images, arr_0 or data; it holds"),
        (
            {"images": np.zeros((2, 8, 8), np.float32)},
            r"images in .*a\.npz must be uint8, got float32",
        ),
        (
            {"images": random_pixels(2, 3, 8, 8)},
            r"images in .* must have shape \(N, H, W\) or .*, got \(2, 3, 8, 8\)",
        ),
        ({"images": random_pixels(8, 8)}, r"images in .* must have shape .*, got \(8, 8\)"),
        (
            {"images": random_pixels(2, 8, 8), "labels": np.arange(3)},
            r"labels in .* must have shape \(2,\), got \(3,\)",
        ),
        (
            {"data": random_pixels(2, 100)},
            r"data in .* must have shape \(N, 3 \* H \* H\), got \(2, 100\)",
        ),
        ({"data": random_pixels(2, 8, 12)}, r"data in .* must have shape .*, got \(2, 8, 12\)"),
        ({"images": random_pixels(0, 8, 8)}, r"data\.path .*a\.npz holds no image"),
        ({"images": np.array([None])}, r"a\.npz is no readable npz file: Object arrays"),
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
