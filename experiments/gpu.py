"""What a GPU gives: ours beside diffusers, experts' time beside their macs, a search's throughput.

    python experiments/gpu.py --out runs/gpu.jsonl
    python experiments/gpu.py --out runs/gpu.jsonl --sections experts search
    python experiments/gpu.py --smoke

It ends after `--seconds` (480), and every measurement is a line of `--out` as soon as it is there:
the same command runs those that are missing or failed. The sections, most important first:
`works`: the tests marked gpu, a run of `digits-smoke` whose two actors share the GPU, and `tdc-ray
doctor`. `training`: a step of ours and of diffusers' unconditional example in fp32, TF32 and bf16,
with peak memory. `sampling`: DDIM steps of our pipeline and of diffusers'. `search`: seconds and
macs per second of `tdc-ray prune`, measurements and refits included. `experts`: forward passes of
experts cut at random (channel multiples 8, 16, 32) to 0.8, 0.6 and 0.5 of the base's macs,
compiled, at batch 128, 16, 1, beside the base's, and how much of the macs saved is time saved.
`compiled` and `compiled sampling`: training steps and DDIM steps again, compiled.

Hardware and hours: at most eight minutes on one GPU of the H200's class; nothing is downloaded. It
was written without a GPU and has run on a CPU alone (`--smoke`).

The paper has no such table.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from benchmark.peers import ExampleTraining, ddim_images, ddim_pipeline
from benchmark.sampling import our_base, our_images
from benchmark.training import CONFIG, random_images
from torch import Tensor

from tdc_ray.config.data import DataConfig
from tdc_ray.config.diffusion import DiffusionConfig
from tdc_ray.config.presets import preset
from tdc_ray.data.batches import to_minus_one_one
from tdc_ray.diffusion.process import noise_schedule
from tdc_ray.diffusion.samplers import make_scheduler
from tdc_ray.diffusion.train import start_state, train
from tdc_ray.execution.device import allow_tf32, worker_device
from tdc_ray.models.network_config import NetworkConfig
from tdc_ray.models.unet2d.architectures import architecture
from tdc_ray.models.unet2d.surgery import cut
from tdc_ray.models.unet2d.unet import build_unet, save_unet
from tdc_ray.pruning.criteria.random import random_scores
from tdc_ray.pruning.criteria.scores import select_top
from tdc_ray.pruning.proxies.by_score import sorted_scores, uniform_scheme
from tdc_ray.pruning.space import space_of
from tdc_ray.storage.files import append_json_line, read_json_lines
from tdc_ray.storage.provenance import commit, versions

ROOT = Path(__file__).parents[1]
DEVICE = worker_device()
PRECISIONS = ("bf16", "tf32", "fp32")

Measure = Callable[[], dict[str, Any]]
Measurements = Iterator[tuple[str, Measure]]


@dataclass(frozen=True, kw_only=True)
class GpuFlags:
    """What is measured, for how long, and where it goes."""

    out: Path = Path("runs/gpu.jsonl")
    """A line for each measurement."""
    sections: tuple[str, ...] = ()
    """Sections; none means all."""
    seconds: float = 480.0
    """Nothing new is begun after so long."""
    smoke: bool = False
    """A quick check on any machine: tiny models, nothing compiled to machine code."""


def compiled(model: Any, flags: GpuFlags) -> Any:
    """Return a model compiled for the device; the quick check only traces it."""
    return torch.compile(model, backend="eager" if flags.smoke else "inductor", dynamic=False)


def seconds_of(call: Callable[[], object], flags: GpuFlags) -> dict[str, float]:
    """Time a call after warming up; return the median in seconds and the peak memory in bytes."""
    for _ in range(1 if flags.smoke else 3):
        call()
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times: list[float] = []
    while len(times) < 3 or (sum(times) < 0.5 and not flags.smoke):
        synchronize()
        began = time.perf_counter()
        call()
        synchronize()
        times.append(time.perf_counter() - began)
    return {"seconds": statistics.median(times), "repeats": len(times), **peak_memory()}


def synchronize() -> None:
    """Wait until the GPU has done what it was given."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def peak_memory() -> dict[str, float]:
    """Return the most memory that torch took of the GPU, if there is one."""
    return {"peak_bytes": torch.cuda.max_memory_allocated()} if DEVICE.type == "cuda" else {}


def networks(flags: GpuFlags) -> dict[str, tuple[NetworkConfig, int]]:
    """Return the networks that are timed, and the images of a training step."""
    if flags.smoke:
        return {"tiny": (architecture("tiny"), 4)}
    batches = {"iddpm-cifar10": 128, "ddpm-cifar10": 128, "ldm-ffhq256": 32}
    return {name: (architecture(name), batch) for name, batch in batches.items()}


# --- sections ------------------------------------------------------------------------------------


