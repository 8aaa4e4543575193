"""Images in and out: the only gate through which image files enter."""

from __future__ import annotations

import io
import stat
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from localctl.files import first_line
from localctl.labels import brief
from localctl.lazy import moved_names
from localctl.png import is_png, without_texts
from localctl.sizes import PHOTO_PIXELS as PHOTO_PIXELS

if TYPE_CHECKING:  # torch is imported where it is used: most programs read images, and answer, without it
    from torch import Tensor

__getattr__ = moved_names(__name__, {name: f"localctl.drawing:{name}" for name in ("outline", "grid", "captioned")})

# Everything that photos and masks come in. No format here runs another program (EPS), renders (SVG, WMF) or fetches.
FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "BMP", "DIB", "TIFF", "GIF", "JPEG2000", "PPM")
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".avif", ".bmp", ".tif", ".tiff", ".gif", ".jfif", ".jpe", ".apng") + (
    (".dib", ".mpo", ".jp2", ".j2k", ".jpf", ".jpx", ".jpc", ".j2c", ".ppm", ".pgm", ".pbm", ".pnm")
)
MAX_PIXELS = 16_000_000  # of what is decoded whole
MAX_SIDE = 16_384


class ImageError(ValueError):
    """An image that we cannot or will not read. reason: which kind of trouble, one of a few fixed words."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Limits:
    """How large an image may be, and how much of it is needed.

    pixels: more are refused, judged by the header. cover: what the image is going to be scaled down to, (height,
    width): beyond MAX_PIXELS it is then read smaller, a JPEG decoded at 1/2 to 1/8 of its size, down to twice what
    covers that. None: always whole.
    """

    pixels: int = MAX_PIXELS
    cover: tuple[int, int] | None = None

    def shrink(self, size: tuple[int, int]) -> int:
        """Tell by which factor an image of ``size`` may be read smaller, 1 = not at all."""
        if self.cover is None or size[0] * size[1] <= MAX_PIXELS:
            return 1
        return max(1, min(size) // (2 * max(self.cover)))  # whichever way up it is


def open_image(source: str | Path | bytes, name: str = "the image", limits: Limits = Limits()) -> Image.Image:
    """Read an image file of one of ``FORMATS`` as 8-bit RGB, or RGBA where it has transparency; upright by its EXIF
    tag, the first page or frame of a TIFF or GIF.

    ``source``: a path, or the bytes of such a file, which messages then call ``name``. 16-bit gray is scaled to 8 bit,
    CMYK, palette and gray become RGB. ImageError (a ValueError) in one sentence for a missing, damaged, animated or too
    large file (over ``limits.pixels`` or 16,384 on a side, judged before decoding).
    """
    return _open(source, name, _to_8bit, limits)[0]


def open_gray(source: str | Path | bytes, name: str = "the image") -> np.ndarray:
    """Read the brightness of an image, (H,W) float32 in [0,1]; 16-bit files keep their precision, and what is
    transparent is black. Otherwise as :func:`open_image`."""
    return np.array(_open(source, name, to_gray, Limits())[0])


def load_image(source: str | Path | bytes, name: str = "the image", limits: Limits = Limits()) -> Image.Image:
    """Read an image as 8-bit RGB, transparent parts on white. ImageError as for :func:`open_image`."""
    return _open(source, name, to_rgb, limits)[0]


def read_photo(
    source: str | Path | bytes, name: str, limits: Limits, gray: bool = False
) -> tuple[Image.Image, tuple[int, int]]:
    """Read RGB as by :func:`load_image`, or where ``gray`` mode F in [0,1] as by :func:`open_gray`; and (height, width)
    of the file itself, upright, however much smaller it was read."""
    return _open(source, name, to_gray if gray else to_rgb, limits)


def _open(
    source: str | Path | bytes, name: str, convert: Callable[[Image.Image], Image.Image], limits: Limits
) -> tuple[Image.Image, tuple[int, int]]:
    """Return the converted image and the (height, width) of the file, upright."""
    if not isinstance(source, bytes):
        source = Path(source)
        name = brief(str(source), 300)
        _check_file(source, name)
    try:
        try:
            return _decode(source, name, convert, limits)
        except ImageError:
            raise
        except (ValueError, SyntaxError, UnidentifiedImageError):  # of texts and profiles over 1 MB, which nobody needs
            if not is_png(source):
                raise
            content = source if isinstance(source, bytes) else source.read_bytes()
            return _decode(without_texts(content), name, convert, limits)
    except ImageError:
        raise
    except UnidentifiedImageError:
        sentence = f"{name} is not a {', '.join(FORMATS)} image; convert it to one of these."
        raise ImageError("not a picture", sentence) from None
    except Image.DecompressionBombError:
        raise _too_large(name, f"has more than {limits.pixels:,} pixels") from None
    except Exception as error:  # decoders raise nearly anything on damaged bytes
        if isinstance(error, OSError) and error.errno is not None:
            raise ImageError("unreadable", f"{name} cannot be read ({error.strerror}).") from error
        sentence = f"{name} is damaged and cannot be read ({first_line(error)}); export it again."
        raise ImageError("damaged", sentence) from error


def _decode(
    source: Path | bytes, name: str, convert: Callable[[Image.Image], Image.Image], limits: Limits
) -> tuple[Image.Image, tuple[int, int]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own, stricter limit follows
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS) as image:
            _check_header(image, name, limits)
            (width, height), shrink = image.size, limits.shrink(image.size)
            if shrink > 1:
                image.draft(None, (width // shrink, height // shrink))  # of a JPEG; other formats know no such thing
            image.load()
            lying = image.size
            ImageOps.exif_transpose(image, in_place=True)
            if image.size != lying:
                width, height = height, width
            converted = convert(image)
    rest = limits.shrink((width, height)) * converted.height // height  # what draft has left to do
    return (converted if rest <= 1 else converted.reduce(rest)), (height, width)


def _check_file(path: Path, name: str) -> None:
    """ImageError unless ``path`` is a file. A pipe or device would be waited for."""
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        status = None
    except (OSError, ValueError) as error:  # a loop of links, a name that no disk takes, a locked folder
        why = error.strerror if isinstance(error, OSError) else first_line(error)
        raise ImageError("unreadable", f"{name} cannot be read ({why}).") from None
    if status is None or not stat.S_ISREG(status.st_mode):
        raise ImageError("missing", f"There is no image file {name}; check the path.")


def to_pixels(image: Image.Image) -> Tensor:
    """Convert an image to pixels (3,H,W) float32 in [-1,1]."""
    array = np.asarray(image.convert("RGB"), dtype=np.float32)  # (H,W,3)
    import torch

    return torch.from_numpy(array).permute(2, 0, 1).contiguous() / 127.5 - 1


def to_pil(pixels: Tensor) -> Image.Image:
    """Convert pixels (3,H,W) in [-1,1] to an image; values outside are clipped. ValueError for a wrong shape or NaN."""
    if pixels.ndim != 3 or pixels.shape[0] != 3:
        raise ValueError(f"Pixels must have shape (3, H, W), not {tuple(pixels.shape)}.")
    pixels = pixels.detach().float().cpu()
    import torch

    if torch.isnan(pixels).any():
        raise ValueError("The pixels contain NaN, which is no colour; decode in float32 (the VAE may overflow).")
    array = ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return Image.fromarray(array.permute(1, 2, 0).contiguous().numpy())


def condition_to_pil(condition: Tensor) -> Image.Image:
    """Convert a condition (1,H,W) or (3,H,W) in [0,1] to an RGB image."""
    return to_pil(condition.expand(3, -1, -1) * 2 - 1)


def _check_header(image: Image.Image, name: str, limits: Limits) -> None:
    width, height = image.size
    if width * height > limits.pixels or max(width, height) > MAX_SIDE:
        raise _too_large(name, f"is {width}x{height}, over {limits.pixels:,} pixels or {MAX_SIDE:,} on a side")
    # Phones put a second image (depth, HDR gain) into a JPEG, which Pillow calls MPO: its first frame is the photo.
    if image.format in ("PNG", "WEBP", "AVIF") and getattr(image, "is_animated", False):
        raise ImageError("animated", f"{name} is animated; save a single frame of it.")


def _too_large(name: str, what: str) -> ImageError:
    return ImageError("too large", f"{name} {what}; scale it down.")


def _to_8bit(image: Image.Image) -> Image.Image:
    """RGB or RGBA, 8 bit. Pillow clips 16-bit gray at 255 where it should scale."""
    if image.mode == "F":
        raise ValueError("its values are floating-point numbers, of which nobody knows what is white")
    if image.mode.startswith("I"):  # I;16 and its byte orders, I
        image = Image.fromarray((_from_16bit(image) * 255).round().astype(np.uint8))
    transparent = "A" in image.getbands() or "transparency" in image.info
    image = image.convert("RGBA" if transparent else "RGB")
    image.info.clear()  # camera, place and comments must not travel into what we save
    return image


def to_rgb(image: Image.Image) -> Image.Image:
    image = _to_8bit(image)
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def to_gray(image: Image.Image) -> Image.Image:
    """Mode F, in [0,1]."""
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
        raise ValueError("32-bit values; 0 to 65,535 is what an image holds")
    return values.astype(np.float64) / 65535
