"""Layouts from images with one colour per region, and from DenseDiffusion's benchmark of such images."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from localctl.files import first_line, read_object
from localctl.images import load_image
from localctl.layout import Layout, Region
from localctl.layout_checks import check_count
from localctl.sizes import near_side, shown

Color = tuple[int, int, int]
_MIN_DISTANCE = 40.0  # colours closer than this (Euclidean, 0-255) are one colour, with compression noise or soft edges
_SPLITS, _MOST_BYTES = ("valset", "testset"), 2**24


def from_colors(
    image: str | Path | Image.Image,
    phrases: Mapping[Color | str, str],
    prompt: str | None = None,
    size: tuple[int, int] | None = None,
) -> Layout:
    """Make a layout from an image with one colour per region.

    Args:
        image: every pixel is assigned to the nearest colour of the table, so smooth edges and compression noise are
            allowed.
        phrases: maps a colour, (r, g, b) or "#rrggbb", to a phrase; "" for a part without words.
        prompt: without one, the phrases are joined.
        size: (height, width) of the layout in pixels; by default the image's, rounded to multiples of 8.

    Raises:
        ValueError: an invalid colour, one that does not occur in the image, or two that are too similar.
    """
    check_count(len(phrases), "The table of colours")
    colors = [as_color(color) for color in phrases]
    array = _rgb(image)  # (H,W,3)
    masks = nearest_color(array, colors)
    segments = []
    for color, phrase, mask in zip(phrases, phrases.values(), masks, strict=True):
        near = np.abs(array[mask.numpy()[0] > 0] - np.array(as_color(color))).max(axis=-1, initial=0)
        if not mask.any() or near.min() > _MIN_DISTANCE:
            raise ValueError(
                f"The colour {color} of the phrase {phrase!r} does not occur in the image; check the table of colours."
            )
        segments.append(Region(phrase, mask=mask))
    height, width = size or (near_side(array.shape[0]), near_side(array.shape[1]))
    return Layout.from_segments(segments, prompt, height, width)


def from_dense_diffusion(
    folder: str | Path, index: int | str, size: tuple[int, int] | None = None, split: str | None = None
) -> Layout:
    """Read one scene of DenseDiffusion's benchmark, from the published folder ``dataset`` with its archives unpacked.

    As published, the colours of the image are ordered by area, with black or white first, and the descriptions belong
    to them in this order; an empty description is a part without words.

    Args:
        folder: holds ``valset.pkl`` or ``testset.pkl``, or the same as ``.json``, and ``<index>.png`` or
            ``valset_layout/<index>.png``. Of the pickle, plain containers, texts and numbers are read and nothing else.
        index: of the scene.
        size: (height, width) in pixels; by default the image's.
        split: ``valset`` or ``testset``; None: the one that is there, ``valset`` first.

    Raises:
        ValueError: files are missing or in another format.
    """
    folder = Path(folder)
    path, content = _scenes(folder, split)
    scene = content.get(str(index))
    if not isinstance(scene, dict) or not {"textual_condition", "segment_descriptions"} <= set(scene):
        raise ValueError(f"There is no scene {index} in {path}; choose one of the {len(content)} that it has.")
    texts = scene["segment_descriptions"]
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"The descriptions of scene {index} must be a list of texts, not {shown(texts)}.")
    check_count(len(texts), f"Scene {index} in {path}")
    image = folder / f"{path.stem}_layout" / f"{index}.png"
    image = image if image.is_file() else folder / f"{index}.png"
    array = _rgb(image)
    colors = main_colors(array, len(texts))
    if len(colors) < len(texts):
        raise ValueError(f"{image} has {len(colors)} colours for {len(texts)} descriptions; it needs one for each.")
    for color in ((0, 0, 0), (255, 255, 255)):
        close = [item for item in colors if float(np.linalg.norm(np.subtract(item, color))) < _MIN_DISTANCE]
        if close:
            colors.remove(close[0])
            colors.insert(0, close[0])
    segments = [Region(text, mask=mask) for text, mask in zip(texts, nearest_color(array, colors), strict=True)]
    height, width = size or array.shape[:2]
    return Layout.from_segments(segments, scene["textual_condition"], height, width)


def dense_diffusion_scenes(folder: str | Path, split: str | None = None) -> list[str]:
    """Return the indices of the scenes in a folder of DenseDiffusion's benchmark; arguments and errors as for
    :func:`from_dense_diffusion`."""
    return list(_scenes(Path(folder), split)[1])


def _scenes(folder: Path, split: str | None) -> tuple[Path, dict[str, Any]]:
    """Return the file with the scenes, and index -> scene."""
    if split is not None and split not in _SPLITS:
        raise ValueError(f"Unknown split {split!r}; choose one of {', '.join(_SPLITS)}.")
    names = [f"{name}{suffix}" for name in ([split] if split else _SPLITS) for suffix in (".json", ".pkl")]
    path = next((folder / name for name in names if (folder / name).is_file()), folder / names[0])
    if path.suffix == ".json":
        return path, read_object(path, "The file")
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise ValueError(f"it has over {_MOST_BYTES} bytes")
        content = _PlainUnpickler(BytesIO(path.read_bytes())).load()
        if not isinstance(content, dict):
            raise ValueError(f"it holds {shown(content)}, not scenes by index")
    except Exception as error:  # damaged pickles raise any error
        raise ValueError(f"The file {path} cannot be read ({first_line(error)}); give it as .json.") from error
    return path, {str(index): scene for index, scene in content.items()}


class _PlainUnpickler(pickle.Unpickler):
    """Reads containers, texts and numbers; names no class or function, so that no code of the file can run."""

    def find_class(self, module: str, name: str) -> Any:
        raise ValueError(f"it names {module}.{name}, which is not unpickled")


def _rgb(image: str | Path | Image.Image) -> np.ndarray:
    """Read an image as (H,W,3) float32 in [0, 255]."""
    loaded = image if isinstance(image, Image.Image) else load_image(image)
    return np.asarray(loaded.convert("RGB"), dtype=np.float32)


def as_color(color: Color | str) -> Color:
    """Return (r, g, b) of a colour; ValueError unless it is that already, or #rrggbb."""
    try:
        values = bytes.fromhex(color.lstrip("#")) if isinstance(color, str) else bytes(color)
    except (ValueError, TypeError):
        values = b""
    if len(values) != 3:
        raise ValueError(f"{color!r} is not a colour; give #rrggbb or three whole numbers from 0 to 255.")
    return values[0], values[1], values[2]


