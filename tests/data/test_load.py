import pickle
from hashlib import md5
from typing import get_args, get_type_hints

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images
from torchvision.datasets import CIFAR10

from tdc_ray.config.data import DataConfig
from tdc_ray.data.detect import data_config
from tdc_ray.data.load import SOURCES, load_dataset
from tdc_ray.errors import ConfigError, DataError
from tests.images import everything, npz_config, random_pixels


def test_digits_are_scikit_learns_at_the_full_range():
    dataset = load_dataset(DataConfig())
    images, labels = everything(dataset)
    reference = load_digits()
    assert images.shape == (1797, 8, 8, 1)
    np.testing.assert_allclose(images[..., 0], reference.images * 255 / 16, atol=0.5)
    assert (images.min(), images.max()) == (0, 255)
    assert labels == reference.target.tolist()
    assert dataset.num_classes == 10


def test_digits_come_larger_and_in_colour_when_asked():
    images, _ = everything(load_dataset(DataConfig(image_size=16, num_channels=3)))
    assert images.shape == (1797, 16, 16, 3)
    assert np.array_equal(images[..., 0], images[..., 2])


def test_photos_are_squares_of_scikit_learns_with_six_classes():
    dataset = load_dataset(DataConfig(source="photos", image_size=16, num_channels=3))
    images, labels = everything(dataset)
    china, flower = load_sample_images().images
    assert images.shape == (2 * 52 * 79, 16, 16, 3)
    np.testing.assert_array_equal(images[79 + 2], china[8:24, 16:32])
    np.testing.assert_array_equal(images[-1], flower[408:424, 624:640])
    assert (labels[0], labels[-1], dataset.num_classes) == (0, 5, 6)
    assert labels == sorted(labels)


def test_a_path_that_is_named_like_a_bundled_source_must_be_written_as_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert data_config("photos", DataConfig()).source == "photos"
    folder = tmp_path / "photos"
    folder.mkdir()
    Image.fromarray(random_pixels(8, 8, 3)).save(folder / "a.png")
    with pytest.raises(ConfigError, match=r"--data photos is the name of .* write \./photos"):
        data_config("photos", DataConfig())
    assert data_config("./photos", DataConfig()).source == "folder"


def test_every_source_that_the_settings_name_can_be_opened():
    assert set(SOURCES) == set(get_args(get_type_hints(DataConfig)["source"]))


def test_a_dataset_is_loaded_once():
    assert load_dataset(DataConfig()) is load_dataset(DataConfig())


@pytest.mark.parametrize("source", ["npz", "folder", "cifar10"])
def test_a_missing_path_is_named_with_the_flag_to_set(tmp_path, source):
    config = DataConfig(source=source, path=str(tmp_path / "nowhere"))
    message = rf"data\.path {tmp_path}/nowhere does not exist \(data\.source {source}\).*--data"
    with pytest.raises(DataError, match=message):
        load_dataset(config)


def test_white_stays_white_in_grey(tmp_path):
    np.savez(tmp_path / "a.npz", images=np.full((1, 8, 8, 3), 255, np.uint8))
    images, _ = everything(load_dataset(npz_config(tmp_path / "a.npz")))
    assert np.all(images == 255)


def test_colours_become_grey_by_their_brightness(tmp_path):
    pixels = random_pixels(4, 8, 8, 3)
    np.savez(tmp_path / "a.npz", images=pixels)
    images, _ = everything(load_dataset(npz_config(tmp_path / "a.npz")))
    luma = pixels @ np.array([0.299, 0.587, 0.114])  # ITU-R 601-2
    np.testing.assert_allclose(images[..., 0], luma, atol=1.1)


@pytest.fixture
def cifar10(tmp_path, monkeypatch):
    """A little CIFAR-10 as torchvision unpacks it, whose checksums torchvision expects."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    pixels, labels = random_pixels(12, 32, 32, 3), [i % 10 for i in range(12)]

    def write(name, document):
        content = pickle.dumps(document)
        (folder / name).write_bytes(content)
        return [name, md5(content, usedforsecurity=False).hexdigest()]

    def batch(chosen):
        return {
            "data": pixels[chosen].transpose(0, 3, 1, 2).reshape(-1, 3072),
            "labels": labels[chosen],
        }

    train = [
        write(f"data_batch_{i + 1}", batch(slice(2 * i, 2 * i + 2))) for i in range(5)
    ]  # 10 images
    monkeypatch.setattr(CIFAR10, "train_list", train)
    monkeypatch.setattr(CIFAR10, "test_list", [write("test_batch", batch(slice(10, 12)))])
    name, checksum = write("batches.meta", {"label_names": [str(i) for i in range(10)]})
    meta = {"filename": name, "key": "label_names", "md5": checksum}
    monkeypatch.setattr(CIFAR10, "meta", meta)
    return tmp_path, pixels[:10], labels[:10]


def cifar10_config(path):
    return DataConfig(source="cifar10", path=str(path), image_size=32, num_channels=3)


def test_cifar10_gives_the_training_images_and_their_labels(cifar10):
    path, pixels, labels = cifar10
    dataset = load_dataset(cifar10_config(path))
    images, found = everything(dataset)
    assert np.array_equal(images, pixels)
    assert found == labels
    assert dataset.num_classes == 10


def test_a_damaged_cifar10_is_refused(cifar10):
    path, _, _ = cifar10
    with (path / "cifar-10-batches-py" / "data_batch_3").open("ab") as file:
        file.write(b"x")
    message = rf"data\.path {path} holds no CIFAR-10: .*{path}/cifar-10-batches-py.*corrupted"
    with pytest.raises(DataError, match=message):
        load_dataset(cifar10_config(path))


def test_a_folder_without_cifar10_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"holds no CIFAR-10: expected .*cifar-10-batches-py"):
        load_dataset(cifar10_config(tmp_path))
