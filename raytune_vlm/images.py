"""Bytes to an upright RGB image within limits: the only place of the project that opens an image.

The policy (`docs/`, and PITFALLS: a plain `Image.open(...).convert("RGB")` is wrong in each point):

- refused before anything is decoded: empty data, too many bytes, a format outside `FORMATS`
  (EPS would start Ghostscript), too many pixels by the header;
- the first frame of an animation; the orientation that EXIF or XMP gives is applied;
- deep greys are scaled to 8 bits (Pillow clips them), transparency is laid over white;
- a truncated or broken file is an error: `ImageFile.LOAD_TRUNCATED_IMAGES` stays False.
"""

from __future__ import annotations

import io
import re
import struct
import warnings
from collections.abc import Iterator

import numpy
import simplejpeg  # type: ignore[import-untyped]
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    UnidentifiedImageError,
    WebPImagePlugin,
)

from raytune_vlm.config.data import ImageLimits
from raytune_vlm.errors import DataError

# Named so that Pillow finds them loaded: otherwise it imports every plugin it has, EPS included.
_PLUGINS = (
    JpegImagePlugin,
    PngImagePlugin,
    WebPImagePlugin,
    GifImagePlugin,
    BmpImagePlugin,
    TiffImagePlugin,
)
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
"""The formats that are opened, as Pillow names them."""

MAX_SCANS = 100
"""Passes of a progressive JPEG; encoders make about ten. Each takes 20 ms for 50 megapixels, and no
more than a few bytes of the file."""
_JPEG_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")
_END_OF_IMAGE, _START_OF_SCAN, _WITHOUT_LENGTH = 0xD9, 0xDA, (0x01, 0xD8)

_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_DEEP_MODES = frozenset({"I", "F", "I;16", "I;16B", "I;16L", "I;16N"})

# For the whole process rather than in a `catch_warnings` block, which is not safe between threads
# (images are decoded in several). Our own pixel limit holds also where someone resets the filters.
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)


class ImageError(DataError):
    """An image is refused; the message says why, in a few words, without its name."""


def decode(data: bytes, limits: ImageLimits) -> Image.Image:
    """The image upright and in RGB, detached from its file.

    Raises ImageError for whatever is wrong with the data, and nothing else.
    """
    return Image.fromarray(decode_pixels(data, limits))


def num_pixels(data: bytes, limits: ImageLimits) -> int:
    """Width times height, from the header alone; raises ImageError as `decode` does."""
    image, _ = _open(data, limits)
    return image.width * image.height


def decode_pixels(data: bytes, limits: ImageLimits) -> numpy.ndarray:
    """The pixels of `decode`: uint8 `[height, width, 3]`, C-contiguous.

    Plain JPEG files go through simplejpeg (libjpeg-turbo, like Pillow, without its copies); it is
    strict, and what it refuses is left to Pillow to judge. Raises ImageError as `decode` does.
    """
    image, orientation = _open(data, limits)
    if image.format == "JPEG" and image.mode in ("RGB", "L") and orientation not in _TURNS:
        try:
            pixels: numpy.ndarray = simplejpeg.decode_jpeg(data)
            return pixels
        except ValueError:
            pass
    return numpy.asarray(_decode_with_pillow(image, orientation, data))


def _decode_with_pillow(image: Image.Image, orientation: int, data: bytes) -> Image.Image:
    if image.format == "PNG" and all(kind != b"IEND" for kind, _, _ in _png_chunks(data)):
        raise ImageError("cannot decode the PNG image: truncated")  # Pillow does not always see it
    try:
        image.load()
        if orientation in _TURNS and image.format != "TIFF":  # Pillow turns TIFF by itself
            upright = image.transpose(_TURNS[orientation])
        else:
            upright = image
        result = _to_rgb(upright)
    except ImageError:
        raise
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, ...
        raise ImageError(f"cannot decode the {image.format} image: {_short(error)}") from error
    result.info.clear()  # colour profiles and comments would be written again by `save`
    return result


