"""What a GPU gives: ours beside diffusers, experts' time beside their macs, a search's throughput.

    python experiments/gpu.py --out runs/gpu.jsonl
    python experiments/gpu.py --out runs/gpu.jsonl --sections experts search
    python experiments/gpu.py --smoke

It begins nothing new after `--seconds` (480), and every measurement is a line of `--out` as soon
as it is there: the same command goes on with those that are missing, then with those that failed.
What comes first is worth most: the sections in this order, in each bf16 before TF32 and fp32,
large batches first.

- `works`: the tests marked gpu, a run of `digits-smoke` whose two actors share the GPU, and
  `tdc-ray doctor`.
- `training`: a step of ours and of diffusers' unconditional example in each precision.
- `sampling`: DDIM steps of our pipeline and of diffusers', without a first stage. In bf16 ours
  has weights of that type; diffusers' pipeline takes such by autocast alone.
- `experts`: forward passes, in bf16, of experts cut at random (channel multiples 16, 8, 32) to
  0.8, 0.6 and 0.5 of the base's macs at batch 128, 16, 1, beside the base's, and how much of the
  macs saved is time saved. `experts, compiled`: the same by Inductor and CUDA graphs.
- `search`: macs per second of measuring a candidate, without and with its refit, and of the whole
  of `tdc-ray prune`; and what a limit of 0.8 of the base's time finds, beside an expert of as many
  macs that was found by them.
- `training, compiled` and `sampling, compiled`.

Every line has seconds (median), those of the first call, in which all is compiled, and the most
memory that torch took. The networks are iddpm-cifar10, ddpm-cifar10 and the UNet of latent
diffusion on 256x256.

Hardware and hours: eight minutes a command on one GPU of the H200's class. By estimate one
command does all but what is compiled, of which each network and batch takes up to a minute;
nothing is downloaded. It was written without a GPU and has run on a CPU alone (`--smoke`).

The paper has no such table.
"""

import copy
import gc
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from benchmark.peers import ExampleTraining, ddim_images, ddim_pipeline
from benchmark.pruning import nothing, pruned_setting, without_refit
from benchmark.sampling import BF16, our_base, our_images, random_base
from benchmark.timing import SpeedFlags
from benchmark.training import CONFIG, random_images
from diffusers import UNet2DModel
from torch import Tensor

from tdc_ray.cli.main import run_command
from tdc_ray.config.data import DataConfig
from tdc_ray.config.diffusion import DiffusionConfig
from tdc_ray.config.presets import preset
from tdc_ray.config.prune import PruneConfig
from tdc_ray.config.run import RunConfig
from tdc_ray.data.batches import to_minus_one_one
from tdc_ray.diffusion.process import noise_schedule
from tdc_ray.diffusion.samplers import make_scheduler
from tdc_ray.diffusion.train import start_state, train
from tdc_ray.execution.device import allow_tf32, worker_device
from tdc_ray.models.network_config import NetworkConfig
from tdc_ray.models.saved_expert import load_expert
from tdc_ray.models.timing import time_passes
from tdc_ray.models.unet2d.architectures import architecture, base_unet
from tdc_ray.models.unet2d.surgery import cut
from tdc_ray.models.unet2d.unet import build_unet, save_unet
from tdc_ray.models.units import keep_everything
from tdc_ray.pruning.criteria.random import random_scores
from tdc_ray.pruning.criteria.scores import select_top
from tdc_ray.pruning.proxies.by_score import sorted_scores, uniform_scheme
from tdc_ray.pruning.space import space_of
from tdc_ray.pruning.tasks.candidates import CandidateJob, measure_candidate
from tdc_ray.runs.stages.expert import pruning_context
from tdc_ray.storage.files import append_json_line, read_json, read_json_lines
from tdc_ray.storage.provenance import commit, versions

