import json
import os
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

import pytest

from tdc_ray.errors import StorageError
from tdc_ray.storage import object_store
from tdc_ray.storage.object_store import (
    BACKENDS,
    display_path,
    filesystem,
    is_remote,
    resolve_path,
)

# --- URIs and their mirrors --------------------------------------------------------------------


@pytest.mark.parametrize("path", ["runs/a", "/runs/a", "a:b", "C:/runs", Path("x"), "openai:a/b"])
def test_a_path_is_itself(path):
    assert resolve_path(path) == Path(path)
    assert not is_remote(resolve_path(path))
    assert display_path(path) == str(path)


@pytest.mark.parametrize("uri", ["file:///runs/a", "local:///runs/a"])
def test_a_uri_of_a_local_file_is_its_path(uri):
    assert resolve_path(uri) == Path("/runs/a")


@pytest.mark.parametrize("kind", [str, Path])  # a Path loses one of the slashes
@pytest.mark.parametrize("uri", ["s3://bucket/runs/a", "s3://bucket", "memory://a/b=c/d e"])
def test_a_mirror_tells_its_uri_in_any_process(tmp_path, monkeypatch, uri, kind):
    monkeypatch.setenv("TDC_RAY_MIRROR", str(tmp_path))
    path = resolve_path(kind(uri))
    assert is_remote(path)
    assert path.is_relative_to(tmp_path)
    assert display_path(path) == uri
    assert display_path(path / "x" / "y") == f"{uri}/x/y"
    monkeypatch.setenv("TDC_RAY_MIRROR", "/elsewhere")  # as on another node
    assert display_path(path) == uri
    assert resolve_path(path) == path


def test_without_a_setting_mirrors_are_the_users_own(monkeypatch):
    monkeypatch.delenv("TDC_RAY_MIRROR", raising=False)
    folder = Path(tempfile.gettempdir(), f"tdc_ray-{os.getuid()}").resolve()
    assert resolve_path("s3://bucket/a").is_relative_to(folder)


@pytest.mark.parametrize(
    "uri",
    ["s3://", "s3:///", "s3://key:secret@bucket/a", "s3://b/a?endpoint_override=x", "s3://b/../a"],
)
@pytest.mark.parametrize("kind", [str, Path])
def test_a_uri_of_no_place_or_with_a_key_is_refused_without_telling_it(uri, kind):
    with pytest.raises(StorageError, match=r"must be s3://BUCKET/PREFIX") as caught:
        resolve_path(kind(uri))
    assert "secret" not in str(caught.value)


def test_a_kind_that_is_not_known_is_refused():
    with pytest.raises(StorageError, match=r"nonsense://b/a is of a kind that is not known"):
        resolve_path("nonsense://b/a")


def test_a_kind_that_is_not_installed_is_refused_with_what_to_install():
    code = (
        "import sys; sys.modules['s3fs'] = None\n"
        "from tdc_ray.storage.object_store import resolve_path; resolve_path('s3://bucket/a')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "StorageError: s3://bucket/a cannot be used" in done.stderr
    assert "pip install 'tdc-ray[s3]'" in done.stderr


def test_local_paths_need_no_fsspec():
    code = (
        "import sys; sys.modules['fsspec'] = None\n"
        "from pathlib import Path; from tdc_ray.storage import files\n"
        "path = files.fetch(Path(sys.argv[1])); files.write_json(path, 1)\n"
        "assert files.exists(path) and files.read_json(path) == 1; files.remove(path)"
    )
    assert subprocess.run([sys.executable, "-c", code, "/tmp/x.json"], check=False).returncode == 0


def test_what_backends_are_installed_by_is_an_extra():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    extras = {backend.extra for backend in BACKENDS.values()} - {None}
    assert extras <= project["optional-dependencies"].keys()


# --- the store ---------------------------------------------------------------------------------


def test_files_and_folders_exist_as_long_as_the_store_has_them(bucket):
    path = resolve_path(bucket) / "runs" / "a" / "file"
    assert not object_store.exists(path)
    object_store.write(path, b"content")
    assert object_store.read(path) == b"content"
    for there in (path, path.parent, path.parents[1]):
        assert object_store.exists(there)
    assert not object_store.exists(path.with_name("fil"))
    assert not object_store.exists(path / "x")
    filesystem(path)[0].rm_file(filesystem(path)[1])
    assert not object_store.exists(path.parents[1])
    with pytest.raises(FileNotFoundError):
        object_store.read(path)


def test_the_version_changes_with_the_content_alone(bucket):
    path = resolve_path(bucket) / "file"
    object_store.write(path, b"one")
    first = object_store.version(path)
    object_store.write(path, b"one")
    assert object_store.version(path) == first
    object_store.write(path, b"two")
    assert object_store.version(path) != first


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("*.jsonl", ["a.jsonl"]),
        ("search/*/memory.jsonl", ["search/x/memory.jsonl", "search/y/memory.jsonl"]),
        ("**/made.json", ["made.json", "search/x/made.json"]),
        ("sea*", ["search"]),
        ("*[0-9].npz", ["0001.npz"]),
        ("nothing*", []),
    ],
)
def test_listings_are_those_of_a_local_folder(bucket, tmp_path, pattern, found):
    names = ["a.jsonl/000000-x.json", "0001.npz", "0001.moments.npz", "made.json", "made.json.x"]
    names += ["search/x/memory.jsonl/000000-x.json", "search/y/memory.jsonl/000000-x.json"]
    names += ["search/x/made.json"]
    for name in names:
        object_store.write(resolve_path(bucket) / "run" / name, b"")
        (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / name).touch()
    path = resolve_path(bucket) / "run"
    assert object_store.listing(path, pattern) == [path / name for name in found]
    assert sorted((tmp_path / "run").glob(pattern)) == [tmp_path / "run" / name for name in found]


