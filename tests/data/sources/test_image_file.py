import struct
import zlib

import numpy as np
import pytest
from PIL import EpsImagePlugin, ExifTags, Image, ImageFile, ImageOps, features

from tdc_ray.data.sources.image_file import (
    Member,
    is_plain,
    read_header,
    read_pixels,
    stored_shape,
)
from tdc_ray.errors import CorruptFileError, DataError

DEEP = (np.arange(64).reshape(8, 8) * 1040).astype(np.uint16)  # up to 65,520
GREY = (np.arange(64).reshape(8, 8) * 4).astype(np.uint8)
AVIF = pytest.mark.skipif(not features.check("avif"), reason="this Pillow has no AVIF")


def saved(path, pixels, **how):
    Image.fromarray(pixels).save(path, **how)
    return path


# --- more than 8 bits ------------------------------------------------------------------------


@pytest.mark.parametrize("num_channels", [1, 3])
@pytest.mark.parametrize(
    ("name", "pixels"),
    [
        ("a.png", DEEP),
        ("little.tif", DEEP.astype("<u2")),
        ("big.tif", DEEP.astype(">u2")),
        ("a.pgm", DEEP.astype(np.int32)),
        ("a.tif", (DEEP / 65535).astype(np.float32)),
        ("a.pfm", (DEEP / 65535).astype(np.float32)),
    ],
)
def test_grey_of_more_than_8_bits_is_scaled(tmp_path, name, pixels, num_channels):
    found = read_pixels(saved(tmp_path / name, pixels), num_channels)
    expected = np.round(DEEP / 257)
    assert np.array_equal(found, expected if num_channels == 1 else np.dstack([expected] * 3))


def test_grey_whose_0_is_white_is_turned_round(tmp_path):
    path = saved(tmp_path / "a.tif", DEEP, tiffinfo={262: 0})
    assert np.array_equal(read_pixels(path, 1), np.round((65535 - DEEP.astype(int)) / 257))


def test_12_bits_are_scaled_by_their_own_white(tmp_path):
    values = np.arange(64) * 65  # up to 4,095
    pairs = values.reshape(-1, 2)  # two in three bytes
    packed = np.stack(
        [pairs[:, 0] >> 4, ((pairs[:, 0] & 15) << 4) | (pairs[:, 1] >> 8), pairs[:, 1] & 255], 1
    )
    tags = [(256, 8), (257, 8), (258, 12), (259, 1), (262, 1), (273, 122), (277, 1), (278, 8)]
    fields = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in [*tags, (279, 96)])
    head = struct.pack("<2sHIH", b"II", 42, 8, 9) + fields + bytes(4)
    assert len(head) == 122
    (tmp_path / "a.tif").write_bytes(head + packed.astype(np.uint8).tobytes())
    found = read_pixels(tmp_path / "a.tif", 1)
    assert np.array_equal(found.ravel(), np.round(values / 4095 * 255))


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (
            (DEEP / 257).astype(np.float32),
            r"grey from 0 to 254\.\d+, and F is read from 0 .* to 1",
        ),
        ((DEEP / 32760 - 1).astype(np.float32), "grey from -1 to 1"),
        (np.full((8, 8), np.nan, np.float32), "grey from nan"),
        (DEEP.astype(np.int32), "32 bits .* no file says what white is"),
    ],
)
def test_grey_whose_white_is_unknown_is_refused(tmp_path, pixels, message):
    path = saved(tmp_path / "a.tif", pixels)
    with pytest.raises(
        DataError, match=rf"^{path} holds {message}|^{path} holds grey of {message}"
    ):
        read_pixels(path, 1)


# --- transparency ----------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".png", ".tif", ".webp"])
@pytest.mark.parametrize("hidden", [(255, 0, 0), (0, 255, 0)])
def test_colours_under_full_transparency_are_white(tmp_path, suffix, hidden):
    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[..., :3] = hidden
    pixels[2:6, 2:6] = (0, 0, 255, 255)
    how = {"lossless": True} if suffix == ".webp" else {}
    found = read_pixels(saved(tmp_path / f"a{suffix}", pixels, **how), 3)
    expected = np.full((8, 8, 3), 255)
    expected[2:6, 2:6] = (0, 0, 255)
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("num_channels", [1, 3])
def test_what_is_half_transparent_is_mixed_with_white(tmp_path, num_channels):
    pixels = np.stack([GREY, np.full((8, 8), 100, np.uint8)], 2)
    found = read_pixels(saved(tmp_path / "a.png", pixels), num_channels)
    expected = (100 * GREY.astype(float) + 155 * 255) / 255
    np.testing.assert_allclose(found.reshape(8, 8, -1)[..., 0], expected, atol=0.51)


