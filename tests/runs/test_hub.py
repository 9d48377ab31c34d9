"""Images and bases on the Hugging Face hub: which commit a run takes, and keeps."""

from contextlib import suppress
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import pytest
from diffusers import DDPMPipeline, DDPMScheduler
from PIL import Image

from tdc_ray.cli.main import run_command
from tdc_ray.cli.parse import parse
from tdc_ray.cli.paths import check_named_data
from tdc_ray.config.data import DataConfig
from tdc_ray.config.hub import hub_base, hub_dataset, with_recorded_commit
from tdc_ray.config.model import ModelConfig
from tdc_ray.config.run import RunConfig, from_json, to_json, with_absolute_paths
from tdc_ray.data.load import load_dataset, with_commit
from tdc_ray.data.survey import images_summary
from tdc_ray.errors import ConfigError, DataError
from tdc_ray.runs.choices import with_choices, with_pretrained
from tdc_ray.runs.pretrained.importer import import_base
from tdc_ray.runs.pretrained.sources import resolve_base
from tdc_ray.storage.files import read_json, write_json
from tests.hub import hub
from tests.small import random_unet

DATA, MODEL = "datasets/a/b", "models/a/b"


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A hub on this machine, with empty caches."""
    monkeypatch.chdir(tmp_path)
    load_dataset.cache_clear()
    with hub() as running:
        url = running.endpoint
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
        template = url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr("datasets.config.HF_ENDPOINT", url)
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
        yield running


def go_offline(monkeypatch):
    """Leave what is in the caches alone, as in a later process."""
    load_dataset.cache_clear()
    monkeypatch.setattr("datasets.config.HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)


def pictures(count):
    """Grey images of 8x8, as the files of a split."""
    files = {}
    for value in range(count):
        stream = BytesIO()
        Image.new("L", (8, 8), value).save(stream, "PNG")
        files[f"train/{value}.png"] = stream.getvalue()
    return files


def pipeline(folder, *, beta_end):
    """The files of a pipeline."""
    DDPMPipeline(random_unet(), DDPMScheduler(beta_end=beta_end)).save_pretrained(folder)
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*.*")
        if path.is_file()
    }


def choose(run_dir, *arguments):
    """Return the settings of a run's call, and record them as it does."""
    config = parse(["run", "--run-dir", str(run_dir), *arguments]).config
    recorded = Path(run_dir) / "config.json"
    config, _ = with_pretrained(with_absolute_paths(config), recorded)
    config = with_choices(config, recorded)
    write_json(recorded, to_json(config))
    load_dataset.cache_clear()  # as in a later process
    return config


def test_names_of_the_hub_have_a_revision():
    assert hub_base("a/b@refs/pr/1") == ("a/b", "refs/pr/1", None)
    assert hub_base("a/b:c") is None
    for name in ("a/b", "a/b@v1", "a/b:c", "a/b@v1:c"):
        assert str(hub_dataset(name)) == name


@pytest.mark.parametrize(
    ("name", "before", "expected"),
    [
        ("a/b", None, "a/b"),
        ("a/b", "a/b@1", "a/b@1"),
        ("a/b:c", "a/b@1:c", "a/b@1:c"),
        ("a/b:c", "a/b@1", "a/b:c"),
        ("a/b", "c/b@1", "a/b"),
        ("a/b@2", "a/b@1", "a/b@2"),
        ("/a/b", "/a/b", "/a/b"),
    ],
)
def test_a_name_without_a_revision_gets_the_recorded_commit(name, before, expected):
    assert with_recorded_commit(name, before) == expected


@pytest.mark.parametrize("arguments", [["run", "--data", "a/b"], ["run", "--base", "a/b"]])
def test_what_the_hub_has_not_is_refused_before_work(server, tmp_path, arguments, capsys):
    assert run_command([*arguments, "--dry-run"]) == 1
    told = capsys.readouterr().err
    assert "a/b is neither a" in told
    assert len(told.splitlines()) == 1
    server.commit(DATA, pictures(60))
    server.commit(MODEL, pipeline(tmp_path / "p", beta_end=0.02))
    assert run_command([*arguments, "--data", "a/b", "--dry-run"]) == 0


@pytest.mark.parametrize(
    ("name", "is_known"), [("a/b", True), ("a/other", True), ("other/b", False)]
)
def test_without_a_network_what_may_be_cached_is_let_through(server, monkeypatch, name, is_known):
    server.commit(DATA, pictures(3))
    monkeypatch.setenv("HF_DATASETS_CACHE", "datasets")
    assert len(load_dataset(DataConfig(source="datasets", path="a/b"))) == 3
    go_offline(monkeypatch)
    with suppress(ConfigError):
        assert check_named_data("--data", name) == is_known
        return
    assert not is_known


