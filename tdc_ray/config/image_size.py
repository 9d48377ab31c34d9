"""The size of images: one number for a square, or height and width."""

from typing import Annotated, Any

from pydantic import PlainValidator
from pydantic_core import PydanticCustomError
from tyro.constructors import PrimitiveConstructorSpec

LEAST_SIDE = 4
"""Pixels of the shorter side, at least."""


def image_size_of(value: object) -> int | tuple[int, int]:
    """Read a size: a number, ``"64"``, ``"48x64"``, or a pair ``[height, width]``.

    Returns:
        One number for a square, however it is written, else height and width.

    Raises:
        PydanticCustomError: It is no size.
    """
    parts = value.lower().split("x") if isinstance(value, str) else value
    parts = parts if isinstance(parts, list | tuple) else [parts]
    sides = [side for side in map(_whole, parts) if side >= LEAST_SIDE]
    if len(sides) != len(parts) or len(sides) not in (1, 2):
        raise PydanticCustomError(
            "image_size",
            "Input should be at least 4 pixels, one number for a square or HEIGHTxWIDTH such as "
            "48x64",
        )
    return sides[0] if sides[0] == sides[-1] else (sides[0], sides[1])


def size_text(size: int | tuple[int, int]) -> str:
    """Write a size as its flag takes it."""
    return str(size) if isinstance(size, int) else f"{size[0]}x{size[1]}"


def _whole(part: object) -> int:
    """Return a side as a whole number; 0 where it is none."""
    if isinstance(part, str):
        return int(part) if part.strip().isdecimal() else 0
    if isinstance(part, float):
        return int(part) if part.is_integer() else 0
    return part if isinstance(part, int) else 0


_FLAG: PrimitiveConstructorSpec[Any] = PrimitiveConstructorSpec(
    nargs=1,
    metavar="PIXELS|HEIGHTxWIDTH",
    instance_from_str=lambda texts: texts[0],  # the settings read it, and name it in their error
    is_instance=lambda value: isinstance(value, int | tuple),
    str_from_instance=lambda size: [size_text(size)],
)

ImageSize = Annotated[int | tuple[int, int], PlainValidator(image_size_of), _FLAG]
"""Pixels of a square, or height and width of another shape."""
