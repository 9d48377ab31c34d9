"""Parquet files with a column of encoded images, as the Hugging Face hub has them.

The column holds bytes, or structs of ``bytes`` and ``path``, of which the path is never opened. A
row is only available with the hundreds around it, so that the images are copied into the cache.
"""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tdc_ray.config.data import DataConfig
from tdc_ray.data.sources.shards import Entry, ShardImages, list_shards
from tdc_ray.data.sources.warn import warn_once
from tdc_ray.errors import CorruptFileError, DataError

SUFFIX = ".parquet"

IMAGE_NAMES, LABEL_NAMES = ("image", "img"), ("label", "labels")
CAPTION_NAMES = ("text", "caption")
"""Names of columns, the first one that there is counts."""

WITHOUT_BYTES = "rows without an image's bytes"
"""Reason why a row is left out."""

BATCH_ROWS = 64
"""Rows that are in memory at once."""


def open(config: DataConfig) -> ShardImages:
    """Open a parquet file, or all below a folder.

    Raises:
        DataError: There is none, one is damaged or has no column of images, none of the images can
            be decoded, or of one of some that are looked at it is unknown what white is.
    """
    return list_images(config).checked()


def list_images(config: DataConfig) -> ShardImages:
    """List the images of a parquet file, or of all below a folder.

    Raises:
        DataError: There is none, one is damaged or has no column of images, or the cache's disk
            cannot take copies of the images.
    """
    return list_shards(config, SUFFIX, entries, copies=True)


def entries(path: Path, left_out: Counter[str], *, captions: bool) -> Iterator[Entry]:
    """Yield the image of every row, with its label and caption.

    Args:
        path: Of the parquet file.
        left_out: Counts rows without an image.
        captions: Whether captions are read.

    Raises:
        CorruptFileError: The file is damaged.
        DataError: It has no column of images, or several.
    """
    import pyarrow as pa
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            image, label = columns(file.schema_arrow, path)
            caption = caption_column(file.schema_arrow, path) if captions else None
            read = [name for name in (image, label, caption) if name is not None]
            row = 0
            for batch in file.iter_batches(BATCH_ROWS, columns=read):
                found = {name: batch.column(name).to_pylist() for name in read}
                for index, value in enumerate(found[image]):
                    content = value.get("bytes") if isinstance(value, dict) else value
                    if content:
                        known, text = (found[n][index] if n else None for n in (label, caption))
                        yield Entry(f"row {row}", known, text, content=content)
                    else:
                        left_out[WITHOUT_BYTES] += 1
                    row += 1
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise CorruptFileError(
            f"{path} is no readable parquet file: {error}. Fetch or write it again."
        ) from error


def columns(schema: Any, path: Path | str) -> tuple[str, str | None]:
    """Return the names of the columns of images and of labels; None where there are no labels.

    Those that Hugging Face's metadata declares as ``Image`` and ``ClassLabel`` are known as such.

    Raises:
        DataError: It is not known which column holds images.
    """
    from pyarrow import types

    def is_bytes(kind: Any) -> bool:
        return bool(types.is_binary(kind) or types.is_large_binary(kind))

    def holds_bytes(kind: Any) -> bool:
        if types.is_struct(kind):
            return any(field.name == "bytes" and is_bytes(field.type) for field in kind)
        return is_bytes(kind)

    declared = _declared(schema)
    images = [field.name for field in schema if holds_bytes(field.type)]
    named = [name for name in images if declared.get(name) == "Image"]
    named = named or [name for name in IMAGE_NAMES if name in images] or images
    if not named or (len(named) > 1 and named[0] not in IMAGE_NAMES):
        raise DataError(
            f"{path} must have a column image of encoded images, bytes or structs with bytes: its "
            f"columns are {', '.join(schema.names)}, of which {', '.join(named) or 'none'} could "
            "be it."
        )
    labels = [name for name in LABEL_NAMES if name in schema.names]
    if not labels:
        labels = [name for name, kind in declared.items() if kind == "ClassLabel"]
        if len(labels) > 1:
            warn_once(
                f"columns {' and '.join(labels)} of {path} are left out: which is the label? Name "
                "it label"
            )
            return named[0], None
    for name in labels:
        kind = schema.field(name).type
        value = kind.value_type if types.is_dictionary(kind) else kind  # a categorical of pandas
        is_number = types.is_integer(value) or types.is_boolean(value)
        if is_number or types.is_string(value) or types.is_large_string(value):
            return named[0], name
        warn_once(f"column {name} of {path} is no label: its type is {kind}")
    return named[0], None


def caption_column(schema: Any, path: Path | str) -> str | None:
    """Return the name of the column of captions; None where there is none."""
    from pyarrow import types

    for name in CAPTION_NAMES:
        if name in schema.names:
            kind = schema.field(name).type
            if types.is_string(kind) or types.is_large_string(kind):
                return name
            warn_once(f"column {name} of {path} is no caption: its type is {kind}")
    return None


def _declared(schema: Any) -> dict[str, str]:
    """Return what Hugging Face's metadata says of columns: their kinds, by their names."""
    try:
        document = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        features = document["info"]["features"]
        return {name: str(features[name]["_type"]) for name in schema.names if name in features}
    except (ValueError, LookupError, TypeError, RecursionError):
        return {}
