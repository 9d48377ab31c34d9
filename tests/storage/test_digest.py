import hashlib
import os
from pathlib import Path

from tdc_ray.storage.digest import cached_file_digest, file_digest, json_digest, tree_digest


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_a_files_digest_is_that_of_its_content(tmp_path):
    (tmp_path / "a").write_bytes(b"content")
    assert file_digest(tmp_path / "a") == sha256(b"content")
    assert cached_file_digest(tmp_path / "a") == sha256(b"content")


def test_a_cached_digest_is_read_anew_when_size_or_time_changed(tmp_path):
    path = tmp_path / "a"
    for content, mtime in ((b"one", 1), (b"four", 1), (b"five", 2)):
        path.write_bytes(content)
        os.utime(path, ns=(mtime, mtime))
        assert cached_file_digest(path) == sha256(content)
    path.write_bytes(b"FIVE")
    os.utime(path, ns=(2, 2))
    assert cached_file_digest(path) == sha256(b"five")
    assert file_digest(path) == sha256(b"FIVE")


def make(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def test_a_folders_digest_is_that_of_names_and_contents_wherever_it_lies(tmp_path):
    files = {"b": b"1", "a/c": b"2"}
    found = tree_digest(make(tmp_path / "one", files))
    assert found == sha256(f"a/c {sha256(b'2')}\nb {sha256(b'1')}\n".encode())
    assert found == tree_digest(make(tmp_path / ".hidden", files | {".x/y": b"", "a/.z": b""}))
    assert found != tree_digest(make(tmp_path / "content", files | {"b": b"3"}))
    assert found != tree_digest(make(tmp_path / "more", files | {"d": b""}))


def test_a_lone_file_has_no_name_in_its_digest(tmp_path):
    (tmp_path / "a").write_bytes(b"1")
    assert tree_digest(tmp_path / "a") == sha256(f". {sha256(b'1')}\n".encode())


def test_a_documents_digest_is_the_same_whatever_the_order_of_keys():
    document = {"b": [1, 2], "a": {"d": None, "c": 0.5}}
    expected = sha256(b'{"a": {"c": 0.5, "d": null}, "b": [1, 2]}')
    assert json_digest(document) == json_digest(dict(reversed(document.items()))) == expected
