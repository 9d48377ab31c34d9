"""How settings are declared: ranges stand at the fields, and one message names what is outside."""

from collections.abc import Callable
from dataclasses import field
from typing import Annotated, Any, TypeVar, dataclass_transform

import pydantic.dataclasses
from pydantic import Field, ValidationError

from tdc_ray.errors import ConfigError

PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, lt=1)]

T = TypeVar("T")


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(field,))
def settings(stage: str = "") -> Callable[[type[T]], type[T]]:
    """Create a frozen, keyword-only pydantic dataclass whose errors name ``stage.field``."""

    def decorate(cls: Any) -> Any:
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
    """Return the first of the errors by the setting's dotted name, with its rule and value."""
    first = error.errors(include_url=False)[0]
    name = ".".join(map(str, [stage, *first["loc"]] if stage else first["loc"]))
    text = f"{name or 'the settings'}: {first['msg']}, got {first['input']!r}."
    text = text.replace(": Input should be", " must be", 1)
    text = text.replace("greater than or equal to", "at least")
    return ConfigError(text.replace("less than or equal to", "at most"))


def require(stage: str, config: object, name: str, rule: str, *, ok: bool) -> None:
    """Refuse a setting that breaks its rule."""
    if not ok:
        raise ConfigError(f"{stage}.{name} must be {rule}, got {getattr(config, name)}.")
