"""Reads the command line; tyro makes the flags from the commands' dataclasses.

What a preset, a base, a model or a run says of its settings are the defaults of all flags, so the
arguments are read twice: at first for what decides the defaults, with no check of the rest.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import fields, replace
from functools import reduce
from operator import or_
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Protocol, TypeVar, get_type_hints

import tyro
from rich.console import Console
from tyro import MISSING
from tyro.conf import subcommand
from tyro.constructors import (
    ConstructorRegistry,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

from tdc_ray.cli.commands.compare import CompareCommand
from tdc_ray.cli.commands.doctor import DoctorCommand
from tdc_ray.cli.commands.export import ExportCommand
from tdc_ray.cli.commands.import_base import ImportCommand
from tdc_ray.cli.commands.ls import LsCommand
from tdc_ray.cli.commands.memory import MemoryCommand
from tdc_ray.cli.commands.plan import PlanCommand
from tdc_ray.cli.commands.prune import PruneCommand
from tdc_ray.cli.commands.report import ReportCommand
from tdc_ray.cli.commands.run import RunCommand
from tdc_ray.cli.commands.sample import SampleCommand
from tdc_ray.cli.commands.schedule import ScheduleCommand
from tdc_ray.cli.commands.score import ScoreCommand
from tdc_ray.cli.commands.simulate import SimulateCommand
from tdc_ray.cli.commands.status import StatusCommand
from tdc_ray.cli.commands.sweep import SweepCommand
from tdc_ray.cli.commands.train_autoencoder import TrainAutoencoderCommand
from tdc_ray.cli.flags import ALIASES, check_values
from tdc_ray.cli.help import SHORT, short_help, summary
from tdc_ray.cli.names import check_command, check_names
from tdc_ray.cli.paths import check_base, check_input, check_named_data
from tdc_ray.config.autoencoder import AutoencoderConfig
from tdc_ray.config.data import BASE_SAMPLES, BUNDLED
from tdc_ray.config.diffusion import PredictionType
from tdc_ray.config.hub import with_recorded_commit
from tdc_ray.config.presets import PRESETS, preset
from tdc_ray.config.run import (
    RunConfig,
    from_json,
    recorded_settings,
    with_absolute_paths,
    with_data,
)
from tdc_ray.config.validation import errors_together, refuse
from tdc_ray.errors import CheckpointError, ConfigError, TdcError
from tdc_ray.models.config_file import with_file
from tdc_ray.storage.files import exists, read_json
from tdc_ray.storage.object_store import resolve_path
from tdc_ray.storage.run_dir import RunDir

DESCRIPTION = f"""Progressive diffusion models: one pruned denoiser per range of timesteps.

tdc-ray run does the whole of TDC Training on the bundled digits, in minutes.

Presets (--preset NAME): {", ".join(PRESETS)}. Every setting of a preset is a flag.

