"""The rest: how long things take to start, peak memory, and where a run's wall time goes."""

import subprocess
import sys
from collections import defaultdict
from collections.abc import Mapping
from functools import partial
from itertools import pairwise

from benchmark.peers import ExampleTraining, ddim_images, ddim_pipeline
from benchmark.sampling import KINDS, PEER, our_base, our_images, random_base, sampled_config
from benchmark.timing import Row, SpeedFlags, compared, peak_mb, precision_of, use_threads
from benchmark.training import (
    EXAMPLE,
    our_training,
    random_images,
    trained_unet,
)
from tdc_ray.config.train import Precision
from tdc_ray.data.batches import to_minus_one_one
from tdc_ray.diffusion.samplers import make_scheduler
from tdc_ray.errors import ConfigError
from tdc_ray.execution.timeline import Span, load_history
from tdc_ray.runs.results import load_results
from tdc_ray.storage.files import listing, read_json, read_json_lines
from tdc_ray.storage.object_store import display_path, resolve_path
from tdc_ray.storage.run_dir import RunDir

COMMANDS: Mapping[str, tuple[str, ...]] = {
    "import torch": ("-c", "import torch"),
    "import tdc_ray": ("-c", "import tdc_ray"),
    "tdc-ray --help": ("-m", "tdc_ray", "--help"),
    "tdc-ray plan --preset cifar10": ("-m", "tdc_ray", "plan", "--preset", "cifar10"),
}


def starting(flags: SpeedFlags) -> list[Row]:
    """Time processes from start to end."""

    def call(arguments: tuple[str, ...]) -> None:
        subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)

    ways = {name: partial(call, arguments) for name, arguments in COMMANDS.items()}
    if flags.smoke:
        del ways["import torch"], ways["tdc-ray plan --preset cifar10"]
    return compared("start-up", ways, flags.repeats, precision=lambda _: "")


def train_as_example(flags: SpeedFlags) -> None:
    """Run two steps of the example."""
    use_threads(flags.threads)
    config = trained_unet(flags)
    example, images = ExampleTraining(config), to_minus_one_one(random_images(config, 8))
    for _ in range(2):
        example.step(images)


def train_as_we(flags: SpeedFlags, precision: Precision) -> None:
    """Run two of our steps."""
    use_threads(flags.threads)
    config = trained_unet(flags)
    ours = our_training(config, precision)
    ours.step(random_images(config, 8), 2)


def sample_as_peer(flags: SpeedFlags, num_images: int) -> None:
    """Sample two steps by diffusers' pipeline."""
    use_threads(flags.threads)
    config = sampled_config(flags)
    scheduler = make_scheduler(config.diffusion, config.sampler)
    ddim_images(ddim_pipeline(random_base(config), scheduler), num_images, 2)


def sample_as_we(flags: SpeedFlags, num_images: int, kind: str) -> None:
    """Sample two steps by our pipeline."""
    use_threads(flags.threads)
    config = sampled_config(flags)
    our_images(our_base(random_base(config), config, kind), num_images, 2)


def memory(flags: SpeedFlags) -> list[Row]:
    """Measure the peak of training and of sampling, each in a process of its own."""
    count = 4 if flags.smoke else flags.images
    training, sampling = "peak memory, training step", "peak memory, sampling"
    works = {
        (training, EXAMPLE): partial(train_as_example, flags),
        (training, "ours, fp32"): partial(train_as_we, flags, "fp32"),
        (training, "ours, bf16"): partial(train_as_we, flags, "bf16"),
        (sampling, PEER): partial(sample_as_peer, flags, count),
    }
    works |= {
        (sampling, f"{kind}ours"): partial(sample_as_we, flags, count, kind) for kind in KINDS
    }
    against = {training: EXAMPLE, sampling: PEER}
    if flags.smoke:  # every process imports torch anew
        works = {key: work for key, work in works.items() if key[0] == sampling}
    values: dict[tuple[str, str], list[float]] = defaultdict(list)
    for _ in range(min(3, flags.repeats)):
        for key, work in works.items():
            values[key].append(peak_mb(work)[0])
    return [
        Row(
            section=section,
            name=name,
            unit="MB",
            values=tuple(found),
            precision=precision_of(name),
            batch=8 if section == training else count,
            against=None if name == against[section] else against[section],
        )
        for (section, name), found in values.items()
    ]


