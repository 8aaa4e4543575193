"""The scenes of a run: prompts and layouts from files of several kinds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageColor

from localctl.files import first_line, parse_json
from localctl.layout import Layout
from localctl.layout_io import file_inside, from_colors, from_content, load_layout
from localctl.masks import load_mask

LINES = ".jsonl"


def read_layouts(options: Mapping[str, Any]) -> list[Layout]:
    """Read the layouts of a run: from layouts (JSON), lists of them (JSON lines), or an image with a colour per region.

    ``options``: the settings ``layout``, ``color`` and ``prompt``. ValueError for a file that is none of these, or a
    colour that is not in the image.
    """
    layouts: list[Layout] = []
    for place in options["layout"] or ():
        if is_image(place):
            layouts.append(_from_colors(place, options["color"] or (), next(iter(options["prompt"] or ()), None)))
        elif Path(place).suffix.lower() == LINES:
            layouts += _read_lines(Path(place))
        else:
            layouts.append(load_layout(place))
    return layouts


def is_image(place: str) -> bool:
    """Return whether a layout is an image with one colour per region, by the ending of its name."""
    return Path(place).suffix.lower() in Image.registered_extensions()


def _from_colors(path: str, texts: Any, prompt: str | None) -> Layout:
    colors = split_colors(texts)
    if not colors:
        raise ValueError(
            f"The layout {path} is an image with a colour for each region; say what they are, such as "
            "--color '#ff0000=a red circle'."
        )
    return from_colors(path, colors, prompt)


def split_colors(texts: Sequence[str]) -> dict[tuple[int, int, int] | str, str]:
    """Split each COLOR=PHRASE. ValueError for other text, or a colour that is given twice."""
    colors: dict[tuple[int, int, int] | str, str] = dict(map(split_color, texts))
    if len(colors) < len(texts):
        raise ValueError(f"A colour is given twice in --color {' '.join(texts)}; give each one once.")
    return colors


def split_color(text: str) -> tuple[tuple[int, int, int], str]:
    """Split COLOR=PHRASE, such as "#ff0000=a red circle" or "red=a circle". ValueError for other text."""
    color, equals, phrase = text.partition("=")
    try:
        if not equals:
            raise ValueError
        red, green, blue = ImageColor.getrgb(color.strip())[:3]
    except ValueError:
        raise ValueError(
            f"{text!r} is not a colour with its phrase; write COLOR=PHRASE, such as '#ff0000=a red circle'."
        ) from None
    return (red, green, blue), phrase.strip()


def _read_lines(path: Path) -> list[Layout]:
    """Read a layout in each line of a file; masks are in its folder or below."""
    layouts = []
    for number, line in enumerate(_lines(path), start=1):
        source = f"{path}, line {number}"
        try:
            content = parse_json(line)
        except ValueError as error:
            raise ValueError(f"{source} is not JSON ({first_line(error)}); write one layout per line.") from error
        layouts.append(
            from_content(content, lambda name, where: load_mask(file_inside(path.parent, name, where)), source)
        )
    return layouts


def read_prompts(place: str) -> dict[str, list[str]]:
    """Return the settings of a file of prompts: ``prompt``, one for each line of text; or ``layout``, the file itself,
    if its lines are layouts (JSON). ValueError for a file that cannot be read, or has no prompts."""
    lines = _lines(Path(place).expanduser())
    if not lines:
        raise ValueError(f"There are no prompts in {place}; write one per line.")
    if lines[0].startswith("{"):
        if Path(place).suffix.lower() != LINES:
            raise ValueError(f"The lines of {place} are JSON; call the file {Path(place).stem}{LINES}.")
        return {"layout": [place]}
    return {"prompt": lines}


def _lines(path: Path) -> list[str]:
    """Return the lines of a text file that are not blank. ValueError when it cannot be read."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise ValueError(f"The file of prompts {path} cannot be read ({reason}); check it.") from error
    return [line.strip() for line in text.split("\n") if line.strip()]
