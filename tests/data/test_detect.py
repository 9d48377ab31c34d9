import io
import tarfile

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from tdc_ray.config.data import DataConfig
from tdc_ray.data.detect import data_config
from tdc_ray.data.load import load_dataset
from tdc_ray.errors import ConfigError


def put_folder(folder):
    Image.new("RGB", (8, 8)).save(folder / "a.png")


def put_imagefolder(folder):
    put_folder(folder)
    (folder / "metadata.csv").write_text("file_name\na.png\n")


def put_npz(folder):
    np.savez(folder / "a.npz", images=np.zeros((1, 8, 8), np.uint8))


def encoded():
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    return buffer.getvalue()


def put_parquet(folder):
    (folder / "data").mkdir()
    parquet.write_table(pa.table({"image": [encoded()]}), folder / "data/a.parquet")


def put_webdataset(folder):
    with tarfile.open(folder / "a.tar", "w") as tar:
        info = tarfile.TarInfo("a.png")
        info.size = len(encoded())
        tar.addfile(info, io.BytesIO(encoded()))


@pytest.mark.parametrize(
    ("put", "source"),
    [
        (put_folder, "folder"),
        (put_imagefolder, "imagefolder"),
        (put_npz, "npz"),
        (put_parquet, "parquet"),
        (put_webdataset, "webdataset"),
    ],
)
def test_the_kind_of_data_is_found_out(tmp_path, put, source):
    put(tmp_path)
    (tmp_path / "README.md").write_text("# data")
    config = data_config(str(tmp_path), DataConfig(cache_dir=str(tmp_path / "cache")))
    assert (config.source, config.path) == (source, str(tmp_path))
    assert len(load_dataset(config)) == 1


def test_a_file_is_of_the_kind_that_its_suffix_says(tmp_path):
    for name, source in (("a.npz", "npz"), ("a.parquet", "parquet"), ("a.TAR", "webdataset")):
        (tmp_path / name).touch()
        assert data_config(str(tmp_path / name), DataConfig()).source == source


def test_data_of_several_kinds_is_refused_with_what_to_do(tmp_path):
    put_folder(tmp_path)
    put_parquet(tmp_path)
    message = rf"--data {tmp_path} holds data of several kinds, folder and parquet: .*--data\.so"
    with pytest.raises(ConfigError, match=message):
        data_config(str(tmp_path), DataConfig())
    (tmp_path / "images").mkdir()
    put_npz(tmp_path / "images")
    put_folder(tmp_path / "images")  # a.png is the grid of a.npz
    assert data_config(str(tmp_path / "images"), DataConfig()).source == "npz"
    Image.new("L", (8, 8)).save(tmp_path / "images/b.png")
    with pytest.raises(ConfigError, match="holds data of several kinds, npz and folder: "):
        data_config(str(tmp_path / "images"), DataConfig())
    (tmp_path / "metadata.parquet").touch()
    assert data_config(str(tmp_path / "data"), DataConfig()).source == "parquet"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "a.txt",
            r"--data must be digits or photos, .* got .*data, which holds these files: 1 \.txt\.$",
        ),
        (".hidden.png", r"got .*data, which holds these files: 1 hidden\.$"),
        ("a.zip", r"got .*, with a compressed file, .* one by one: unzip a\.zip\.$"),
        ("a.tar.gz", r"got .*, with a compressed file, .* one by one: gunzip a\.tar\.gz\.$"),
        ("a.TAR.ZST", r"got .*: unzstd a\.TAR\.ZST\.$"),
        ("data-0.arrow", r"got .*, with Arrow files and no state\.json: name a folder"),
    ],
)
def test_what_holds_no_data_is_refused_with_a_way_out(tmp_path, name, message):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / name).touch()
    with pytest.raises(ConfigError, match=message):
        data_config(str(folder), DataConfig())


def test_a_single_image_and_an_empty_folder_are_no_data(tmp_path):
    put_folder(tmp_path)
    (image,) = tmp_path.iterdir()
    with pytest.raises(ConfigError, match=r"a\.png, one image: name its folder\.$"):
        data_config(str(image), DataConfig())
    image.unlink()
    with pytest.raises(ConfigError, match=r", which holds no files\.$"):
        data_config(str(tmp_path), DataConfig())


def test_of_folders_that_are_splits_train_is_taken_and_that_is_said(tmp_path, caplog):
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            put_folder(tmp_path / split / name)
    config = data_config(
        str(tmp_path), DataConfig(labels_from_folders=True, source="folder", path="x")
    )
    assert config.path == str(tmp_path / "train")
    assert (len(load_dataset(config)), load_dataset(config).num_classes) == (2, 2)
    assert caplog.messages == [f"{tmp_path} holds splits: the images of train are taken"]
    put_folder(tmp_path / "test")
    assert data_config(str(tmp_path / "test"), DataConfig()).path == str(tmp_path / "test")