def palette(path, **how):
    image = Image.fromarray(np.repeat([[0, 1, 2, 3]], 4, 0).astype(np.uint8)).convert("P")
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255, 9, 9, 9])
    image.save(path, **how)
    return read_pixels(path, 3)[0].tolist()


def test_transparent_colours_of_a_palette_are_white(tmp_path):
    rest = [[0, 0, 255], [9, 9, 9]]
    assert palette(tmp_path / "a.png", transparency=1) == [[255, 0, 0], [255, 255, 255], *rest]
    assert palette(tmp_path / "a.gif", transparency=0) == [[255, 255, 255], [0, 255, 0], *rest]
    alphas = palette(tmp_path / "b.png", transparency=bytes([0, 51, 255]))
    assert alphas == [[255, 255, 255], [204, 255, 204], *rest]


@pytest.mark.parametrize(
    ("image", "transparent"),
    [
        (Image.fromarray(GREY), 4),
        (Image.fromarray(DEEP), 1040),
        (Image.fromarray(np.dstack([GREY] * 3)), (4, 4, 4)),
    ],
)
def test_the_one_transparent_colour_of_a_png_is_white(tmp_path, image, transparent):
    image.save(tmp_path / "a.png", transparency=transparent)
    found = read_pixels(tmp_path / "a.png", 1)
    assert found[0, 1] == 255
    expected = np.round(DEEP / 257) if image.mode == "I;16" else GREY
    assert np.array_equal(np.delete(found, 1), np.delete(expected, 1))


# --- orientation -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "suffix", [".png", ".jpg", ".tif", ".webp", pytest.param(".avif", marks=AVIF)]
)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_an_image_as_pillow_does(tmp_path, suffix, orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    picture = Image.fromarray(
        np.kron(np.arange(6).reshape(2, 3) * 50, np.ones((8, 8))).astype("u1")
    )
    picture.convert("RGB").save(tmp_path / f"a{suffix}", exif=exif, quality=100)
    picture.getexif()[ExifTags.Base.Orientation] = orientation
    expected = np.array(ImageOps.exif_transpose(picture))
    np.testing.assert_allclose(
        read_pixels(tmp_path / f"a{suffix}", 1).astype(int), expected, atol=9
    )
    assert stored_shape(tmp_path / f"a{suffix}") == (3, *expected.shape)


def test_an_image_whose_exif_is_damaged_is_read_as_it_is_stored(tmp_path):
    path = saved(tmp_path / "a.jpg", np.full((8, 8, 3), 9, np.uint8), exif=b"Exif\0\0no exif")
    assert np.all(read_pixels(path, 1) == 9)


# --- other kinds -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["a.gif", "b.png", "c.tiff", "d.webp", pytest.param("e.avif", marks=AVIF)],
)
def test_of_several_pictures_in_a_file_the_first_is_read(tmp_path, name):
    first, second = (Image.new("RGB", (8, 8), (value, 0, 0)) for value in (20, 200))
    first.save(tmp_path / name, save_all=True, append_images=[second])
    np.testing.assert_allclose(read_pixels(tmp_path / name, 3)[4, 4], [20, 0, 0], atol=4)


@pytest.mark.parametrize("name", ["a.jpg", "a.tif"])
def test_cmyk_is_read_as_the_colours_it_prints(tmp_path, name):
    path = tmp_path / name
    Image.new("RGB", (8, 8), (250, 120, 10)).convert("CMYK").save(path)  # a JPEG's is inverted
    np.testing.assert_allclose(read_pixels(path, 3)[4, 4].astype(int), [250, 120, 10], atol=4)


def test_a_progressive_jpeg_is_read(tmp_path):
    path = saved(tmp_path / "a.jpg", np.full((8, 8, 3), 77, np.uint8), progressive=True)
    assert np.all(read_pixels(path, 1) == 77)