def digits(flags: SpeedFlags) -> list[Row]:
    """Return the wall time of a finished run by stage; it must have run without interruption."""
    if flags.run is None:
        return []
    run_dir = RunDir(resolve_path(flags.run).resolve())
    spent = load_results(run_dir.results).seconds
    seconds, wall = seconds_of(run_dir, spent.base), spent.wall
    neither = wall - sum(seconds[kind] for kind in ("training", "measuring", "sampling"))
    if neither < 0:
        raise ConfigError(
            f"--run must be a run that one attempt finished, but {display_path(run_dir.root)} is "
            f"none: more was done than fits into the last attempt's {wall:.0f} s."
        )
    rows = {kind: found / wall for kind, found in seconds.items() if kind != "before"}
    rows |= {"neither training, measuring nor sampling": neither / wall}
    shares = [
        Row(section="digits", name=name, unit="of wall time", values=(share,), precision="")
        for name, share in rows.items()
    ]
    times = {"wall time": wall, "start to the first training step": seconds["before"]}
    return shares + [
        Row(section="digits", name=name, unit="s", values=(value,), precision="")
        for name, value in times.items()
    ]


def seconds_of(run_dir: RunDir, base: float) -> dict[str, float]:
    """Return how long of a run's wall time it trained, measured, sampled and scored.

    An item counts from where its function began, so that a worker's start and imports do not; what
    is done side by side shares the time. ``before`` is from the driver's start to the beginning of
    stage 1's training function, or somewhat more: what ends stage 1 is in it.

    Args:
        run_dir: The run's directory.
        base: Seconds that stage 1's training function took.
    """
    found = dict.fromkeys(("training", "measuring", "sampling", "scoring"), 0.0)
    found["training"] = base
    work = []
    for span in load_history(run_dir.timeline).spans:
        if span.ended is not None and span.outcome == "done" and span.workers:
            seconds = min(span.ended - span.started, _own_seconds(run_dir, span))
            work.append((span.ended - seconds, span.ended, _kind(span)))
    times = sorted({time for start, end, _ in work for time in (start, end)})
    for start, end in pairwise(times):
        active = [kind for first, last, kind in work if first <= start and end <= last]
        for kind in active:
            found[kind] += (end - start) / len(active)
    events = [event for line in read_json_lines(run_dir.timeline) for event in line]
    began = next(event["time"] for event in events if event["event"] == "driver")
    stage_2 = next(event["time"] for event in events if event.get("name") == "experts")
    return {**found, "before": stage_2 - began - base}


def _kind(span: Span) -> str:
    last = span.item.rpartition("/")[2]
    if last == "finetune" or last.startswith("try-"):
        return "training"
    if last.endswith("-features") or span.item.startswith(("features/", "reference/")):
        return "scoring"
    return "sampling" if span.item.startswith("evaluate-") else "measuring"


def _own_seconds(run_dir: RunDir, span: Span) -> float:
    """Return the seconds that an item's function took by its own count, if it keeps one."""
    where, _, name = span.item.rpartition("/")
    if where.startswith("group-"):
        folder = run_dir.group(int(where.removeprefix("group-")))
    else:
        folder = run_dir.samples / where.removeprefix("evaluate-")
    paths = [p for suffix in ("", "-????????") for p in listing(folder, f"{name}{suffix}.json")]
    seconds = [read_json(path).get("seconds", float("inf")) for path in paths]
    return float(min(seconds, default=float("inf")))
