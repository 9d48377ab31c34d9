"""How much private memory a base of some 200 MB takes in a worker.

    python experiments/worker_memory.py --json experiments/results/worker_memory.json
    python experiments/worker_memory.py --smoke

Two Ray actors load a base, as every worker of the pool does, and denoise a few images with it. Its
weights stay in the pages of the file that they were mapped from, which all workers of a node
share: private is what a worker has beside them. An actor that has imported the same and loaded
nothing is the baseline.

Hardware and hours: a minute on 2 CPU cores. The paper has no such table.
"""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch
import tyro
from output import provenance
from processes import private_mb

from tdc_ray.config.presets import preset
from tdc_ray.config.run import RunConfig
from tdc_ray.diffusion.plan import plan_groups
from tdc_ray.execution.ray.cluster import connected
from tdc_ray.models.unet2d.architectures import base_unet
from tdc_ray.models.unet2d.unet import build_unet, save_unet
from tdc_ray.pruning.loaded_base import LoadedBase, load_base
from tdc_ray.runs.stages.expert import pruning_context
from tdc_ray.storage.files import write_json
from tdc_ray.storage.run_dir import RunDir


@dataclass(frozen=True, kw_only=True)
class MemoryFlags:
    """What is measured, and where it goes."""

    smoke: bool = False
    """A tiny base only."""
    json: Path | None = None
    """Where the figures go."""


class Worker:
    """A process that may load a base."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self.base: LoadedBase | None = None

    def private_mb(self) -> float:
        """Memory that no other process shares, in MB."""
        return private_mb()

    def load(self, run_dir: RunDir, config: RunConfig) -> None:
        """Load the base."""
        group = plan_groups(config.diffusion, config.plan, config.sampler).groups[0]
        self.base = load_base(pruning_context(run_dir, config), group)

    def denoise(self, shape: tuple[int, int, int, int]) -> None:
        """Run some images through it, and free the outputs."""
        assert self.base is not None
        with torch.inference_mode():
            self.base.network(torch.zeros(shape), torch.zeros(shape[0]))


def measured(config: RunConfig, folder: Path) -> dict[str, Any]:
    """Return the figures in MB."""
    unet = base_unet(config.model, config.conditioning)
    save_unet(build_unet(unet), folder / "unet")
    run_dir = RunDir(folder, folder / "unet")
    weights = (folder / "unet" / "diffusion_pytorch_model.safetensors").stat().st_size / 1e6
    size, channels = unet["sample_size"], unet["in_channels"]
    found: dict[str, Any] = {"weights_mb": weights}
    remote: Any = ray.remote(num_cpus=0)(Worker)
    idle, *loaded = [remote.remote() for _ in range(3)]
    found["idle_mb"] = ray.get(idle.private_mb.remote())
    ray.get([worker.load.remote(run_dir, config) for worker in loaded])
    found["loaded_mb"] = ray.get([worker.private_mb.remote() for worker in loaded])
    shape = (2, channels, size, size)
    ray.get([worker.denoise.remote(shape) for worker in loaded])
    found["denoised_mb"] = ray.get([worker.private_mb.remote() for worker in loaded])
    most = max(*found["loaded_mb"], *found["denoised_mb"])
    found["copies_beyond_idle"] = (most - found["idle_mb"]) / weights
    return found


def main(flags: MemoryFlags) -> None:
    """Measure, print and write."""
    name = "digits-smoke" if flags.smoke else "cifar10"
    with tempfile.TemporaryDirectory() as folder, connected():
        found = measured(preset(name), Path(folder))
    document = {"made_by": provenance(), "preset": name, **found}
    print(json.dumps(document, indent=2))
    if flags.json is not None:
        write_json(flags.json, document)


if __name__ == "__main__":
    main(tyro.cli(MemoryFlags, description=__doc__))