def tiff_length(data: bytes, *, max_pages: int) -> int:
    """The number of pages of a TIFF; raises ImageError as `decode` does, and beyond `max_pages`."""
    try:
        image = Image.open(io.BytesIO(data), formats=("TIFF",))
        count = _num_pages(image, max_pages + 1)
    except Exception as error:  # headers are parsed here; see `decode`
        raise ImageError(f"cannot read the TIFF: {_short(error)}") from error
    if count > max_pages:
        raise ImageError(f"the TIFF has more pages than the limit, {max_pages}")
    return count


def tiff_page(data: bytes, number: int, limits: ImageLimits) -> Image.Image:
    """Page `number` (from 1) of a TIFF, as `decode` gives the first one of an image.

    Raises ImageError as `decode` does, and where there is no such page. All pages before it are
    looked at: ask `tiff_length` first.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=("TIFF",))
        count = _num_pages(image, number)
    except Exception as error:  # headers are parsed here; see `decode`
        raise ImageError(f"cannot read the TIFF: {_short(error)}") from error
    if number > count:
        raise ImageError(f"there is no page {number}: the TIFF has {count}")
    width, height = image.size
    if width * height > limits.max_pixels:
        raise ImageError(
            f"page {number} has {width} x {height} pixels, the limit is {limits.max_pixels}"
        )
    return _decode_with_pillow(image, 1, data)


def _num_pages(image: Image.Image, at_most: int) -> int:
    """The pages of a TIFF as far as `at_most`; Pillow's `n_frames` follows any chain to its end."""
    for page in range(at_most):
        try:
            image.seek(page)
        except EOFError:
            return page
    return at_most


def thumbnail(data: bytes, limits: ImageLimits, max_side: int) -> bytes:
    """A JPEG whose longer side has at most `max_side` pixels, for reports.

    Raises ImageError as `decode` does.
    """
    image = decode(data, limits)
    image.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=85)
    return buffer.getvalue()


def file_suffix(data: bytes) -> str:
    """The suffix that names the format of an image that `decode` took: `.png`, `.jpeg`."""
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        return f".{str(image.format).lower()}"


