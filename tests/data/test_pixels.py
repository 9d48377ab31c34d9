import pytest
import torch

from tdc_ray.config.data import DataConfig
from tdc_ray.data.pixels import covering_size, to_size


@pytest.mark.parametrize(
    ("stored", "size", "covering"),
    [
        ((16, 16), (8, 8), (8, 8)),
        ((20, 30), (10, 10), (10, 15)),
        ((30, 20), (10, 10), (15, 10)),
        ((48, 64), (24, 32), (24, 32)),
        ((48, 64), (8, 16), (12, 16)),
        ((64, 48), (8, 16), (21, 16)),
        ((7, 9), (16, 8), (16, 20)),
    ],
)
def test_an_image_covers_what_it_is_brought_to_by_one_side_exactly(stored, size, covering):
    assert covering_size(stored, size) == covering


def test_images_are_cut_to_the_middle_of_a_shape_that_is_no_square():
    rows = torch.arange(12, dtype=torch.uint8)[:, None].expand(12, 16)
    (cut,) = to_size(rows[None, None], DataConfig(image_size=(8, 16)))
    assert cut.shape == (1, 8, 16)
    assert cut[0, :, 0].tolist() == list(range(2, 10))
    columns = torch.arange(16, dtype=torch.uint8).expand(1, 1, 8, 16)
    (cut,) = to_size(columns, DataConfig(image_size=(8, 12), num_channels=3))
    assert cut.shape == (3, 8, 12)
    assert cut[0, 0].tolist() == list(range(2, 14))
