"""Parses the command line; tyro makes the flags from the commands' dataclasses."""

from collections.abc import Iterator, Sequence
from dataclasses import is_dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import tyro
from tyro.conf import OmitSubcommandPrefixes, subcommand

from tdc_ray.cli.commands.export import Export
from tdc_ray.cli.commands.import_base import Import
from tdc_ray.cli.commands.memory import Memory
from tdc_ray.cli.commands.plan import Plan
from tdc_ray.cli.commands.prune import Prune
from tdc_ray.cli.commands.report import Report
from tdc_ray.cli.commands.run import Run
from tdc_ray.cli.commands.sample import Sample
from tdc_ray.cli.commands.simulate import Simulate
from tdc_ray.cli.commands.status import Status
from tdc_ray.cli.commands.sweep import Sweep
from tdc_ray.cli.commands.train_autoencoder import TrainAutoencoder
from tdc_ray.config.autoencoder import AutoencoderConfig
from tdc_ray.config.presets import PRESETS, preset
from tdc_ray.config.run import RunConfig, from_json
from tdc_ray.errors import CheckpointError, ConfigError
from tdc_ray.storage.object_store import resolve_path

DESCRIPTION = f"""Progressive diffusion models: one pruned denoiser per range of timesteps.

tdc-ray run does the whole of TDC Training on the bundled digits, in minutes.

Presets (--preset NAME): {", ".join(PRESETS)}. Every setting of a preset is a flag."""

Command = (
    Run
    | Sweep
    | Plan
    | Sample
    | Report
    | Status
    | Simulate
    | Prune
    | Memory
    | TrainAutoencoder
    | Import
    | Export
)


def parse(arguments: Sequence[str]) -> Command:
    """Parse in two passes: the preset decides the defaults of all other flags."""
    config = _with_costs(_with_base(preset(_preset_name(arguments)), arguments), arguments)
    missing: Any = tyro.MISSING
    prune = Prune(model_dir=missing, out=missing, config=_config_of_model(config, arguments))
    autoencoder = TrainAutoencoder(config=AutoencoderConfig(), out=missing)
    imported = Import(source=missing, out=missing, config=config)
    choices = (
        Annotated[Run, subcommand("run", default=Run(config=config))]
        | Annotated[Sweep, subcommand("sweep", default=Sweep(config=config, vary=missing))]
        | Annotated[Plan, subcommand("plan", default=Plan(config=config))]
        | Annotated[Sample, subcommand("sample")]
        | Annotated[Prune, subcommand("prune", default=prune)]
        | Annotated[Export, subcommand("export")]
        | Annotated[Report, subcommand("report")]
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
    from tdc_ray.runs.pretrained.settings import apply_settings, missing_settings
    from tdc_ray.runs.pretrained.sources import resolve_base  # imports torch
    from tdc_ray.runs.prune_model import run_config_of

    base, has_preset = resolve_base(source), _value_of("--preset", arguments) is not None
    missing = missing_settings(base.settings)
    if missing and not has_preset and not any(a.startswith("--diffusion.") for a in arguments):
        raise ConfigError(
            f"{source} does not tell {', '.join(missing)}: name the preset that it was trained "
            f"with by --preset, or set --{missing[0].replace('_', '-')} and so on."
        )
    trained = None if has_preset or base.folder is None else run_config_of(base.folder)
    names_data = has_preset or any(a.startswith("--data.") for a in arguments)
    if arguments[0] in ("run", "sweep") and trained is None and not names_data:
        raise ConfigError(
            f"{source} does not tell what it was trained on: name the data by --data.source and "
            "--data.path, or a preset by --preset."
        )
    config = trained or config
    config = replace(config, model=replace(config.model, base=source, num_heads=None))
    return apply_settings(base.settings, config, with_data=not has_preset)


def _with_costs(config: RunConfig, arguments: Sequence[str]) -> RunConfig:
    """Make the settings of the run whose costs a simulation takes the defaults of its flags."""
    costs = _value_of("--costs", arguments)
    if arguments[:1] != ["simulate"] or costs is None or _value_of("--preset", arguments):
        return config
    from tdc_ray.storage.files import exists, read_json
    from tdc_ray.storage.run_dir import RunDir

    path = RunDir(resolve_path(costs)).config
    return from_json(read_json(path)) if exists(path) else config


def _source(arguments: Sequence[str]) -> str | None:
    """Find the base among the arguments, before they are parsed."""
    if not arguments or arguments[0] not in ("run", "sweep", "plan", "import"):
        return None
    if arguments[0] != "import":
        return _value_of("--base", arguments) or _value_of("--model.base", arguments)
    return next(_free(arguments), None)


def _free(arguments: Sequence[str]) -> Iterator[str]:
    """Give the arguments behind the command that are neither flags nor the value of one."""
    switches = {"--verbose", "--no-verbose"}
    for stage, kind in get_type_hints(RunConfig).items():
        for name, value in get_type_hints(kind).items() if is_dataclass(kind) else ():
            if value is bool:
                setting = name.replace("_", "-")
                switches |= {f"--{stage}.{setting}", f"--{stage}.no-{setting}"}
    for before, argument in pairwise(arguments):
        flag = before.replace("_", "-")
        takes_value = flag.startswith("--") and "=" not in flag and flag not in switches
        if not argument.startswith("-") and not takes_value:
            yield argument


def _config_of_model(config: RunConfig, arguments: Sequence[str]) -> RunConfig:
    """Make what the model that is to be pruned tells the defaults of all flags.

    The settings of the run that trained it hold unless a preset is asked for; of another model
    its noise process does.

    Raises:
        ConfigError: The model is of a kind that cannot be pruned here.
        CheckpointError: It is malformed.
    """
    if not arguments or arguments[0] != "prune":
        return config
    from tdc_ray.runs.pretrained.settings import apply_settings
    from tdc_ray.runs.pretrained.sources import noise_settings
    from tdc_ray.runs.prune_model import run_config_of, unet_dir

    for argument in _free(arguments):
        try:
            unet = unet_dir(Path(argument))
        except CheckpointError:  # a second value of a flag, or it is told once all is parsed
            continue
        trained = run_config_of(unet)
        if trained is None:
            return apply_settings(noise_settings(argument), config, with_data=True)
        if _value_of("--preset", arguments):
            return config
        prune = trained.prune
        method = "offline" if prune.method == "none" else prune.method
        return replace(trained, prune=replace(prune, method=method, halving_steps=0))
    return config
