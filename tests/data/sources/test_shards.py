import io
import json
import shutil
import tarfile
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from tdc_ray.config.data import DataConfig
from tdc_ray.data.batches import batches
from tdc_ray.data.load import load_dataset
from tdc_ray.errors import CorruptFileError, DataError
from tests.images import everything


@pytest.fixture
def config_of(tmp_path):
    def make(source, path, **settings):
        cache_dir = str(tmp_path / "cache")
        return DataConfig(source=source, path=str(path), cache_dir=cache_dir, **settings)

    return make


def encoded(value, kind="PNG", mode="L", size=(8, 8)):
    """An image of one grey."""
    buffer = io.BytesIO()
    Image.new("L", size, value).convert(mode).save(buffer, kind)
    return buffer.getvalue()


def write_tar(path, members, mode="w"):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def write_parquet(path, columns, kinds=None, **options):
    """``kinds`` are Hugging Face's, by column."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(columns)
    if kinds:
        features = {name: {"_type": kind} for name, kind in kinds.items()}
        document = json.dumps({"info": {"features": features}})
        table = table.replace_schema_metadata({"huggingface": document})
    parquet.write_table(table, path, **options)


def structs(*contents):
    return [{"bytes": content, "path": "/etc/passwd"} for content in contents]


def values(dataset):
    images, labels = everything(dataset)
    return list(zip(images[:, 0, 0, 0].tolist(), labels, strict=True))


# --- tar files -------------------------------------------------------------------------------


def test_samples_of_tar_files_are_images_with_their_labels(tmp_path, config_of):
    write_tar(
        tmp_path / "data/shard-1.tar",
        [
            ("x/b.cls", b"2\n"),
            ("x/b.png", encoded(20)),
            ("x/c.JPG", encoded(30, "JPEG")),
            ("x/c.json", json.dumps({"caption": "c", "label": 1}).encode()),
        ],
    )
    write_tar(
        tmp_path / "data/shard-0.tar",
        [("a.seg.png", encoded(10)), ("a.txt", b"words"), ("a.cls", b"0"), (".b.png", b"")],
    )
    dataset = load_dataset(config_of("webdataset", tmp_path / "data"))
    assert values(dataset) == [(10, 0), (20, 2), (30, 1)]
    assert dataset.num_classes == 3
    assert dataset.left_out == {".txt": 1, "hidden": 1}


def test_what_lies_in_hidden_and_system_folders_of_tar_files_is_no_data(tmp_path, config_of):
    folders = ("__MACOSX/", ".git/", "x/@eaDir/y/")
    members = [(f"{folder}{i}.png", encoded(9)) for i, folder in enumerate(folders)]
    write_tar(tmp_path / "a.tar", [*members, ("./x/a.png", encoded(1))])
    dataset = load_dataset(config_of("webdataset", tmp_path / "a.tar"))
    assert values(dataset) == [(1, -1)]
    assert dataset.left_out == {"hidden": 3}


def test_further_images_of_a_sample_are_said_with_what_to_do(tmp_path, config_of, caplog):
    write_tar(tmp_path / "a.tar", [(f"2024.01.{i}.png", encoded(i)) for i in range(5)])
    dataset = load_dataset(config_of("webdataset", tmp_path / "a.tar"))
    assert (len(dataset), dataset.left_out) == (1, {"another image of its sample": 4})
    (message,) = caplog.messages
    assert message.startswith(f"4 images of {tmp_path}/a.tar are left out, 1 are taken: ")
    assert "ends at its first dot" in message


def test_a_single_tar_file_and_names_as_labels(tmp_path, config_of):
    samples = [(f"{i}.{end}", content) for i in range(3) for end, content in (
        ("png", encoded(i)), ("cls", b"dog" if i % 2 else b"cat"),
    )]  # fmt: skip
    write_tar(tmp_path / "a.tar", samples)
    assert values(load_dataset(config_of("webdataset", tmp_path / "a.tar"))) == [
        (0, 0),
        (1, 1),
        (2, 0),
    ]


def test_nothing_of_a_tar_file_is_extracted_and_no_link_is_followed(tmp_path, config_of):
    (tmp_path / "secret.png").write_bytes(encoded(99))
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for name, kind in (("a.png", tarfile.SYMTYPE), ("b.png", tarfile.LNKTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, str(tmp_path / "secret.png")
            tar.addfile(info)
        info = tarfile.TarInfo("../../outside/c.png")
        info.size = len(encoded(3))
        tar.addfile(info, io.BytesIO(encoded(3)))
    before = sorted(tmp_path.rglob("*"))
    dataset = load_dataset(config_of("webdataset", path))
    assert values(dataset) == [(3, -1)]
    assert dataset.left_out == {"no plain file": 2}
    new = set(tmp_path.rglob("*")) - set(before)
    assert all(tmp_path / "cache" in (one, *one.parents) for one in new)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:700],
        lambda content: content[:1024] + b"x" * 512 + content[1536:],
        lambda content: b"no tar file" * 100,
        lambda content: b"",
    ],
)
def test_a_damaged_tar_file_is_refused_by_name(tmp_path, config_of, damage):
    write_tar(tmp_path / "a.tar", [(f"{i}.png", encoded(i)) for i in range(3)])
    content = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(damage(content))
    message = rf"{tmp_path}/a\.tar is no readable tar file: .*Fetch or write it again"
    with pytest.raises(CorruptFileError, match=message):
        load_dataset(config_of("webdataset", tmp_path / "a.tar"))
    assert not list(tmp_path.glob("cache/shards/*.npz"))


def test_a_compressed_tar_file_is_refused_with_what_to_do(tmp_path, config_of):
    write_tar(tmp_path / "a.tar", [("a.png", encoded(0))], mode="w:gz")
    with pytest.raises(CorruptFileError, match="a compressed one must be uncompressed"):
        load_dataset(config_of("webdataset", tmp_path / "a.tar"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b"{", r"a\.tar: a\.json is no JSON"),
        ("a.json", b"[" * 10_000, r"a\.json is no JSON"),
        ("a.json", b'{"label": [1]}', r"the label in a\.json must be .* got \[1\]"),
        ("a.cls", b"1" * (2**20 + 1), r"a\.cls is too large for a label"),
    ],
)
def test_a_malformed_label_is_refused_by_its_file(tmp_path, config_of, name, content, message):
    write_tar(tmp_path / "a.tar", [("a.png", encoded(0)), (name, content)])
    with pytest.raises(DataError, match=message):
        load_dataset(config_of("webdataset", tmp_path / "a.tar"))


def test_labels_of_shards_that_are_numbers_and_names_are_refused(tmp_path, config_of):
    for index, label in enumerate((b"1", b"cat")):
        members = [("a.png", encoded(0)), ("a.cls", label)]
        write_tar(tmp_path / f"data/{index}.tar", members)
    with pytest.raises(DataError, match="must be all numbers or all names, got both"):
        load_dataset(config_of("webdataset", tmp_path / "data"))


# --- parquet files ---------------------------------------------------------------------------


@pytest.mark.parametrize("is_struct", [True, False])
def test_rows_of_parquet_files_are_images_with_their_labels(tmp_path, config_of, is_struct):
    contents = [encoded(i) for i in range(5)]
    image = structs(*contents) if is_struct else contents
    columns = {"id": [0] * 5, "image": image, "label": [2, 0, 1, 0, 2]}
    write_parquet(tmp_path / "a.parquet", columns, row_group_size=2)
    dataset = load_dataset(config_of("parquet", tmp_path / "a.parquet"))
    assert values(dataset) == [(0, 2), (1, 0), (2, 1), (3, 0), (4, 2)]
    assert dataset.num_classes == 3


def test_of_splits_of_shards_the_one_to_train_on_is_read(tmp_path, config_of):
    for name, value in (("train-1-of-2", 2), ("test-0-of-1", 9), ("train-0-of-2", 1)):
        write_parquet(tmp_path / f"data/{name}.parquet", {"image": structs(encoded(value))})
    dataset = load_dataset(config_of("parquet", tmp_path))
    assert values(dataset) == [(1, -1), (2, -1)]
    assert dataset.left_out == {"shards of another split than train": 1}


def test_hugging_faces_own_notes_say_which_columns_hold_images_and_classes(tmp_path, config_of):
    columns = {
        "thumbnail": structs(encoded(9)),
        "photo": structs(encoded(1)),
        "fine": [4],
        "label_text": ["cat"],
    }
    kinds = {"photo": "Image", "fine": "ClassLabel", "label_text": "Value"}
    write_parquet(tmp_path / "a.parquet", columns, kinds)
    assert values(load_dataset(config_of("parquet", tmp_path))) == [(1, 4)]


@pytest.mark.parametrize(
    "labels", [pa.array(["b", "a", "b"]).dictionary_encode(), [True, False, True]]
)
def test_categories_and_truth_values_are_labels(tmp_path, config_of, labels):
    contents = [encoded(value) for value in range(3)]
    write_parquet(tmp_path / "a.parquet", {"image": structs(*contents), "label": labels})
    assert values(load_dataset(config_of("parquet", tmp_path))) == [(0, 1), (1, 0), (2, 1)]


def test_a_column_that_holds_no_labels_is_said(tmp_path, config_of, caplog):
    columns = {"image": structs(encoded(1)), "label": [0.5], "labels": [3]}
    write_parquet(tmp_path / "a.parquet", columns)
    assert values(load_dataset(config_of("parquet", tmp_path))) == [(1, 3)]
    assert "column label of" in caplog.messages[0]
    assert caplog.messages[0].endswith("is no label: its type is double")


def test_a_row_without_bytes_is_left_out_and_its_path_is_never_opened(tmp_path, config_of):
    (tmp_path / "b.png").write_bytes(encoded(9))
    rows = [{"bytes": encoded(1), "path": None}, {"bytes": None, "path": str(tmp_path / "b.png")}]
    write_parquet(tmp_path / "a.parquet", {"image": [*rows, None]})
    dataset = load_dataset(config_of("parquet", tmp_path / "a.parquet"))
    assert values(dataset) == [(1, -1)]
    assert dataset.left_out == {"rows without an image's bytes": 2}


@pytest.mark.parametrize(
    ("columns", "found"),
    [
        ({"text": ["a"]}, "text, of which none"),
        ({"a": [b"x"], "b": [b"y"]}, "a, b, of which a, b"),
    ],
)
def test_a_parquet_file_must_have_one_column_of_images(tmp_path, config_of, columns, found):
    write_parquet(tmp_path / "a.parquet", columns)
    message = rf"{tmp_path}/a\.parquet must have a column image .* {found}"
    with pytest.raises(DataError, match=message):
        load_dataset(config_of("parquet", tmp_path / "a.parquet"))


@pytest.mark.parametrize("damage", [lambda content: content[:-30], lambda content: b"PAR1" * 9])
def test_a_damaged_parquet_file_is_refused_by_name(tmp_path, config_of, damage):
    path = tmp_path / "a.parquet"
    write_parquet(path, {"image": structs(encoded(0))})
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CorruptFileError, match=rf"{path} is no readable parquet file"):
        load_dataset(config_of("parquet", path))


# --- both ------------------------------------------------------------------------------------


def write_shard(source, path, contents):
    if source == "parquet":
        image = pa.array(structs(*contents), pa.struct({"bytes": pa.binary(), "path": pa.utf8()}))
        write_parquet(path.with_suffix(".parquet"), {"image": image})
    else:
        write_tar(path.with_suffix(".tar"), [(f"{i}.png", c) for i, c in enumerate(contents)])


BOTH = pytest.mark.parametrize("source", ["parquet", "webdataset"])


@BOTH
def test_corrupt_images_of_shards_are_named_and_counted(tmp_path, config_of, caplog, source):
    write_shard(source, tmp_path / "data/a", [encoded(0), b"no image", encoded(2)])
    config = config_of(source, tmp_path / "data", max_corrupt=1)
    assert values(load_dataset(config)) == [(0, -1), (2, -1), (2, -1)]
    suffix, name = ("parquet", "row 1") if source == "parquet" else ("tar", "1.png")
    start = f"{tmp_path}/data/a.{suffix}: {name} is no readable image"
    assert any(message.startswith(start) for message in caplog.messages)
    with pytest.raises(CorruptFileError, match=r"1 of the files in .* data\.max_corrupt is 0"):
        everything(load_dataset(config_of(source, tmp_path / "data", max_corrupt=0)))


def test_a_disk_without_room_for_copies_is_refused_before_they_are_made(
    tmp_path, config_of, monkeypatch
):
    write_parquet(tmp_path / "data/0.parquet", {"image": structs(encoded(1))})
    config = config_of("parquet", tmp_path / "data")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    with pytest.raises(
        DataError, match=r"cache needs about 0 MB for copies .* of 1 files.*--data"
    ):
        load_dataset(config)
    monkeypatch.undo()
    assert len(load_dataset(config)) == 1
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    load_dataset.cache_clear()
    assert len(load_dataset(config)) == 1  # they are there


@BOTH
@pytest.mark.parametrize("mode", ["RGBA", "LA", "I;16", "P", "1", "CMYK"])
def test_pillows_kinds_are_read_as_those_of_folders(tmp_path, config_of, source, mode):
    image = Image.new("L", (8, 8), 255)
    image = Image.new("I;16", (8, 8), 65535) if mode == "I;16" else image.convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, "TIFF" if mode == "CMYK" else "PNG")
    content = buffer.getvalue()
    if mode == "CMYK" and source == "webdataset":
        write_tar(tmp_path / "data/a.tar", [("a.tif", content)])
    else:
        write_shard(source, tmp_path / "data/a", [content])
    images, _ = everything(load_dataset(config_of(source, tmp_path / "data")))
    assert np.all(images == 255)


@BOTH
def test_shards_are_read_through_once(tmp_path, config_of, caplog, source):
    caplog.set_level("INFO")
    write_shard(source, tmp_path / "data/a", [encoded(0)])
    config = config_of(source, tmp_path / "data")
    name = load_dataset(config).fingerprint()
    load_dataset.cache_clear()  # as in another process
    assert load_dataset(config).fingerprint() == name
    assert sum("reading through" in message for message in caplog.messages) == 1
    write_shard(source, tmp_path / "data/a", [encoded(0), encoded(1)])
    load_dataset.cache_clear()
    assert len(load_dataset(config)) == 2
    assert load_dataset(config).fingerprint() != name


@BOTH
def test_a_copy_or_an_index_that_is_damaged_is_made_again(tmp_path, config_of, source):
    write_shard(source, tmp_path / "data/a", [encoded(0)])
    config = config_of(source, tmp_path / "data")
    load_dataset(config)
    for pattern in ("*.npz", "*.images"):
        (file,) = (tmp_path / "cache/shards").glob(pattern)
        file.write_bytes(b"x")
        load_dataset.cache_clear()
        assert values(load_dataset(config)) == [(0, -1)]


@BOTH
def test_a_cache_that_cannot_be_written_is_named(tmp_path, config_of, source):
    write_shard(source, tmp_path / "data/a", [encoded(0)])
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(
        DataError, match=r"data\.cache_dir .*/cache cannot take the index of .*Set"
    ):
        load_dataset(config_of(source, tmp_path / "data"))


@BOTH
def test_loader_processes_read_shards(tmp_path, config_of, source):
    for shard in range(3):
        contents = [encoded(10 * shard + i) for i in range(4)]
        write_shard(source, tmp_path / f"data/{shard}", contents)
    dataset = load_dataset(config_of(source, tmp_path / "data"))
    found = batches(dataset, batch_size=4, seed=0, num_steps=3, num_workers=1)
    seen = sorted(int(value) for images, _ in found for value in images[:, 0, 0, 0])
    assert seen == [10 * shard + i for shard in range(3) for i in range(4)]


@BOTH
def test_a_folder_without_shards_and_shards_without_images_are_refused(
    tmp_path, config_of, source
):
    (tmp_path / "data").mkdir()
    with pytest.raises(DataError, match=r"holds no \.(tar|parquet) file"):
        load_dataset(config_of(source, tmp_path / "data"))
    write_shard(source, tmp_path / "data/a", [])
    with pytest.raises(DataError, match="holds no image"):
        load_dataset(config_of(source, tmp_path / "data"))


def test_a_shard_that_is_cut_short_meanwhile_is_no_corrupt_image(tmp_path, config_of):
    write_tar(tmp_path / "a.tar", [(f"{i}.png", encoded(i)) for i in range(2)])
    dataset = load_dataset(config_of("webdataset", tmp_path / "a.tar"))
    (tmp_path / "a.tar").write_bytes((tmp_path / "a.tar").read_bytes()[:600])
    with pytest.raises(DataError, match=r"a\.tar has been cut short"):
        dataset.__getitems__([1])


def test_the_images_of_parquet_files_alone_are_copied(tmp_path, config_of):
    for source, num_copied in (("webdataset", 0), ("parquet", 1)):
        write_shard(source, tmp_path / source / source, [encoded(0)])
        load_dataset(config_of(source, tmp_path / source))
        (copy,) = (tmp_path / "cache/shards").glob(f"{source}-*.images")
        assert copy.stat().st_size == num_copied * len(encoded(0))


def test_an_image_that_a_parquet_file_repeats_takes_the_disk_once(tmp_path, config_of):
    contents = [encoded(1), encoded(2)] * 50
    write_shard("parquet", tmp_path / "data/a", contents)
    assert values(load_dataset(config_of("parquet", tmp_path / "data"))) == [(1, -1), (2, -1)] * 50
    (copy,) = (tmp_path / "cache/shards").glob("*.images")
    assert copy.stat().st_size == len(encoded(1)) + len(encoded(2))


# --- captions --------------------------------------------------------------------------------


def write_captioned(source, folder, texts):
    """Two shards of images of the greys 10, 20, ... and of these captions; None is none."""
    images = [encoded(10 * (index + 1)) for index in range(len(texts))]
    for number, some in enumerate(([0], range(1, len(texts)))):
        path = folder / f"{number}.{'tar' if source == 'webdataset' else 'parquet'}"
        if source == "parquet":
            chosen = [texts[index] for index in some]
            write_parquet(path, {"image": structs(*(images[i] for i in some)), "text": chosen})
            continue
        members = [(f"{index}.png", images[index]) for index in some]
        known = [(index, texts[index]) for index in some if texts[index] is not None]
        members += [(f"{index}.txt", text.encode()) for index, text in known]
        write_tar(path, sorted(members))
    return folder


@pytest.mark.parametrize("source", ["parquet", "webdataset"])
def test_captions_of_shards_are_read_where_a_text_encoder_is_named(tmp_path, config_of, source):
    texts = ["a cat", "", "zwei \u00e4pfel"]
    path = write_captioned(source, tmp_path / "data", texts)
    dataset = load_dataset(config_of(source, path, text_encoder="pipeline"))
    assert [dataset.captions[index] for index in range(3)] == texts
    assert (values(dataset), dataset.num_classes) == ([(10, 0), (20, 1), (30, 2)], None)
    plain = load_dataset(config_of(source, path))  # by an index of its own
    assert (plain.captions, values(plain)) == (None, [(10, -1), (20, -1), (30, -1)])


@pytest.mark.parametrize(
    ("source", "name"), [("parquet", r"1\.parquet .* row 1"), ("webdataset", r"1\.tar .* 2\.png")]
)
def test_an_image_of_a_shard_without_a_caption_is_refused(tmp_path, config_of, source, name):
    path = write_captioned(source, tmp_path / "data", ["a", "b", None])
    with pytest.raises(DataError, match=f"{name} has none"):
        load_dataset(config_of(source, path, text_encoder="pipeline"))


def test_what_is_no_caption_of_a_shard_is_refused_or_said(tmp_path, config_of, caplog):
    write_tar(tmp_path / "a.tar", [("a.png", encoded(1)), ("a.txt", b"\xff\xfe")])
    with pytest.raises(DataError, match=r"the caption a\.txt must be a text in UTF-8"):
        load_dataset(config_of("webdataset", tmp_path / "a.tar", text_encoder="pipeline"))
    columns = {"image": structs(encoded(1)), "text": [5], "caption": ["c"]}
    write_parquet(tmp_path / "a.parquet", columns)
    dataset = load_dataset(config_of("parquet", tmp_path / "a.parquet", text_encoder="pipeline"))
    assert dataset.captions[0] == "c"
    assert "column text" in caplog.text
