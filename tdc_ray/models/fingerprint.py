"""A digest of saved weights."""

import hashlib
from pathlib import Path

from tdc_ray.storage.digest import cached_file_digest
from tdc_ray.storage.files import fetch, read_json


def weights_digest(folder: Path) -> str:
    """Return the SHA-256 of a saved model's configs and weights."""
    digest = hashlib.sha256()
    for path in sorted(fetch(folder).rglob("*")):
        name = path.relative_to(folder).as_posix()
        if "/." in f"/{name}":  # an interrupted writer's
            continue
        if path.suffix == ".json":
            document = read_json(path)
            known = {key: value for key, value in document.items() if key[0] != "_"}
            digest.update(f"{name} {sorted(known.items())}\n".encode())
        elif path.suffix == ".safetensors":
            digest.update(f"{name} {cached_file_digest(path)}\n".encode())
    return digest.hexdigest()
