"""Large datasets: memory and CPU of streaming an image folder or npz batches.

    python experiments/large_datasets.py --json runs/large_datasets.json
    python experiments/large_datasets.py --smoke

Makes JPEGs of 96x96 in subfolders (all of them, and a tenth of them), and npz files laid out as
ImageNet-64's, below TMPDIR, and draws batches of 64 images of 64x64 from each in training's order,
each in a process of its own. Memory is the peak (VmHWM) above that of the process with all
imported; CPU seconds are of this one process and one thread, so other work on the machine changes
them little. The files have just been written: they are read from the page cache, not the disk.

Hardware and hours: about 10 minutes, 4 GB of disk and 2 GB of memory on 1 CPU core.

The paper trains on ImageNet-64 (1.28 M images) and FFHQ (70,000) and has no such numbers.
"""

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from output import provenance, write_table
from PIL import Image

from tdc_ray.config.data import DataConfig
from tdc_ray.data.batches import batches
from tdc_ray.data.load import load_dataset
from tdc_ray.storage.files import write_json

BATCH, SIZE, FOLDERS = 64, 64, 100
Save = Callable[..., None]


@dataclass(frozen=True, kw_only=True)
class SizeFlags:
    """Flags of this experiment."""

    json: Path = Path("runs/large_datasets.json")
    """Where the numbers go, with what made them; a table goes beside them."""
    num_files: int = 20_000
    """JPEGs of the larger folder."""
    num_rows: int = 80_000
    """Images of an npz file, 12,288 bytes each."""
    num_batches: int = 100
    """Batches that are drawn."""
    smoke: bool = False
    """A quick check; npz files are then small enough to be held in memory."""


def make_folder(root: Path, num_files: int) -> DataConfig:
    """Write JPEGs of smooth colours."""
    generator = np.random.default_rng(0)
    for number in range(num_files):
        folder = root / f"{number % FOLDERS:03d}"
        folder.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 256, (12, 12, 3), np.uint8)
        Image.fromarray(pixels).resize((96, 96)).save(folder / f"{number:08d}.jpg", quality=90)
    return DataConfig(source="folder", path=str(root), labels_from_folders=True, **shape())


def make_npz(path: Path, num_rows: int, save: Save) -> DataConfig:
    """Write rows of pixels and labels from 1 on, as in ImageNet-64's batches."""
    generator = np.random.default_rng(0)
    rows = generator.integers(0, 16, (num_rows, 3 * SIZE * SIZE), np.uint8)
    save(path, data=rows, labels=generator.integers(1, 1001, num_rows))
    cache_dir = str(path.with_suffix(".cache"))
    return DataConfig(source="npz", path=str(path), cache_dir=cache_dir, **shape())


def shape() -> dict[str, Any]:
    """Return the settings of both kinds of data."""
    return {"image_size": SIZE, "num_channels": 3}


def peak_bytes() -> int:
    """Return the peak resident memory of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def measure(config: DataConfig, num_batches: int) -> dict[str, Any]:
    """Open a dataset and draw batches; in a fresh process."""
    torch.set_num_threads(1)
    before, started = peak_bytes(), time.process_time()
    dataset = load_dataset(config)
    opened = time.process_time()
    for _ in batches(dataset, batch_size=BATCH, seed=0, num_steps=num_batches):
        pass
    seconds = time.process_time() - opened
    return {
        "read as": type(dataset).__name__,
        "images": len(dataset),
        "opening, CPU s": opened - started,
        "memory above imports, MiB": (peak_bytes() - before) / 2**20,
        "images per CPU s": num_batches * BATCH / seconds,
    }


def main(flags: SizeFlags) -> None:
    """Create the data, measure, and write table and numbers."""
    files, rows, steps = flags.num_files, flags.num_rows, flags.num_batches
    if flags.smoke:
        files, rows, steps = 40, 60, 2
    results = {}
    with tempfile.TemporaryDirectory() as place:
        makers: dict[str, Callable[[], DataConfig]] = {
            "folder, a tenth": lambda: make_folder(Path(place, "tenth"), files // 10),
            "folder": lambda: make_folder(Path(place, "folder"), files),
            "npz": lambda: make_npz(Path(place, "a.npz"), rows, np.savez),
            "npz, compressed": lambda: make_npz(Path(place, "b.npz"), rows, np.savez_compressed),
        }
        for name, make in makers.items():
            config = make()
            with get_context("fork").Pool(1) as process:
                results[name] = process.apply(measure, (config, steps))
    columns = ["data", *results["npz"]]
    table = [
        [name, *(f"{v:.4g}" if isinstance(v, float) else str(v) for v in found.values())]
        for name, found in results.items()
    ]
    write_table(flags.json.parent, flags.json.stem, columns, table)
    write_json(flags.json, {"made_by": provenance(), "results": results})


if __name__ == "__main__":
    main(tyro.cli(SizeFlags, description=__doc__))