ROOT = Path(__file__).parents[1]
DEVICE = worker_device()
PRECISIONS = ("bf16", "tf32", "fp32")
MOST_OF_A_COMMAND_S = 180.0
"""Longest time of a command; one that hangs leaves time for the other sections."""

SLOW_S = 2.0
"""A first call that takes longer is warm-up enough."""


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


def seconds_of(call: Callable[[], object], flags: GpuFlags) -> dict[str, float]:
    """Time a call after warming up; return the median in seconds and the peak memory in bytes."""
    first = timed(call)
    for _ in range(0 if flags.smoke or first > SLOW_S else 2):
        call()
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times = [timed(call)]
    while len(times) < 3 or (sum(times) < 0.5 and not flags.smoke):
        times.append(timed(call))
    repeats = len(times)
    return {
        "seconds": statistics.median(times),
        "repeats": repeats,
        "first_seconds": first,
        **peak_memory(),
    }


def timed(call: Callable[[], object]) -> float:
    """Return the seconds until a call's work is done."""
    synchronize()
    began = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - began


def synchronize() -> None:
    """Wait until the GPU has done what it was given."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def peak_memory() -> dict[str, float]:
    """Return the most memory that torch took of the GPU, if there is one."""
    return {"peak_bytes": torch.cuda.max_memory_allocated()} if DEVICE.type == "cuda" else {}


def free_memory() -> None:
    """Let peaks of memory, and what is compiled, be of the next measurement alone."""
    torch.compiler.reset()
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


@dataclass(frozen=True)
class Timed:
    """A network that is timed."""

    config: RunConfig
    """Of which network, noise process, sampler and shape count."""

    batch: int
    """Images of a training step."""

    images: int
    """Images that are sampled at once."""

    @property
    def network(self) -> NetworkConfig:
        """Settings of the network."""
        return architecture(self.config.model.architecture)


def networks(flags: GpuFlags) -> dict[str, Timed]:
    """Return what is timed, by name."""
    if flags.smoke:
        return {"tiny": Timed(preset("digits-smoke"), 4, 2)}
    latent = preset("ffhq256-ldm")
    latent = replace(latent, data=replace(latent.data, image_size=64))  # that of the latents
    return {
        "iddpm-cifar10": Timed(preset("cifar10"), 128, 128),
        "ldm-ffhq256": Timed(latent, 32, 32),
        "ddpm-cifar10": Timed(preset("ddpm-cifar10"), 128, 128),
    }


# --- sections ------------------------------------------------------------------------------------


def works(flags: GpuFlags) -> Measurements:
    """Run the tests marked gpu, the doctor, and a run whose two actors share the GPU."""
    ends = time.monotonic() + flags.seconds

    def command(*arguments: str) -> dict[str, Any]:
        began = time.perf_counter()
        with tempfile.TemporaryDirectory(prefix="tdc-gpu-") as folder:
            done = subprocess.run(
                [sys.executable, "-m", *(one.format(folder=folder) for one in arguments)],
                cwd=ROOT,
                capture_output=True,
                text=True,
                check=False,
                timeout=min(MOST_OF_A_COMMAND_S, ends - time.monotonic()),
            )
        seconds, text = time.perf_counter() - began, done.stdout + done.stderr
        return {"code": done.returncode, "seconds": seconds, "output": text[-2000:]}

    share = "0" if DEVICE.type == "cpu" else "0.5"
    run = ["tdc_ray", "run", "--preset", "digits-smoke", "--run-dir", "{folder}/run"]
    run += ["--compute.num-actors", "2", "--compute.gpus-per-actor", share]
    yield "tests", partial(command, "pytest", "-q", "-n", "0", "-m", "gpu", "tests")
    yield "run", partial(command, *run)
    yield "doctor", partial(command, "tdc_ray", "doctor")


def training(flags: GpuFlags, *, compiles: bool = False) -> Measurements:
    """Time training steps, ours and diffusers' example's."""

    def ours(config: NetworkConfig, batch: int, precision: str) -> Any:
        chosen = replace(
            CONFIG,
            precision="bf16" if precision == "bf16" else "fp32",
            compile="default" if compiles else "none",
            num_steps=6 if flags.smoke else 14,
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
        first, _, _, *steps = [after - before for before, after in pairwise(times)]
        return {
            "seconds": statistics.median(steps),
            "repeats": len(steps),
            "first_seconds": first,
            **peak_memory(),
        }

    def theirs(config: NetworkConfig, batch: int, precision: str) -> Any:
        example = ExampleTraining(config)
        example.unet.to(DEVICE)
        example.ema.to(DEVICE)
        if compiles:
            example.unet = torch.compile(example.unet)
        images = to_minus_one_one(random_images(config, batch)).to(DEVICE)

        def step() -> None:
            with in_bf16(precision):
                example.step(images)

        return seconds_of(step, flags)

    for precision in precisions(flags, compiles=compiles):
        for name, network in networks(flags).items():
            config = {**network.network, "out_channels": network.network["in_channels"]}
            for who, way in (("ours", ours), ("diffusers", theirs)):
                measure = partial(in_precision, precision, way, config, network.batch)
                yield f"{name}, {network.batch} images, {precision}, {who}", measure


def precisions(flags: GpuFlags, *, compiles: bool) -> tuple[str, ...]:
    """Return the precisions, most important first; of what a quick check compiles, one."""
    return PRECISIONS[:1] if flags.smoke and compiles else PRECISIONS


def in_bf16(precision: str) -> AbstractContextManager[object]:
    """Enter autocast as a user of diffusers does, if the precision is bf16."""
    return torch.autocast(DEVICE.type, torch.bfloat16) if precision == "bf16" else nullcontext()


def in_precision(
    precision: str, way: Callable[..., dict[str, Any]], *arguments: Any
) -> dict[str, Any]:
    """Measure with TF32 as a precision says, which is the last argument."""
    allow_tf32(allowed=precision == "tf32")
    return way(*arguments, precision)


def sampling(flags: GpuFlags, *, compiles: bool = False) -> Measurements:
    """Time DDIM steps of our pipeline and of diffusers' DDIMPipeline."""
    steps = 2 if flags.smoke else 10

    def ours(config: RunConfig, count: int, precision: str) -> Any:
        kind = BF16 if precision == "bf16" else ""
        pipeline = our_base(random_base(config), config, kind).to(DEVICE)
        pipeline.compile_mode = "default" if compiles else "none"
        return seconds_of(partial(our_images, pipeline, count, steps), flags)

    def theirs(config: RunConfig, count: int, precision: str) -> Any:
        scheduler = make_scheduler(config.diffusion, config.sampler)
        pipeline = ddim_pipeline(random_base(config), scheduler).to(DEVICE)
        if compiles:
            pipeline.unet = torch.compile(pipeline.unet)
        with in_bf16(precision):
            return seconds_of(partial(ddim_images, pipeline, count, steps), flags)

    for precision in precisions(flags, compiles=compiles):
        for name, network in networks(flags).items():
            sampler = replace(network.config.sampler, sampler="ddim", num_inference_steps=steps)
            config = replace(network.config, sampler=sampler)
            for who, way in (("ours", ours), ("diffusers", theirs)):
                measure = partial(in_precision, precision, way, config, network.images)
                yield (
                    f"{name}, {network.images} images, {steps} steps, {precision}, {who}",
                    measure,
                )


