"""How much memory what Stable Diffusion 3 reads of captions takes: encoded, and kept by a search.

    python -m tests.caption_memory --num-captions 480 --out experiments/results/caption_memory.json

The pipeline is a tiny one of random weights whose T5 is as wide as that of Stable Diffusion 3: 333
states of 4,096 channels, 5.5 MB a caption. Measured is anonymous memory, which no file backs: how
far it rises at most while prompts are encoded into the cache, and by how much it has risen where
the noised images of a refit are kept.

Hardware and hours: two minutes of a CPU core, 5 GB of disk.
"""

import argparse
import json
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from tdc_ray.config.run import RunConfig
from tdc_ray.data.latents import prepare_latents, training_data
from tdc_ray.data.prompts import EncodePromptsJob, encode_into
from tdc_ray.execution.chain import run_chains
from tdc_ray.models.families import load_network
from tdc_ray.pruning.noised import noised_batches
from tdc_ray.storage.files import write_json
from tdc_ray.storage.provenance import commit, machine
from tdc_ray.storage.run_dir import RunDir
from tests.small import context_of, group_of, small_config
from tests.text_pipelines import save, stable_diffusion_3

WIDTH = 4096
NUM_IMAGES = 16


def anonymous_mb() -> float:
    """Anonymous memory of this process, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024 / 1e6


def peak_mb(function: Callable[[], object]) -> float:
    """How far anonymous memory rises at most while a function runs, in MB."""
    before, done = anonymous_mb(), threading.Event()
    peaks = [before]

    def watch() -> None:
        while not done.wait(0.01):
            peaks.append(anonymous_mb())

    watcher = threading.Thread(target=watch)
    watcher.start()
    function()
    done.set()
    watcher.join()
    return max(peaks) - before


def captioned(folder: Path, pipeline: Path, num_captions: int) -> RunConfig:
    """Settings of a search on a few captioned images, each noised several times."""
    (folder / "images").mkdir()
    rows = []
    for number in range(NUM_IMAGES):
        name = f"{number:02}.png"
        pixels = np.full((16, 16, 3), 10 * number, np.uint8)
        Image.fromarray(pixels).save(folder / "images" / name)
        rows.append(json.dumps({"file_name": name, "text": "ab"[number % 2]}))
    (folder / "images/metadata.jsonl").write_text("\n".join(rows))
    return small_config(
        sampler={"clip_sample": False, "num_inference_steps": 4, "guidance_scale": 2.0},
        data={
            "source": "imagefolder",
            "path": str(folder / "images"),
            "image_size": 16,
            "num_channels": 3,
            "first_stage": str(pipeline / "vae"),
            "text_encoder": str(pipeline),
        },
        evaluate={"cache_dir": str(folder / "cache"), "features": "none"},
        prune={"num_refit_images": num_captions, "batch_size": 16},
    )


def measure(folder: Path, num_captions: int) -> dict[str, Any]:
    """Encode prompts, and keep noised images, in a new folder."""
    pipeline = save(lambda place: stable_diffusion_3(place, WIDTH), folder)
    config = captioned(folder, pipeline, num_captions)
    prompts = ("ab",) * num_captions
    job = EncodePromptsJob(pipeline, prompts, (16, 16), folder / "states.safetensors")
    encoding = peak_mb(lambda: encode_into(job, lambda *_: None))
    run_chains(
        {"captions": prepare_latents(training_data(config.data, config.evaluate.cache_dir))}
    )
    network, group = load_network(pipeline / "transformer"), group_of(config, 1)
    context, before = context_of(RunDir(folder / "run"), config), anonymous_mb()
    batches = list(noised_batches(context, group, network, purpose="refit"))
    return {
        "num_captions": sum(len(batch.x_0) for batch in batches),
        "mb_of_states": num_captions * 333 * WIDTH * 4 / 1e6,
        "mb_encoding_at_most": round(encoding),
        "mb_of_batches": round(anonymous_mb() - before),
    }


def main() -> None:
    """Measure, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-captions", type=int, default=480)
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), asked.num_captions)
    command = " ".join(["python -m tests.caption_memory", *sys.argv[1:]])
    record = {"made_by": {"command": command, "commit": commit(), "machine": machine()}, **found}
    write_json(asked.out, record)


if __name__ == "__main__":
    main()
