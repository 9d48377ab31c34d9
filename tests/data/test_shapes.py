import io
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from tdc_ray.config.data import DataConfig
from tdc_ray.data.shapes import check_given, first_shape, stored_shapes
from tdc_ray.errors import ConfigError
from tests.images import folder_config, npz_config, random_pixels


def test_the_shape_of_the_first_images_is_theirs_as_they_are_stored(tmp_path):
    Image.fromarray(random_pixels(20, 30, 3)).save(tmp_path / "a.png")
    Image.fromarray(random_pixels(8, 8)).save(tmp_path / "b.png")
    np.savez(tmp_path / "a.npz", images=random_pixels(3, 12, 12))
    (tmp_path / "no.npz").write_bytes(b"no npz")
    assert first_shape(folder_config(tmp_path)) == (3, 20, 30)
    assert [shape for _, shape in stored_shapes(folder_config(tmp_path))] == [
        (3, 20, 30),
        (1, 8, 8),
    ]
    assert first_shape(npz_config(tmp_path / "a.npz")) == (1, 12, 12)
    image = io.BytesIO()
    Image.fromarray(random_pixels(6, 9)).save(image, "PNG")
    parquet.write_table(pa.table({"image": [image.getvalue()]}), tmp_path / "a.parquet")
    cache_dir, path = str(tmp_path / "cache"), str(tmp_path / "a.parquet")
    shards = DataConfig(source="parquet", path=path, cache_dir=cache_dir)
    assert list(stored_shapes(shards)) == [(f"{path}: row 0", (1, 6, 9))]
    assert first_shape(DataConfig(source="photos")) == (3, 16, 16)
    assert first_shape(npz_config(tmp_path / "no.npz")) is None  # loading says why
    assert first_shape(folder_config(tmp_path / "nowhere")) is None


def test_images_that_a_shape_nobody_gave_does_not_fit_are_refused(tmp_path):
    Image.fromarray(random_pixels(24, 24, 3)).save(tmp_path / "a.png")
    data = folder_config(tmp_path, image_size=8, num_channels=1)
    message = (
        rf"the first image in {tmp_path} is 24x24 in colour, .* learnt as 8x8 in grey\. "
        "Set --data.image-size 24 --data.num-channels 3"
    )
    for given in ((False, False), (True, False), (False, True)):
        with pytest.raises(ConfigError, match=message):
            check_given(data, has_size=given[0], has_channels=given[1])
    check_given(data, has_size=True, has_channels=True)
    fits = replace(data, image_size=24, num_channels=3)
    check_given(fits, has_size=False, has_channels=False)


def test_a_damaged_file_hides_no_shape(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no image")
    Image.new("RGB", (30, 20)).save(tmp_path / "b.png")
    assert first_shape(folder_config(tmp_path)) == (3, 20, 30)
