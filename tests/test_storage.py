import json
import os
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tdc_ray.errors import StorageError
from tdc_ray.storage import (
    append_json_line,
    atomic_path,
    exclusive,
    locked,
    read_json,
    read_json_lines,
    write_json,
    write_text,
)

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


@settings(max_examples=30)  # each one is written through to the disk
@given(value=JSON)
def test_json_reads_back_as_it_was_written(tmp_path_factory, value):
    path = tmp_path_factory.getbasetemp() / "round-trip.json"
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
    for value in values:
        append_json_line(path, value)
    assert read_json_lines(path) == values


@pytest.mark.parametrize("torn", ['{"round": 2, "lo', '{"round": 2}', "x" * 5000])
def test_a_torn_last_line_does_not_count_and_is_dropped_by_the_next(tmp_path, torn):
    path = tmp_path / "lines.jsonl"
    append_json_line(path, {"round": 1})
    with path.open("a") as file:
        file.write(torn)  # a kill came before the newline
    assert read_json_lines(path) == [{"round": 1}]
    append_json_line(path, {"round": 2})
    assert path.read_text() == '{"round": 1}\n{"round": 2}\n'


def test_a_file_of_nothing_but_a_torn_line_is_empty(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_text('{"round"')
    assert read_json_lines(path) == []
    append_json_line(path, 1)
    assert path.read_text() == "1\n"


def test_a_missing_file_has_no_lines(tmp_path):
    assert read_json_lines(tmp_path / "missing.jsonl") == []


def test_a_whole_line_that_is_not_json_is_an_error_and_not_dropped(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_text('{"round": 1}\nnonsense\n{"round": 2}\n')
    with pytest.raises(StorageError, match=f"^{path} holds a line that is not JSON"):
        read_json_lines(path)


def test_other_characters_survive_as_lines(tmp_path):
    path = tmp_path / "lines.jsonl"
    append_json_line(path, {"text": "two\nlines, ε"})
    assert path.read_bytes().count(b"\n") == 1
    assert read_json_lines(path) == [{"text": "two\nlines, ε"}]


# --- exclusive -------------------------------------------------------------------------------

HOLD = """
import sys
from pathlib import Path
from tdc_ray.storage import exclusive
with exclusive(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
"""


@contextmanager
def held_by_another_process(run_dir):
    command = [sys.executable, "-c", HOLD, str(run_dir)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        try:
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


def hold(run_dir):
    with exclusive(run_dir):
        return "held"


def test_a_second_driver_is_refused_and_told_the_first_ones_process(tmp_path):
    run_dir = tmp_path / "runs" / "one"  # it is made
    with held_by_another_process(run_dir) as process:
        with pytest.raises(StorageError) as caught:
            hold(run_dir)
        assert f"{run_dir} is in use by process {process.pid}:" in str(caught.value)
        assert "--run-dir" in str(caught.value)
        command = [sys.executable, "-c", HOLD, str(run_dir)]
        second = subprocess.run(command, capture_output=True, text=True, check=False)
        assert second.returncode == 1
        assert f"in use by process {process.pid}" in second.stderr
        assert hold(tmp_path / "runs" / "other") == "held"


def test_the_hold_ends_with_a_killed_driver(tmp_path):
    with held_by_another_process(tmp_path) as process:
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert hold(tmp_path) == "held"


def test_the_hold_ends_with_the_block_of_the_other_process(tmp_path):
    with held_by_another_process(tmp_path) as process:
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.wait() == 0
        assert hold(tmp_path) == "held"


def test_the_hold_ends_with_an_error_too(tmp_path):
    def fail():
        with exclusive(tmp_path):
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert hold(tmp_path) == hold(tmp_path) == "held"


def test_the_process_is_told_anew_by_every_holder(tmp_path):
    (tmp_path / ".lock").write_text("123456789012")  # an earlier holder's, and longer
    with held_by_another_process(tmp_path) as process:
        assert (tmp_path / ".lock").read_text() == json.dumps(process.pid)


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