def experts(flags: GpuFlags, *, compiles: bool = False) -> Measurements:
    """Time forward passes of experts beside the base's."""
    batches, multiples, shares = (128, 16, 1), (16, 8, 32), (0.8, 0.6, 0.5)
    if flags.smoke:
        batches, multiples, shares = (2,), (8,), (0.6,)
    dtype = torch.float32 if flags.smoke else torch.bfloat16

    @cache
    def base_of(name: str) -> UNet2DModel:
        return random_base(networks(flags)[name].config)

    @cache
    def base_seconds(name: str, batch: int) -> float:
        found = seconds_of(passes(copy.deepcopy(base_of(name)), batch), flags)
        free_memory()
        return found["seconds"]

    def passes(unet: UNet2DModel, batch: int) -> Callable[[], object]:
        unet = unet.eval().to(DEVICE, dtype, memory_format=torch.channels_last)
        size = unet.config["sample_size"]
        shape = (batch, unet.config["in_channels"], size, size)
        noise = torch.randn(shape, device=DEVICE, dtype=dtype)
        timesteps = torch.full((batch,), 500, device=DEVICE)
        model = torch.compile(unet, mode="reduce-overhead") if compiles else unet
        return torch.inference_mode()(lambda: model(noise, timesteps))

    def measure(name: str, batch: int, multiple: int, share: float) -> dict[str, Any]:
        base = base_of(name)
        expert, macs = cut_at_random(base, multiple, share)
        base_time = base_seconds(name, batch)
        found = seconds_of(passes(expert, batch), flags)
        saved = (1 - found["seconds"] / base_time) / (1 - macs)
        return {**found, "base_seconds": base_time, "macs_share": macs, "saved_of_macs": saved}

    for name in list(networks(flags))[:2]:
        for batch, multiple, share in product(batches, multiples, shares):
            of = f"{name}, batch {batch}, multiples of {multiple}, {share:g} F"
            yield of, partial(measure, name, batch, multiple, share)


