import itertools
import pickle
from hashlib import md5

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_digits
from torchvision.datasets import CIFAR10

from tdc_ray.data import augment, batches, fixed_batches, held_out_split, to_model_range
from tdc_ray.datasets import ArrayImages, load_dataset
from tdc_ray.errors import DataError
from tdc_ray.settings import DataConfig


def random_pixels(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def npz_config(path, *, image_size=8, num_channels=1):
    return DataConfig(
        source="npz", path=str(path), image_size=image_size, num_channels=num_channels
    )


def folder_config(path, *, image_size=8, num_channels=3):
    return DataConfig(
        source="folder", path=str(path), image_size=image_size, num_channels=num_channels
    )


def everything(dataset):
    """All images as (N, H, W, C), and all labels."""
    images, labels = dataset.__getitems__(range(len(dataset)))
    assert images.dtype == torch.uint8
    assert labels.dtype == torch.int64
    return images.permute(0, 2, 3, 1).numpy(), labels.tolist()


# --- digits ----------------------------------------------------------------------------------


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


def test_a_dataset_is_loaded_once():
    assert load_dataset(DataConfig()) is load_dataset(DataConfig())


# --- npz -------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("source", ["npz", "folder", "cifar10"])
def test_a_missing_path_is_named_with_the_flag_to_set(tmp_path, source):
    config = DataConfig(source=source, path=str(tmp_path / "nowhere"))
    message = rf"data\.path {tmp_path}/nowhere does not exist \(data\.source {source}\).*--data"
    with pytest.raises(DataError, match=message):
        load_dataset(config)


# --- folders of images -----------------------------------------------------------------------


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


def test_the_first_image_must_be_readable_before_any_work_starts(tmp_path):
    (tmp_path / "0.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=rf"{tmp_path}/0\.png is no readable image.*Mend or"):
        load_dataset(folder_config(tmp_path))


def test_a_later_image_that_cannot_be_read_is_named(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    noise = Image.fromarray(random_pixels(64, 64, 3))
    noise.save(tmp_path / "1.png")
    (tmp_path / "1.png").write_bytes((tmp_path / "1.png").read_bytes()[:500])  # cut short
    dataset = load_dataset(folder_config(tmp_path))
    with pytest.raises(DataError, match=rf"{tmp_path}/1\.png is no readable image"):
        dataset.__getitems__([0, 1])


def test_a_folder_without_images_is_refused_with_what_was_looked_for(tmp_path):
    (tmp_path / "notes.txt").write_text("no image")
    message = rf"data\.path {tmp_path} holds no image; looked for \.png"
    with pytest.raises(DataError, match=message):
        load_dataset(folder_config(tmp_path))


def test_a_file_is_no_folder(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    with pytest.raises(DataError, match=r"0\.png must be a folder of images"):
        load_dataset(folder_config(tmp_path / "0.png"))


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


# --- CIFAR-10 --------------------------------------------------------------------------------


@pytest.fixture
def cifar10(tmp_path, monkeypatch):
    """A little CIFAR-10 as torchvision unpacks it, and torchvision told of its checksums."""
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


# --- fingerprints ----------------------------------------------------------------------------


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


def test_a_folders_fingerprint_tells_files_and_shape(tmp_path):
    Image.fromarray(random_pixels(8, 8, 3)).save(tmp_path / "0.png")
    first = load_dataset(folder_config(tmp_path)).fingerprint()
    load_dataset.cache_clear()  # as in a later process
    assert load_dataset(folder_config(tmp_path)).fingerprint() == first
    assert load_dataset(folder_config(tmp_path, image_size=16)).fingerprint() != first
    Image.fromarray(random_pixels(8, 8, 3)).save(tmp_path / "1.png")
    load_dataset.cache_clear()
    assert load_dataset(folder_config(tmp_path)).fingerprint() != first


# --- to the model ----------------------------------------------------------------------------


def test_pixels_are_brought_to_minus_one_and_one():
    images = torch.tensor([0, 51, 255], dtype=torch.uint8)
    torch.testing.assert_close(to_model_range(images), torch.tensor([-1.0, -0.6, 1.0]))
    assert images.tolist() == [0, 51, 255]  # as it was


def some_images(*shape):
    return torch.from_numpy(random_pixels(*shape))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_without_flags_nothing_is_augmented():
    images = some_images(6, 3, 8, 8)
    assert torch.equal(augment(images, DataConfig(), generator()), images)


def test_horizontal_flip_mirrors_about_half_of_the_images_from_left_to_right():
    images = some_images(200, 3, 8, 8)
    flipped = augment(images, DataConfig(horizontal_flip=True), generator())
    same = (flipped == images).all(dim=(1, 2, 3))
    mirrored = (flipped == images.flip(-1)).all(dim=(1, 2, 3))
    assert torch.equal(same, ~mirrored)
    assert 60 < mirrored.sum() < 140


def test_crops_come_from_the_reflected_image():
    images, padding = some_images(40, 1, 8, 8), 2
    cropped = augment(images, DataConfig(crop_padding=padding), generator())
    assert cropped.shape == images.shape
    places = list(itertools.product(range(2 * padding + 1), repeat=2))
    taken = set()
    for before, after in zip(images[:, 0].numpy(), cropped[:, 0].numpy(), strict=True):
        padded = np.pad(before, padding, mode="reflect")
        found = [p for p in places if np.array_equal(padded[p[0] :, p[1] :][:8, :8], after)]
        assert len(found) == 1
        taken.update(found)
    assert len(taken) > 10  # of 25


def test_augmentation_follows_from_the_generator():
    config = DataConfig(horizontal_flip=True, crop_padding=2)
    images = some_images(20, 3, 8, 8)
    first = augment(images, config, generator(3))
    assert torch.equal(augment(images, config, generator(3)), first)
    assert not torch.equal(augment(images, config, generator(4)), first)


# --- batches ---------------------------------------------------------------------------------


def numbered(num_images):
    """A dataset whose labels are the images' numbers."""
    images = torch.zeros(num_images, 1, 4, 4, dtype=torch.uint8)
    images[:, 0, 0, 0] = torch.arange(num_images) % 256
    return ArrayImages(images, torch.arange(num_images))


def numbers(stream):
    """The images' numbers, batch by batch."""
    found = []
    for images, labels in stream:
        assert images[:, 0, 0, 0].tolist() == [label % 256 for label in labels.tolist()]
        found.append(labels.tolist())
    return found


@given(st.integers(1, 30), st.integers(1, 40), st.integers(0, 2**31 - 1), st.data())
def test_training_can_go_on_at_any_step(num_images, batch_size, seed, data):
    dataset = numbered(num_images)
    common = {"batch_size": batch_size, "seed": seed, "num_steps": 9}
    unbroken = numbers(batches(dataset, **common))
    assert [len(batch) for batch in unbroken] == [batch_size] * 9
    start = data.draw(st.integers(0, 9))
    assert numbers(batches(dataset, **common, start_step=start)) == unbroken[start:]


@given(st.integers(1, 30), st.integers(1, 5), st.integers(1, 6), st.integers(0, 2**31 - 1))
def test_the_shares_of_all_ranks_are_the_whole_batch(num_images, world_size, share, seed):
    dataset = numbered(num_images)
    common = {"batch_size": share * world_size, "seed": seed, "num_steps": 7}
    whole = numbers(batches(dataset, **common))
    ranks = [
        numbers(batches(dataset, **common, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    joined = [sum(shares, []) for shares in zip(*ranks, strict=True)]  # noqa: RUF017
    assert joined == whole
    assert all(len(batch) == share for rank in ranks for batch in rank)


@given(st.integers(1, 30), st.integers(1, 40), st.integers(0, 2**31 - 1))
def test_every_epoch_sees_each_image_exactly_once(num_images, batch_size, seed):
    num_steps = 3 * num_images // batch_size + 1
    stream = batches(numbered(num_images), batch_size=batch_size, seed=seed, num_steps=num_steps)
    seen = list(itertools.chain.from_iterable(numbers(stream)))
    assert len(seen) >= 3 * num_images
    for epoch in range(3):
        part = seen[epoch * num_images : (epoch + 1) * num_images]
        assert sorted(part) == list(range(num_images))


def test_every_epoch_has_an_order_of_its_own():
    first, second = numbers(batches(numbered(50), batch_size=50, seed=0, num_steps=2))
    assert first != second
    assert list(range(50)) not in (first, second)


def test_every_seed_has_an_order_of_its_own():
    one, other = (
        numbers(batches(numbered(50), batch_size=50, seed=seed, num_steps=1)) for seed in (0, 1)
    )
    assert one != other


def test_loader_processes_change_no_batch():
    common = {"batch_size": 4, "seed": 3, "num_steps": 5}
    alone = numbers(batches(numbered(10), **common))
    assert numbers(batches(numbered(10), **common, num_workers=1)) == alone


def test_no_steps_are_no_batches():
    assert numbers(batches(numbered(5), batch_size=2, seed=0, start_step=4, num_steps=4)) == []


def test_images_of_a_folder_can_be_batched(tmp_path):
    for index in range(3):
        Image.new("L", (8, 8), index).save(tmp_path / f"{index}.png")
    dataset = load_dataset(folder_config(tmp_path, num_channels=1))
    (images, _), *_ = batches(dataset, batch_size=3, seed=0, num_steps=1)
    assert sorted(images[:, 0, 0, 0].tolist()) == [0, 1, 2]


@given(st.integers(1, 30), st.integers(1, 70), st.integers(1, 20), st.integers(0, 2**31 - 1))
def test_fixed_batches_are_the_same_images_for_the_same_seed(num_images, count, batch_size, seed):
    dataset = numbered(num_images)
    found = numbers(fixed_batches(dataset, count, batch_size, seed))
    assert found == numbers(fixed_batches(dataset, count, batch_size, seed))
    assert all(len(batch) == batch_size for batch in found[:-1])
    flat = list(itertools.chain.from_iterable(found))
    assert len(flat) == count
    for first in range(0, count, num_images):  # over again only when all were given
        part = flat[first : first + num_images]
        assert len(set(part)) == len(part)


@given(st.integers(1, 30), st.integers(1, 70), st.integers(1, 20))
def test_fixed_batches_do_not_depend_on_their_size(num_images, count, batch_size):
    dataset = numbered(num_images)
    (together,) = numbers(fixed_batches(dataset, count, count, seed=5))
    split = numbers(fixed_batches(dataset, count, batch_size, seed=5))
    assert list(itertools.chain.from_iterable(split)) == together


def test_fixed_batches_of_other_seeds_are_other_images():
    one, other = (numbers(fixed_batches(numbered(50), 10, 10, seed)) for seed in (0, 1))
    assert one != other


# --- held-out images -------------------------------------------------------------------------

held_out_shares = st.floats(0, 0.5, exclude_min=True)


@given(st.integers(2, 300), held_out_shares, st.integers(0, 2**31 - 1))
def test_every_image_is_held_out_or_of_the_rest(num_images, share, seed):
    rest, held_out = held_out_split(numbered(num_images), share, seed)
    assert sorted([*rest, *held_out]) == list(range(num_images))
    assert len(rest) >= 1
    assert len(held_out) == max(1, round(share * num_images))


@given(held_out_shares, st.integers(0, 2**31 - 1))
def test_a_single_image_is_in_both_parts(share, seed):
    assert held_out_split(numbered(1), share, seed) == ([0], [0])


def test_which_images_are_held_out_follows_from_the_seed_alone():
    torch.manual_seed(1)
    one = held_out_split(numbered(100), 0.1, seed=3)
    torch.manual_seed(2)
    assert held_out_split(numbered(100), 0.1, seed=3) == one
    assert held_out_split(numbered(100), 0.1, seed=4) != one
    assert sorted(one[1]) != list(range(10))


@given(st.integers(2, 40), held_out_shares, st.integers(1, 40), st.integers(0, 2**31 - 1))
def test_batches_among_some_images_hold_each_of_them_once_an_epoch(
    num_images, share, batch_size, seed
):
    dataset = numbered(num_images)
    rest, held_out = held_out_split(dataset, share, seed)
    for among in (rest, held_out):
        num_steps = 2 * len(among) // batch_size + 1
        stream = batches(
            dataset, among=among, batch_size=batch_size, seed=seed, num_steps=num_steps
        )
        seen = list(itertools.chain.from_iterable(numbers(stream)))
        for epoch in range(2):
            part = seen[epoch * len(among) : (epoch + 1) * len(among)]
            assert sorted(part) == sorted(among)


@given(st.integers(2, 40), held_out_shares, st.integers(1, 70), st.integers(0, 2**31 - 1))
def test_fixed_batches_among_some_images_are_of_them_alone(num_images, share, count, seed):
    dataset = numbered(num_images)
    _, held_out = held_out_split(dataset, share, seed)
    stream = fixed_batches(dataset, count, 7, seed, among=held_out)
    found = list(itertools.chain.from_iterable(numbers(stream)))
    assert len(found) == count
    first = found[: len(held_out)]
    assert len(set(first)) == len(first)
    assert set(found) <= set(held_out)


def test_batches_among_all_images_are_those_without_a_choice():
    dataset, common = numbered(30), {"batch_size": 8, "seed": 3, "num_steps": 9}
    everyone = numbers(batches(dataset, among=range(30), **common))
    assert everyone == numbers(batches(dataset, **common))
    assert numbers(fixed_batches(dataset, 40, 8, 3, among=range(30))) == numbers(
        fixed_batches(dataset, 40, 8, 3)
    )
