"""Folders of work that nobody named."""

import shutil
import tempfile
import weakref
from pathlib import Path


class TemporaryFolder:
    """A folder that is removed with the last object that holds it."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="tdc-ray-"))
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)
