"""Pictures in and out: the only gate through which image files enter, and the drawing of overlays and sheets."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError

if TYPE_CHECKING:  # torch is imported where it is used: most programs read images, and answer, without it
    from torch import Tensor

FORMATS = ("PNG", "JPEG", "WEBP")
MAX_PIXELS = 16_000_000
MAX_SIDE = 16_384
Picture = TypeVar("Picture")


class ImageError(ValueError):
    """A picture that we cannot or will not read. reason: which kind of trouble, one of a few fixed words."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def open_image(source: str | Path | bytes, name: str = "the picture") -> Image.Image:
    """Read a PNG, JPEG or WEBP file as 8-bit RGB, or RGBA where it has transparency; upright by its EXIF tag.

    ``source``: a path, or the bytes of such a file, which messages then call ``name``. 16-bit gray is scaled to 8 bit,
    CMYK, palette and gray become RGB. ImageError (a ValueError) in one sentence for a missing, damaged, animated or too
    large file (over 16 million pixels or 16,384 on a side, judged before decoding).
    """
    return _open(source, name, _to_8bit)


def open_gray(source: str | Path | bytes, name: str = "the picture") -> np.ndarray:
    """The brightness of a picture, (H,W) float32 in [0,1]; 16-bit files keep their precision, and what is transparent
    is black. Otherwise as :func:`open_image`."""
    return _open(source, name, _to_gray)


