"""The content of saved weights, named by a digest."""

import functools
import hashlib
from pathlib import Path

from tdc_ray.storage.files import fetch, read_json


def weights_digest(folder: Path) -> str:
    """Name the content of a saved model: SHA-256 of its configs and of the weights' files."""
    digest = hashlib.sha256()
    for path in sorted(fetch(folder).rglob("*")):
        name = path.relative_to(folder).as_posix()
        if "/." in f"/{name}":  # what a writer left
            continue
        if path.suffix == ".json":
            document = read_json(path)
            known = {key: value for key, value in document.items() if key[0] != "_"}
            digest.update(f"{name} {sorted(known.items())}\n".encode())
        elif path.suffix == ".safetensors":
            found = path.stat()
            content = _sha256(path, found.st_size, found.st_mtime_ns)
            digest.update(f"{name} {content}\n".encode())
    return digest.hexdigest()


@functools.lru_cache(maxsize=256)  # a driver asks for every item
def _sha256(path: Path, _size: int, _mtime_ns: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