def works(flags: GpuFlags) -> Measurements:
    """Run the tests marked gpu, the doctor, and a run whose two actors share the GPU."""

    def command(*arguments: str) -> dict[str, Any]:
        began = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", *arguments],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
            timeout=flags.seconds,
        )
        seconds, text = time.perf_counter() - began, done.stdout + done.stderr
        return {"code": done.returncode, "seconds": seconds, "output": text[-2000:]}

    share = "0" if DEVICE.type == "cpu" else "0.5"
    run_dir = tempfile.mkdtemp(prefix="tdc-gpu-")
    run = ["tdc_ray", "run", "--preset", "digits-smoke", "--run-dir", run_dir]
    run += ["--compute.num-actors", "2", "--compute.gpus-per-actor", share]
    yield "tests", partial(command, "pytest", "-q", "-n", "0", "-m", "gpu", "tests")
    yield "run", partial(command, *run)
    yield "doctor", partial(command, "tdc_ray", "doctor")


def experts(flags: GpuFlags) -> Measurements:
    """Time forward passes of experts beside the base's."""
    shares, multiples, batches = ((0.8, 0.6, 0.5), (16, 8, 32), (128, 16, 1))
    if flags.smoke:
        shares, multiples, batches = (0.6,), (8,), (2,)
    dtype = torch.float32 if flags.smoke else torch.bfloat16

    @cache
    def base_seconds(name: str, batch: int) -> float:
        config = networks(flags)[name][0]
        return seconds_of(passes(build_unet(config), batch), flags)["seconds"]

    def passes(unet: Any, batch: int) -> Callable[[], object]:
        unet = unet.eval().to(DEVICE, dtype, memory_format=torch.channels_last)
        size = unet.config["sample_size"]
        shape = (batch, unet.config["in_channels"], size, size)
        noise = torch.randn(shape, device=DEVICE, dtype=dtype)
        timesteps = torch.full((batch,), 500, device=DEVICE)
        model = torch.inference_mode()(compiled(unet, flags))
        return lambda: model(noise, timesteps)

    def measure(name: str, batch: int, share: float, multiple: int) -> dict[str, Any]:
        config = networks(flags)[name][0]
        space = space_of(config, "inner", multiple)
        scores = random_scores(space.units, 0)
        scheme = uniform_scheme(space, int(share * space.macs_base), sorted_scores(scores))
        expert = cut(build_unet(config), space.units, select_top(space.units, scores, scheme))
        timed, base = seconds_of(passes(expert, batch), flags), base_seconds(name, batch)
        macs = space.macs(scheme) / space.macs_base
        saved = (1 - timed["seconds"] / base) / (1 - macs)
        return {**timed, "base_seconds": base, "macs_share": macs, "time_saved_of_macs": saved}

    for name in networks(flags):
        for batch in batches:
            for multiple in multiples:
                for share in shares:
                    yield (
                        f"{name}, batch {batch}, multiples of {multiple}, {share:g} F",
                        partial(measure, name, batch, share, multiple),
                    )


def training(flags: GpuFlags, *, compiles: bool = False) -> Measurements:
    """Time training steps, ours and diffusers' example's."""

    def ours(config: NetworkConfig, batch: int, precision: str) -> Any:
        chosen = replace(
            CONFIG,
            precision="bf16" if precision == "bf16" else "fp32",
            compile="default" if compiles else "none",
            num_steps=5 if flags.smoke else 30,
            batch_size=batch,
            log_every=10,
        )
        images, times = random_images(config, batch), []
        labels = torch.full((batch,), -1)

        def timed_batches() -> Iterator[tuple[Tensor, Tensor]]:
            for _ in range(chosen.num_steps):
                synchronize()
                times.append(time.perf_counter())
                yield images, labels

        train(
            state := start_state(build_unet(config).to(DEVICE), chosen),
            state.unet,
            timed_batches(),
            noise_schedule(DiffusionConfig()).to(DEVICE),
            chosen,
            DataConfig(image_size=config["sample_size"], num_channels=3),
            timesteps=range(1000),
            seed=0,
            report=lambda _metrics, _step: None,
            save=lambda _state: None,
        )
        steps = [after - before for before, after in pairwise(times[3:])]  # warmed up
        return {"seconds": statistics.median(steps), "repeats": len(steps), **peak_memory()}

    def theirs(config: NetworkConfig, batch: int, precision: str) -> Any:
        example = ExampleTraining(config)
        example.unet.to(DEVICE)
        example.ema.to(DEVICE)
        if compiles:
            example.unet = compiled(example.unet, flags)
        images = to_minus_one_one(random_images(config, batch)).to(DEVICE)

        def step() -> None:
            bf16 = torch.autocast(DEVICE.type, torch.bfloat16)
            with bf16 if precision == "bf16" else nullcontext():
                example.step(images)

        return seconds_of(step, flags)

    for name, (config, batch) in networks(flags).items():
        plain = {**config, "out_channels": config["in_channels"]}
        for precision in PRECISIONS:
            for who, way in (("ours", ours), ("diffusers", theirs)):
                measure = partial(in_precision, precision, way, plain, batch)
                yield f"{name}, {precision}, {who}", measure


