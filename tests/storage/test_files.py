import os
import resource
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from tdc_ray.errors import StorageError
from tdc_ray.storage import object_store
from tdc_ray.storage.files import (
    append_json_line,
    atomic_path,
    cut_at_torn_line,
    exists,
    fetch,
    listing,
    locked,
    read_json,
    read_json_lines,
    remove,
    write_json,
    write_text,
)
from tdc_ray.storage.object_store import resolve_path

# --- atomic_path -----------------------------------------------------------------------------


def make_file(path: Path, content: str) -> None:
    path.write_text(content)


def make_folder(path: Path, content: str) -> None:
    path.mkdir()
    (path / "inside").write_text(content)


def read(path: Path) -> str:
    return (path / "inside" if path.is_dir() else path).read_text()


@pytest.mark.parametrize("make", [make_file, make_folder])
def test_what_was_written_appears_when_the_block_ends(tmp_path, make):
    path = tmp_path / "a" / "b" / "target"  # parents are made
    with atomic_path(path) as temporary:
        make(temporary, "whole")
        assert temporary.parent == path.parent
        assert not path.exists()
    assert read(path) == "whole"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("make", [make_file, make_folder])
def test_nothing_is_seen_of_a_block_that_raises(tmp_path, make):
    path = tmp_path / "target"

    def write_half():
        with atomic_path(path) as temporary:
            make(temporary, "half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert list(tmp_path.iterdir()) == []
    make(path, "before")
    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert list(tmp_path.iterdir()) == [path]
    assert read(path) == "before"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param(make_file, make_file, id="file by file"),
        pytest.param(make_folder, make_folder, id="folder by folder"),
        pytest.param(make_file, make_folder, id="file by folder"),
        pytest.param(
            make_folder,
            make_file,
            id="folder by file",
        ),
    ],
)
def test_what_stood_there_is_replaced(tmp_path, before, after):
    path = tmp_path / "target"
    before(path, "old")
    with atomic_path(path) as temporary:
        after(temporary, "new")
    assert read(path) == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_what_an_earlier_kill_left_under_the_temporary_name_is_cleared(tmp_path):
    path = tmp_path / "target"
    with atomic_path(path) as temporary:
        temporary.write_text("x")
    make_folder(temporary, "left by a kill")
    with atomic_path(path) as same:
        assert same == temporary
        assert not same.exists()
        same.write_text("new")
    assert path.read_text() == "new"


def test_a_file_that_a_library_made_for_one_user_can_be_read_by_who_sees_the_folder(tmp_path):
    for mode in (0o755, 0o700):
        (tmp_path / "runs").mkdir(exist_ok=True)
        (tmp_path / "runs").chmod(mode)
        with atomic_path(tmp_path / "runs" / "unet") as temporary:
            temporary.mkdir()
            save_file({"weight": torch.zeros(1)}, temporary / "model.safetensors")
            (temporary / "model.safetensors").chmod(0o600)
        found = (tmp_path / "runs" / "unet" / "model.safetensors").stat().st_mode
        assert found & 0o777 == mode & 0o666


def test_a_link_to_a_folder_is_replaced_and_not_followed(tmp_path):
    make_folder(tmp_path / "elsewhere", "precious")
    (tmp_path / "target").symlink_to(tmp_path / "elsewhere")
    with atomic_path(tmp_path / "target") as temporary:
        make_folder(temporary, "new")
    assert read(tmp_path / "target") == "new"
    assert read(tmp_path / "elsewhere") == "precious"


def test_a_block_that_writes_nothing_is_refused_with_the_path(tmp_path):
    path = tmp_path / "target"
    with pytest.raises(StorageError, match=f"nothing was written for {path}"), atomic_path(path):
        pass


def test_the_temporary_name_is_hidden_and_the_processs_own(tmp_path):
    with atomic_path(tmp_path / "target") as temporary:
        assert temporary.name.startswith(".")
        assert str(os.getpid()) in temporary.name
        temporary.write_text("x")


# --- text and JSON ---------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(), values, max_size=3),
    max_leaves=8,
)


def test_text_is_written_as_utf_8(tmp_path):
    write_text(tmp_path / "text", "snr, ε, 日本\n")
    assert (tmp_path / "text").read_bytes().decode("utf-8") == "snr, ε, 日本\n"


@settings(max_examples=30)
@given(value=JSON)
def test_json_reads_back_as_it_was_written(tmp_path_factory, value):
    path = tmp_path_factory.getbasetemp() / "round-trip.json"
    with mock.patch("os.fsync"):  # which takes a tenth of a second an example
        write_json(path, value)
    assert read_json(path) == value