def _open(source: str | Path | bytes, name: str, convert: Callable[[Image.Image], Picture]) -> Picture:
    if isinstance(source, bytes):
        file: Path | io.BytesIO = io.BytesIO(source)
    else:
        file = path = Path(source)
        name = str(path)
        if not path.is_file():
            raise ImageError("missing", f"There is no image file {path}; check the path.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own, stricter limit follows
            with Image.open(file, formats=FORMATS) as picture:
                _check_header(picture, name)
                picture.load()
                return convert(ImageOps.exif_transpose(picture))
    except ImageError:
        raise
    except UnidentifiedImageError:
        sentence = f"{name} is not a {', '.join(FORMATS)} picture; convert it to one of these."
        raise ImageError("not a picture", sentence) from None
    except Image.DecompressionBombError:
        raise ImageError("too large", f"{name} has more than {MAX_PIXELS:,} pixels; scale it down.") from None
    except Exception as error:  # decoders raise nearly anything on damaged bytes
        sentence = f"{name} is damaged and cannot be read ({error}); export it again."
        raise ImageError("damaged", sentence) from error


def load_image(source: str | Path | bytes, name: str = "the picture") -> Image.Image:
    """Read a picture as 8-bit RGB, transparent parts on white. ImageError as for :func:`open_image`."""
    picture = open_image(source, name)
    if picture.mode == "RGBA":
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def to_pixels(picture: Image.Image) -> Tensor:
    """A picture as pixels (3,H,W) float32 in [-1,1]."""
    array = np.asarray(picture.convert("RGB"), dtype=np.float32)  # (H,W,3)
    import torch

    return torch.from_numpy(array).permute(2, 0, 1).contiguous() / 127.5 - 1


def to_pil(pixels: Tensor) -> Image.Image:
    """Pixels (3,H,W) in [-1,1] as a picture; values outside are clipped. ValueError for a wrong shape or NaN."""
    if pixels.ndim != 3 or pixels.shape[0] != 3:
        raise ValueError(f"Pixels must have shape (3, H, W), not {tuple(pixels.shape)}.")
    pixels = pixels.detach().float().cpu()
    import torch

    if torch.isnan(pixels).any():
        raise ValueError("The pixels contain NaN, which is no colour; decode in float32 (the VAE may overflow).")
    array = ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return Image.fromarray(array.permute(1, 2, 0).contiguous().numpy())


def condition_to_pil(condition: Tensor) -> Image.Image:
    """A condition (1,H,W) or (3,H,W) in [0,1] as an RGB picture."""
    return to_pil(condition.expand(3, -1, -1) * 2 - 1)


def outline(picture: Image.Image, mask: Tensor, color: str = "magenta") -> Image.Image:
    """A copy of ``picture`` with the inner border of ``mask`` (1,H,W) or (H,W) drawn; 1 = controlled, cut at 0.5.

    ValueError when the sizes differ.
    """
    inside = (mask.detach().float().cpu().reshape(mask.shape[-2:]).numpy() >= 0.5).astype(np.uint8)
    if inside.shape != (picture.height, picture.width):
        raise ValueError(
            f"The mask is {inside.shape[1]}x{inside.shape[0]} but the picture is {picture.width}x{picture.height}."
        )
    width = max(1, min(inside.shape) // 128)
    # Outside the picture counts as outside the mask, so that a full mask shows as a frame.
    kernel = np.ones((2 * width + 1, 2 * width + 1), np.uint8)
    core = cv2.erode(inside, kernel, borderType=cv2.BORDER_CONSTANT, borderValue=0)
    border = Image.fromarray((inside - core) * 255)
    result = picture.convert("RGB")
    result.paste(color, (0, 0, *result.size), border)
    return result


def grid(
    rows: Sequence[Sequence[Image.Image]],
    column_labels: Sequence[str] = (),
    row_labels: Sequence[str] = (),
    pad: int = 4,
) -> Image.Image:
    """A contact sheet: rows of pictures on white, labels over the columns and a caption line over each row.

    Every cell has the size of the largest picture, smaller ones are centred; rows may differ in length. Labels too long
    for their place end in "...". ValueError for no picture at all or more labels than columns or rows.
    """
    pictures = [picture for row in rows for picture in row]
    if not pictures:
        raise ValueError("A contact sheet needs at least one picture.")
    columns = max(len(row) for row in rows)
    if len(column_labels) > columns or len(row_labels) > len(rows):
        raise ValueError(f"{len(column_labels)} x {len(row_labels)} labels for {columns} columns and {len(rows)} rows.")
    width, height = max(p.width for p in pictures), max(p.height for p in pictures)
    font = ImageFont.load_default()
    line = 14
    head, caption = (line if column_labels else 0), (line if row_labels else 0)
    row_height = caption + height + pad
    sheet = Image.new("RGB", (pad + columns * (width + pad), pad + head + len(rows) * row_height), "white")
    draw = ImageDraw.Draw(sheet)
    for column, label in enumerate(column_labels):
        draw.text((pad + column * (width + pad), 1), _shorten(draw, label, width, font), fill="black", font=font)
    for index, row in enumerate(rows):
        top = pad + head + index * row_height
        if index < len(row_labels):
            text = _shorten(draw, row_labels[index], sheet.width - 2 * pad, font)
            draw.text((pad, top), text, fill="black", font=font)
        for column, picture in enumerate(row):
            left = pad + column * (width + pad) + (width - picture.width) // 2
            sheet.paste(picture.convert("RGB"), (left, top + caption + (height - picture.height) // 2))
    return sheet


def captioned(picture: Image.Image, lines: Sequence[str]) -> Image.Image:
    """``picture`` on white with lines of text under it; those too long for its width end in "..."."""
    line, font = 14, ImageFont.load_default()
    result = Image.new("RGB", (picture.width, picture.height + line * len(lines)), "white")
    result.paste(picture.convert("RGB"))
    draw = ImageDraw.Draw(result)
    for index, text in enumerate(lines):
        shown = _shorten(draw, text, picture.width - 4, font)
        draw.text((2, picture.height + line * index + 1), shown, fill="black", font=font)
    return result


def _check_header(picture: Image.Image, name: str) -> None:
    width, height = picture.size
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
        sentence = f"{name} is {width}x{height}, over {MAX_PIXELS:,} pixels or {MAX_SIDE:,} on a side; scale it down."
        raise ImageError("too large", sentence)
    # Phones put a second picture (depth, HDR gain) into a JPEG, which Pillow calls MPO: its first frame is the photo.
    if picture.format in ("PNG", "WEBP") and getattr(picture, "is_animated", False):
        raise ImageError("animated", f"{name} is animated; save a single frame of it.")


def _to_8bit(picture: Image.Image) -> Image.Image:
    """RGB or RGBA, 8 bit. Pillow clips 16-bit gray at 255 where it should scale."""
    if picture.mode.startswith("I"):  # I;16 and its byte orders, I
        picture = Image.fromarray((_from_16bit(picture) * 255).round().astype(np.uint8))
    transparent = "A" in picture.getbands() or "transparency" in picture.info
    picture = picture.convert("RGBA" if transparent else "RGB")
    picture.info.clear()  # camera, place and comments must not travel into what we save
    return picture


def _to_gray(picture: Image.Image) -> np.ndarray:
    if picture.mode.startswith("I"):
        return _from_16bit(picture).astype(np.float32)
    picture = _to_8bit(picture)
    gray = np.asarray(picture.convert("L"), dtype=np.float32) / 255  # (H,W)
    return gray * np.asarray(picture.getchannel("A"), dtype=np.float32) / 255 if picture.mode == "RGBA" else gray


def _from_16bit(picture: Image.Image) -> np.ndarray:
    return (np.asarray(picture).astype(np.float64) / 65535).clip(0, 1)


def _shorten(
    draw: ImageDraw.ImageDraw, text: str, width: int, font: ImageFont.ImageFont | ImageFont.FreeTypeFont
) -> str:
    if draw.textlength(text, font=font) <= width:
        return text
    while text and draw.textlength(text + "...", font=font) > width:
        text = text[:-1]
    return text + "..."
