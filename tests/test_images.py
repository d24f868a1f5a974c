"""The one opener of images, against the files that plain Pillow code gets wrong."""

import io
import struct
import subprocess
import sys
import zlib

import numpy
import pytest
from PIL import Image, ImageFile

from raytune_vlm.config.data import ImageLimits
from raytune_vlm.errors import DataError
from raytune_vlm.images import FORMATS, ImageError, decode, encode_png, thumbnail

LIMITS = ImageLimits()


def encoded(image: Image.Image, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=form, **options)
    return buffer.getvalue()


def halves(width: int = 40, height: int = 20) -> Image.Image:
    """Red on the left, blue on the right."""
    image = Image.new("RGB", (width, height), (255, 0, 0))
    image.paste((0, 0, 255), (width // 2, 0, width, height))
    return image


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, depth: int, colour: int, rows: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b"")


def exif(orientation: int) -> bytes:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags.tobytes()


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_each_allowed_format_opens(form: str) -> None:
    assert form in FORMATS
    data = encoded(halves(), form)
    image = decode(data, LIMITS)
    assert (image.mode, image.size, image.info) == ("RGB", (40, 20), {})
    assert image.getpixel((5, 10))[0] > 200


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied(form: str, orientation: int) -> None:
    data = encoded(halves(), form, exif=exif(orientation))
    image = decode(data, LIMITS)
    assert image.size == ((20, 40) if orientation >= 5 else (40, 20))
    first = image.getpixel((2, 2))
    red_first = orientation in (1, 4, 5, 6)
    assert (first[0] > first[2]) is red_first


def test_png_orientation_behind_the_pixels_is_seen() -> None:
    data = encoded(halves(), "PNG")
    body = exif(6).removeprefix(b"Exif\x00\x00")
    late = data[:-12] + chunk(b"eXIf", body) + data[-12:]
    assert decode(late, LIMITS).size == (20, 40)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_broken_exif_leaves_the_image_as_it_stands() -> None:
    data = encoded(halves(), "JPEG", exif=b"Exif\x00\x00MM\x00\x2a\xff\xff\xff\xff")
    assert decode(data, LIMITS).size == (40, 20)


def test_16_bit_greys_are_scaled_not_clipped() -> None:
    values = (0, 0x4040, 0x8080, 0xFFFF)
    data = png(4, 1, 16, 0, b"\x00" + struct.pack(">4H", *values))
    pixels = numpy.asarray(decode(data, LIMITS))[0]
    assert pixels.tolist() == [[v] * 3 for v in (0, 0x40, 0x80, 0xFF)]


@pytest.mark.parametrize(
    ("kind", "values", "expected"),
    [
        (numpy.uint16, [0, 257, 65535], [0, 1, 255]),
        (numpy.int32, [0, 128, 255], [0, 128, 255]),
        (numpy.int32, [0, 257, 65535], [0, 1, 255]),
        (numpy.float32, [0.0, 0.5, 1.0], [0, 128, 255]),
        (numpy.float32, [0.0, 128.0, 255.0], [0, 128, 255]),
    ],
)
def test_deep_tiff_greys(kind: type, values: list[float], expected: list[int]) -> None:
    data = encoded(Image.fromarray(numpy.array([values], dtype=kind)), "TIFF")
    assert numpy.asarray(decode(data, LIMITS))[0, :, 0].tolist() == expected


@pytest.mark.parametrize("values", [[0.0, float("nan")], [-1.0, 1.0], [0.0, 1e9]])
def test_float_images_without_a_known_range_are_refused(values: list[float]) -> None:
    data = encoded(Image.fromarray(numpy.array([values], dtype=numpy.float32)), "TIFF")
    with pytest.raises(ImageError, match="outside 0 to 65535"):
        decode(data, LIMITS)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_lies_over_white(mode: str) -> None:
    image = Image.new(mode, (4, 4), (0, 0, 0, 0) if mode == "RGBA" else (0, 0))
    assert decode(encoded(image, "PNG"), LIMITS).getpixel((1, 1)) == (255, 255, 255)


def test_palette_with_transparency_lies_over_white() -> None:
    image = Image.new("P", (4, 4), 0)
    image.putpalette([0, 0, 0, 255, 0, 0])
    image.putpixel((0, 0), 1)
    decoded = decode(encoded(image, "PNG", transparency=0), LIMITS)
    assert decoded.getpixel((0, 0)) == (255, 0, 0)
    assert decoded.getpixel((1, 1)) == (255, 255, 255)


def test_cmyk_jpeg_and_bilevel() -> None:
    cmyk = decode(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"), LIMITS)
    assert cmyk.mode == "RGB"
    red, green, blue = cmyk.getpixel((4, 4))
    assert red > 200 > 80 > max(green, blue)
    assert decode(encoded(Image.new("1", (4, 4), 1), "TIFF"), LIMITS).getpixel((0, 0)) == (255,) * 3


@pytest.mark.parametrize("form", ["GIF", "WEBP"])
def test_the_first_frame_of_an_animation(form: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "lime")]
    data = encoded(frames[0], form, save_all=True, append_images=frames[1:], duration=50)
    assert decode(data, LIMITS).getpixel((4, 4))[0] > 200


@pytest.mark.parametrize("form", ["PNG", "JPEG"])
def test_truncated_files_are_refused(form: str) -> None:
    noise = numpy.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=numpy.uint8)
    data = encoded(Image.fromarray(noise), form)
    with pytest.raises(ImageError, match="cannot decode"):
        decode(data[: len(data) // 2], LIMITS)
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    for end in range(0, len(data), max(len(data) // 50, 1)):
        with pytest.raises(ImageError):
            decode(data[:end], LIMITS)


def test_a_bomb_is_refused_by_its_header() -> None:
    bomb = png(12_000, 12_000, 8, 0, b"")
    for limits in (LIMITS, ImageLimits(max_pixels=10**9)):
        with pytest.raises(ImageError, match="pixels"):
            decode(bomb, limits)
    with pytest.raises(ImageError, match=r"40 x 20 pixels, the limit is 799"):
        decode(encoded(halves(), "PNG"), ImageLimits(max_pixels=799))


@pytest.mark.parametrize(
    "data",
    [
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"just text",
        b"P6 1 1 255 abc",
        b"\x89PNG\r\n\x1a\n",
        b"\x00" * 100,
    ],
)
def test_other_formats_are_refused(data: bytes) -> None:
    with pytest.raises(ImageError) as caught:
        decode(data, LIMITS)
    assert "\n" not in caught.value.message


def test_empty_and_oversized_data() -> None:
    with pytest.raises(ImageError, match="empty"):
        decode(b"", LIMITS)
    with pytest.raises(ImageError, match="the limit is 10"):
        decode(encoded(halves(), "PNG"), ImageLimits(max_bytes=10))
    assert issubclass(ImageError, DataError)


def test_thumbnail_and_png() -> None:
    small = decode(thumbnail(encoded(halves(400, 200), "PNG"), LIMITS, 50), LIMITS)
    assert small.size == (50, 25)
    image = halves()
    assert decode(encode_png(image), LIMITS).tobytes() == image.tobytes()


def test_importing_is_light() -> None:
    code = (
        "import sys, raytune_vlm.images, raytune_vlm.sources\n"
        "print([m for m in ('torch', 'ray', 'transformers', 'pandas') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
