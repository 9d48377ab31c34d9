import numpy as np
import pytest

from tdc_ray.reporting.grid import GAP, LEAST_SIDE, image_grid


@pytest.mark.parametrize("count", [1, 3, 4, 7, 16])
def test_every_pixel_of_a_tiny_image_is_a_square_in_its_place(count):
    images = np.random.default_rng(0).integers(0, 256, (count, 8, 6, 3), dtype=np.uint8)
    grid = image_grid(images)
    columns = max(1, round(count**0.5))
    rows = -(-count // columns)
    factor = (grid.shape[0] // rows - 2 * GAP) // 8
    assert max(grid.shape[:2]) >= LEAST_SIDE
    for number, image in enumerate(images):
        row, column = divmod(number, columns)
        top = row * (8 * factor + 2 * GAP) + GAP
        left = column * (6 * factor + 2 * GAP) + GAP
        shown = grid[top : top + 8 * factor, left : left + 6 * factor]
        assert np.array_equal(shown, np.kron(image, np.ones((factor, factor, 1), np.uint8)))


def test_images_that_are_large_enough_stay_as_they_are():
    images = np.full((4, 300, 300, 1), 7, dtype=np.uint8)
    grid = image_grid(images)
    assert grid.shape == (604, 604, 1)
    assert np.count_nonzero(grid == 7) == images.size