tdc-ray --version shows the version."""

REQUIRED = {"model_dir": Path(), "out": Path(), "source": "", "vary": ()}
"""Placeholder for a required argument where ``--help`` or an error follows."""

MODEL = (
    "the folder of a UNet2DModel, or a run directory (tdc-ray import BASE DIR makes such a folder "
    "of a model on the hub and of a file of openai: or compvis:)"
)
"""What ``tdc-ray prune`` prunes."""

BUDGET_FLAGS = ("--hours", "--train-macs", "--epochs")
HELP_ALL = "--help-all"

T = TypeVar("T")

UNCHECKED = ConstructorRegistry()
"""Reads settings into plain namespaces: checks need the right defaults, and all the settings."""


class Command(Protocol):
    """What a command line asks for."""

    @property
    def verbose(self) -> bool:
        """Whether to log more, and show where an error came from."""

    def check_paths(self) -> None:
        """Refuse paths that are not there or cannot be written to; settings may be unchecked."""

    def execute(self, console: Console) -> None:
        """Execute the command."""


@UNCHECKED.struct_rule
def _unchecked(info: StructTypeInfo) -> StructConstructorSpec | None:
    names = getattr(info.type, "__pydantic_fields__", None)
    if names is None:
        return None
    hints = get_type_hints(info.type, include_extras=True)
    fields = (StructFieldSpec(name, hints[name], getattr(info.default, name)) for name in names)
    return StructConstructorSpec(SimpleNamespace, tuple(fields))


def parse(arguments: Sequence[str], *, checks_paths: bool = True) -> Command:
    """Return the command of a command line.

    Args:
        arguments: The words after ``tdc-ray``.
        checks_paths: Whether paths are looked for, which may be another machine's.

    Raises:
        ConfigError: A setting is out of its range, or two settings disagree, or a path is missing.
        CheckpointError: The base or the model that is named does not exist, or is malformed.
    """
    try:
        return _parsed(arguments, checks_paths=checks_paths)
    except ConfigError as error:
        error.args = tuple(_as_flag(problem, arguments) for problem in error.args)
        raise


def _parsed(arguments: Sequence[str], *, checks_paths: bool) -> Command:
    """Return the command of a command line; errors have the settings' own names."""
    known = _commands(preset("digits"))
    check_command(arguments, known)
    if (named := known.get(next(iter(arguments), ""))) and not _asks_for_help(arguments):
        check_names(arguments, named)
        check_values(arguments, named)
    reading = _first_reading(arguments)
    if not _asks_for_help(arguments):
        _check_sources(reading, arguments, checks_paths=checks_paths)
    commands = _commands(_defaults(arguments, reading))
    flags = ["--help" if argument == HELP_ALL else argument for argument in arguments]
    command: Command
    if named := commands.get(next(iter(arguments), "")):
        command = _read(named, flags, None if _asks_for_help(arguments) else UNCHECKED)
        command = _with_checked_settings(command, named, arguments, checks_paths=checks_paths)
    else:
        kinds = [
            Annotated[type(c), subcommand(n, default=c, description=summary(c))]
            for n, c in commands.items()
        ]
        union: Any = reduce(or_, kinds)
        command = tyro.cli(union, args=flags, prog="tdc-ray", description=DESCRIPTION)
        if checks_paths:
            command.check_paths()
    if isinstance(command, RunCommand | SweepCommand):
        _check_shape(command.config, arguments)
    _check_budget(command, arguments)
    return _with_own_run_dir(command, arguments)


def _check_sources(command: Any, arguments: Sequence[str], *, checks_paths: bool) -> None:
    """Refuse images, a base or a model that are not there, with all other paths that are not.

    What the settings are by default follows from them, so that the settings are not checked. And
    to look at images takes long, which no misspelt path is to wait for.

    Args:
        command: What ``_first_reading`` returned.
        arguments: The command line.
        checks_paths: Whether all other paths are looked for in any case.

    Raises:
        ConfigError: One does not exist, or images are named twice.
    """
    if command is None:
        return
    if getattr(command, "data", None) is not None and "data.path" in _given(arguments):
        raise ConfigError("give --data or --data.path, not both.")
    with errors_together():
        found = [check_named_data("--data", getattr(command, "data", None))]
        if isinstance(command, PruneCommand):
            found += [check_input(command.model_dir, MODEL)]
        elif base := getattr(command, "source", None) or command.config.model.base:
            found += [check_base(base)]
        looks_at_images = getattr(command, "data", None) is not None
        if not all(found) or (checks_paths and looks_at_images and not _may_be_finished(command)):
            command.check_paths()


def _may_be_finished(command: Any) -> bool:
    """Whether a run of own images may be finished in the folder that it is to find out."""
    is_named = not isinstance(command, RunCommand) or command.run_dir is not None
    return not is_named and any(Path("runs").glob("images-*/results.json"))


def _check_budget(command: Command, arguments: Sequence[str]) -> None:
    """Refuse a budget beside steps that are given, and of other commands than ``run``.

    Raises:
        ConfigError: There is one.
    """
    flags = _flags(arguments)
    given = [flag for flag in BUDGET_FLAGS if flags & {flag, f"--budget.{flag[2:]}"}]
    if not given:
        return
    if not isinstance(command, RunCommand):
        raise ConfigError(f"{given[0]} goes with tdc-ray run alone. Leave it out.")
    # No fine-tune at all is a choice that a budget leaves.
    if "--base.num-steps" in flags or (
        "--finetune.num-steps" in flags and command.config.finetune.num_steps
    ):
        raise ConfigError(
            f"{given[0]} sets the steps of base and fine-tunes: leave out --base.num-steps and "
            f"--finetune.num-steps (but for 0), or {given[0]}."
        )


def _flags(arguments: Sequence[str]) -> set[str]:
    """Return the flags of a command line, as they are documented."""
    return {argument.partition("=")[0].replace("_", "-") for argument in arguments}


