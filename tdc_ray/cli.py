"""The command line: one subcommand per job; parses, configures logging, calls."""

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.logging import RichHandler
from tyro.conf import OmitSubcommandPrefixes, Positional, arg, subcommand

from tdc_ray.config import RunConfig, default_run_dir
from tdc_ray.errors import TdcError
from tdc_ray.plan import Plan as GroupPlan
from tdc_ray.presets import PRESETS, preset
from tdc_ray.settings import require

logger = logging.getLogger(__name__)

DESCRIPTION = f"""Progressive diffusion models: one pruned denoiser per range of timesteps.

tdc-ray run              the whole of TDC Training on the bundled digits, in minutes
tdc-ray plan             which timesteps form a group, and what each group may cost
tdc-ray sample RUN_DIR   images from a finished run

Presets (--preset NAME): {", ".join(PRESETS)}. Every setting of a preset is a flag."""

Settings = Annotated[RunConfig, arg(name="")]
"""Flags such as ``--plan.num-groups`` without a prefix of their own."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """Do the whole of TDC Training: base, pruning rounds, fine-tunes, pipeline, scores.

    Run the same command again to go on after a cut, or to see the results of a finished run.
    """

    config: Settings
    run_dir: Path | None = None
    """Where everything goes; default: runs/<preset>-seed<seed>-<digest of the settings>."""
    dry_run: bool = False
    """Show the settings and the plan, check the data, and stop."""
    verbose: bool = False
    """Log more, and show where an error came from."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Show the groups of timesteps and what each may cost; trains nothing."""

    config: Settings
    out_dir: Path | None = None
    """Where plan.json and plan.png go; default: the default run directory."""
    verbose: bool = False
    """Log more, and show where an error came from."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Sample images from the experts of a finished run: a grid and an npz (arr_0, uint8, NHWC)."""

    run: Positional[Path]
    """The run directory, or a folder of experts."""
    num_images: int = 64
    """How many images."""
    seed: int = 0
    """Image i of a seed is always the same."""
    num_inference_steps: int | None = None
    """Denoising steps; default: as the run was planned."""
    batch_size: int = 64
    """Images sampled at once."""
    out_dir: Path | None = None
    """Where samples.png and samples.npz go; default: RUN/samples."""
    verbose: bool = False
    """Log more, and show where an error came from."""

    def __post_init__(self) -> None:
        for name in ("num_images", "batch_size"):
            require("sample", self, name, "at least 1", ok=getattr(self, name) >= 1)


Command = Run | Plan | Sample


def main() -> None:
    """Run the command line and exit."""
    sys.exit(run_command(sys.argv[1:]))


def run_command(arguments: Sequence[str]) -> int:
    """Run one command line; give the exit code: 0, 1 for an error, 130 for an interrupt."""
    console = Console()
    try:
        command = _parse(arguments)
    except TdcError as error:
        return _fail(error, verbose="--verbose" in arguments)
    _configure_logging(console, verbose=command.verbose)
    try:
        if isinstance(command, Run):
            _run(command, console)
        elif isinstance(command, Plan):
            _plan(command, console)
        else:
            _sample(command, console)
    except (TdcError, OSError) as error:  # a full disk, a folder that cannot be written
        return _fail(error, verbose=command.verbose)
    except KeyboardInterrupt:
        again = "; run the same command again to go on" if isinstance(command, Run) else ""
        Console(stderr=True).print(f"interrupted{again}", soft_wrap=True)
        return 130
    return 0


def _run(command: Run, console: Console) -> None:
    config = command.config
    folder = command.run_dir or default_run_dir(config)
    from tdc_ray.run import check, run  # imports torch and ray

    if command.dry_run:
        console.print(config)
        _show_plan(config, console)
        check(config)
        console.print(f"would run in {folder}", soft_wrap=True)
        return
    console.print(f"run directory {folder}; the same command goes on after a cut", soft_wrap=True)
    from tdc_ray.report import print_results

    log = _log_to(folder / "run.log")
    try:
        results = run(config, folder, console)
    finally:
        logging.getLogger().removeHandler(log)
        log.close()
    print_results(console, results)
    console.print(
        f"results: {folder}/results.json\nimages: tdc-ray sample {folder}\n"
        f"curves: tensorboard --logdir {folder}/tensorboard",
        soft_wrap=True,
    )