def encode_png(image: Image.Image) -> bytes:
    """The image as a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def jpeg_compressed(image: Image.Image, quality: int) -> Image.Image:
    """The RGB image after JPEG compression (4:2:0) with a quality of 1 to 95."""
    data = simplejpeg.encode_jpeg(
        numpy.ascontiguousarray(image), quality=quality, colorsubsampling="420"
    )
    return Image.fromarray(simplejpeg.decode_jpeg(data))


MIN_CANVAS_WIDTH = 4.0
"""In heights of the crop, so that a short text is not blown up to fill the canvas."""


def on_canvas(crop: Image.Image, width: int, height: int) -> Image.Image:
    """A crop of one line of text in the middle of a grey canvas of `width` x `height` pixels.

    The crop keeps its proportions. The ground is the crop's own: the median of the brighter half
    of its edge, so that no frame appears around it.
    """
    crop = crop.convert("L")
    pixels = numpy.asarray(crop)
    edge = numpy.sort(numpy.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]]))
    ground = int(numpy.median(edge[len(edge) // 2 :]))
    aspect = height / width
    room = round(max(crop.width / 0.94, MIN_CANVAS_WIDTH * crop.height))
    canvas = Image.new("L", (room, max(crop.height, round(room * aspect))), ground)
    place = ((canvas.width - crop.width) // 2, (canvas.height - crop.height) // 2)
    canvas.paste(crop, place)
    return canvas.resize((width, height), Image.Resampling.LANCZOS).convert("RGB")


def _open(data: bytes, limits: ImageLimits) -> tuple[Image.Image, int]:
    """The opened, undecoded image and its EXIF orientation (1 to 8); raises ImageError."""
    if not data:
        raise ImageError("the image is empty (0 bytes)")
    if len(data) > limits.max_bytes:
        raise ImageError(f"the image has {len(data)} bytes, the limit is {limits.max_bytes}")
    if data.count(b"\xff\xda") > MAX_SCANS and _num_scans(data) > MAX_SCANS:
        raise ImageError(f"the JPEG image has more than {MAX_SCANS} scans")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        cap = min(limits.max_pixels, Image.MAX_IMAGE_PIXELS or limits.max_pixels)
        raise ImageError(f"the image has more than {cap} pixels") from error
    except UnidentifiedImageError as error:
        raise ImageError(f"not an image, or of a format outside {', '.join(FORMATS)}") from error
    except Exception as error:  # headers are parsed here; see `decode`
        raise ImageError(f"cannot read the image's header: {_short(error)}") from error
    width, height = image.size
    if width < 1 or height < 1:
        raise ImageError(f"the image is empty ({width} x {height} pixels)")
    if width * height > limits.max_pixels:
        raise ImageError(
            f"the image has {width} x {height} pixels, the limit is {limits.max_pixels}"
        )
    return image, _orientation(image, data)


def _num_scans(data: bytes) -> int:
    """The scans of a JPEG file (ITU-T T.81, annex B): markers, and between them segments with
    their length; entropy-coded data holds no marker but restarts.
    """
    position, scans = 0, 0
    while match := _JPEG_MARKER.search(data, position):
        position, kind = match.end(), data[match.end() - 1]
        if kind == _END_OF_IMAGE:
            break
        if kind not in _WITHOUT_LENGTH and position + 2 <= len(data):
            position += int.from_bytes(data[position : position + 2], "big")
        scans += kind == _START_OF_SCAN
    return scans


def _orientation(image: Image.Image, data: bytes) -> int:
    """The orientation that EXIF or XMP gives; 1 where there is none or it cannot be read."""
    try:
        if image.format == "PNG" and "exif" not in image.info:
            late = _png_exif(data)
            if late is not None:
                image.info["exif"] = late
        # The base class's method: that of PNG decodes the image to look for a late EXIF chunk.
        value = Image.Image.getexif(image).get(_ORIENTATION, 1)
    except Exception:  # broken metadata around good pixels: viewers show them as they stand
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _png_exif(data: bytes) -> bytes | None:
    """The EXIF chunk of a PNG file, which may stand behind the pixels."""
    for kind, start, end in _png_chunks(data):
        if kind == b"eXIf":
            return b"Exif\x00\x00" + data[start:end]
    return None


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Kind, start and end of each chunk that is whole."""
    position = 8
    while position + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, position)
        start, end = position + 8, position + 8 + length
        if end + 4 > len(data):
            return
        yield data[position + 4 : start], start, end
        position = end + 4


def _to_rgb(image: Image.Image) -> Image.Image:
    """Any mode to RGB: deep greys scaled, transparency over white; never the same object."""
    if image.mode in _DEEP_MODES:
        return _scale_to_8_bits(image).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _scale_to_8_bits(image: Image.Image) -> Image.Image:
    """A grey image of 16 or 32 bits as 8 bits.

    16-bit modes span 0 to 65535 by definition. 32-bit integers and floats do not say what white
    is: it is the smallest of 1 (floats only), 255 and 65535 that no pixel exceeds. Raises
    ImageError where no such range fits: stretching it would be a guess.
    """
    pixels = numpy.asarray(image, dtype=numpy.float64)
    low, high = float(pixels.min()), float(pixels.max())
    if not (low >= 0 and high <= 65535):  # False for NaN too
        raise ImageError(f"grey values from {low:g} to {high:g} are outside 0 to 65535")
    if image.mode.startswith("I;16"):
        white = 65535.0
    else:
        ranges = (1.0, 255.0, 65535.0) if image.mode == "F" else (255.0, 65535.0)
        white = next(value for value in ranges if high <= value)
    return Image.fromarray(numpy.rint(pixels * (255.0 / white)).astype(numpy.uint8))


def _short(error: Exception) -> str:
    """The error in one short line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 120 else f"{text[:117]}..."
