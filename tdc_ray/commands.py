"""The commands and their flags, made from dataclasses by tyro."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import tyro
from tyro.conf import OmitSubcommandPrefixes, Positional, arg, subcommand

from tdc_ray.autoencoder_settings import AutoencoderConfig
from tdc_ray.config import RunConfig
from tdc_ray.errors import CheckpointError, ConfigError
from tdc_ray.presets import PRESETS, preset
from tdc_ray.prune_settings import SearchMethod
from tdc_ray.settings import require
from tdc_ray.simulation_settings import SimulationConfig

DESCRIPTION = f"""Progressive diffusion models: one pruned denoiser per range of timesteps.

tdc-ray run does the whole of TDC Training on the bundled digits, in minutes.

Presets (--preset NAME): {", ".join(PRESETS)}. Every setting of a preset is a flag."""

Settings = Annotated[RunConfig, arg(name="")]
"""Flags such as ``--plan.num-groups`` without a prefix of their own."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """Do the whole of TDC Training: base, pruning rounds, fine-tunes, pipeline, scores.

    Run the same command again to go on after a cut, or to see the results of a finished run.
    With --finetune.num-steps 0 it is training-free: after the base no gradient step is taken, and
    the experts are what cut and least-squares refit make of the base, in minutes.
    """

    config: Settings
    run_dir: Path | None = None
    """Where everything goes: a path or a URI such as s3://bucket/run; default:
    runs/<preset>-seed<seed>-<digest of the settings>."""
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
    """The run directory, or a folder of experts, or its URI."""
    num_images: int = 64
    """How many images."""
    seed: int = 0
    """Image i of a seed is always the same."""
    num_inference_steps: int | None = None
    """Denoising steps; default: as the run was planned."""
    labels: tuple[int, ...] | None = None
    """Classes, which take turns over the images; default: all that a conditioned model knows."""
    guidance_scale: float | None = None
    """Weight of classifier-free guidance, 1 for none; default: as the run was planned."""
    batch_size: int = 64
    """Images sampled at once."""
    out_dir: Path | None = None
    """Where samples.png and samples.npz go; default: RUN/samples."""
    verbose: bool = False
    """Log more, and show where an error came from."""

    def __post_init__(self) -> None:
        for name in ("num_images", "batch_size"):
            require("sample", self, name, "at least 1", ok=getattr(self, name) >= 1)


@dataclass(frozen=True, kw_only=True)
class Status:
    """Show how far a run is: groups, what is under way, workers; from wherever it can be seen."""

    run: Positional[Path]
    """The run directory."""
    verbose: bool = False
    """Log more, and show where an error came from."""


@dataclass(frozen=True, kw_only=True)
class Simulate:
    """Say how long stage 2 would take on a cluster that you do not have; starts nothing.

    The very scheduling policy of a run, in simulated time. What items take is measured
    (--costs RUN) or follows from their macs and --macs-per-second.
    """

    config: Settings
    simulation: Annotated[SimulationConfig, arg(name="")] = field(default_factory=SimulationConfig)
    json: Path | None = None
    """Where the table goes as JSON."""
    verbose: bool = False
    """Log more, and show where an error came from."""


@dataclass(frozen=True, kw_only=True)
class Prune:
    """Cut any saved UNet2DModel to a share of its macs and refit it: no gradient step, no Ray.

    Run the same command again to go on after a cut. The language model (--method llm) needs
    OPENAI_API_KEY, and OPENAI_BASE_URL for servers other than OpenAI's.
    """

    model_dir: Positional[Path]
    """Folder of a diffusers UNet2DModel or of a pipeline with one, or a run directory; or its
    URI."""
    config: Settings
    out: Path
    """Where the pruned model and report.json go."""
    macs: float = 0.7
    """Most macs that are left, as a share of the model's, in (0, 1]."""
    method: SearchMethod | None = None
    """Who proposes what is cut; default: prune.method, which is that of the model's run."""
    data: str | None = None
    """digits, an npz file, a folder of npz files or of images, or CIFAR-10's; default: what the
    model's run was trained on."""
    timesteps: tuple[int, int] | None = None
    """First and last timestep to prune for; default: all."""
    group: int | None = None
    """A group of the plan (--plan.num-groups and so on) to prune for, in place of timesteps."""
    verbose: bool = False
    """Log more, and show where an error came from."""

    def __post_init__(self) -> None:
        require("prune", self, "macs", "in (0, 1]", ok=0 < self.macs <= 1)
        if self.timesteps is not None and self.group is not None:
            raise ConfigError("give --timesteps or --group, not both.")


@dataclass(frozen=True, kw_only=True)
class Export:
    """Export a finished run's experts for diffusers, plain PyTorch and tdc_ray.

    With a model card, and code that needs neither Ray nor tdc_ray.
    """

    run: Positional[Path]
    """The run directory, or its URI."""
    out: Positional[Path]
    """A new folder."""
    verbose: bool = False
    """Log more, and show where an error came from."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Show the memory bank: every pruning scheme that was cut, and its losses, best last."""

    run: Positional[Path]
    """A run directory, or what tdc-ray prune wrote, or its URI."""
    group: int | None = None
    """Only this group."""
    verbose: bool = False
    """Log more, and show where an error came from."""


