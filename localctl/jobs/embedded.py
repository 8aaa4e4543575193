"""Records inside images: the settings that repeat a run, with its small inputs, in a text chunk of a PNG file.

An image is shared more often than a folder, so a record in it names no folder of its maker: see :func:`embedded`.
"""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Container, Iterator, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from PIL import Image

from localctl import __version__
from localctl.files import first_line, parse_json, read_object, sha256, write_bytes
from localctl.jobs.settings import HERE, INPUTS, PLACES, checked_settings, earlier_regions, names_file
from localctl.sizes import shown

KEY = "localctl"  # of the text chunk
MOST_BYTES = 600_000  # of all inputs in one image; base64 takes a third more
MOST_TEXT = 1_000_000  # bytes of a record in an image; Pillow opens no image with a text over 2**20
_NAME = re.compile(r"[a-z_]{1,40}_\d{1,6}(_mask_\d{1,3})?(\.[a-z0-9]{1,10})?")
_FOLDER = "inputs"
_NAMED = re.compile(r"[^/\\=]+=")  # a LoRA or learned word with a name of its own

Record = Mapping[str, Any]


def embedded(options: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return the record for the images of a run.

    Bases, adapters and other models are recorded as they were named, but without the folders of an absolute path, and
    nothing is recorded that only matters on one machine (``HERE``). Inputs are included up to ``MOST_BYTES``, layouts
    and small ones first; others are known by their SHA-256 alone. What a reader cannot find in the record stands under
    ``needs``, by setting.

    Args:
        options: the settings of the run; input files are relative to ``folder``.
        folder: the output folder, with copies of the inputs.
    """
    kept, needs = {}, {}
    for name, value in options.items():
        if name in HERE or value is None:
            continue
        if name in PLACES:
            value, private = _without_folders(value)
            needs.update({name: value} if private else {})
        kept[name] = _settings_without_folders(value) if name == "set" else value
    files, left = {}, MOST_BYTES
    for name, paths in sorted(_files(options, folder).items(), key=lambda item: (item[0] != "layout", _size(item[1]))):
        if _size(paths) > left:
            needs[name] = ", ".join(f"{path.name} (SHA-256 {sha256(path)})" for path in paths)
            continue
        left -= _size(paths)
        files.update({path.name: base64.b64encode(path.read_bytes()).decode() for path in paths})
    record: dict[str, Any] = {"localctl": __version__, "options": kept, "files": files, "needs": needs}
    return {name: value for name, value in record.items() if value}


def _files(options: Mapping[str, Any], folder: Path) -> dict[str, list[Path]]:
    """Return the files of each input that is given, a layout's masks included."""
    found: dict[str, list[Path]] = {}
    for name in INPUTS:
        for item in filter(names_file, options.get(name) or ()):
            paths = found.setdefault(name, [])
            paths.append(folder / item)
            if name == "layout":
                regions = read_object(folder / item, "The file").get("regions", ())
                paths += [(folder / item).with_name(one["mask"]) for one in regions if one.get("mask")]
    return found


def _size(paths: list[Path]) -> int:
    return sum(path.stat().st_size for path in paths)


def _without_folders(value: Any) -> tuple[Any, bool]:
    """Return a place, or a list of them, with absolute paths reduced to their last part; and whether one was."""
    if isinstance(value, list):
        parts = [_without_folders(item) for item in value]
        return [part for part, _ in parts], any(private for _, private in parts)
    text = str(value)
    starts = (0, *(match.end() for match in re.finditer("=", text)))  # a name of its own may come first
    start = next((start for start in starts if _is_private(text[start:])), None)
    if start is None:
        return value, False
    place = text[start:]
    return text[:start] + (PureWindowsPath(place) if "\\" in place else PurePosixPath(place)).name, True


def _is_private(text: str) -> bool:
    """Return whether a path says where on its maker's disk it is."""
    return text.startswith(("/", "~", "\\", "..")) or PureWindowsPath(text).is_absolute()


def _settings_without_folders(settings: list[str]) -> list[str]:
    parts = (item.partition("=") for item in settings)
    return [f"{name}{equals}{_without_folders(value)[0]}" for name, equals, value in parts]


def record_text(record: Record) -> str:
    """Return a record as the text of a chunk."""
    return json.dumps(record, ensure_ascii=False, separators=(",", ":"))


def read_embedded(source: Path | bytes) -> dict[str, Any]:
    """Read the record in a PNG file, or in its content. ValueError in one sentence for a file without one."""
    what = "The image" if isinstance(source, bytes) else f"The image {source}"
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=["PNG"]) as image:
            text = image.info.get(KEY)
    except Exception as error:  # Pillow raises many kinds for damaged files
        raise ValueError(f"{what} cannot be read ({first_line(error)}); give a PNG of an earlier run.") from error
    if text is None:
        raise ValueError(
            f"{what} has no record of localctl (other programs remove it, as does --no_record); give the original."
        )
    try:
        record = parse_json(str(text))
    except ValueError as error:
        raise ValueError(f"The record in {what.lower()} is damaged ({first_line(error)}); give another.") from error
    if not isinstance(record, dict) or not isinstance(record.get("options"), dict):
        raise ValueError(f"The record in {what.lower()} is damaged; give another.")
    return record