def test_a_missing_json_file_is_named(tmp_path):
    path = tmp_path / "config.json"
    with pytest.raises(StorageError, match=f"^{path} does not exist"):
        read_json(path)


@pytest.mark.parametrize("content", [b"", b"{'a': 1}", b'{"a": 1', b"\xff\xfe"])
def test_a_file_that_is_not_json_is_named(tmp_path, content):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(StorageError, match=f"^{path} is not JSON"):
        read_json(path)


# --- JSON lines ------------------------------------------------------------------------------


@settings(max_examples=30)
@given(values=st.lists(JSON, max_size=5))
def test_json_lines_read_back_in_the_order_they_were_appended(tmp_path_factory, values):
    path = tmp_path_factory.mktemp("lines") / "memory" / "lines.jsonl"
    with mock.patch("os.fsync"):
        for value in values:
            append_json_line(path, value)
    assert read_json_lines(path) == values


@pytest.mark.parametrize("torn", ['{"round": 2, "lo', '{"round": 2}', "x" * 5000])
def test_a_torn_last_line_does_not_count_and_is_set_aside_by_the_next(tmp_path, torn, caplog):
    path = tmp_path / "lines.jsonl"
    append_json_line(path, {"round": 1})
    with path.open("a") as file:
        file.write(torn)  # a kill came before the newline
    assert read_json_lines(path) == [{"round": 1}]
    append_json_line(path, {"round": 2})
    assert path.read_text() == '{"round": 1}\n{"round": 2}\n'
    (aside,) = tmp_path.glob("lines.jsonl.torn-*")
    assert aside.read_text() == torn
    assert str(aside) in caplog.text


def test_a_file_of_nothing_but_a_torn_line_is_empty(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_text('{"round"')
    assert read_json_lines(path) == []
    append_json_line(path, 1)
    assert path.read_text() == "1\n"


def test_a_missing_file_has_no_lines(tmp_path):
    assert read_json_lines(tmp_path / "missing.jsonl") == []


@pytest.mark.parametrize("torn", [b"nonsense", b'{"a": 1, {"a": 2}', b"\0" * 50, b"\xff", b""])
def test_a_torn_line_in_the_middle_is_left_out_with_a_warning(tmp_path, caplog, torn):
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'{"round": 1}\n' + torn + b'\n{"round": 2}\n')
    assert read_json_lines(path) == [{"round": 1}, {"round": 2}]
    assert f"line 2 of {path} is torn: left out" in caplog.text


@pytest.mark.parametrize("torn", [b'{"op": 2, "x', b'{"op": 2}', b"\0" * 9, b"nonsense\n{}\n"])
def test_a_journal_is_cut_at_its_first_torn_line_and_the_rest_is_set_aside(tmp_path, caplog, torn):
    path = tmp_path / "study.log"
    cut_at_torn_line(path)  # there is none
    path.write_bytes(b'{"op": 1}\n')
    cut_at_torn_line(path)
    assert not caplog.text
    path.write_bytes(b'{"op": 1}\n' + torn)
    cut_at_torn_line(path)
    assert path.read_bytes() == b'{"op": 1}\n'
    (aside,) = tmp_path.glob("study.log.torn-*")
    assert aside.read_bytes() == torn
    assert str(aside) in caplog.text


def test_other_characters_survive_as_lines(tmp_path):
    path = tmp_path / "lines.jsonl"
    append_json_line(path, {"text": "two\nlines, ε"})
    assert path.read_bytes().count(b"\n") == 1
    assert read_json_lines(path) == [{"text": "two\nlines, ε"}]


# --- locked ----------------------------------------------------------------------------------


def test_one_lock_holder_waits_for_the_other(tmp_path):
    path, entered = tmp_path / "folder" / "a.lock", threading.Event()

    def enter():
        with locked(path):
            entered.set()

    other = threading.Thread(target=enter)
    with locked(path):
        other.start()
        assert not entered.wait(0.3)
    assert entered.wait(20)
    other.join()


# --- an object store ---------------------------------------------------------------------------


@pytest.mark.parametrize("make", [make_file, make_folder])
def test_a_uri_is_read_and_written_as_a_path_is(bucket, make):
    folder = resolve_path(f"{bucket}/run")
    path = folder / "target"
    with atomic_path(path) as temporary:
        make(temporary, "whole")
        assert not exists(path)
    assert exists(path)
    assert read(fetch(path)) == "whole"
    assert listing(folder, "t*") == [path]
    assert [file.name for file in folder.iterdir()] == ["target"]  # of this node, hidden ones too
    with atomic_path(path) as temporary:
        make(temporary, "new")
    assert read(fetch(path)) == "new"
    remove(path)
    assert not exists(path)
    assert not fetch(path).exists()


