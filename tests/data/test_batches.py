import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tdc_ray.config.data import DataConfig
from tdc_ray.data.batches import (
    augment,
    batches,
    fixed_batches,
    halves,
    held_out_split,
    to_minus_one_one,
)
from tdc_ray.data.dataset import ArrayImages
from tdc_ray.data.load import load_dataset
from tests.images import folder_config, random_pixels

# --- to the model ------------------------------------------------------------------------------


def test_pixels_are_brought_to_minus_one_and_one():
    images = torch.tensor([0, 51, 255], dtype=torch.uint8)
    torch.testing.assert_close(to_minus_one_one(images), torch.tensor([-1.0, -0.6, 1.0]))
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


def test_crops_keep_height_and_width():
    images = torch.arange(2 * 6 * 10, dtype=torch.uint8).view(2, 1, 6, 10)
    config = DataConfig(image_size=(6, 10), crop_padding=1)
    assert augment(images, config, generator()).shape == images.shape


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


# --- batches -----------------------------------------------------------------------------------


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


# --- held-out images ---------------------------------------------------------------------------

held_out_shares = st.floats(0, 0.5, exclude_min=True)


@given(st.integers(2, 300), held_out_shares, st.integers(0, 2**31 - 1))
def test_every_image_is_held_out_or_of_the_rest(num_images, share, seed):
    rest, held_out = held_out_split(numbered(num_images), share, seed)
    assert sorted([*rest, *held_out]) == list(range(num_images))
    assert len(rest) >= 1
    assert len(held_out) == max(1, round(share * num_images))


@given(held_out_shares, st.integers(0, 2**31 - 1))
def test_a_single_image_is_in_both_parts(share, seed):
    assert [list(part) for part in held_out_split(numbered(1), share, seed)] == [[0], [0]]


@given(st.integers(2, 300), held_out_shares, st.integers(0, 2**31 - 1))
def test_what_is_held_out_is_chosen_by_or_judged_by(num_images, share, seed):
    _, held_out = held_out_split(numbered(num_images), share, seed)
    chosen_by, judged_by = halves(held_out)
    if len(held_out) == 1:
        assert list(chosen_by) == list(judged_by) == list(held_out)
    else:
        assert [*chosen_by, *judged_by] == list(held_out)
        assert 0 <= len(chosen_by) - len(judged_by) <= 1


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
    for indices in (rest, held_out):
        num_steps = 2 * len(indices) // batch_size + 1
        stream = batches(
            dataset, indices=indices, batch_size=batch_size, seed=seed, num_steps=num_steps
        )
        seen = list(itertools.chain.from_iterable(numbers(stream)))
        for epoch in range(2):
            part = seen[epoch * len(indices) : (epoch + 1) * len(indices)]
            assert sorted(part) == sorted(indices)


@given(st.integers(2, 40), held_out_shares, st.integers(1, 70), st.integers(0, 2**31 - 1))
def test_fixed_batches_among_some_images_are_of_them_alone(num_images, share, count, seed):
    dataset = numbered(num_images)
    _, held_out = held_out_split(dataset, share, seed)
    stream = fixed_batches(dataset, count, 7, seed, indices=held_out)
    found = list(itertools.chain.from_iterable(numbers(stream)))
    assert len(found) == count
    first = found[: len(held_out)]
    assert len(set(first)) == len(first)
    assert set(found) <= set(held_out)


def test_batches_among_all_images_are_those_without_a_choice():
    dataset, common = numbered(30), {"batch_size": 8, "seed": 3, "num_steps": 9}
    everyone = numbers(batches(dataset, indices=range(30), **common))
    assert everyone == numbers(batches(dataset, **common))
    assert numbers(fixed_batches(dataset, 40, 8, 3, indices=range(30))) == numbers(
        fixed_batches(dataset, 40, 8, 3)
    )


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_dataset_smaller_than_a_batch_fills_it_again(tmp_path, count):
    for index in range(count):
        Image.new("L", (8, 8), index).save(tmp_path / f"{index}.png")
    dataset = load_dataset(folder_config(tmp_path, num_channels=1))
    rest, held_out = held_out_split(dataset, 0.1, seed=0)
    for indices in (rest, held_out, None):
        drawn = list(batches(dataset, indices=indices, batch_size=8, seed=0, num_steps=2))
        assert [images.shape for images, _ in drawn] == [(8, 1, 8, 8)] * 2
        seen = {int(image[0, 0, 0]) for images, _ in drawn for image in images}
        assert seen == set(range(count) if indices is None else indices)
    fixed = list(fixed_batches(dataset, 10, 8, 0, indices=rest))
    assert [len(images) for images, _ in fixed] == [8, 2]
