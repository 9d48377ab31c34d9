"""Names that there are not: misspelt ones, and those that other tools have for settings."""

from collections import defaultdict
from collections.abc import Collection, Sequence
from difflib import get_close_matches
from typing import Any

from tdc_ray.cli.flags import flags_of, has_arguments, missing_arguments, words_without_flag
from tdc_ray.config.presets import PRESETS
from tdc_ray.config.validation import errors_together, meant, refuse
from tdc_ray.errors import ConfigError

FOREIGN = {
    "lr": ("--base.learning-rate", "--finetune.learning-rate"),
    "steps": ("--base.num-steps", "--finetune.num-steps", "--sampler.num-inference-steps"),
    "max-train-steps": ("--base.num-steps", "--finetune.num-steps"),
    "train-batch-size": ("--base.batch-size", "--finetune.batch-size"),
    "train-data-dir": ("--data",),
    "resolution": ("--data.image-size",),
    "output-dir": ("--run-dir", "--storage", "--out-dir", "--out"),
    "random-flip": ("--data.horizontal-flip",),
    "scheduler": ("--sampler.scheduler",),
    "gpus": ("--compute.gpus-per-base-worker", "--compute.gpus-per-actor"),
}
"""What other tools call a flag, that tyro does not find by its letters."""


NEAR = 0.75
"""How alike a flag is that may be meant, as of `difflib`."""


def check_command(arguments: Sequence[str], commands: Collection[str]) -> None:
    """Refuse a command, or a flag without one, that there is not.

    Raises:
        ConfigError: It is named.
    """
    name = next(iter(arguments), "-")
    if name.startswith("--") and not name.startswith("--help"):
        raise ConfigError(f"tdc-ray has no flag {name}{meant(name, ['--help', '--version'])}")
    if name not in commands and not name.startswith("-"):
        hint = meant(name, commands)
        raise ConfigError(f"there is no command {name}{hint} Commands: {', '.join(commands)}.")


def check_names(arguments: Sequence[str], command: Any) -> None:
    """Refuse flags that there are not, and words that no flag takes, by what is meant.

    What is missing is refused, too.

    Args:
        arguments: The command line.
        command: The command that is named, with any settings.

    Raises:
        ConfigError: There is one.
    """
    known = list(flags_of(command))
    with errors_together():
        for argument in arguments[1:]:
            flag = argument.partition("=")[0].replace("_", "-")
            if argument.startswith("--") and _positive(flag) not in known:
                near = " or ".join(_meant(flag, known))
                lists = f". tdc-ray {arguments[0]} --help-all lists all."
                refuse(f"there is no flag {flag}{f': did you mean {near}?' if near else lists}")
        if not has_arguments(command):
            for word in words_without_flag(arguments, command):
                flag = "--preset" if word in PRESETS else "--data"
                is_value = flag in known and not word.startswith("-")
                hint = f": did you mean {flag} {word}?" if is_value else "."
                refuse(f"tdc-ray {arguments[0]} takes flags alone, got {word}{hint}")
        if missing := list(missing_arguments(arguments, command)):
            needs = f"tdc-ray {arguments[0]} needs {' and '.join(missing)}"
            refuse(f"{needs}: tdc-ray {arguments[0]} --help says what that is.")


def _positive(flag: str) -> str:
    """Return the flag that sets what a flag such as ``--no-stream`` unsets."""
    return flag.replace("--no-", "--", 1).replace(".no-", ".", 1)


def _meant(flag: str, known: Collection[str]) -> list[str]:
    """Return the flags that a name is meant for, if any."""
    stage, _, last = flag.removeprefix("--").rpartition(".")
    names = [one for one in FOREIGN.get(last, ()) if one.startswith(f"--{stage}")]
    if foreign := [one for one in names if one in known]:
        return foreign
    by_letters = defaultdict[str, list[str]](list)
    for one in known:
        for name in {one, one.rpartition(".")[2]}:
            by_letters[_letters(name)].append(one)
    near = get_close_matches(_letters(flag), by_letters, n=1, cutoff=NEAR)
    found = by_letters[near[0]] if near else []
    return [one for one in found if "." not in one] or found


def _letters(flag: str) -> str:
    return "".join(letter for letter in flag.lower() if letter.isalnum())


def nearest(stage: str, name: str, known: list[str]) -> str | None:
    """Return the setting of a stage that a name is meant for. None means that there is none."""
    flags = FOREIGN.get(name.replace("_", "-"), ())
    named = [flag for flag in flags if flag.startswith(f"--{stage}.")]
    if named:
        return named[0].rpartition(".")[2].replace("-", "_")
    return next(iter(get_close_matches(name, known, n=1)), None)
