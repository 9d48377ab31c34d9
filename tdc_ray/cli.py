"""The command line: one subcommand per job; parses, configures logging, calls."""

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console
from rich.logging import RichHandler

from tdc_ray.commands import (
    Export,
    Import,
    Memory,
    Plan,
    Prune,
    Run,
    Sample,
    Simulate,
    Status,
    TrainAutoencoder,
    parse,
)
from tdc_ray.config import RunConfig, default_run_dir, to_json, with_absolute_paths
from tdc_ray.errors import ConfigError, StorageError, TdcError
from tdc_ray.mirror import growing
from tdc_ray.plan import Plan as GroupPlan
from tdc_ray.remote import is_remote, located, shown, writer

logger = logging.getLogger(__name__)


def main() -> None:
    """Run the command line and exit."""
    sys.exit(run_command(sys.argv[1:]))


def run_command(arguments: Sequence[str]) -> int:
    """Run one command line; give the exit code: 0, 1 for an error, 130 for an interrupt."""
    console = Console()
    try:
        command = parse(arguments)
    except TdcError as error:
        return _fail(error, verbose="--verbose" in arguments)
    _configure_logging(console, verbose=command.verbose)
    try:
        if isinstance(command, Run):
            _run(command, console)
        elif isinstance(command, Plan):
            _plan(command, console)
        elif isinstance(command, Prune):
            _prune(command, console)
        elif isinstance(command, Memory):
            _memory(command, console)
        elif isinstance(command, Status):
            _status(command, console)
        elif isinstance(command, Simulate):
            _simulate(command, console)
        elif isinstance(command, TrainAutoencoder):
            _train_autoencoder(command, console)
        elif isinstance(command, Import):
            _import(command, console)
        elif isinstance(command, Export):
            _export(command, console)
        else:
            _sample(command, console)
    except (TdcError, OSError) as error:  # a full disk, a folder that cannot be written
        return _fail(error, verbose=command.verbose)
    except KeyboardInterrupt:
        resumable = isinstance(command, Run | Prune | TrainAutoencoder)
        again = "; run the same command again to go on" if resumable else ""
        Console(stderr=True).print(f"interrupted{again}", soft_wrap=True)
        return 130
    return 0


def _run(command: Run, console: Console) -> None:
    config = command.config
    folder = located(command.run_dir or default_run_dir(config))
    from tdc_ray.bases import with_first_stage  # imports torch
    from tdc_ray.run import check, run  # imports ray

    if command.dry_run:
        console.print(config)
        _show_plan(config, console)
        check(with_first_stage(with_absolute_paths(config)))
        console.print(f"would run in {shown(folder)}", soft_wrap=True)
        return
    name = shown(folder)
    console.print(f"run directory {name}; the same command goes on after a cut", soft_wrap=True)
    from tdc_ray.report import print_results

    with _log_to(folder / "run.log"):
        results = run(config, folder, console)
    print_results(console, results)
    console.print(
        f"results: {name}/results.json\nimages: tdc-ray sample {name}\n"
        f"curves: tensorboard --logdir {name}/tensorboard",
        soft_wrap=True,
    )


def _show_plan(config: RunConfig, console: Console) -> GroupPlan:
    from tdc_ray.models.architectures import base_unet
    from tdc_ray.models.layers import count
    from tdc_ray.plan import plan_groups
    from tdc_ray.report import print_plan

    plan = plan_groups(config.diffusion, config.plan, config.sampler)
    if config.model.base is None:
        unet = base_unet(config)
    else:
        from tdc_ray.base_sources import find_base  # imports torch
        from tdc_ray.bases import check_base

        unet = check_base(find_base(config.model.base), config)
    _, macs_base = count(unet)
    print_plan(console, plan, config, macs_base)
    return plan


def _plan(command: Plan, console: Console) -> None:
    from tdc_ray.plan import to_json
    from tdc_ray.report import plot_plan
    from tdc_ray.storage import write_json

    config = command.config
    plan = _show_plan(config, console)
    folder = located(command.out_dir or default_run_dir(config))
    write_json(folder / "plan.json", to_json(plan))
    plot_plan(plan, folder / "plan.png")
    name = shown(folder)
    console.print(f"written: {name}/plan.json, {name}/plan.png", soft_wrap=True)


def _prune(command: Prune, console: Console) -> None:
    from tdc_ray.models.unet import unet_config
    from tdc_ray.plan import one_group, plan_groups
    from tdc_ray.prune_model import REPORT_FILE, for_unet, prune_model, unet_dir
    from tdc_ray.report import print_pruned

    unet = unet_dir(command.model_dir)
    config = for_unet(command.config, unet_config(unet), command.data)
    if command.method is not None:
        config = replace(config, prune=replace(config.prune, method=command.method))
    if command.group is None:
        span = command.timesteps or (0, config.diffusion.num_train_timesteps - 1)
        group = one_group(config.diffusion, config.sampler, span, command.macs)
    else:
        groups = plan_groups(config.diffusion, config.plan, config.sampler).groups
        if not 0 <= command.group < len(groups):
            raise ConfigError(f"--group must be 0 to {len(groups) - 1}, got {command.group}.")
        group = replace(groups[command.group], limit_share=command.macs)
    report = prune_model(unet, config, group, command.out, console)
    print_pruned(console, report)
    console.print(f"written: {shown(command.out)}/{REPORT_FILE} and the model", soft_wrap=True)