def cut_at_random(base: UNet2DModel, multiple: int, share: float) -> tuple[UNet2DModel, float]:
    """Cut an expert of uniform ratios within a share of the base's macs; return its own share."""
    space = space_of(base.config, "inner", multiple)
    scores = random_scores(space.units, 0)
    scheme = uniform_scheme(space, int(share * space.macs_base), sorted_scores(scores))
    expert = cut(base, space.units, select_top(space.units, scores, scheme))
    return expert, space.macs(scheme) / space.macs_base


def search(flags: GpuFlags) -> Measurements:
    """Measure and refit a candidate, and prune a base of random weights, on random images."""

    def candidate(*, refits: bool) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as name:
            run_dir, config, group = pruned_setting(SpeedFlags(smoke=flags.smoke), Path(name))
            if not flags.smoke:
                config = replace(config, prune=PruneConfig())
            config = config if refits else without_refit(config)
            space = space_of(base_unet(config.model, config.conditioning))
            scores = random_scores(space.units, 0)
            scheme = uniform_scheme(space, int(0.7 * space.macs_base), sorted_scores(scores))
            kept = select_top(space.units, scores, scheme)
            context, whole = pruning_context(run_dir, config), keep_everything(space.units)
            if refits:  # a search weighs the images of its refits once
                weighs = CandidateJob(context, group, whole, 0, saves_weights=True)
                measure_candidate(weighs, nothing)
            measure = partial(measure_candidate, CandidateJob(context, group, kept, 1), nothing)
            return with_speed(seconds_of(measure, flags), measure().macs)

    def pruned(folder: Path, *limit: str) -> dict[str, Any]:
        out = folder / limit[0].strip("-")
        arguments = ["prune", str(folder / "unet"), "--out", str(out), *limit]
        arguments += ["--data", str(folder / "images.npz")]
        if flags.smoke:
            arguments += ["--prune.num-images", "16", "--prune.num-refit-images", "16"]
        if code := run_command(arguments):
            raise RuntimeError(f"tdc-ray {' '.join(arguments)} exits with {code}.")
        report: dict[str, Any] = read_json(out / "report.json")
        return report

    @contextmanager
    def random_model() -> Iterator[tuple[Path, UNet2DModel]]:
        with tempfile.TemporaryDirectory() as name:
            network, count = next(iter(networks(flags).values())), 64 if flags.smoke else 1024
            unet, folder = random_base(network.config), Path(name)
            save_unet(unet, folder / "unet")
            pixels = random_images(network.network, count).permute(0, 2, 3, 1).numpy()
            np.savez(folder / "images.npz", images=pixels.squeeze(-1) if flags.smoke else pixels)
            yield folder, unet.to(DEVICE)

    def prune() -> dict[str, Any]:
        with random_model() as (folder, _):
            report = pruned(folder, "--macs", "0.7")
        return with_speed({"seconds": report["search_seconds"]}, report["search_macs"])

    def latency() -> dict[str, Any]:
        batch = 4 if flags.smoke else 128
        passes = {"min_repeats": 3, "min_seconds": 0.0 if flags.smoke else 2.0}
        allow_tf32(allowed=False)
        with random_model() as (folder, unet):
            (whole,) = time_passes([unet], batch, **passes)
            limit = f"{0.8e3 * whole.total:.6g}"
            size = ("--prune.latency-batch-size", str(batch))
            report = pruned(folder, "--milliseconds", limit, *size)
            share = report["macs"] / report["macs_base"]
            pruned(folder, "--macs", f"{min(share, 0.999):.6g}")
            found = [load_expert(folder / way).to(DEVICE) for way in ("milliseconds", "macs")]
            base, by_time, by_macs = time_passes([unet, *found], batch, **passes)
        return {
            "seconds": by_time.total,
            "seconds_by_macs": by_macs.total,
            "base_seconds": base.total,
            "macs_share": share,
            "table": report["time"],
        }

    yield "measuring a candidate", partial(candidate, refits=False)
    yield "measuring a candidate with its refit", partial(candidate, refits=True)
    yield "prune to 0.7 F", prune
    yield "prune to 0.8 of the time", latency