def help_text(arguments: Sequence[str]) -> str | None:
    """Return the help of the flags that people use, or None where tyro's is meant.

    Raises:
        TdcError: A base, a model or a preset is named that does not exist.
    """
    if not {"-h", "--help"} & set(arguments) or arguments[0] not in SHORT:
        return None
    defaults = _defaults(arguments, _first_reading(arguments))
    return short_help(arguments[0], _commands(defaults)[arguments[0]])


def _check_shape(config: RunConfig, arguments: Sequence[str]) -> None:
    """Refuse to learn images of people's own in the shape of a preset's bundled ones.

    Raises:
        ConfigError: The images have another, and no flag says what they are brought to.
    """
    is_bundled = preset(config.preset).data.source in BUNDLED
    if config.model.base or not is_bundled or config.data.source in BUNDLED:
        return
    from tdc_ray.data.shapes import check_given  # imports torch

    given = _given(arguments)
    check_given(
        with_absolute_paths(config).data,
        has_size="data.image_size" in given,
        has_channels="data.num_channels" in given,
    )


def _given(arguments: Sequence[str]) -> set[str]:
    """Return the dotted names of the settings that flags give."""
    flags = {argument.partition("=")[0].replace("-", "_") for argument in arguments}
    return {flag.removeprefix("__").replace(".no_", ".") for flag in flags}


def _commands(config: RunConfig) -> dict[str, Command]:
    """Return every command with its defaults, by name."""
    missing: Any = MISSING
    return {
        "run": RunCommand(config=config),
        "sweep": SweepCommand(config=config, vary=missing),
        "plan": PlanCommand(config=config),
        "sample": SampleCommand(run=missing),
        "prune": PruneCommand(model_dir=missing, out=missing, config=config),
        "schedule": ScheduleCommand(run=missing, macs=missing),
        "score": ScoreCommand(images=missing, reference=missing),
        "export": ExportCommand(run=missing, out=missing),
        "report": ReportCommand(runs=missing),
        "ls": LsCommand(),
        "compare": CompareCommand(runs=missing),
        "status": StatusCommand(run=missing),
        "doctor": DoctorCommand(),
        "simulate": SimulateCommand(config=config),
        "memory": MemoryCommand(run=missing),
        "train-autoencoder": TrainAutoencoderCommand(config=AutoencoderConfig(), out=missing),
        "import": ImportCommand(source=missing, out=missing, config=config),
    }


def _defaults(arguments: Sequence[str], command: Any) -> RunConfig:
    """Return the settings that the flags of a run start from.

    Args:
        arguments: The command line.
        command: What ``_first_reading`` returned of it.
    """
    if command is None:
        return preset("digits")
    named = command.config.preset
    data = getattr(command, "data", None)
    config = preset(named or "digits")
    if isinstance(command, PruneCommand):
        is_drawn = data == BASE_SAMPLES
        config = _of_model(command, config, has_preset=bool(named), with_sampler=is_drawn)
        return _without_shared_budgets(_with_data(BASE_SAMPLES, config) if is_drawn else config)
    if isinstance(command, SimulateCommand):
        return config if named else _of_costs(command.simulation.costs, config)
    source = command.source if isinstance(command, ImportCommand) else command.config.model.base
    source = _as_recorded(source, getattr(command, "run_dir", None)) if source else None
    predicts = command.config.diffusion.prediction_type
    if data is None:
        return (
            _of_base(source, config, arguments, predicts, has_preset=bool(named))
            if source
            else config
        )
    if data == BASE_SAMPLES and not source:
        raise ConfigError(
            "--data base draws images from a base that is given: name it by --base, or name "
            "images by --data."
        )
    if not source and named in ("", "images"):
        return _of_own_images(data, arguments)
    if source:
        config = preset(named or "images")
        config = _of_base(source, config, arguments, predicts, has_preset=bool(named), data=data)
    return _with_data(data, config)


def _as_recorded(base: str, run_dir: Path | None) -> str:
    """Return a base's name with the commit on the hub that a run recorded, if its folder is named.

    Runs in their default folders, and sweeps, read what the newest commit says of the settings.
    """
    if run_dir is None:
        return base
    before = recorded_settings(RunDir(resolve_path(run_dir)).config)
    return with_recorded_commit(base, None if before is None else before.model.base)


