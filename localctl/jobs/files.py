"""The files of a run: the output folder, images, copies of the inputs, and the record that repeats the run."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from localctl import __version__
from localctl.files import first_line, set_aside, write_bytes, write_json
from localctl.jobs.embedded import KEY, Record, record_text
from localctl.jobs.scenes import read_layouts
from localctl.jobs.settings import AUTO, INPUTS, RECORD, names_file
from localctl.jobs.variants import Variant, file_label
from localctl.layout import Layout
from localctl.layout_io import save_layout
from localctl.sampling import GenerateOutput

_LONGEST_ENDING = 80  # letters of a file name
# What a run writes: first what shows that there was one.
_IMAGES = "[0-9][0-9]*_seed[-0-9]*.png"
_RESULTS = (RECORD, _IMAGES)
_WRITTEN = (*_RESULTS, "sheet.png", "compare.png", f"steps/{_IMAGES}", *(f"inputs/{name}_[0-9]*" for name in INPUTS))

logger = logging.getLogger(__name__)


def open_output(path: str, needed: int) -> Path:
    """Create the output folder, before anything slow. ValueError when that fails or nothing can be written there,
    OSError when fewer bytes than ``needed`` are free on its disk."""
    folder = Path(path).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"The output folder {folder} cannot be created ({error.strerror}); choose another.") from error
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(1 << 16))
            file.flush()
            os.fsync(file.fileno())
        free = shutil.disk_usage(folder).free
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(f"The disk of the output folder {folder} is full; make room or choose another.") from error
        raise ValueError(
            f"The output folder {folder} cannot be written to ({error.strerror}); choose another."
        ) from error
    if free < needed:
        raise OSError(
            f"The disk of the output folder {folder} has {free / 1e6:.0f} MB free but the images may take "
            f"{needed / 1e6:.0f} MB; make room or choose another."
        )
    return folder


def save_images(
    output: GenerateOutput,
    index: int,
    variants: Sequence[Variant],
    folder: Path,
    record: Record | None = None,
) -> list[Path]:
    """Write the images of the variant with this ``index``, with ``record`` inside; return their paths. OSError that
    names the file."""
    ending = f"_{file_endings(variants)[index]}" if len(variants) > 1 else ""
    paths = []
    for name, image in zip(names_of(output.seeds), output.images, strict=True):
        paths.append(folder / f"{name}{ending}.png")
        save(image, paths[-1], record and {**record, "image": paths[-1].name})
    return paths


def file_endings(variants: Sequence[Variant]) -> list[str]:
    """Return the end of each variant's file names: its label, shortened and numbered where it is too long or not
    unique."""
    names = [file_label(variant.label) for variant in variants]
    return [
        name if len(name) <= _LONGEST_ENDING and names.count(name) == 1 else f"{name[:_LONGEST_ENDING]}_{index}"
        for index, name in enumerate(names)
    ]


def names_of(seeds: Sequence[int]) -> list[str]:
    """Return the beginning of the file name of each image of a run, of which these are the seeds."""
    count = len(dict.fromkeys(seeds))
    return [f"{i // count:02d}_seed{seed}" for i, seed in enumerate(seeds)]


def save(image: Image.Image, path: Path, record: Record | None = None) -> None:
    """Write a PNG file, with ``record`` in a text chunk. OSError that names the file."""
    texts = PngInfo()
    if record is not None:
        texts.add_itxt(KEY, record_text(record), zip=True)
    try:
        if path.is_symlink():  # replaced, never followed
            path.unlink()
        image.save(path, pnginfo=texts)
    except OSError as error:
        reason = error.strerror or first_line(error)
        failed = OSError(f"{path} could not be written ({reason}); what was written before is kept.")
        failed.strerror = reason  # without the path, which the studio does not tell
        raise failed from error


def save_record(options: Mapping[str, Any], paths: Sequence[Path], folder: Path) -> None:
    """Write the options that repeat the run, and the names of its images. OSError that names the file."""
    record = {"localctl": __version__, "options": options, "images": [path.name for path in paths]}
    write_json(folder / RECORD, record, indent=1, ensure_ascii=False)


def subfolder(folder: Path, name: str) -> Path:
    """Create a folder within the output folder and return it. ValueError for a link in its place."""
    if (folder / name).is_symlink():
        raise ValueError(f"{folder / name} is a link, which could lead anywhere; choose another --output_dir.")
    (folder / name).mkdir(exist_ok=True)
    return folder / name


@dataclass(frozen=True)
class Inputs:
    """The input files of a run, as they were before anything slow. contents: (setting, content) by the place of the
    copy in the output folder."""

    contents: Mapping[str, tuple[str, bytes]]
    layouts: Sequence[Layout]


def read_inputs(options: Mapping[str, Any], used: Sequence[Layout]) -> Inputs:
    """Read the input files. Predicted layouts are those that are ``used``, so that the record does not depend on the
    predictor."""
    contents = {
        f"inputs/{name}_{index}{Path(path).suffix.lower()[:10]}": (name, Path(path).read_bytes())
        for name in INPUTS
        if name != "layout"
        for index, path in enumerate(options[name] or [])
        if names_file(path)
    }
    predicted = options["layout"] == [AUTO]
    once = used if options["lora_per_prompt"] else dict.fromkeys(used)  # each prompt has its own LoRAs
    return Inputs(contents, list(once) if predicted else read_layouts(options))


def write_inputs(inputs: Inputs, options: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Write the input files to ``folder``/inputs and return the settings that name the copies, relative to ``folder``:
    the record needs no other files, and no image can overwrite one of them. What an earlier run wrote to ``folder`` is
    moved to a subfolder, with its record."""
    subfolder(folder, "inputs")
    if any(next(folder.glob(name), None) for name in _RESULTS) and (aside := set_aside(folder, _WRITTEN)):
        logger.info(f"{folder} held an earlier run, which is now in {aside}.")
    copies: dict[str, Any] = {}
    if inputs.layouts:
        copies = dict.fromkeys(("prompt", "layout_seed", "predictor", "color"))
    for index, layout in enumerate(inputs.layouts):
        path = save_layout(layout, folder / "inputs" / f"layout_{index}.json")  # with its masks
        copies.setdefault("layout", []).append(str(path.relative_to(folder)))
    for target, (name, content) in inputs.contents.items():
        write_bytes(folder / target, content)
        copies.setdefault(name, []).append(target)
    for name, values in copies.items():  # with the words in place of files where they were
        if name != "layout" and values and len(values) != len(options[name]):
            files = iter(values)
            copies[name] = [next(files) if names_file(value) else value for value in options[name]]
    return copies