def with_speed(found: dict[str, float], macs: float) -> dict[str, float]:
    """Add the macs of what was timed, and those per second."""
    return {**found, "macs": macs, "macs_per_second": macs / found["seconds"]}


SECTIONS: dict[str, Callable[[GpuFlags], Measurements]] = {
    "works": works,
    "training": training,
    "sampling": sampling,
    "experts": experts,
    "search": search,
    "experts, compiled": partial(experts, compiles=True),
    "training, compiled": partial(training, compiles=True),
    "sampling, compiled": partial(sampling, compiles=True),
}


def main(flags: GpuFlags) -> None:
    """Measure what is not yet in the file, and print it."""
    sections = flags.sections or tuple(SECTIONS)
    if unknown := set(sections) - set(SECTIONS):
        sys.exit(f"--sections must be among {', '.join(SECTIONS)}, got {', '.join(unknown)}")
    if flags.smoke:  # traced, not compiled to machine code
        torch.compile = partial(torch.compile, backend="eager")
    began = time.monotonic()
    rows = read_json_lines(flags.out)
    failed = ("error", "code")
    tried = {(row["section"], row["name"]): any(map(row.get, failed)) for row in rows}
    wanted = [
        (section, name, measure)
        for section in sections
        for name, measure in SECTIONS[section](flags)
        if tried.get((section, name)) is not False
    ]
    wanted.sort(key=lambda one: one[:2] in tried)  # what failed comes last
    about = {"device": str(DEVICE), "commit": commit(), "versions": versions()}
    if DEVICE.type == "cuda":
        about["device"] = torch.cuda.get_device_name()
    for section, name, measure in wanted:
        if time.monotonic() - began > flags.seconds:
            sys.exit(f"{flags.seconds:g} s are over; the same command resumes")
        try:
            found = measure()
        except Exception as error:  # noqa: BLE001  the other measurements count, too
            found = {"error": f"{type(error).__name__}: {error}"}
        free_memory()
        append_json_line(flags.out, {"section": section, "name": name, **found, **about})
        print(f"{section}: {name}: {found}", flush=True)


if __name__ == "__main__":
    main(tyro.cli(GpuFlags, description=__doc__))
