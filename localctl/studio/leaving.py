"""What leaves the page with an image: its PNG with the record, its layout, a ZIP, the command; and the record back."""

from __future__ import annotations

import shutil
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from localctl.files import writing
from localctl.jobs.embedded import Record, read_embedded, settings_in, unpack
from localctl.jobs.settings import INPUTS, PLACES, SampleSettings, command_line, earlier_regions, names_file

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
    """Write what leaves with an image to ``folder``, once. ValueError for a file without a record."""
    record = read_embedded(image)
    options = unpack(record, folder) | earlier_regions(record["options"]) | _left_out(record, image, folder)
    relative = {name: _below(value, folder) for name, value in options.items()}
    command = command_line(SampleSettings(**relative), PROGRAM).replace(f"'{PROGRAM}'", PROGRAM, 1)
    layouts = options.get("layout") or []
    bundle = folder / f"{image.stem}.zip"
    if bundle.exists():
        return Bundle(image, Path(layouts[0]) if layouts else None, bundle, command)
    with writing(bundle) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
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
