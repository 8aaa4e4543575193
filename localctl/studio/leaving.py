"""What leaves the page with an image, and comes back: its PNG with the record, its layout, a ZIP, the command."""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from localctl.images import load_image
from localctl.jobs.embedded import Record, read_embedded, settings_in, unpack
from localctl.jobs.settings import INPUTS, PLACES, SampleSettings, command_line, names_file
from localctl.masks import load_mask, mask_to_pil
from localctl.sizes import shown
from localctl.studio import limits
from localctl.studio.canvas import data_url
from localctl.studio.canvas import scene as canvas_value
from localctl.studio.config import StudioConfig
from localctl.studio.local_control_form import AUTO, PHOTO, SOURCES, first_regions
from localctl.studio.local_control_job import MOST_ADAPTERS, adapter_places

PROGRAM = "python sample.py"
_INPUTS = "inputs"


@dataclass(frozen=True)
class Bundle:
    """The files of an image. layout: None for a run without regions. command: repeats the run where ``bundle`` was
    unpacked."""

    image: Path
    layout: Path | None
    bundle: Path
    command: str


def bundle_of(image: Path, folder: Path) -> Bundle:
    """Write what leaves with an image to ``folder``. ValueError for a file without a record."""
    record = read_embedded(image)
    options = unpack(record, folder) | _left_out(record, image, folder)
    relative = {name: _below(value, folder) for name, value in options.items()}
    command = command_line(SampleSettings(**relative), PROGRAM).replace(f"'{PROGRAM}'", PROGRAM, 1)
    layouts = options.get("layout") or []
    bundle = folder / f"{image.stem}.zip"
    with zipfile.ZipFile(bundle, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(image, image.name)
        same = f"{PROGRAM} --from_json {image.name}  # the same\n" if "needs" not in record else ""
        archive.writestr("command.txt", f"{command}\n{same}")
        for path in sorted((folder / _INPUTS).iterdir()):
            archive.write(path, f"{_INPUTS}/{path.name}")
    return Bundle(image, Path(layouts[0]) if layouts else None, bundle, command)


def _left_out(record: Record, image: Path, folder: Path) -> dict[str, Any]:
    """Copy the inputs that were too large for the record from beside the image; return the settings that name them."""
    large = [name for name in INPUTS if name in record.get("needs", ())]
    if large:
        shutil.copytree(image.parent / _INPUTS, folder / _INPUTS, dirs_exist_ok=True)
    options = {name: record["options"][name] for name in large}
    return {name: [str(folder / i) if names_file(i) else i for i in items] for name, items in options.items()}


def _below(value: Any, folder: Path) -> Any:
    """Return the paths in ``value`` that lie in ``folder`` relative to it."""
    if isinstance(value, list):
        return [_below(item, folder) for item in value]
    prefix = f"{folder}/"
    return value.removeprefix(prefix) if isinstance(value, str) else value


def settings_of_image(content: bytes, folder: Path) -> dict[str, Any]:
    """Return the settings in a PNG that was made before; its inputs are written to ``folder``.

    Models are those of the server, whatever the image was made with. ValueError for a file without a record.
    """
    return settings_in(read_embedded(content), folder, given=PLACES)


def follow_values(options: Mapping[str, Any], config: StudioConfig) -> dict[str, Any]:
    """Return the values of the fields of the tab Local control for the settings of a run with adapters.

    ValueError for more adapters than the page takes, one that the server does not have, or several conditions.
    """
    adapters = [_known_adapter(name, config) for name in options["adapter"]]
    sources = options.get("image") or options.get("condition_image") or []
    if len(adapters) > MOST_ADAPTERS or len(set(map(_content, sources))) != 1:
        raise ValueError(
            f"The image follows {len(sources)} images with {len(adapters)} adapters; the page takes one image and up "
            f"to {MOST_ADAPTERS} adapters. Use the command line for it."
        )
    source = load_image(sources[0])
    size = options.get("height") or source.height, options.get("width") or source.width
    regions = first_regions(len(adapters))
    for region, path in zip(regions, each(options.get("mask") or [None], len(adapters)), strict=True):
        mask = None if path is None else load_mask(path, size)
        if mask is not None and not bool((mask == 1).all()):
            region["mask"] = data_url(mask_to_pil(mask), longest=512)
    values = {
        "prompt": (options.get("prompt") or [""])[0],
        "photo": source,
        "source": PHOTO if options.get("image") else next(name for name in SOURCES if name != PHOTO),
        "scene": canvas_value(size, regions),
        "negative_prompt": options.get("negative_prompt") or "",
        "scheduler": options.get("scheduler") or AUTO,
        "steps": options.get("num_inference_steps", 30),
        "guidance_scale": options.get("guidance_scale"),
        "seed": (options.get("seeds") or [0])[0],
        "images": min(len(options.get("seeds") or [0]), limits.MAX_IMAGES),
    }
    for number, adapter in enumerate(adapters, start=1):
        values[f"adapter{number}"] = adapter
        for name, usual in (("weight", 1.0), ("start", 0.0), ("end", 1.0)):
            values[f"{name}{number}"] = each(options.get(name) or [usual], len(adapters))[number - 1]
    return values


def _known_adapter(name: str, config: StudioConfig) -> str:
    """Return how the page calls an adapter, by its place, or by its last part where only one has that.

    ValueError for one that the server does not have, or a last part of several.
    """
    last, places = Path(name).name, adapter_places(config)
    labels = [label for label, place in places.items() if place == name]
    labels = labels[:1] or [label for label, place in places.items() if Path(place).name == last]
    if len(labels) == 1:
        return labels[0]
    if labels:
        raise ValueError(
            f"The image was made with an adapter {last!r}, and this server has {len(labels)} of that name; choose "
            "one of the list."
        )
    raise ValueError(
        f"The image was made with the adapter {last!r}, which this server does not have; start it with it."
    )


def _content(path: str) -> bytes:
    return Path(path).read_bytes()


def each(values: Sequence[Any], count: int) -> list[Any]:
    """Return one value for each adapter; a single value is for all. ValueError for another number of values."""
    if len(values) not in (1, count):
        raise ValueError(
            f"The record in the image has {len(values)} values for {count} models ({shown(list(values))}); give "
            "another image."
        )
    return list(values) * count if len(values) == 1 else list(values)