def in_precision(
    precision: str, way: Callable[..., dict[str, Any]], *arguments: Any
) -> dict[str, Any]:
    """Measure with TF32 as a precision says, which is the last argument."""
    allow_tf32(allowed=precision == "tf32")
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    return way(*arguments, precision)


def sampling(flags: GpuFlags, *, compiles: bool = False) -> Measurements:
    """Time DDIM steps of our pipeline and of diffusers' DDIMPipeline."""
    config = preset("digits-smoke" if flags.smoke else "cifar10")
    count, steps = (2, 2) if flags.smoke else (128, 20)
    sampler = replace(config.sampler, sampler="ddim", num_inference_steps=steps)
    config = replace(config, sampler=sampler)

    def images(precision: str) -> dict[str, Any]:
        unet = build_unet(architecture(config.model.architecture)).eval()
        kind = "bf16: " if precision == "bf16" else ""
        peer = ddim_pipeline(unet, make_scheduler(config.diffusion, config.sampler))
        peer = peer.to(DEVICE)
        if compiles:
            peer.unet = compiled(peer.unet, flags)
        with torch.autocast(DEVICE.type, torch.bfloat16) if kind else nullcontext():
            theirs = seconds_of(lambda: ddim_images(peer, count, steps), flags)
        ours = our_base(unet, config, kind).to(DEVICE)
        ours.compile_mode = "default" if compiles and not flags.smoke else "none"
        return {
            **seconds_of(lambda: our_images(ours, count, steps), flags),
            "diffusers_seconds": theirs["seconds"],
        }

    for precision in PRECISIONS:
        name = f"{count} images, {steps} steps, {precision}"
        yield name, partial(in_precision, precision, images)


def search(flags: GpuFlags) -> Measurements:
    """Prune a base of random weights by the whole search on random images."""

    def prune() -> dict[str, Any]:
        from tdc_ray.cli.main import run_command
        from tdc_ray.storage.files import read_json

        config = architecture("tiny" if flags.smoke else "iddpm-cifar10")
        count = 64 if flags.smoke else 1024
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            save_unet(build_unet(config), folder / "unet")
            pixels = random_images(config, count).permute(0, 2, 3, 1).numpy()
            np.savez(folder / "images.npz", images=pixels.squeeze(-1) if flags.smoke else pixels)
            arguments = ["prune", str(folder / "unet"), "--out", str(folder / "out")]
            arguments += ["--data", str(folder / "images.npz"), "--macs", "0.7"]
            if flags.smoke:
                arguments += ["--prune.num-images", "16", "--prune.num-refit-images", "16"]
            if code := run_command(arguments):
                raise RuntimeError(f"tdc-ray prune exits with {code}.")
            report = read_json(folder / "out" / "report.json")
        seconds, macs = report["search_seconds"], report["search_macs"]
        return {"seconds": seconds, "macs": macs, "macs_per_second": macs / seconds}

    yield "prune to 0.7 F", prune


SECTIONS: dict[str, Callable[[GpuFlags], Measurements]] = {
    "works": works,
    "training": training,
    "sampling": sampling,
    "search": search,
    "experts": experts,
    "compiled": partial(training, compiles=True),
    "compiled sampling": partial(sampling, compiles=True),
}


def main(flags: GpuFlags) -> None:
    """Measure what is not yet in the file, and print it."""
    began = time.monotonic()
    rows = read_json_lines(flags.out)
    failed = ("error", "code")
    done = {(row["section"], row["name"]) for row in rows if not any(map(row.get, failed))}
    about = {"device": str(DEVICE), "commit": commit(), "versions": versions()}
    if DEVICE.type == "cuda":
        about["device"] = torch.cuda.get_device_name()
    for section in flags.sections or SECTIONS:
        for name, measure in SECTIONS[section](flags):
            if (section, name) in done:
                continue
            if time.monotonic() - began > flags.seconds:
                sys.exit(f"{flags.seconds:g} s are over; the same command resumes")
            try:
                found = measure()
            except Exception as error:  # noqa: BLE001  the other measurements count, too
                found = {"error": f"{type(error).__name__}: {error}"}
            torch.compiler.reset()
            append_json_line(flags.out, {"section": section, "name": name, **found, **about})
            print(f"{section}: {name}: {found}", flush=True)


if __name__ == "__main__":
    main(tyro.cli(GpuFlags, description=__doc__))
