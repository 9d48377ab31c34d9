"""Data sets that Hugging Face's ``datasets`` itself wrote, or would fetch."""

import json
import pickle
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
from PIL import Image

from tdc_ray.cli.main import run_command
from tdc_ray.config.data import DataConfig, hub_dataset
from tdc_ray.config.presets import preset
from tdc_ray.config.run import with_absolute_paths, with_data
from tdc_ray.data.detect import data_config
from tdc_ray.data.latents import captions_of
from tdc_ray.data.load import current_fingerprint, load_dataset
from tdc_ray.data.survey import survey
from tdc_ray.errors import DataError
from tests.images import everything

datasets.disable_progress_bars()

ANIMALS = datasets.ClassLabel(names=["cat", "dog"])


def animals(count=4, classes=("species",), **columns):
    rows = {"img": [Image.fromarray(np.full((8, 8), 10 * i, np.uint8)) for i in range(count)]}
    rows |= {name: [i % 2 for i in range(count)] for name in classes}
    kinds = {"img": datasets.Image(), **dict.fromkeys(classes, ANIMALS)}
    kinds |= dict.fromkeys(columns, datasets.Value("string"))
    return datasets.Dataset.from_dict({**rows, **columns}, datasets.Features(kinds))


def config_of(path, **settings):
    return DataConfig(source="datasets", path=str(path), **settings)


def values(dataset):
    images, labels = everything(dataset)
    return list(zip(images[:, 0, 0, 0].tolist(), labels, strict=True))


def test_images_and_classes_of_a_saved_data_set_are_found_by_its_features(tmp_path):
    animals().save_to_disk(tmp_path / "saved")
    config = data_config(str(tmp_path / "saved"), DataConfig())
    assert config == config_of(tmp_path / "saved")
    dataset = load_dataset(config)
    assert values(dataset) == [(0, 0), (10, 1), (20, 0), (30, 1)]
    assert (dataset.num_classes, dataset.left_out) == (2, {})
    (header,) = survey(config).headers
    assert (header.height, header.width, header.is_grey) == (8, 8, True)


def test_images_stay_on_the_disk_and_loader_processes_take_where_they_are(tmp_path):
    animals(20).save_to_disk(tmp_path / "saved")
    rows = load_dataset(config_of(tmp_path / "saved"))._rows
    sent = pickle.dumps(rows)
    assert b"IHDR" not in sent  # no PNG
    assert pickle.loads(sent)[19] == rows[19]


def test_of_several_splits_train_is_taken_and_others_have_to_be_named(tmp_path):
    splits = datasets.DatasetDict(test=animals(1), train=animals(3))
    splits.save_to_disk(tmp_path / "splits")
    config = data_config(str(tmp_path / "splits"), DataConfig())
    dataset = load_dataset(config)
    assert (len(dataset), dataset.left_out) == (3, {"splits of another split than train": 1})
    assert len(load_dataset(config_of(tmp_path / "splits/test"))) == 1
    datasets.DatasetDict(a=animals(1), b=animals(2)).save_to_disk(tmp_path / "unknown")
    with pytest.raises(DataError, match=r"must have one split to train on, .*, got a, b\. Save"):
        load_dataset(config_of(tmp_path / "unknown"))


def test_rows_without_an_image_are_left_out(tmp_path):
    rows = {"image": [None, {"bytes": None, "path": "/etc/passwd"}, *animals(2)["img"]]}
    kinds = datasets.Features({"image": datasets.Image()})
    # As a file that somebody else wrote: save_to_disk itself would look for the path.
    datasets.Dataset.from_dict(animals(1).to_dict()).save_to_disk(tmp_path / "a")
    table = datasets.Dataset.from_dict(rows, kinds)
    with datasets.arrow_writer.ArrowWriter(
        path=str(next((tmp_path / "a").glob("*.arrow"))), features=kinds
    ) as writer:
        writer.write_table(table.data.table)
        writer.finalize()
    (tmp_path / "a/dataset_info.json").write_text(json.dumps({"features": kinds.to_dict()}))
    dataset = load_dataset(config_of(tmp_path / "a"))
    assert values(dataset) == [(0, -1), (10, -1)]
    assert dataset.left_out == {"rows without an image's bytes": 2}
    assert dataset.name(1).endswith("a: row 3")