def test_a_run_keeps_the_commit_of_its_images_wherever_it_is_resumed(server, monkeypatch):
    first = server.commit(DATA, pictures(3))
    before = choose("run", "--data", "a/b")
    assert before.data.path == f"a/b@{first}"
    assert images_summary(before.data).hub == f"a/b@{first}"
    server.commit(DATA, pictures(5))
    for number in range(2):  # the second time as on a node with caches of its own
        assert choose("run", "--data", "a/b") == before
        assert len(load_dataset(before.data)) == 3
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", f"hub{number}")
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", Path(f"datasets{number}"))
    elsewhere = choose("elsewhere", "--data", "a/b")
    assert elsewhere.data.path != before.data.path
    assert len(load_dataset(elsewhere.data)) == 5


def test_the_images_are_the_same_on_every_node(server, monkeypatch):
    server.commit(DATA, pictures(3))
    data = with_commit(DataConfig(source="datasets", path="a/b"))
    before = load_dataset(data).fingerprint()
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", Path("elsewhere"))
    load_dataset.cache_clear()
    assert load_dataset(data).fingerprint() == before


@pytest.mark.parametrize("readme", [{}, {"README.md": b"Pictures"}])
def test_without_a_network_the_commit_in_the_cache_is_taken(server, monkeypatch, readme):
    commit = server.commit(DATA, pictures(3) | readme)
    data = DataConfig(source="datasets", path="a/b")
    assert len(load_dataset(data)) == 3
    go_offline(monkeypatch)
    assert with_commit(data).path == f"a/b@{commit}"


def test_without_a_network_a_commit_that_is_named_is_found_beside_later_ones(server, monkeypatch):
    commits = [server.commit(DATA, pictures(count)) for count in (3, 5)]
    pinned = [DataConfig(source="datasets", path=f"a/b@{commit}") for commit in commits]
    before = [load_dataset(data).fingerprint() for data in pinned]
    go_offline(monkeypatch)
    assert [len(load_dataset(data)) for data in pinned] == [3, 5]
    assert [load_dataset(data).fingerprint() for data in pinned] == before
    with pytest.raises(DataError, match="neither a path here nor a data set"):
        load_dataset(replace(pinned[0], path=f"a/b@{'0' * 40}"))


def test_a_run_of_an_older_version_keeps_the_name_that_it_has(server):
    server.commit(DATA, pictures(3))
    data = DataConfig(source="datasets", path="a/b")
    assert with_commit(data, "a/b") == data


def test_a_run_of_an_older_version_keeps_the_name_of_its_base(server, tmp_path):
    server.commit(MODEL, pipeline(tmp_path / "p", beta_end=0.02))
    config = RunConfig(model=ModelConfig(base="a/b"))
    write_json(Path("config.json"), to_json(config))
    assert with_pretrained(config, Path("config.json"))[0] == config


def test_the_dry_run_shows_both_commits(server, tmp_path, capsys):
    images = server.commit(DATA, pictures(60))
    base = server.commit(MODEL, pipeline(tmp_path / "p", beta_end=0.02))
    assert run_command(["run", "--data", "a/b", "--base", "a/b", "--dry-run"]) == 0
    shown = "".join(capsys.readouterr().out.split())
    assert f"->a/b@{images}" in shown
    assert f"model.baseNone->a/b@{base}" in shown


def test_a_run_keeps_the_commit_of_its_base(server, tmp_path):
    server.commit(DATA, pictures(3))
    first = server.commit(MODEL, pipeline(tmp_path / "p", beta_end=0.02))
    before = choose("run", "--data", "a/b", "--base", "a/b")
    assert before.model.base == f"a/b@{first}"
    second = server.commit(MODEL, pipeline(tmp_path / "q", beta_end=0.03))
    assert choose("run", "--data", "a/b", "--base", "a/b") == before
    elsewhere = choose("elsewhere", "--data", "a/b", "--base", "a/b")
    assert elsewhere.model.base == f"a/b@{second}"
    assert (before.diffusion.beta_end, elsewhere.diffusion.beta_end) == (0.02, 0.03)
    named = choose("named", "--data", "a/b", "--base", f"a/b@{first}")
    assert named.model == before.model


def test_what_is_imported_names_its_commit(server, tmp_path):
    commit = server.commit(MODEL, pipeline(tmp_path / "p", beta_end=0.02))
    config = choose("run", "--base", "a/b", "--data", "digits")
    import_base(resolve_base("a/b"), config, tmp_path / "base")
    assert read_json(tmp_path / "base/base.json")["source"] == f"a/b@{commit}"


def test_settings_that_name_a_commit_come_back_as_they_are(server):
    server.commit(DATA, pictures(3))
    config = choose("run", "--data", "a/b")
    assert from_json(to_json(config)) == config
    assert config.data.name == "b"
