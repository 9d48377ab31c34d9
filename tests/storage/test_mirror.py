import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tdc_ray.errors import StorageError
from tdc_ray.storage import mirror, object_store
from tdc_ray.storage.files import append_json_line, atomic_path, listing, write_json
from tdc_ray.storage.mirror import fetch, remove, synced_while_growing, upload
from tdc_ray.storage.object_store import filesystem, resolve_path


def make(source: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(content)
    return source


def local(path: Path) -> dict[str, str]:
    """What a process on this node reads, hidden files included."""
    return {
        file.relative_to(path).as_posix(): file.read_text()
        for file in path.rglob("*")
        if file.is_file()
    }


def on_another_node(monkeypatch, tmp_path: Path, uri: str) -> Path:
    monkeypatch.setenv("TDC_RAY_MIRROR", str(tmp_path / "another"))
    return resolve_path(uri)


FILES = {"config.json": "{}", "model.safetensors": "weights", "inner/tdc_heads.json": "4"}


def test_a_folder_comes_back_whole_on_another_node(bucket, tmp_path, monkeypatch):
    path = resolve_path(f"{bucket}/unet")
    upload(make(tmp_path / "source", FILES), path)
    assert local(path) == FILES
    other = on_another_node(monkeypatch, tmp_path, f"{bucket}/unet")
    assert other != path
    fetch(other)
    assert local(other) == FILES


def test_a_file_comes_back_whole(bucket, tmp_path, monkeypatch):
    (tmp_path / "source").write_bytes(bytes(range(256)) * 40_000)
    upload(tmp_path / "source", resolve_path(f"{bucket}/file"))
    assert not (tmp_path / "source").exists()
    other = on_another_node(monkeypatch, tmp_path, f"{bucket}/file")
    fetch(other)
    assert other.read_bytes() == bytes(range(256)) * 40_000


def test_a_folder_that_is_written_atomically_within_goes_up_once(bucket):
    folder = resolve_path(f"{bucket}/expert")
    with atomic_path(folder) as temporary:
        write_json(temporary / "config.json", {"kept": []})
        append_json_line(temporary / "log.jsonl", 1)
        assert listing(resolve_path(bucket), "**") == []
    assert listing(resolve_path(bucket), "**") == [
        folder,
        folder / "config.json",
        folder / "log.jsonl",
    ]
    assert list(folder.parents[2].rglob("*.tmp")) == []


def test_what_was_written_or_fetched_is_not_downloaded_again(bucket, tmp_path, monkeypatch):
    path = resolve_path(f"{bucket}/unet")
    upload(make(tmp_path / "source", FILES), path)
    other = on_another_node(monkeypatch, tmp_path, f"{bucket}/unet")
    fetch(other)
    for place in (path, other):
        inodes = {file: file.stat().st_ino for file in place.rglob("*")}
        fetch(place)
        assert {file: file.stat().st_ino for file in place.rglob("*")} == inodes


def test_what_another_driver_wrote_over_is_fetched_anew(bucket, tmp_path, monkeypatch):
    here = resolve_path(f"{bucket}/unet")
    upload(make(tmp_path / "source", FILES), here)
    there = on_another_node(monkeypatch, tmp_path, f"{bucket}/unet")
    after = {"config.json": "{}", "model.safetensors": "WEIGHTS"}  # of the same size
    upload(make(tmp_path / "again", after), there)
    fetch(here)
    assert local(here) == after


def test_a_stale_copy_goes_with_what_it_was_a_copy_of(bucket, tmp_path, monkeypatch):
    here = resolve_path(f"{bucket}/run")
    upload(make(tmp_path / "source", FILES), here)
    remove(on_another_node(monkeypatch, tmp_path, f"{bucket}/run"))
    fetch(here)
    assert local(here) == {}
    upload(make(tmp_path / "source", FILES), here)
    store, key = filesystem(here / "config.json")
    store.rm_file(key)
    fetch(here / "config.json")
    assert not (here / "config.json").exists()


def test_a_copy_that_was_changed_by_hand_is_not_believed(bucket, tmp_path):
    path = resolve_path(f"{bucket}/file")
    (tmp_path / "source").write_text("right")
    upload(tmp_path / "source", path)
    path.write_text("wrong")
    fetch(path)
    assert path.read_text() == "right"


def test_files_that_are_being_written_stay(bucket, tmp_path):
    path = resolve_path(f"{bucket}/unet")
    upload(make(tmp_path / "source", FILES), path)
    make(path, {".other.host-1.tmp/config.json": "half", ".file.host-1.tmp": "half"})
    fetch(path)
    assert (path / ".other.host-1.tmp" / "config.json").exists()
    assert (path / ".file.host-1.tmp").exists()


def test_folders_of_like_names_are_not_mixed_up(bucket, tmp_path):
    upload(make(tmp_path / "one", {"a": "1"}), resolve_path(f"{bucket}/expert-1"))
    upload(make(tmp_path / "ten", {"a": "10"}), resolve_path(f"{bucket}/expert-10"))
    remove(resolve_path(f"{bucket}/expert-1"))
    assert object_store.listing(resolve_path(bucket), "*") == [resolve_path(f"{bucket}/expert-10")]


def test_config_is_the_last_file_to_come_and_the_first_to_go(bucket, tmp_path, monkeypatch):
    seen = []
    put = mirror.put

    def watched(source, path):
        put(source, path)
        seen.append(path.name)

    monkeypatch.setattr(mirror, "put", watched)
    files = {"config.json": "", "zero.json": "", "a.safetensors": "", "in/config.json": ""}
    upload(make(tmp_path / "source", files), resolve_path(f"{bucket}/a"))
    assert seen == ["a.safetensors", "config.json", "zero.json", "config.json"]


FETCH = """
import sys, time
from tdc_ray.storage import mirror
from tdc_ray.storage.object_store import resolve_path
print("ready", flush=True)
sys.stdin.readline()
mirror.fetch(resolve_path(sys.argv[1]))
print(resolve_path(sys.argv[1]).stat().st_ino, flush=True)
"""


def test_several_processes_of_a_node_download_a_file_once(bucket, tmp_path, monkeypatch):
    (tmp_path / "source").write_bytes(os.urandom(8_000_000))
    upload(tmp_path / "source", resolve_path(f"{bucket}/weights"))
    on_another_node(monkeypatch, tmp_path, bucket)
    command, pipe = [sys.executable, "-c", FETCH, f"{bucket}/weights"], subprocess.PIPE
    started = [subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) for _ in range(3)]
    for process in started:
        assert process.stdout.readline() == "ready\n"
    for process in started:
        process.stdin.write("\n")
        process.stdin.flush()
    found = {process.communicate()[0] for process in started}
    assert len(found) == 1  # a second download would have made another file
    assert found != {""}


