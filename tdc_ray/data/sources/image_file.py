"""One image file: decoded as a viewer shows it, as 8-bit pixels in grey or colour.

Of an animation, or a file of several pages, it is the first picture. A file lies on a disk, or is
a member of a larger one, such as a tar file.
"""

import contextlib
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageFile, ImageOps, PngImagePlugin, TiffImagePlugin

from tdc_ray.errors import CorruptFileError, DataError

BACKGROUND = (255, 255, 255, 255)
"""What shows through where an image is transparent: white."""

DEEP_MODES = ("I;16", "I;16L", "I;16B", "I;16N", "I", "F")
"""Pillow's names of grey of more than 8 bits, which its own conversions clamp."""

GREY_MODES = ("1", "L", "LA", "La", *DEEP_MODES)
"""Pillow's names of what has no colours."""

RGB_MODES = ("RGB", "RGBA", "RGBa", "RGBX", "P", "PA")
"""Pillow's names of what needs no conversion between colour spaces."""

NO_PICTURES = frozenset({"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"})
"""Formats whose names Pillow knows and whose pixels it cannot decode on its own."""

UNREADABLE = (
    OSError,
    EOFError,
    SyntaxError,
    ValueError,
    LookupError,
    TypeError,
    RuntimeError,
    ArithmeticError,
    AttributeError,
    AssertionError,
    struct.error,
    Image.DecompressionBombError,
)
"""What Pillow raises for damaged files, for others than images, and for decompression bombs."""


@dataclass(frozen=True, slots=True)
class Member:
    """The content of an image file that lies in a larger file."""

    content: bytes
    name: Callable[[], str]
    """Returns what errors call it."""

    def __str__(self) -> str:
        return self.name()


Encoded = Path | Member
"""An image file."""


@dataclass(frozen=True, slots=True)
class Header:
    """What an image file says of its image, before a pixel is decoded."""

    height: int
    """As it is shown: upright."""

    width: int
    is_grey: bool
    is_deep: bool
    """Its grey has more than 8 bits."""

    is_deep_colour: bool
    """Its colours have more than 8 bits each, of which Pillow reads the upper 8."""

    is_rgb: bool
    """Its colours, if it has some, are red, green and blue, and not CMYK or Lab."""

    is_turned: bool
    """EXIF says that it is shown otherwise than it is stored."""

    is_transparent: bool
    """It has an alpha channel, or a colour that is transparent."""

    is_animated: bool
    """There are more pictures behind the first."""

    @property
    def is_plain(self) -> bool:
        """Whether the image is opaque, upright and of 8 bits."""
        return not (self.is_turned or self.is_transparent or self.is_deep)


# Pixels need no text: by default, comments of more than a megabyte make a PNG unreadable. What is
# compressed stays below 16, as a few kilobytes unpack to that.
PngImagePlugin.MAX_TEXT_CHUNK = 2**24
PngImagePlugin.MAX_TEXT_MEMORY = 2**27


@cache
def image_suffixes() -> frozenset[str]:
    """Return the endings of the files that this Pillow decodes, in lower case."""
    extensions, readable = Image.registered_extensions(), frozenset(_formats())
    return frozenset(end for end, kind in extensions.items() if kind in readable)


@cache
def _formats() -> tuple[str, ...]:
    """Return the formats that files are opened as, whatever their suffixes: EPS runs programs."""
    Image.init()
    return tuple(name for name in Image.ID if name not in NO_PICTURES)


def read_pixels(file: Encoded, num_channels: int) -> NDArray[np.uint8]:
    """Decode an image file: upright, without transparency, in grey or colour.

    EXIF's orientation is applied; what is transparent shows ``BACKGROUND``; grey of more than 8
    bits is scaled, so that its white is 255. White of floats is 1.

    Returns:
        ``(H, W)`` for one channel, ``(H, W, 3)`` for three.

    Raises:
        CorruptFileError: It is no readable image.
        DataError: It cannot be opened, or has grey values whose white is unknown.
    """
    try:
        with _opened(file) as image:
            _load_upright(image)
            return shown_pixels(image, num_channels, str(file))
    except UNREADABLE as error:
        if isinstance(error, OSError) and error.errno is not None:  # it was not even read
            raise DataError(f"{file} cannot be opened: {error}. Mend or remove it.") from error
        raise CorruptFileError(f"{file} is no readable image: {error}.") from error


def shown_pixels(image: Image.Image, num_channels: int, name: str) -> NDArray[np.uint8]:
    """Return the pixels of a decoded image as :func:`read_pixels` does.

    Raises:
        DataError: It has grey values whose white is unknown; ``name`` is what the error calls it.
    """
    plain = _opaque(_eight_bits(image, name))
    return np.array(plain.convert("RGB" if num_channels == 3 else "L"))


def read_header(file: Encoded) -> Header | None:
    """Return what an image file says of itself; None where it is no readable one."""
    try:
        with _opened(file) as image:
            orientation = _orientation(image)
            # Pillow gives the size of a TIFF file as it is shown.
            lies = orientation in (5, 6, 7, 8) and image.format != "TIFF"
            return Header(
                height=image.width if lies else image.height,
                width=image.height if lies else image.width,
                is_grey=image.mode in GREY_MODES,
                is_deep=image.mode in DEEP_MODES,
                is_deep_colour=_is_deep_colour(image),
                is_rgb=image.mode in (*GREY_MODES, *RGB_MODES),
                is_turned=orientation != 1,
                is_transparent=image.has_transparency_data,
                is_animated=getattr(image, "is_animated", False),
            )
    except UNREADABLE:
        return None


