"""What flags stand for and take; words that they do not take are refused here.

tyro would refuse them in Python's types, and without the choice that is meant.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import takewhile
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from tyro import MISSING
from tyro.conf import Positional, Suppress, arg
from tyro.constructors import PrimitiveConstructorSpec

from tdc_ray.config.validation import errors_together, meant, refuse

NUMBERS = {int: "a whole number", float: "a number"}

ALIASES = {
    "base": "model.base",
    "compare": "compare.kind",
    "hours": "budget.hours",
    "train_macs": "budget.train_macs",
    "epochs": "budget.epochs",
}
"""Settings that have a short flag."""


@dataclass(frozen=True, slots=True)
class Taken:
    """What the values of a flag may be."""

    words: tuple[str, ...] = ()
    numbers: tuple[type[int] | type[float], ...] = ()
    are_many: bool = False
    """Whether the flag takes several."""

    is_repeated: bool = False
    """Whether the flag may be given again, to add values; then it has some each time."""

    def takes(self, text: str) -> bool:
        """Whether a word is one of the values."""
        return text in self.words or any(_is_number(text, kind) for kind in self.numbers)

    @property
    def choices(self) -> tuple[str, ...]:
        """The words that stand for something."""
        return tuple(word for word in self.words if word != "None")

    def __str__(self) -> str:
        some = [f"one of {', '.join(self.choices)}"] if self.choices else []
        return " or ".join([*(NUMBERS[kind] for kind in self.numbers), *some])


def check_values(arguments: Sequence[str], command: Any) -> None:
    """Refuse values of flags that are none of the choices, or no numbers.

    What flags take in other forms, and flags that there are not, are left to tyro.

    Args:
        arguments: The command line.
        command: The command that is named, with any settings.

    Raises:
        ConfigError: There is one.
    """
    with errors_together():
        for flag, values in _given(arguments):
            taken = taken_by(flag, command)
            if not values and _needs_value(flag, command):
                refuse(f"{flag} must be {taken or 'given a value'}, got nothing.")
            if taken is None or not (taken.words or taken.numbers):
                continue
            for value in values if taken.are_many else values[:1]:
                if not taken.takes(value):
                    refuse(f"{flag} must be {taken}, got {value}{meant(value, taken.choices)}")


def _given(arguments: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Yield every flag, as it is documented, with the words up to the next one."""
    flag, values = "", list[str]()
    for argument in [*arguments[1:], "--"]:
        if argument.startswith("--"):
            if flag:
                yield flag, values
            name, has_value, value = argument.partition("=")
            flag, values = name.replace("_", "-"), [value] if has_value else []
        else:
            values.append(argument)


def taken_by(flag: str, command: Any) -> Taken | None:
    """Return what a flag takes; None where there is no such flag, or it takes other things."""
    found = owner(flag, command)
    if found is None:
        return None
    holder, name = found
    return _taken(get_type_hints(type(holder), include_extras=True)[name])


def _needs_value(flag: str, command: Any) -> bool:
    """Whether a flag cannot stand alone, as far as that is known."""
    found = owner(flag, command)
    if found is None:
        return False
    taken = taken_by(flag, command)
    if taken is not None:
        return taken.is_repeated or (not taken.are_many and bool(taken.words or taken.numbers))
    hint = _hints(found[0])[found[1]]
    return set(get_args(hint) or [hint]) <= {str, Path, NoneType}


def owner(flag: str, command: Any) -> tuple[Any, str] | None:
    """Return what has the field of a flag, and the field's name; None where there is no such flag.

    Args:
        flag: The flag, or a positional argument in capitals.
        command: The command that has it.
    """
    dotted = flag.strip("-").lower().replace("-", "_")
    stage, _, name = ALIASES.get(dotted, dotted).rpartition(".")
    config = getattr(command, "config", None)
    holders = (
        [getattr(config, stage, None)]
        if stage
        else [command, config, *(getattr(command, part, None) for part in ("sweep", "simulation"))]
    )
    return next(((one, name) for one in holders if name in _fields(one)), None)