def test_captions_are_the_column_text(tmp_path):
    animals(2, text=["a cat", ""]).save_to_disk(tmp_path / "captioned")
    config = config_of(tmp_path / "captioned", text_encoder="pipeline")
    captions = captions_of(config)
    assert [captions[number] for number in everything(load_dataset(config))[1]] == ["a cat", ""]
    animals(2, text=["a cat", None]).save_to_disk(tmp_path / "lacking")
    with pytest.raises(DataError, match=r"column text of .*lacking must have .*: row 1 has none"):
        load_dataset(config_of(tmp_path / "lacking", text_encoder="pipeline"))


def test_two_columns_of_classes_are_said_to_be_left_out(tmp_path, caplog):
    animals(classes=("fine", "coarse")).save_to_disk(tmp_path / "a")
    assert load_dataset(config_of(tmp_path / "a")).num_classes is None
    assert "columns fine and coarse of" in caplog.messages[0]


def test_what_was_changed_and_saved_again_has_another_fingerprint(tmp_path):
    path = tmp_path / "a"
    animals(4).save_to_disk(path)
    first = current_fingerprint(config_of(path))
    assert current_fingerprint(config_of(path)) == first
    path.rename(tmp_path / "moved")
    assert current_fingerprint(config_of(tmp_path / "moved")) == first
    animals(4).select([1, 0, 2, 3]).save_to_disk(path)
    assert current_fingerprint(config_of(path)) != first


def test_other_pixels_from_the_same_code_have_another_fingerprint(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    read = tmp_path / "value"

    def brightened(row):
        return {"img": Image.new("L", (8, 8), int(read.read_text()))}

    found = []
    for value in (10, 20):
        read.write_text(str(value))
        path = tmp_path / f"a{value}"
        animals(2).map(brightened).save_to_disk(path)
        found.append(current_fingerprint(config_of(path)))
    assert found[0] != found[1]


def test_images_beside_a_state_file_of_something_else_are_a_folder(tmp_path):
    Image.new("L", (8, 8)).save(tmp_path / "1.png")
    (tmp_path / "state.json").write_text("{}")
    assert data_config(str(tmp_path), DataConfig()).source == "folder"


@pytest.mark.parametrize(
    ("kind", "columns"), [("pandas", None), ("numpy", ["species"]), ("torch", None)]
)
def test_the_format_that_a_data_set_was_saved_with_does_not_matter(tmp_path, kind, columns):
    animals(2).with_format(kind, columns=columns).save_to_disk(tmp_path / "a")
    assert values(load_dataset(config_of(tmp_path / "a"))) == [(0, 0), (10, 1)]


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("state.json", "{}", "cannot be read by datasets: .*_data_files"),
        ("dataset_info.json", "[", "cannot be read by datasets: "),
        ("state.json", '{"_data_files": [{"filename": "../b.arrow"}]}', "no file beside it"),
        ("data-00000-of-00001.arrow", "ARROW1", "cannot be read by datasets: "),
    ],
)
def test_damaged_folders_are_one_clear_error(tmp_path, file, content, message):
    animals().save_to_disk(tmp_path / "a")
    (tmp_path / "a" / file).write_text(content)
    with pytest.raises(DataError, match=message):
        load_dataset(config_of(tmp_path / "a"))


def test_a_data_set_without_images_is_refused_with_its_columns(tmp_path):
    datasets.Dataset.from_dict({"text": ["a"], "label": [0]}).save_to_disk(tmp_path / "a")
    with pytest.raises(DataError, match="its columns are text, label, of which none could be"):
        load_dataset(config_of(tmp_path / "a"))


# --- names on the hub ------------------------------------------------------------------------