def chunk(kind, body):
    """A chunk of a PNG."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def put_chunk(path, kind, body, *, at=33):
    """Put a chunk behind the header."""
    content = path.read_bytes()
    path.write_bytes(content[:at] + chunk(kind, body) + content[at:])


@pytest.mark.parametrize(("kind", "length"), [(b"zTXt", 16_000_000), (b"tEXt", 80_000_000)])
def test_a_long_comment_is_no_damage(tmp_path, kind, length):
    path, text = saved(tmp_path / "a.png", GREY), b"a" * length
    body = b"Comment\0" + (b"\0" + zlib.compress(text, 1) if kind == b"zTXt" else text)
    put_chunk(path, kind, body)
    assert np.array_equal(read_pixels(path, 1), GREY)


def test_a_few_kilobytes_do_not_unpack_to_a_comment_that_takes_the_memory(tmp_path):
    path = saved(tmp_path / "a.png", GREY)
    put_chunk(path, b"zTXt", b"Comment\0\0" + zlib.compress(b"a" * 50_000_000, 9))
    assert path.stat().st_size < 100_000
    with pytest.raises(CorruptFileError, match="no readable image"):
        read_pixels(path, 1)


@pytest.mark.parametrize("has_exif", [False, True])
@pytest.mark.parametrize("is_animated", [False, True])
def test_a_header_is_read_without_decoding_a_pixel(tmp_path, monkeypatch, has_exif, is_animated):
    path, picture = tmp_path / "a.png", Image.fromarray(np.zeros((8, 6), np.uint8))
    others = [Image.new("L", (6, 8), 9)] if is_animated else []
    picture.save(path, save_all=is_animated, append_images=others)
    if has_exif:  # where ExifTool writes it
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = 6
        put_chunk(path, b"eXIf", exif.tobytes()[6:], at=-12)
        assert read_pixels(path, 1).shape == ((8, 6) if is_animated else (6, 8))
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda _: pytest.fail("it was decoded"))
    header = read_header(path)
    is_turned = has_exif and not is_animated
    assert (header.is_turned, header.is_animated) == (is_turned, is_animated)
    assert (header.height, header.width) == ((6, 8) if is_turned else (8, 6))


def test_damaged_exif_leaves_a_header_readable(tmp_path):
    path = saved(tmp_path / "a.jpg", np.full((8, 8, 3), 9, np.uint8), exif=b"Exif\0\0no exif")
    assert read_header(path).is_plain


def test_plain_images_are_told_by_their_headers(tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    assert is_plain(saved(tmp_path / "a.png", GREY))
    assert is_plain(saved(tmp_path / "a.jpg", np.dstack([GREY] * 3)))
    assert not is_plain(saved(tmp_path / "b.png", DEEP))
    assert not is_plain(saved(tmp_path / "c.png", np.dstack([GREY] * 4)))
    assert not is_plain(saved(tmp_path / "b.jpg", GREY, exif=exif))
    (tmp_path / "d.png").write_bytes(b"no image")
    assert is_plain(tmp_path / "d.png")


def test_a_file_that_would_run_a_program_is_not_opened_whatever_its_name(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    Image.new("RGB", (4, 4)).save(path, "EPS")
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("it ran"))
    for file in (path, Member(path.read_bytes(), lambda: str(path))):
        with pytest.raises(
            CorruptFileError, match=r"a\.png is no readable image: cannot identify"
        ):
            read_pixels(file, 3)


def test_a_kind_of_pixels_that_pillow_does_not_know_is_a_corrupt_file(tmp_path):
    path = tmp_path / "a.dds"
    Image.new("RGB", (4, 4)).save(path)
    data = bytearray(path.read_bytes())
    data[80:88] = struct.pack("<I4s", 4, b"ABCD")  # compressed, in a way of nobody's
    path.write_bytes(data)
    for read in (lambda: read_pixels(path, 3), lambda: stored_shape(path)):
        with pytest.raises(CorruptFileError, match=r"a\.dds is no readable image"):
            read()


def test_a_png_of_a_palette_that_it_lacks_is_a_corrupt_file(tmp_path):
    Image.new("P", (4, 4)).save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    start = content.index(b"PLTE") - 4
    length = int.from_bytes(content[start : start + 4])
    (tmp_path / "a.png").write_bytes(content[:start] + content[start + 12 + length :])
    assert read_header(tmp_path / "a.png") is None
    with pytest.raises(CorruptFileError, match="is no readable image"):
        read_pixels(tmp_path / "a.png", 3)