@dataclass(frozen=True, kw_only=True)
class TrainAutoencoder:
    """Train a small first stage for latent diffusion (an AutoencoderKL); needs no Ray.

    The loss is L1 and a small divergence, without discriminator or perceptual loss. Run the same
    command again to go on after a cut.
    """

    config: Annotated[AutoencoderConfig, arg(name="")]
    out: Path
    """Where the model goes, as a diffusers folder, and report.json: what --data.first-stage is."""
    data: str | None = None
    """digits, an npz file, a folder of npz files or of images, or CIFAR-10's; in place of
    --data.source and --data.path."""
    verbose: bool = False
    """Log more, and show where an error came from."""


@dataclass(frozen=True, kw_only=True)
class Import:
    """Bring a base into diffusers' format, with the noise process that it was trained with.

    ``tdc-ray run --base DIR`` starts from it, and so it does from the base itself.
    """

    source: Positional[str]
    """A base as --base takes it, such as openai:FILE.pt or compvis:FILE.ckpt."""
    out: Positional[Path]
    """A new folder."""
    config: Settings
    verbose: bool = False
    """Log more, and show where an error came from."""


Command = (
    Run | Plan | Sample | Status | Simulate | Prune | Memory | TrainAutoencoder | Import | Export
)


def parse(arguments: Sequence[str]) -> Command:
    """Parse in two passes: the preset decides the defaults of all other flags."""
    config = _with_base(preset(_preset_name(arguments)), arguments)
    missing: Any = tyro.MISSING
    prune = Prune(model_dir=missing, out=missing, config=_config_of_model(arguments) or config)
    autoencoder = TrainAutoencoder(config=AutoencoderConfig(), out=missing)
    imported = Import(source=missing, out=missing, config=config)
    choices = (
        Annotated[Run, subcommand("run", default=Run(config=config))]
        | Annotated[Plan, subcommand("plan", default=Plan(config=config))]
        | Annotated[Sample, subcommand("sample")]
        | Annotated[Prune, subcommand("prune", default=prune)]
        | Annotated[Export, subcommand("export")]
        | Annotated[Status, subcommand("status")]
        | Annotated[Simulate, subcommand("simulate", default=Simulate(config=config))]
        | Annotated[Memory, subcommand("memory")]
        | Annotated[TrainAutoencoder, subcommand("train-autoencoder", default=autoencoder)]
        | Annotated[Import, subcommand("import", default=imported)]
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
    return _value_of("--preset", arguments) or "digits"


def _value_of(flag: str, arguments: Sequence[str]) -> str | None:
    for place, argument in enumerate(arguments):
        if argument == flag and place + 1 < len(arguments):
            return arguments[place + 1]
        if argument.startswith(f"{flag}="):
            return argument.removeprefix(f"{flag}=")
    return None


def _with_base(config: RunConfig, arguments: Sequence[str]) -> RunConfig:
    """Make what a given base tells the defaults of all flags.

    A preset that was named, or a flag, says what the data are; otherwise their resolution and
    channels are the base's, and of a run directory all settings come along.

    Raises:
        ConfigError: The base does not tell its noise process, and nothing was named that has it.
        CheckpointError: There is no such base.
    """
    source = _source(arguments)
    if source is None:
        return config
    from tdc_ray.base_sources import find_base  # imports torch
    from tdc_ray.bases import come_along, untold
    from tdc_ray.prune_model import run_config_of

    base, has_preset = find_base(source), _value_of("--preset", arguments) is not None
    missing = untold(base)
    if missing and not has_preset and not any(a.startswith("--diffusion.") for a in arguments):
        raise ConfigError(
            f"{source} does not tell {', '.join(missing)}: name the preset that it was trained "
            f"with by --preset, or set --{missing[0].replace('_', '-')} and so on."
        )
    if not has_preset and base.folder is not None:
        config = run_config_of(base.folder) or config
    config = replace(config, model=replace(config.model, base=source, num_heads=None))
    return come_along(base, config, with_data=not has_preset)


def _source(arguments: Sequence[str]) -> str | None:
    """Find the base among the arguments, before they are parsed."""
    if not arguments or arguments[0] not in ("run", "plan", "import"):
        return None
    if arguments[0] != "import":
        return _value_of("--base", arguments) or _value_of("--model.base", arguments)
    names = [
        argument
        for before, argument in pairwise(arguments)
        if not argument.startswith("-") and not before.startswith("--")
    ]
    return names[0] if names else None


def _config_of_model(arguments: Sequence[str]) -> RunConfig | None:
    """Give the settings of the run that trained the model that is to be pruned.

    They hold unless a preset is asked for. The model is the first argument that is neither a flag
    nor a flag's value.
    """
    if not arguments or arguments[0] != "prune" or _value_of("--preset", arguments):
        return None
    from tdc_ray.prune_model import run_config_of, unet_dir

    for before, argument in pairwise(arguments):
        is_value = before.startswith("--") and "=" not in before and before != "--verbose"
        if argument.startswith("-") or is_value:
            continue
        with contextlib.suppress(CheckpointError):
            if config := run_config_of(unet_dir(Path(argument))):
                prune = config.prune
                method = "offline" if prune.method == "none" else prune.method
                return replace(config, prune=replace(prune, method=method, halving_steps=0))
    return None