def is_plain(file: Encoded) -> bool:
    """Whether an image is opaque, upright and of 8 bits, by its header; if unreadable, too."""
    header = read_header(file)
    return header is None or header.is_plain


def stored_shape(file: Encoded) -> tuple[int, int, int]:
    """Decode an image file and return its ``(C, H, W)``: one channel for grey, else three.

    Raises:
        CorruptFileError: It is no readable image.
    """
    try:
        with _opened(file) as image:
            channels = 1 if image.mode in GREY_MODES else 3
            _load_upright(image)
            return (channels, image.height, image.width)
    except UNREADABLE as error:
        raise CorruptFileError(f"{file} is no readable image: {error}.") from error


def _opened(file: Encoded) -> Image.Image:
    source = file if isinstance(file, Path) else BytesIO(file.content)
    return Image.open(source, formats=_formats())


def _is_deep_colour(image: Image.Image) -> bool:
    """Whether an image's colours are decoded from 16 bits, which its mode does not say."""
    # BGR;16, without a byte order, is BMP's 16 bits for all three.
    tiles = image.tile if isinstance(image, ImageFile.ImageFile) else []
    is_deep = any(re.search(";16[BLN]", str(tile.args)) for tile in tiles)
    return is_deep and image.mode not in GREY_MODES


def _orientation(image: Image.Image) -> int:
    """Return EXIF's orientation without decoding pixels; 1 where it has none that can be read."""
    with contextlib.suppress(*UNREADABLE):
        if isinstance(image, PngImagePlugin.PngImageFile):
            _read_trailer(image)
        # A PNG's own getexif decodes the image, to find what lies behind the pixels.
        return int(Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1))
    return 1


def _read_trailer(image: PngImagePlugin.PngImageFile) -> None:
    """Read the metadata behind a PNG's pixels, where ExifTool writes it, into ``image.info``.

    Of an animation it is what lies before the second picture, as when the first is decoded.
    """
    assert image.fp is not None
    assert image.png is not None  # until pixels are decoded
    image.fp.seek(8)  # behind the signature
    is_behind = False
    while len(start := image.fp.read(8)) == 8:
        length, kind = struct.unpack(">I4s", start)
        begin = image.fp.tell()
        is_behind = is_behind or kind == b"IDAT"
        if is_behind and kind == b"fcTL" and image.is_animated:
            return
        if is_behind and kind in (b"eXIf", b"iTXt", b"zTXt", b"tEXt"):
            image.png.call(kind, begin, length)
        image.fp.seek(begin + length + 4)  # and the checksum


def _load_upright(image: Image.Image) -> None:
    """Decode the pixels, and turn them by EXIF's orientation, unless EXIF cannot be read."""
    image.load()
    with contextlib.suppress(*UNREADABLE):
        ImageOps.exif_transpose(image, in_place=True)


def _eight_bits(image: Image.Image, file: str) -> Image.Image:
    """Scale grey of more than 8 bits to 8.

    Raises:
        DataError: Its white is unknown.
    """
    if image.mode not in DEEP_MODES:
        return image
    values, white = np.asarray(image), _white(image, file)
    if not (values.min() >= 0 and values.max() <= white):  # nor NaN
        raise DataError(
            f"{file} holds grey from {values.min():g} to {values.max():g}, and {image.mode} is "
            f"read from 0 (black) to {white:g} (white). Save it scaled, or with 8 or 16 bits."
        )
    if _tiff_tag(image, TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0:
        values = white - values  # 0 is white
    grey = Image.fromarray(np.rint(values / (white / 255)).astype(np.uint8))
    if isinstance(hidden := image.info.get("transparency"), int):  # one value is transparent
        grey.putalpha(Image.fromarray(np.where(values == hidden, 0, 255).astype(np.uint8)))
    return grey


def _white(image: Image.Image, file: str) -> float:
    """Return the value of white in grey of more than 8 bits.

    Raises:
        DataError: Files of its kind do not say.
    """
    if image.mode == "F":
        return 1.0
    if image.mode == "I" and image.format not in ("PNG", "PPM"):  # which give it for 16 bits
        raise DataError(
            f"{file} holds grey of 32 bits or below 0, of which no file says what white is. Save "
            "it with 8 or 16 bits, or as floats from 0 to 1."
        )
    bits = _tiff_tag(image, TiffImagePlugin.BITSPERSAMPLE)
    return float(2 ** bits[0] - 1) if bits else 65535.0


def _tiff_tag(image: Image.Image, tag: int) -> Any:
    """Return what a TIFF file says of itself; None where it says nothing, or is no TIFF file."""
    return image.tag_v2.get(tag) if isinstance(image, TiffImagePlugin.TiffImageFile) else None


def _opaque(image: Image.Image) -> Image.Image:
    """Put an image that has transparency, by alpha or by one of its colours, on the background."""
    if not image.has_transparency_data:
        return image
    if image.mode == "La":  # Pillow converts it no further
        image = image.convert("LA")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, BACKGROUND), image)