def test_owner_and_name_are_a_data_set_on_the_hub_unless_they_lie_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert hub_dataset("ylecun/mnist") == ("ylecun/mnist", None, None)
    assert hub_dataset("huggan/flowers:full") == ("huggan/flowers", None, "full")
    assert hub_dataset("a/b@refs/pr/1:full") == ("a/b", "refs/pr/1", "full")
    (tmp_path / "data").mkdir()
    for path in (
        "data/mnits",
        "data/mnits@main",
        "mnist",
        "./a/b",
        "/a/b",
        "a/b/c",
        "s3://a/b",
        "~/a",
    ):
        assert hub_dataset(path) is None, path
    config = data_config("ylecun/mnist", DataConfig())
    assert config == config_of("ylecun/mnist")
    run = with_absolute_paths(with_data(preset("digits"), config))
    assert (run.data.path, run.data.name) == ("ylecun/mnist", "mnist")
    assert config_of("a/b@refs/pr/1:full").name == "b_full"


@pytest.fixture
def no_hub(tmp_path, monkeypatch):
    """Nothing answers, and nothing is cached."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr("datasets.config.HF_ENDPOINT", "http://127.0.0.1:9")


def test_without_a_network_a_name_on_the_hub_is_one_clear_error_at_once(
    no_hub, monkeypatch, capsys
):
    asked = []
    monkeypatch.setattr("datasets.load_dataset", asked.append)  # which would ask for 28 s
    with pytest.raises(DataError, match=r"data\.path ylecun/mnist is neither a path here nor"):
        load_dataset(DataConfig(source="datasets", path="ylecun/mnist"))
    assert not asked
    assert run_command(["run", "--data", "ylecun/mnist"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: --data ylecun/mnist is neither a path here nor a data set ")
    assert "by its save_to_disk, and name that folder." in said


@pytest.mark.parametrize("revision", [None, "a" * 40, "v1"])
def test_the_commit_that_was_taken_of_the_hub_is_known(no_hub, monkeypatch, tmp_path, revision):
    folder = tmp_path / f"datasets/a___b/{'a' * 40}"
    animals(2).save_to_disk(folder)
    asked = []

    def dataset_info(self, name, *, revision, timeout):
        asked.append(revision)
        return SimpleNamespace(sha="a" * 40)

    def load(name, config_name, *, revision, keep_in_memory):
        asked.append(revision)
        return datasets.DatasetDict(train=datasets.load_from_disk(str(folder)))

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", dataset_info)
    monkeypatch.setattr("datasets.load_dataset", load)
    path = "a/b" if revision is None else f"a/b@{revision}"
    dataset = load_dataset(config_of(path))
    assert (len(dataset), dataset.commit) == (2, "a" * 40)
    assert asked == [revision, revision]


def test_another_commit_in_the_cache_than_the_one_named_is_refused(no_hub, monkeypatch, tmp_path):
    folder = tmp_path / f"datasets/a___b/{'a' * 40}"
    animals(2).save_to_disk(folder)
    cached = datasets.DatasetDict(train=datasets.load_from_disk(str(folder)))
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: cached)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_, **__: "README.md")
    with pytest.raises(DataError, match="is not cached, but commit aaa"):
        load_dataset(config_of(f"a/b@{'b' * 40}"))


def test_without_the_library_the_extra_is_named(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tdc_ray.cli.paths.find_spec", lambda name: None)
    monkeypatch.setattr("tdc_ray.data.sources.datasets.find_spec", lambda name: None)
    assert run_command(["score", "ylecun/mnist", "--reference", "digits"]) == 1
    assert "pip install 'tdc-ray[datasets]'" in capsys.readouterr().err
    (tmp_path / "a").mkdir()
    with pytest.raises(DataError, match=r"pip install 'tdc-ray\[datasets\]'\. Parquet"):
        load_dataset(config_of(tmp_path / "a"))


def test_rows_may_name_files_of_the_data_set_alone(tmp_path, no_hub):
    """A local folder stands for the hub's cache: image folders there are such rows."""
    folder = tmp_path / "stand-in"
    (folder / "train").mkdir(parents=True)
    for index in range(2):
        Image.new("L", (8, 8), index).save(folder / f"train/{index}.png")
    dataset = load_dataset(config_of(folder))
    assert values(dataset) == [(0, -1), (1, -1)]
    (folder / "train/1.png").unlink()
    (folder / "train/1.png").symlink_to(tmp_path / "secret.png")
    Image.new("L", (8, 8), 99).save(tmp_path / "secret.png")
    with pytest.raises(DataError, match="row 1 names a file outside of the data set"):
        dataset.encoded(1)
