"""A log beside the results."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from io import TextIOWrapper
from pathlib import Path

from tdc_ray.storage.mirror import synced_while_growing
from tdc_ray.storage.object_store import is_remote, writer_id


@contextmanager
def log_to(path: Path) -> Iterator[None]:
    """Write the log of all attempts beside the results, from its first line on.

    Of a URI it is a folder, where every attempt has a file of its own.
    """
    with synced_while_growing(path) as log:
        name = f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{writer_id()}.log"
        handler = _LogFile(log / name if is_remote(path) else log, delay=True)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
        logging.getLogger().addHandler(handler)
        try:
            yield
        finally:
            logging.getLogger().removeHandler(handler)
            handler.close()


class _LogFile(logging.FileHandler):
    """Creates its folder with the first line, which may precede the run's own folders."""

    def _open(self) -> TextIOWrapper:
        Path(self.baseFilename).parent.mkdir(parents=True, exist_ok=True)
        return super()._open()
