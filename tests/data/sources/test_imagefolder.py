import json

import numpy as np
import pytest
from PIL import Image

from tdc_ray.config.data import DataConfig
from tdc_ray.data.load import load_dataset
from tdc_ray.data.sources.imagefolder import list_images
from tdc_ray.errors import DataError
from tests.images import everything


def config_of(path, **settings):
    return DataConfig(source="imagefolder", path=str(path), **settings)


def dots(folder, *names):
    """Image i is i grey."""
    for index, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), index).save(folder / name)


def rows(path, *documents):
    path.write_text("".join(json.dumps(document) + "\n" for document in documents))


def values(dataset):
    images, labels = everything(dataset)
    return list(zip(images[:, 0, 0, 0].tolist(), labels, strict=True))


def test_metadata_lines_name_images_and_their_labels(tmp_path):
    dots(tmp_path, "a.png", "sub/b.png", "c.png")
    rows(
        tmp_path / "metadata.jsonl",
        {"file_name": "./sub/b.png", "label": 3, "text": "a caption"},
        {"file_name": "a.png", "label": 0},
    )
    dataset = load_dataset(config_of(tmp_path))
    assert values(dataset) == [(0, 0), (1, 3)]
    assert dataset.num_classes == 4
    assert dataset.left_out == {"not named by metadata": 1}


def test_a_table_of_names_numbers_the_classes_in_their_order(tmp_path):
    dots(tmp_path, "a.png", "b.png", "c.png")
    lines = ("file_name,label", "a.png,dog", '"b.png",cat', "c.png,2")
    (tmp_path / "metadata.csv").write_text("\ufeff" + "\r\n".join(lines))  # as Excel saves it
    dataset = load_dataset(config_of(tmp_path))
    assert values(dataset) == [(0, 2), (1, 1), (2, 0)]  # 2 cat dog
    assert dataset.num_classes == 3


@pytest.mark.parametrize("has_label", [False, True])
def test_without_a_label_for_every_image_there_are_none(tmp_path, caplog, has_label):
    dots(tmp_path, "a.png", "b.png")
    rows(
        tmp_path / "metadata.jsonl",
        {"file_name": "a.png"} | ({"label": 1} if has_label else {}),
        {"file_name": "b.png"},
    )
    dataset = load_dataset(config_of(tmp_path))
    assert values(dataset) == [(0, -1), (1, -1)]
    assert dataset.num_classes is None
    warning = f"labels of {tmp_path} are left out: 1 of 2 have none"
    assert caplog.messages == ([warning] if has_label else [])


@pytest.mark.parametrize("where", ["each", "root"])
def test_of_splits_the_one_to_train_on_is_read(tmp_path, where):
    dots(tmp_path, "train/a.png", "test/b.png", "train/c.png")
    if where == "root":
        names = ("train/a.png", "train/c.png", "test/b.png")
        rows(tmp_path / "metadata.jsonl", *({"file_name": name} for name in names))
    else:
        rows(tmp_path / "train/metadata.jsonl", {"file_name": "a.png"}, {"file_name": "c.png"})
        rows(tmp_path / "test/metadata.jsonl", {"file_name": "b.png"})
    dataset = load_dataset(config_of(tmp_path))
    assert [value for value, _ in values(dataset)] == [0, 2]
    assert dataset.left_out == {"of another split than train": 1}


def test_an_image_named_train_makes_no_split(tmp_path):
    dots(tmp_path, "train_1.png", "tram.png")
    rows(tmp_path / "metadata.jsonl", {"file_name": "train_1.png"}, {"file_name": "tram.png"})
    assert len(load_dataset(config_of(tmp_path))) == 2


@pytest.mark.parametrize(
    "name", ["../secret.png", "/etc/a.png", "a/../../b.png", "", None, 3, "."]
)
def test_a_path_that_leads_out_of_the_folder_is_refused(tmp_path, name):
    dots(tmp_path, "data/a.png", "secret.png")
    rows(tmp_path / "data/metadata.jsonl", {"file_name": name})
    message = r"file_name in line 1 of .*metadata\.jsonl must be the path of an image below its"
    with pytest.raises(DataError, match=message):
        load_dataset(config_of(tmp_path / "data"))


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (
            "metadata.jsonl",
            '{"file_name": "b.png"}\n',
            r"names 1 images that are not there.*b\.png",
        ),
        ("metadata.jsonl", '{"file_name": "a.png"}\n' * 2, r"names a\.png twice"),
        ("metadata.jsonl", '{"file_name": "a.png"', r"metadata\.jsonl cannot be read: "),
        ("metadata.jsonl", "[" * 100_000, r"metadata\.jsonl cannot be read: "),
        ("metadata.jsonl", "[1]\n", r"cannot be read: line 1 is no object"),
        ("metadata.jsonl", '{"file_name": "a.png", "label": 1.5}', r"label in line 1 .* got 1\.5"),
        (
            "metadata.jsonl",
            '{"file_name": "a.png", "label": 9999999999}',
            r"must be below 1048576",
        ),
        ("metadata.csv", "name\na.png\n", r"file_name in line 2 .* got None"),
        ("metadata.csv", b"file_name\n\xff.png", r"metadata\.csv cannot be read: 'utf-8'"),
    ],
)
def test_malformed_metadata_is_refused_by_its_line(tmp_path, file, content, message):
    dots(tmp_path, "a.png")
    (tmp_path / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message):
        load_dataset(config_of(tmp_path))


def test_a_folder_without_metadata_is_refused_with_the_source_for_it(tmp_path):
    dots(tmp_path, "a.png")
    with pytest.raises(DataError, match=r"holds no metadata\.jsonl or .*--data\.source folder"):
        load_dataset(config_of(tmp_path))


def test_corrupt_images_are_named_and_counted_as_those_of_other_folders(tmp_path, caplog):
    dots(tmp_path, "a.png", "b.png")
    (tmp_path / "b.png").write_bytes(b"no image")
    rows(tmp_path / "metadata.jsonl", *({"file_name": f"{n}.png", "label": 0} for n in "ab"))
    assert values(load_dataset(config_of(tmp_path, max_corrupt=1))) == [(0, 0), (0, 0)]
    assert f"{tmp_path}/b.png is no readable image" in caplog.messages[0]
    with pytest.raises(DataError, match=r"data\.max_corrupt is 0: b\.png"):
        everything(load_dataset(config_of(tmp_path, max_corrupt=0)))


def test_the_fingerprint_tells_labels(tmp_path):
    dots(tmp_path, "a.png", "b.png")
    found = set()
    for label in (0, 1, 1):
        documents = ({"file_name": name, "label": label} for name in ("a.png", "b.png"))
        rows(tmp_path / "metadata.jsonl", *documents)
        found.add(list_images(config_of(tmp_path)).fingerprint())
    assert len(found) == 2
    assert np.all([len(name) == 16 for name in found])