def _show_plan(config: RunConfig, console: Console) -> GroupPlan:
    from tdc_ray.models.architectures import architecture
    from tdc_ray.models.layers import count
    from tdc_ray.plan import plan_groups
    from tdc_ray.report import print_plan

    plan = plan_groups(config.diffusion, config.plan, config.sampler)
    _, macs_base = count(architecture(config.model.architecture))
    print_plan(console, plan, config, macs_base)
    return plan


def _plan(command: Plan, console: Console) -> None:
    from tdc_ray.plan import to_json
    from tdc_ray.report import plot_plan
    from tdc_ray.storage import write_json

    config = command.config
    plan = _show_plan(config, console)
    folder = command.out_dir or default_run_dir(config)
    write_json(folder / "plan.json", to_json(plan))
    plot_plan(plan, folder / "plan.png")
    console.print(f"written: {folder}/plan.json, {folder}/plan.png", soft_wrap=True)


def _sample(command: Sample, console: Console) -> None:
    import numpy as np
    import torch
    from torchvision.utils import save_image

    from tdc_ray.pipeline import ProgressivePipeline
    from tdc_ray.sampling import image_generators
    from tdc_ray.storage import atomic_path

    pipeline = ProgressivePipeline.from_pretrained(command.run)
    pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
    pipeline.set_progress_bar_config(disable=not console.is_terminal)
    pixels = []
    for first in range(0, command.num_images, command.batch_size):
        count = min(command.batch_size, command.num_images - first)
        generators = image_generators(command.seed, first, count)
        output = pipeline(
            count, generators, num_inference_steps=command.num_inference_steps, output_type="np"
        )
        pixels.append(output.images)
    images = np.concatenate(pixels)
    folder = command.out_dir or command.run / "samples"
    with atomic_path(folder / "samples.npz") as temporary, temporary.open("wb") as file:
        np.savez(file, arr_0=images)
    grid = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    with atomic_path(folder / "samples.png") as temporary, temporary.open("wb") as file:
        save_image(grid, file, nrow=max(1, round(len(images) ** 0.5)), format="png")
    console.print(
        f"written: {folder}/samples.npz ({images.shape}), {folder}/samples.png", soft_wrap=True
    )


def _parse(arguments: Sequence[str]) -> Command:
    """Parse in two passes: the preset decides the defaults of all other flags."""
    config = preset(_preset_name(arguments))
    choices = (
        Annotated[Run, subcommand("run", default=Run(config=config))]
        | Annotated[Plan, subcommand("plan", default=Plan(config=config))]
        | Annotated[Sample, subcommand("sample")]
    )
    command: Command = tyro.cli(
        choices,
        args=list(arguments),
        prog="tdc-ray",
        description=DESCRIPTION,
        config=(OmitSubcommandPrefixes,),
    )
    return command


def _preset_name(arguments: Sequence[str]) -> str:
    for place, argument in enumerate(arguments):
        if argument == "--preset" and place + 1 < len(arguments):
            return arguments[place + 1]
        if argument.startswith("--preset="):
            return argument.removeprefix("--preset=")
    return "digits"


def _configure_logging(console: Console, *, verbose: bool) -> None:
    handler: logging.Handler
    if console.is_terminal:
        handler = RichHandler(console=console, show_path=False)
        handler.setFormatter(logging.Formatter("%(message)s"))
    else:
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("tdc_ray").setLevel(logging.DEBUG if verbose else logging.INFO)


def _log_to(path: Path) -> logging.Handler:
    """Keep the log of all attempts beside the results, once the run has made its directory."""
    handler = logging.FileHandler(path, delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
    logging.getLogger().addHandler(handler)
    return handler


def _fail(error: TdcError | OSError, *, verbose: bool) -> int:
    if verbose:
        logger.error("", exc_info=error)
    Console(stderr=True).print(f"error: {error}", soft_wrap=True, markup=False, highlight=False)
    return 1