def test_a_process_killed_while_it_uploads_leaves_nothing_in_the_store(bucket, tmp_path):
    code = (
        "import sys; from pathlib import Path; from tdc_ray.storage.mirror import upload\n"
        "from tdc_ray.storage.object_store import resolve_path; print('go', flush=True)\n"
        "upload(Path(sys.argv[1]), resolve_path(sys.argv[2]))"
    )
    with (tmp_path / "source").open("wb") as file:
        file.truncate(400_000_000)  # goes up in parts
    command = [sys.executable, "-c", code, str(tmp_path / "source"), f"{bucket}/weights"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        process.stdout.readline()
        time.sleep(0.5)
        process.kill()
    assert process.returncode == -9
    assert not object_store.exists(resolve_path(f"{bucket}/weights"))


def test_an_upload_that_fails_leaves_what_was_there(bucket, tmp_path, monkeypatch):
    path = resolve_path(f"{bucket}/file")
    (tmp_path / "source").write_text("before")
    upload(tmp_path / "source", path)
    (tmp_path / "source").write_text("after")
    store, _ = filesystem(path)
    monkeypatch.setattr(store, "put_file", lambda *_: (_ for _ in ()).throw(OSError("cut off")))
    with pytest.raises(StorageError, match=f"^{bucket}/file cannot be written: cut off"):
        upload(tmp_path / "source", path)
    assert object_store.read(path) == b"before"
    fetch(path)
    assert path.read_text() == "before"


def test_a_mirror_in_another_users_folder_is_refused(bucket, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.raises(StorageError, match="Name another by TDC_RAY_MIRROR"):
        upload(make(tmp_path / "source", FILES), resolve_path(f"{bucket}/a"))


# --- files that grow ---------------------------------------------------------------------------


def test_a_growing_file_is_where_it_is_named(tmp_path):
    with synced_while_growing(tmp_path / "run.log") as place:
        assert place == tmp_path / "run.log"


def test_what_grows_is_in_the_store_soon_and_at_the_end(bucket, monkeypatch):
    monkeypatch.setattr(mirror, "SECONDS_BETWEEN_UPLOADS", 0.2)
    path = resolve_path(f"{bucket}/tensorboard")
    with synced_while_growing(path) as folder:
        (folder / "base").mkdir()
        with (folder / "base" / "events").open("w") as file:
            file.write("one\n")
            file.flush()
            deadline = time.monotonic() + 30
            while not object_store.exists(path / "base" / "events"):
                assert time.monotonic() < deadline
                time.sleep(0.05)
            assert object_store.read(path / "base" / "events") == b"one\n"
            file.write("two\n")
    assert object_store.read(path / "base" / "events") == b"one\ntwo\n"
    assert not folder.exists()


def test_a_store_that_fails_for_a_while_gets_what_grew_later(bucket, monkeypatch, caplog):
    monkeypatch.setattr(mirror, "SECONDS_BETWEEN_UPLOADS", 0.1)
    path, failed = resolve_path(f"{bucket}/log"), threading.Event()
    store, _ = filesystem(path)
    put_file = store.put_file

    def fail(*_):
        failed.set()
        raise OSError("a hiccup")

    monkeypatch.setattr(store, "put_file", fail)
    with synced_while_growing(path) as folder:
        (folder / "a.log").write_text("kept")
        assert failed.wait(20)
        monkeypatch.setattr(store, "put_file", put_file)
    assert object_store.read(path / "a.log") == b"kept"
    assert f"{bucket}/log/a.log cannot be written: a hiccup" in caplog.text
