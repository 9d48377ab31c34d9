"""How settings are declared: ranges stand at the fields, and one error names all that is wrong."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import field
from difflib import get_close_matches
from typing import Annotated, Any, TypeVar, dataclass_transform

import pydantic.dataclasses
from pydantic import Field, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

from tdc_ray.errors import ConfigError

PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, lt=1)]

T = TypeVar("T")


_RULES = "rules"
"""Type of pydantic's error that holds what a stage's own rules refuse."""

_collected: ContextVar[list[str] | None] = ContextVar("collected", default=None)
"""What :func:`errors_together` has collected so far; None outside of it."""


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(field,))
def settings(stage: str = "") -> Callable[[type[T]], type[T]]:
    """Create a frozen, keyword-only pydantic dataclass whose errors name ``stage.field``."""

    def decorate(cls: Any) -> Any:
        if check := getattr(cls, "__post_init__", None):

            def __post_init__(self: object) -> None:  # noqa: N807
                try:
                    with errors_together():
                        check(self)
                except ConfigError as error:  # in this form pydantic adds other stages' errors
                    problems = {"problems": error.args}
                    raise PydanticCustomError(_RULES, "{problems}", problems) from None

            cls.__post_init__ = __post_init__
        cls = pydantic.dataclasses.dataclass(
            cls, frozen=True, kw_only=True, slots=True, config={"extra": "forbid"}
        )
        validate = cls.__init__

        def __init__(self: object, **values: object) -> None:  # noqa: N807
            try:
                validate(self, **values)
            except ValidationError as error:
                raise config_error(error, stage) from None

        cls.__init__ = __init__
        return cls

    return decorate


def config_error(error: ValidationError, stage: str = "") -> ConfigError:
    """Return all of the errors, each by the setting's dotted name, with its rule and value."""
    problems: list[str] = []
    errors = error.errors(include_url=False)
    inner = {one["loc"][:length] for one in errors for length in range(len(one["loc"]))}
    for one in errors:
        if one["loc"] and one["loc"] in inner:  # such as a length without the items refused
            continue
        problems += one["ctx"]["problems"] if one["type"] == _RULES else [_problem(one, stage)]
    return ConfigError(*problems)


def _problem(error: ErrorDetails, stage: str) -> str:
    """Write an error of pydantic's own in the words of :func:`require`."""
    name = ".".join(map(str, [stage, *error["loc"]] if stage else error["loc"]))
    text = f"{name or 'the settings'}: {error['msg']}, got {error['input']!r}."
    text = text.replace(": Input should be", " must be", 1)
    text = text.replace("greater than or equal to", "at least")
    return text.replace("less than or equal to", "at most")


@contextmanager
def errors_together() -> Iterator[None]:
    """Collect what :func:`refuse` and :func:`require` refuse inside, and raise it as one error.

    Raises:
        ConfigError: Something was refused.
    """
    problems: list[str] = []
    cause: ConfigError | None = None
    token = _collected.set(problems)
    try:
        yield
    except ConfigError as error:
        if not problems:
            raise
        problems += error.args
        cause = error
    except Exception as error:
        for problem in problems:
            error.add_note(problem)
        raise
    finally:
        _collected.reset(token)
    if problems:
        raise ConfigError(*problems) from cause


def refuse(problem: str) -> None:
    """Raise a problem, or have :func:`errors_together` raise it with others.

    Raises:
        ConfigError: At once, outside of ``errors_together``.
    """
    collected = _collected.get()
    if collected is None:
        raise ConfigError(problem)
    collected.append(problem)


def meant(name: str, known: Iterable[str]) -> str:
    """Return the end of an error about a name: the one of those known that may be meant."""
    near = get_close_matches(name, list(known), n=1)
    return f": did you mean {near[0]}?" if near else "."


def require(stage: str, config: object, name: str, rule: str, *, ok: bool) -> None:
    """Refuse a setting that breaks its rule."""
    if not ok:
        refuse(f"{stage}.{name} must be {rule}, got {getattr(config, name)}.")