def _of_own_images(data: str, arguments: Sequence[str]) -> RunConfig:
    """Return the preset for images of one's own, with what they are; for ``--help`` without.

    Raises:
        ConfigError: There is no data of a known kind.
        DataError: It is malformed.
    """
    from tdc_ray.runs.own_images import own_images, own_run_dir, undetected  # imports torch

    if _asks_for_help(arguments):
        return undetected(data)
    given = _given(arguments)
    asked = _first_reading(arguments, undetected(data))
    config = _checked(asked.config, RunConfig)
    if isinstance(asked, SweepCommand):
        return own_images(config, data, given)
    folder = asked.run_dir if isinstance(asked, RunCommand) else asked.out_dir
    folder = resolve_path(folder or own_run_dir(_with_file(config), data, given))
    return own_images(config, data, given, folder)


def _with_data(data: str, config: RunConfig) -> RunConfig:
    """Return settings with other images, in the shape of the settings' own."""
    from tdc_ray.data.detect import data_config  # imports torch

    return with_data(config, data_config(data, config.data))


def _with_own_run_dir(command: Command, arguments: Sequence[str]) -> Command:
    """Return a command whose folder does not depend on what was found out of ``--data``."""
    if not isinstance(command, RunCommand | PlanCommand) or command.data is None:
        return command
    if command.config.preset != "images" or command.config.model.base:
        return command
    if (command.out_dir if isinstance(command, PlanCommand) else command.run_dir) is not None:
        return command
    from tdc_ray.runs.own_images import own_run_dir

    folder = own_run_dir(_with_file(command.config), command.data, _given(arguments))
    if isinstance(command, PlanCommand):
        return replace(command, out_dir=folder)
    return replace(command, run_dir=folder)


def _with_file(config: RunConfig) -> RunConfig:
    """Return settings with the content of ``model.config``, by which a run is named.

    Raises:
        ConfigError: There is no such file, or it is malformed.
    """
    return replace(config, model=with_file(config.model))


def _first_reading(arguments: Sequence[str], config: RunConfig | None = None) -> Any:
    """Return a command that has a run's settings, these unchecked; of other commands None.

    Args:
        arguments: The command line.
        config: What flags are read onto; None means a preset whose name shows if it is named.
    """
    config = config or replace(preset("digits"), preset="")
    command: Any = _commands(config).get(next(iter(arguments), ""))
    if not isinstance(getattr(command, "config", None), RunConfig):
        return None
    required = {key: value for key, value in REQUIRED.items() if hasattr(command, key)}
    flags = [one for one in arguments if one not in ("-h", "--help", HELP_ALL)]
    return _read(replace(command, **required), flags, UNCHECKED)


def _read(command: Any, arguments: Sequence[str], registry: ConstructorRegistry | None) -> Any:
    """Return a command with the values of its flags; a registry of None shows help of settings."""
    return tyro.cli(
        type(command),
        args=arguments[1:],
        prog=f"tdc-ray {arguments[0]}",
        default=command,
        registry=registry,
    )


def _asks_for_help(arguments: Sequence[str]) -> bool:
    return any(argument == "-h" or argument.startswith("--help") for argument in arguments)


def _with_checked_settings(
    command: Any, like: Any, arguments: Sequence[str], *, checks_paths: bool
) -> Any:
    """Check what was read unchecked, and all paths; ``like`` has settings of the same types.

    All of a part is checked at once, with the paths; the parts, such as ``config`` and ``sweep``,
    and then the command's own flags, are checked one after the other.

    Raises:
        ConfigError: Settings are out of their range, or disagree, or a path is not there.
    """
    read = {one.name: getattr(command, one.name) for one in fields(command)}
    with errors_together():
        try:
            checked = {
                name: _checked(values, type(getattr(like, name)))
                for name, values in read.items()
                if isinstance(values, SimpleNamespace)
            }
            command = replace(command, **checked)
        except ConfigError as error:
            for problem in error.args:
                refuse(problem)
        else:
            with suppress(TdcError):  # a missing model.config is refused as a path
                command = _with_own_run_dir(command, arguments)
        if checks_paths:
            command.check_paths()
    return command


def _as_flag(problem: str, arguments: Sequence[str]) -> str:
    """Write an error by the short flag of its setting, if that is the one that was given."""
    setting, _, rest = problem.partition(" ")
    flags = _flags(arguments)
    short = (
        f"--{name.replace('_', '-')}" for name, dotted in ALIASES.items() if dotted == setting
    )
    return next((f"{flag} {rest}" for flag in short if flag in flags), problem)