def nearest_color(array: np.ndarray, colors: Sequence[Color]) -> list[Tensor]:
    """Return one mask (1,H,W) per colour: the pixels nearer to it than to any other. ValueError for similar colours."""
    for index, color in enumerate(colors):
        for other in colors[:index]:
            if np.linalg.norm(np.subtract(color, other)) < 3:
                raise ValueError(
                    f"The colours {other} and {color} are too similar to tell apart; choose clearly different ones."
                )
    distance = np.stack([((array - np.array(color, np.float32)) ** 2).sum(axis=-1) for color in colors])
    nearest = distance.argmin(axis=0)  # (H,W)
    return [torch.from_numpy((nearest == index).astype(np.float32))[None] for index in range(len(colors))]


def main_colors(array: np.ndarray, count: int) -> list[Color]:
    """Return the ``count`` most frequent clearly different colours, the most frequent first."""
    packed = array.astype(np.int64) @ np.array([1 << 16, 1 << 8, 1])  # one integer per pixel sorts much faster
    values, counts = np.unique(packed, return_counts=True)
    chosen: list[Color] = []
    for value in values[np.argsort(-counts, kind="stable")].tolist():
        color = (value >> 16, value >> 8 & 255, value & 255)
        if all(np.linalg.norm(np.subtract(color, other)) >= _MIN_DISTANCE for other in chosen):
            chosen.append(color)
        if len(chosen) == count:
            break
    return chosen