def unpack(record: Record, folder: Path) -> dict[str, Any]:
    """Write the inputs of a record to ``folder``/inputs, and return its options with the paths of these files.

    It does not say where a run is (``HERE``), as an image may come from anybody, and only inputs that the record itself
    holds are used: it names no other file. ValueError for other names or contents.
    """
    (folder / _FOLDER).mkdir(parents=True, exist_ok=True)
    names = set()
    for name, content in _contents(record):
        write_bytes(folder / _FOLDER / name, content)
        names.add(name)
    options = {name: value for name, value in record["options"].items() if name not in HERE}
    needs = _needs(record)
    for name in INPUTS:
        items = options.get(name)
        if not items or name in needs:
            options.pop(name, None)
            continue
        items = items if isinstance(items, list) else [items]
        for item in items:
            if not isinstance(item, str) or (names_file(item) and item.removeprefix(f"{_FOLDER}/") not in names):
                raise ValueError(f"The record in the image does not hold its input {shown(item)}; give another image.")
        options[name] = [str(folder / item) if names_file(item) else item for item in items]
    return options


def _contents(record: Record) -> Iterator[tuple[str, bytes]]:
    files = record.get("files", {})
    for name, text in files.items() if isinstance(files, dict) else ():
        if not _NAME.fullmatch(name) or not isinstance(text, str):
            raise ValueError(f"The record in the image holds a file {shown(name)}, which no run has; give another.")
        try:
            yield name, base64.b64decode(text, validate=True)
        except ValueError as error:
            raise ValueError(f"The file {name} in the record of the image is damaged; give another image.") from error


def _needs(record: Record) -> dict[str, Any]:
    needs = record.get("needs")
    return needs if isinstance(needs, dict) else {}


def settings_in(record: Record, folder: Path, given: Container[str] = ()) -> dict[str, Any]:
    """Return the settings in a record of an image, checked; its inputs are written to ``folder``.

    given: names of the settings that the user replaces. ValueError in one sentence for what neither the record nor the
    user gives, for an unknown setting, or a value of another type.
    """
    for name, value in _needs(record).items():
        places = [_NAMED.sub("", str(place), count=1) for place in (value if isinstance(value, list) else [value])]
        if name in given or (name in PLACES and all(Path(place).exists() for place in places)):
            continue
        if name in PLACES:
            raise ValueError(f"The image was made with --{name} {shown(value)}, which is not here; give --{name}.")
        if name in INPUTS:
            raise ValueError(f"The image does not hold its {name}, {shown(value)}; give --{name}.")
    settings = checked_settings(unpack(record, folder), "The record in the image")
    settings |= earlier_regions(record["options"])
    for name in PLACES:
        if name not in given and _without_folders(settings.get(name) or "")[1]:
            raise ValueError(
                f"The record in the image names a folder of this machine, {shown(settings[name])}, which no run has; "
                f"give --{name}."
            )
    return settings