def test_nothing_is_seen_in_a_store_of_a_block_that_raises(bucket):
    path = resolve_path(f"{bucket}/run/target")

    def write_half():
        with atomic_path(path) as temporary:
            make_file(temporary, "half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert not exists(path)
    assert list(path.parent.iterdir()) == []


def test_json_is_always_what_the_store_has(bucket):
    path = resolve_path(f"{bucket}/results.json")
    with pytest.raises(StorageError, match=f"^{bucket}/results.json does not exist"):
        read_json(path)
    write_json(path, {"a": 1})
    object_store.write(path, b'{"a": 2}')  # another driver
    assert read_json(path) == {"a": 2}
    object_store.write(path, b"{")
    with pytest.raises(StorageError, match=f"^{bucket}/results.json is not JSON"):
        read_json(path)


def test_lines_are_objects_of_their_own_in_a_store(bucket, caplog):
    path = resolve_path(f"{bucket}/memory.jsonl")
    assert read_json_lines(path) == []
    for number in range(3):
        append_json_line(path, {"round": number})
    assert read_json_lines(path) == [{"round": 0}, {"round": 1}, {"round": 2}]
    assert len(listing(path, "*.json")) == 3
    object_store.write(path / "000003-x.json", b"{")
    assert len(read_json_lines(path)) == 3
    assert f"line 4 of {bucket}/memory.jsonl is torn" in caplog.text


APPEND = """
import sys
from tdc_ray.storage.object_store import resolve_path
from tdc_ray.storage.files import append_json_line
number = 0
while True:
    append_json_line(resolve_path(sys.argv[1]), {"number": number, "text": "x" * 1000})
    number += 1
    print(number, flush=True)
"""


@pytest.mark.parametrize("where", ["local", "s3"])
def test_a_kill_loses_no_line_that_was_appended(request, tmp_path, where):
    place = str(tmp_path) if where == "local" else request.getfixturevalue("bucket")
    command = [sys.executable, "-c", APPEND, f"{place}/memory.jsonl"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for _ in range(5):
            said = process.stdout.readline()
        process.kill()
    lines = read_json_lines(resolve_path(f"{place}/memory.jsonl"))
    assert [line["number"] for line in lines] == list(range(len(lines)))
    assert len(lines) >= int(said) == 5


# --- a disk that is full -----------------------------------------------------------------------


@contextmanager
def no_room(num_bytes):
    """Let no file of this process grow beyond a size, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)


TENSORS = {"weight": torch.zeros(100_000)}


def by_numpy(path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, **{name: value.numpy() for name, value in TENSORS.items()})


@pytest.mark.parametrize(
    "write",
    [
        lambda path: torch.save(TENSORS, path),
        lambda path: save_file(TENSORS, path),
        by_numpy,
        lambda path: path.write_text("x" * 100_000),
    ],
    ids=["torch", "safetensors", "numpy", "text"],
)
@pytest.mark.parametrize("where", ["local", "s3"])
def test_a_write_without_room_is_one_error_and_leaves_what_was_there(
    request, tmp_path, write, where
):
    place = str(tmp_path / "run") if where == "local" else request.getfixturevalue("bucket")
    path = resolve_path(f"{place}/file")
    write_text(path, "before")

    def fill():
        with atomic_path(path) as temporary:
            write(temporary)

    with (
        no_room(10_000),
        pytest.raises(StorageError, match=rf"^{place}/file cannot be written: .*MB are free"),
    ):
        fill()
    assert [file.name for file in path.parent.iterdir()] == ["file"]
    assert fetch(path).read_text() == "before"


def test_a_line_without_room_is_one_error_and_leaves_the_lines_before(tmp_path):
    path = tmp_path / "memory.jsonl"
    append_json_line(path, 1)
    with no_room(100), pytest.raises(StorageError, match=f"^{path} cannot be written: .*large"):
        append_json_line(path, "x" * 1000)
    assert path.read_text() == "1\n"
    append_json_line(path, 2)
    assert read_json_lines(path) == [1, 2]


def test_a_full_disk_is_told_with_how_full_it_is(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)],
        capture_output=True,
        check=False,
    )
    if mounted.returncode != 0:
        pytest.skip("no file system can be mounted here")
    try:
        with pytest.raises(StorageError, match=r"cannot be written: .* \(0 MB are free"):
            write_text(disk / "file", "x" * 1_000_000)
        assert list(disk.iterdir()) == []
        write_text(disk / "file", "x")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_folder_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=f"^{tmp_path}/file/a/b cannot be written"):
        write_text(tmp_path / "file" / "a" / "b", "x")
