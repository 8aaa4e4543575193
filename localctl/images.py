"""Read and convert images. All image files are read by this module, which validates them."""

from __future__ import annotations

import io
import stat
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from localctl.files import first_line
from localctl.labels import shorten
from localctl.lazy import moved_names
from localctl.png import is_png, without_texts

if TYPE_CHECKING:  # torch is imported in the functions that use it, so that reading images does not load it
    from torch import Tensor

__getattr__ = moved_names(__name__, {name: f"localctl.drawing:{name}" for name in ("outline", "grid", "captioned")})

# The formats of photos and masks. None runs another program (EPS), renders (SVG, WMF) or downloads.
FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "BMP", "DIB", "TIFF", "GIF", "JPEG2000", "PPM")
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".avif", ".bmp", ".tif", ".tiff", ".gif", ".jfif", ".jpe", ".apng") + (
    (".dib", ".mpo", ".jp2", ".j2k", ".jpf", ".jpx", ".jpc", ".j2c", ".ppm", ".pgm", ".pbm", ".pnm")
)
MAX_PIXELS = 16_000_000  # largest image that is decoded at its full size
MAX_SIDE = 16_384  # pixels
_ON_ITS_SIDE = (5, 6, 7, 8)  # values of the EXIF tag Orientation


class ImageError(ValueError):
    """An image file that is missing, unreadable or refused. reason: the kind of problem, one of a few fixed phrases."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Limits:
    """How large an image file may be, and at which size it is needed.

    pixels: images with more pixels are refused by their header. cover: the (height, width) that the image will be
    resized to cover. An image over ``MAX_PIXELS`` is then read at a reduced size, at least twice what is needed; JPEG
    files are already decoded at 1/2 to 1/8 of their size. None: read the full size.
    """

    pixels: int = MAX_PIXELS
    cover: tuple[int, int] | None = None

    def shrink(self, size: tuple[int, int]) -> int:
        """Return the factor by which an image of ``size`` may be reduced on reading; 1 = not at all."""
        if self.cover is None or size[0] * size[1] <= MAX_PIXELS:
            return 1
        return max(1, min(size) // (2 * max(self.cover)))  # valid for both orientations


def open_image(source: str | Path | bytes, name: str = "the image", limits: Limits = Limits()) -> Image.Image:
    """Read an image file as 8-bit RGB, or RGBA where it has transparency.

    The image is rotated as its EXIF tag says. Of a TIFF or GIF, the first page or frame is read. 16-bit gray is scaled
    to 8 bit; CMYK, palette and gray images become RGB.

    Args:
        source: a path, or the bytes of a file, in one of ``FORMATS``.
        name: what error messages call the image, where ``source`` is bytes.

    Raises:
        ImageError: a ValueError in one sentence. The file is missing, unreadable, of another format, damaged, animated,
            or too large (over ``limits.pixels`` or 16,384 pixels on a side, which is checked before decoding).
    """
    return _open(source, name, _to_8bit, limits)[0]


def open_gray(source: str | Path | bytes, name: str = "the image") -> np.ndarray:
    """Read the brightness of an image, (H,W) float32 in [0,1]. 16-bit files keep their precision, and transparent
    pixels are black. ImageError as for :func:`open_image`."""
    return np.array(_open(source, name, to_gray, Limits())[0])


def load_image(source: str | Path | bytes, name: str = "the image", limits: Limits = Limits()) -> Image.Image:
    """Read an image as 8-bit RGB; transparent pixels are blended with white. ImageError as for :func:`open_image`."""
    return _open(source, name, to_rgb, limits)[0]


def read_photo(
    source: str | Path | bytes, name: str, limits: Limits, gray: bool = False
) -> tuple[Image.Image, tuple[int, int]]:
    """Read an image, and return it with the (height, width) of the file, upright, before any reduction.

    The image is RGB as from :func:`load_image`, or with ``gray`` mode F in [0,1] as from :func:`open_gray`.
    ImageError as for :func:`open_image`.
    """
    return _open(source, name, to_gray if gray else to_rgb, limits)


def photo_size(source: Path | bytes | BinaryIO, name: str, limits: Limits) -> tuple[int, int]:
    """Return the (height, width) of an image file, upright, from its header where that is valid; nothing is decoded
    then. ImageError as for :func:`open_image`."""
    if isinstance(source, Path):
        _check_file(source, shorten(str(source), 300))
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS) as image:
            _check_header(image, name, limits)
            turned = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)  # a PNG's own would decode the image
            if turned in _ON_ITS_SIDE and image.format != "TIFF":  # whose size is that of the upright image
                return image.size
            return image.size[::-1]
    except ImageError:
        raise
    except Exception:  # say what it is, or read it all the same
        if not isinstance(source, (bytes, Path)):
            source.seek(0)
            source = source.read()
        return read_photo(source, name, limits)[1]


def _open(
    source: str | Path | bytes, name: str, convert: Callable[[Image.Image], Image.Image], limits: Limits
) -> tuple[Image.Image, tuple[int, int]]:
    """Return the converted image and the (height, width) of the file, upright."""
    if not isinstance(source, bytes):
        source = Path(source)
        name = shorten(str(source), 300)
        _check_file(source, name)
    try:
        try:
            return _decode(source, name, convert, limits)
        except ImageError:
            raise
        except (ValueError, SyntaxError, UnidentifiedImageError):  # texts or profiles over 1 MB? read without them
            if not is_png(source):
                raise
            content = source if isinstance(source, bytes) else source.read_bytes()
            return _decode(without_texts(content), name, convert, limits)
    except ImageError:
        raise
    except UnidentifiedImageError:
        sentence = f"{name} is not a {', '.join(FORMATS)} image; convert it to one of these."
        raise ImageError("of unknown format", sentence) from None
    except Image.DecompressionBombError:
        raise _too_large(name, f"has more than {limits.pixels:,} pixels") from None
    except Exception as error:  # decoders raise almost any type for damaged files
        if isinstance(error, OSError) and error.errno is not None:
            raise ImageError("unreadable", f"{name} cannot be read ({error.strerror}).") from error
        sentence = f"{name} is damaged and cannot be read ({first_line(error)}); export it again."
        raise ImageError("damaged", sentence) from error


def _decode(
    source: Path | bytes, name: str, convert: Callable[[Image.Image], Image.Image], limits: Limits
) -> tuple[Image.Image, tuple[int, int]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # _check_header has a stricter limit
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS) as image:
            _check_header(image, name, limits)
            (width, height), shrink = image.size, limits.shrink(image.size)
            if shrink > 1:
                image.draft(None, (width // shrink, height // shrink))  # affects JPEG only
            image.load()
            unrotated = image.size
            ImageOps.exif_transpose(image, in_place=True)
            if image.size != unrotated:
                width, height = height, width
            converted = convert(image)
    rest = limits.shrink((width, height)) * converted.height // height  # the reduction that draft did not do
    return (converted if rest <= 1 else converted.reduce(rest)), (height, width)


def _check_file(path: Path, name: str) -> None:
    """Raise ImageError unless ``path`` is a regular file: reading a pipe or device might never end."""
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        status = None
    except (OSError, ValueError) as error:  # a loop of links, an invalid name, a folder without permission
        why = error.strerror if isinstance(error, OSError) else first_line(error)
        raise ImageError("unreadable", f"{name} cannot be read ({why}).") from None
    if status is None or not stat.S_ISREG(status.st_mode):
        why = "; check the path" if status is None else ", but something else, such as a folder; give an image"
        raise ImageError("missing", f"There is no image file {name}{why}.")


def to_pixels(image: Image.Image) -> Tensor:
    """Convert an image to pixels (3,H,W) float32 in [-1,1]."""
    array = np.asarray(image.convert("RGB"), dtype=np.float32)  # (H,W,3)
    import torch

    return torch.from_numpy(array).permute(2, 0, 1).contiguous() / 127.5 - 1


def to_pil(pixels: Tensor) -> Image.Image:
    """Convert pixels (3,H,W) in [-1,1] to an image; other values are clipped. ValueError for another shape or NaN."""
    if pixels.ndim != 3 or pixels.shape[0] != 3:
        raise ValueError(f"Pixels must have shape (3, H, W), not {tuple(pixels.shape)}.")
    pixels = pixels.detach().float().cpu()
    import torch

    if torch.isnan(pixels).any():
        raise ValueError("The pixels contain NaN; decode in float32 (the VAE may overflow in half precision).")
    array = ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return Image.fromarray(array.permute(1, 2, 0).contiguous().numpy())


def condition_to_pil(condition: Tensor) -> Image.Image:
    """Convert a condition (1,H,W) or (3,H,W) in [0,1] to an RGB image."""
    return to_pil(condition.expand(3, -1, -1) * 2 - 1)


def _check_header(image: Image.Image, name: str, limits: Limits) -> None:
    width, height = image.size
    if width * height > limits.pixels or max(width, height) > MAX_SIDE:
        raise _too_large(name, f"is {width}x{height}, over {limits.pixels:,} pixels or {MAX_SIDE:,} on a side")
    # A JPEG from a phone may hold a second image (depth, HDR gain). Pillow calls it MPO; its first frame is the photo.
    if image.format in ("PNG", "WEBP", "AVIF") and getattr(image, "is_animated", False):
        raise ImageError("animated", f"{name} is animated; save a single frame of it.")


def _too_large(name: str, what: str) -> ImageError:
    return ImageError("too large", f"{name} {what}; scale it down.")


def _to_8bit(image: Image.Image) -> Image.Image:
    """Convert to 8-bit RGB or RGBA. 16-bit gray is scaled here, because Pillow clips it at 255."""
    if image.mode == "F":
        raise ValueError("its values are floating-point numbers, whose white level is unknown")
    if image.mode.startswith("I"):  # I;16 and its byte orders, I
        image = Image.fromarray((_from_16bit(image) * 255).round().astype(np.uint8))
    transparent = "A" in image.getbands() or "transparency" in image.info
    image = image.convert("RGBA" if transparent else "RGB")
    image.info.clear()  # camera, location and comments must not get into saved images
    return image


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image to 8-bit RGB, blending transparent pixels with white."""
    image = _to_8bit(image)
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def to_gray(image: Image.Image) -> Image.Image:
    """Convert an image to mode F in [0,1], with transparent pixels black."""
    if image.mode.startswith("I"):
        return Image.fromarray(_from_16bit(image).astype(np.float32))
    image = _to_8bit(image)
    gray = np.asarray(image.convert("L"), dtype=np.float32) / 255  # (H,W)
    if image.mode == "RGBA":
        gray = gray * np.asarray(image.getchannel("A"), dtype=np.float32) / 255
    return Image.fromarray(gray)


def _from_16bit(image: Image.Image) -> np.ndarray:
    values = np.asarray(image)
    if values.max() > 65535 or values.min() < 0:
        raise ValueError("its 32-bit values are not within 0 to 65,535")
    return values.astype(np.float64) / 65535


def png_bytes(image: Image.Image) -> bytes:
    """Encode an image as the content of a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()