def flags_of(holder: Any, stage: str = "") -> Iterator[str]:
    """Yield every flag of a command, as it is documented; a setting's short one before its other.

    Args:
        holder: The command, or a part of its settings.
        stage: What the names of the part's flags begin with.
    """
    for field, hint in _hints(holder).items():
        if _is(hint, Positional) or _is(hint, Suppress):
            continue
        marks: list[Any] = [one for one in _marks(hint) if isinstance(one, type(arg()))]
        name = next((mark.name for mark in marks if mark.name is not None), field)
        inner = getattr(holder, field)
        if _fields(inner):
            yield from flags_of(inner, f"{stage}{name}." if name else "")
        else:
            yield from (alias for mark in marks for alias in mark.aliases or ())
            yield f"--{stage}{name}".replace("_", "-")


def has_arguments(command: Any) -> bool:
    """Whether a command takes words without a flag."""
    return any(_is(hint, Positional) for hint in _hints(command).values())


def words_without_flag(arguments: Sequence[str], command: Any) -> Iterator[str]:
    """Yield the words of a command line that no flag takes, as far as that is known."""
    for argument in arguments[1:]:
        if argument.startswith("--"):
            break
        yield argument
    for flag, values in _given(arguments):
        taken = taken_by(flag, command)
        if taken is not None and not taken.are_many:
            yield from values[bool(taken.words or taken.numbers) :]


def missing_arguments(arguments: Sequence[str], command: Any) -> Iterator[str]:
    """Yield what a command needs and a command line lacks, as far as that is known.

    Args:
        arguments: The command line.
        command: The command that is named; what it needs is ``MISSING`` there.
    """
    given = list(_given(arguments))
    before = len(list(takewhile(lambda word: not word.startswith("--"), arguments[1:])))
    words = before + sum(
        len(vs) - (_needs_value(flag, command) and bool(vs)) for flag, vs in given
    )
    for name, hint in _hints(command).items():
        if getattr(command, name) is not MISSING:
            continue
        if not _is(hint, Positional):
            flag = f"--{name}".replace("_", "-")
            if flag not in dict(given):
                yield flag
        elif words:
            words -= 1
        elif get_origin(get_args(hint)[0]) is not tuple:  # else the command says how many
            yield name.upper()


def _hints(holder: Any) -> Mapping[str, Any]:
    """Return the types of the fields of a dataclass, by name; of anything else none."""
    if not _fields(holder):
        return {}
    hints = get_type_hints(type(holder), include_extras=True)
    return {field.name: hints[field.name] for field in fields(holder)}


def _is(hint: Any, marker: Any) -> bool:
    """Whether a type carries a mark of tyro's, such as ``Positional``."""
    return get_args(marker[int])[1] in _marks(hint)


def _marks(hint: Any) -> tuple[Any, ...]:
    return getattr(hint, "__metadata__", ())


def _fields(holder: Any) -> Mapping[str, Any]:
    """Return the fields of a dataclass, by name; of anything else none."""
    return getattr(type(holder), "__dataclass_fields__", {})


def _taken(hint: Any) -> Taken | None:
    """Return what a type takes; None where these are not only choices and numbers."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Annotated:
        has_own_form = any(isinstance(one, PrimitiveConstructorSpec) for one in inner[1:])
        return None if has_own_form else _taken(inner[0])
    if origin is Literal:
        return _together(_taken(one) if get_origin(one) else Taken((str(one),)) for one in inner)
    if origin in (Union, UnionType):
        return _together(Taken(("True", "False")) if one is bool else _taken(one) for one in inner)
    if origin is tuple and inner[1:] == (...,):
        one = _taken(inner[0])
        if one is None:
            return None
        return replace(one, are_many=True, is_repeated=one.are_many)
    if hint is NoneType:
        return Taken(("None",))
    if hint is bool:
        return Taken()  # it stands alone
    return Taken(numbers=(hint,)) if hint in NUMBERS else None


def _together(parts: Iterable[Taken | None]) -> Taken | None:
    """Return what is taken by any of several types; None where one takes other things."""
    words, numbers, are_many = list[str](), list[Any](), False
    for part in parts:
        if part is None:
            return None
        words += part.words
        numbers += part.numbers
        are_many |= part.are_many
    return Taken(tuple(words), tuple(numbers), are_many)


def _is_number(text: str, kind: type[int] | type[float]) -> bool:
    try:
        return math.isfinite(kind(text))
    except ValueError:
        return False