def _train_autoencoder(command: TrainAutoencoder, console: Console) -> None:
    from tdc_ray.autoencoder import REPORT_FILE, train_autoencoder
    from tdc_ray.prune_model import data_config

    config = command.config
    if command.data is not None:
        config = replace(config, data=data_config(command.data, config.data))
    report = train_autoencoder(config, command.out, console)
    errors, out = report["held_out"], shown(command.out)
    console.print(
        f"{errors['num_images']} held-out images: L1 {errors['l1']:.4f}, MSE {errors['mse']:.5f} "
        f"(of [-1, 1]), PSNR {errors['psnr_db']:.1f} dB; latents {report['latent_shape']}, "
        f"scaling_factor {report['scaling_factor']:.4f}\n"
        f"written: {out}/{REPORT_FILE} and the model: --data.first-stage {out}",
        soft_wrap=True,
    )


def _memory(command: Memory, console: Console) -> None:
    from tdc_ray.layout import RunDir
    from tdc_ray.prune.memory import MemoryBank
    from tdc_ray.report import print_memory
    from tdc_ray.storage import exists, listing

    folder = located(command.run)
    paths = [RunDir(folder).memory, *listing(folder, "search/*/memory.jsonl")]
    found = [path for path in paths if exists(path)]
    if not found:
        raise StorageError(
            f"{shown(folder)} holds no memory bank: {shown(paths[0])} does not exist."
        )
    for path in found:
        entries = MemoryBank(path).all()
        print_memory(console, [e for e in entries if command.group in (None, e.group)], path)


def _status(command: Status, console: Console) -> None:
    from tdc_ray.layout import RunDir
    from tdc_ray.status import status
    from tdc_ray.workers_report import print_status

    print_status(console, status(RunDir(located(command.run))))


def _simulate(command: Simulate, console: Console) -> None:
    from tdc_ray.simulation import simulate_run
    from tdc_ray.storage import write_json
    from tdc_ray.workers_report import print_simulated

    found = simulate_run(command.config, command.simulation)
    print_simulated(console, found)
    if command.json is not None:
        document = [asdict(one) for one in found]
        write_json(command.json, {"settings": to_json(command.config), "simulated": document})


def _import(command: Import, console: Console) -> None:
    from tdc_ray.base_sources import find_base
    from tdc_ray.bases import import_base, untold
    from tdc_ray.models.layers import count
    from tdc_ray.storage import exists

    out = located(command.out)
    if exists(out) and (is_remote(out) or not out.is_dir() or any(out.iterdir())):
        raise StorageError(f"{shown(out)} must be a new or an empty folder: choose another.")
    base = find_base(command.source)
    num_params, macs = count(import_base(base, command.config, out))
    console.print(
        f"written: {shown(out)} ({base.weights} weights, {num_params / 1e6:.2f} M parameters, "
        f"{macs / 1e9:.2f} G macs)",
        soft_wrap=True,
    )
    for name in untold(base):
        stage, _, setting = name.partition(".")
        value = getattr(getattr(command.config, stage), setting)
        console.print(f"taken from the settings, not the base: {name} {value}", soft_wrap=True)
    if (embeds := base.unet.get("num_class_embeds")) is not None:
        console.print(
            f"it embeds {embeds} classes: run it with --conditioning.num-classes {embeds}, or "
            f"{embeds - 1} if the last one stands for no class",
            soft_wrap=True,
        )


def _export(command: Export, console: Console) -> None:
    from tdc_ray.export import export_run

    export_run(command.run, command.out)
    console.print(f"written: {shown(command.out)} (README.md says how to sample)", soft_wrap=True)


def _sample(command: Sample, console: Console) -> None:
    import numpy as np
    import torch
    from torchvision.utils import save_image

    from tdc_ray.pipeline import ProgressivePipeline
    from tdc_ray.sampling import image_generators, image_labels
    from tdc_ray.storage import atomic_path

    pipeline = ProgressivePipeline.from_pretrained(command.run)
    pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
    pipeline.set_progress_bar_config(disable=not console.is_terminal)
    pixels = []
    classes = torch.tensor(command.labels) if command.labels else None
    for first in range(0, command.num_images, command.batch_size):
        count = min(command.batch_size, command.num_images - first)
        generators = image_generators(command.seed, first, count)
        turns = image_labels(
            pipeline.num_classes if classes is None else len(classes), first, count
        )
        output = pipeline(
            count,
            generators,
            num_inference_steps=command.num_inference_steps,
            output_type="np",
            class_labels=turns if classes is None else classes[turns],
            guidance_scale=command.guidance_scale,
        )
        pixels.append(output.images)
    images = np.concatenate(pixels)
    folder = located(command.out_dir or command.run / "samples")
    with atomic_path(folder / "samples.npz") as temporary, temporary.open("wb") as file:
        np.savez(file, arr_0=images)
    grid = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    with atomic_path(folder / "samples.png") as temporary, temporary.open("wb") as file:
        save_image(grid, file, nrow=max(1, round(len(images) ** 0.5)), format="png")
    name = shown(folder)
    console.print(
        f"written: {name}/samples.npz ({images.shape}), {name}/samples.png", soft_wrap=True
    )


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


@contextmanager
def _log_to(path: Path) -> Iterator[None]:
    """Keep the log of all attempts beside the results, once the run has made its directory.

    Of a URI it is a folder, where every attempt has a file of its own.
    """
    with growing(path) as place:
        file = place / f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{writer()}.log"
        handler = logging.FileHandler(file if is_remote(path) else place, delay=True)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
        logging.getLogger().addHandler(handler)
        try:
            yield
        finally:
            logging.getLogger().removeHandler(handler)
            handler.close()


def _fail(error: TdcError | OSError, *, verbose: bool) -> int:
    if verbose:
        logger.error("", exc_info=error)
    Console(stderr=True).print(f"error: {error}", soft_wrap=True, markup=False, highlight=False)
    return 1