def test_brackets_in_a_folders_name_are_no_pattern(bucket):
    path = resolve_path(bucket) / "run[1]"
    object_store.write(path / "a.json", b"")
    assert object_store.listing(path, "*") == [path / "a.json"]


def test_entries_stand_in_the_order_in_which_they_were_added(bucket):
    path = resolve_path(bucket) / "memory.jsonl"
    assert object_store.read_entries(path) == []
    for number in range(12):
        object_store.append(path, json.dumps(number).encode())
    assert [json.loads(entry) for entry in object_store.read_entries(path)] == list(range(12))


def test_two_processes_that_add_entries_at_once_keep_both(bucket):
    path = resolve_path(bucket) / "memory.jsonl"
    code = (
        "import sys; from tdc_ray.storage.object_store import append, resolve_path\n"
        "for number in range(5): append(resolve_path(sys.argv[1]), "
        "f'{sys.argv[2]}{number}'.encode())"
    )
    uri = f"{bucket}/memory.jsonl"
    started = [subprocess.Popen([sys.executable, "-c", code, uri, name]) for name in "ab"]
    assert [process.wait() for process in started] == [0, 0]
    entries = [entry.decode() for entry in object_store.read_entries(path)]
    for name in "ab":
        assert [e for e in entries if e[0] == name] == [f"{name}{number}" for number in range(5)]


def test_a_store_that_renames_gets_whole_files_too(tmp_path):
    (tmp_path / "source").write_bytes(b"whole")
    path = resolve_path("memory://place/folder/file")
    object_store.put(tmp_path / "source", path)
    assert object_store.read(path) == b"whole"
    assert object_store.listing(path.parent, "*") == [path]


@pytest.mark.parametrize(
    "write",
    [
        lambda path, _: object_store.write(path, b""),
        lambda path, _: object_store.append(path, b""),
        lambda path, source: object_store.put(source, path),
    ],
)
def test_a_bucket_that_does_not_exist_is_told_by_what_is_written(bucket, tmp_path, write):
    (tmp_path / "source").touch()
    path = resolve_path(f"{bucket}-missing/a")
    with pytest.raises(StorageError, match=f"^{bucket}-missing/a cannot be written: .*bucket"):
        write(path, tmp_path / "source")
    assert not object_store.exists(path)
    assert object_store.listing(path, "*") == []


def test_a_store_that_does_not_answer_is_told(bucket, monkeypatch):
    code = (
        "import sys; from tdc_ray.errors import StorageError\n"
        "from tdc_ray.storage.object_store import exists, resolve_path\n"
        "try: exists(resolve_path(sys.argv[1]))\n"
        "except StorageError as error: print(error)"
    )
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    command = [sys.executable, "-c", code, f"{bucket}/a"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert f"{bucket}/a cannot be read: Could not connect" in done.stdout