def _checked(values: SimpleNamespace, kind: type[T]) -> T:
    return kind(**_nested(values))


def _nested(values: SimpleNamespace) -> dict[str, Any]:
    """Return the values of settings, those of their stages as dictionaries."""
    return {
        name: _nested(value) if isinstance(value, SimpleNamespace) else value
        for name, value in vars(values).items()
    }


def _of_base(
    source: str,
    config: RunConfig,
    arguments: Sequence[str],
    predicts: PredictionType,
    *,
    has_preset: bool,
    data: str | None = None,
) -> RunConfig:
    """Return settings with what a base says of them.

    A preset that was named, or a flag, says what the data are; otherwise, and for images that are
    drawn from the base, their resolution and channels are the base's, and of a run directory all
    settings come along. What preset ``images`` predicts is for bases that it trains: one that does
    not say what it predicts is taken to predict epsilon. ``predicts`` is what flags say of it.

    Raises:
        ConfigError: The base does not say its noise process, and nothing was named that has it.
        CheckpointError: There is no such base.
    """
    from tdc_ray.runs.pretrained.settings import apply_settings, missing_settings, with_base
    from tdc_ray.runs.pretrained.sources import images_of, resolve_base  # imports torch
    from tdc_ray.runs.prune_model import run_config_of

    base = resolve_base(source, predicts)
    missing = missing_settings(base.settings)
    if missing and not has_preset and not any(a.startswith("--diffusion.") for a in arguments):
        raise ConfigError(
            f"{source} does not say {', '.join(missing)}: name the preset that it was trained "
            f"with by --preset, or set --{missing[0].replace('_', '-')} and so on."
        )
    trained = None if has_preset or base.folder is None else run_config_of(base.folder)
    names_data = has_preset or any(a.startswith("--data") for a in arguments)
    if arguments[0] in ("run", "sweep") and trained is None and not names_data:
        raise ConfigError(
            f"{source} does not say what it was trained on: name the data by --data, or a preset "
            "by --preset."
        )
    if trained is None and not has_preset:
        config = replace(config, diffusion=replace(config.diffusion, prediction_type="epsilon"))
    config = with_base(trained or config, source)
    is_drawn = data == BASE_SAMPLES
    config = apply_settings(base.settings, config, with_data=is_drawn or not has_preset)
    if is_drawn and isinstance(base.first_stage, Path):
        images = images_of(base.first_stage, base.unet["sample_size"])
        config = replace(config, data=replace(config.data, **images))
    return config


def _of_costs(run: Path | None, config: RunConfig) -> RunConfig:
    """Return the settings of the run whose costs a simulation takes, if there is one."""
    path = RunDir(resolve_path(run)).config if run is not None else None
    return config if path is None or not exists(path) else from_json(read_json(path))


def _without_shared_budgets(config: RunConfig) -> RunConfig:
    """Return settings for a single group, whose limit is given."""
    plan = replace(config.plan, schedule="snr", mean_macs_share=None, match_snr_mean=False)
    return replace(config, plan=plan, finetune=replace(config.finetune, allocation="equal"))


def _of_model(
    command: PruneCommand, config: RunConfig, *, has_preset: bool, with_sampler: bool
) -> RunConfig:
    """Return the settings of the run that trained a model, or with the model's noise process.

    With ``with_sampler`` also with the sampler of the pipeline that it lies in.

    Raises:
        ConfigError: The model is of a kind that cannot be pruned here.
        CheckpointError: It is malformed.
        StorageError: There is none.
    """
    model, predicts = command.model_dir, command.config.diffusion.prediction_type
    from tdc_ray.runs.pretrained.settings import apply_settings
    from tdc_ray.runs.pretrained.sources import noise_settings
    from tdc_ray.runs.prune_model import run_config_of, unet_dir

    try:
        unet = unet_dir(model)
    except CheckpointError:  # the command says so
        return config
    trained = run_config_of(unet)
    if trained is None:
        found = noise_settings(unet, predicts, with_sampler=with_sampler)
        return apply_settings(found, config, with_data=True)
    if has_preset:
        return config
    method = "offline" if trained.prune.method == "none" else trained.prune.method
    return replace(trained, prune=replace(trained.prune, method=method, halving_steps=0))
