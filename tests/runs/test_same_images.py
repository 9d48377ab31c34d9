import io

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from tdc_ray.config.data import DataConfig
from tdc_ray.data.load import images_fingerprint, load_dataset
from tdc_ray.errors import StorageError
from tdc_ray.runs.run import run
from tdc_ray.runs.same_images import (
    IMAGES_FILE,
    check_images,
    note_images,
    warn_of_other_images,
)
from tdc_ray.storage.files import read_json, write_json
from tests.images import folder_config, npz_config, random_pixels


def forget():
    """As in a later process."""
    load_dataset.cache_clear()
    images_fingerprint.cache_clear()


def add(folder, *names):
    for index, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random_pixels(8, 8, seed=index)).save(folder / name)


@pytest.fixture
def begun(tmp_path):
    """A run that began with two classes of a folder."""
    add(tmp_path / "data", "a/1.png", "b/1.png")
    data = folder_config(tmp_path / "data", labels_from_folders=True)
    note_images(tmp_path, data)
    forget()
    return data


def test_the_same_images_are_no_matter(tmp_path, begun, caplog):
    check_images(tmp_path, begun)
    warn_of_other_images(tmp_path, begun)
    assert not caplog.messages


def test_images_of_another_class_are_refused(tmp_path, begun, caplog):
    add(tmp_path / "data", "aa/1.png")
    message = (
        f"the images in {tmp_path}/data are not those at the first start: 2 images of 2 classes "
        "then, 3 images of 3 classes now."
    )
    with pytest.raises(StorageError, match=rf"^{message} Restore them to resume"):
        check_images(tmp_path, begun)
    warn_of_other_images(tmp_path, begun)
    assert caplog.messages == [f"{message} The results are of the former ones."]


def test_other_shards_are_warned_of(tmp_path, caplog):
    image = io.BytesIO()
    Image.new("L", (8, 8)).save(image, "PNG")
    path = tmp_path / "a.parquet"
    data = DataConfig(source="parquet", path=str(path), cache_dir=str(tmp_path / "cache"))
    for count in (1, 2):
        parquet.write_table(pa.table({"image": [image.getvalue()] * count}), path)
        forget()
        if count == 1:
            note_images(tmp_path, data)
    check_images(tmp_path, data)
    assert "1 images then, 2 images now. What was computed before" in caplog.messages[0]


def test_other_images_of_the_same_classes_are_warned_of(tmp_path, begun, caplog):
    add(tmp_path / "data", "a/2.png")
    check_images(tmp_path, begun)
    forget()
    (tmp_path / "data/a/2.png").rename(tmp_path / "data/b/2.png")
    (tmp_path / "data/a/1.png").rename(tmp_path / "data/a/0.png")
    (tmp_path / "data/b/2.png").unlink()
    check_images(tmp_path, begun)
    more, moved = caplog.messages
    assert "2 images of 2 classes then, 3 images of 2 classes now" in more
    assert "2 images of 2 classes, of which some are others, or were written or moved" in moved


def test_other_pixels_of_an_npz_file_are_refused(tmp_path):
    data, pixels = npz_config(tmp_path / "a.npz"), random_pixels(3, 8, 8)
    np.savez(tmp_path / "a.npz", images=pixels)
    note_images(tmp_path, data)
    forget()
    np.savez_compressed(tmp_path / "a.npz", images=pixels)
    check_images(tmp_path, data)
    forget()
    np.savez(tmp_path / "a.npz", images=255 - pixels)
    with pytest.raises(StorageError, match="3 images, of which some are others"):
        check_images(tmp_path, data)


def test_a_run_of_a_version_that_noted_nothing_resumes(tmp_path):
    add(tmp_path / "data", "1.png")
    check_images(tmp_path, folder_config(tmp_path / "data"))


def test_a_finished_run_needs_no_images(tmp_path, begun, caplog):
    for path in (tmp_path / "data").rglob("*.png"):
        path.unlink()
    warn_of_other_images(tmp_path, begun)
    assert not caplog.messages


def test_a_run_of_other_images_is_refused_before_any_work(smoke_config, tmp_path):
    note_images(tmp_path, smoke_config.data)
    path = tmp_path / IMAGES_FILE
    write_json(path, read_json(path) | {"num_classes": 9})
    with pytest.raises(StorageError, match=r"1797 images of 9 classes then, .* 10 classes now"):
        run(smoke_config, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == [IMAGES_FILE]
