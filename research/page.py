"""Parts of the studies' pages: tables, cells, image sheets, and the provenance of the figures."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from localctl.drawing import grid
from localctl.evaluation.provenance import write_text
from localctl.evaluation.tables import head, line
from localctl.metrics.bootstrap import Interval, bootstrap
from localctl.micro.detect import VERSION
from research.harness import former_base, reader_version


def interval(values: np.ndarray) -> Interval | None:
    """Return the bootstrap interval of the mean of ``values``, leaving out NaN; None if all are NaN.

    ``values``: (n,), or (n, seeds), whose rows are resampled as a whole.
    """
    values = values[:, None] if values.ndim == 1 else values
    known = ~np.isnan(values)
    rows = known.any(axis=1)
    if not rows.any():
        return None
    return bootstrap(np.where(known, values, 0)[rows].sum(axis=1) / known[rows].sum(axis=1))


def cell(found: Interval | None) -> str:
    """Return an interval as a table shows it."""
    return "undefined" if found is None else str(found)


def signed(found: Interval | None) -> str:
    """Return a difference with its interval."""
    return "undefined" if found is None else f"{found.value:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"


def table(columns: Iterable[str], rows: Iterable[tuple[str, Iterable[str]]], corner: str = "") -> list[str]:
    """Return a Markdown table of labels and their cells."""
    return [*head([corner, *columns]), *(line([label, *cells]) for label, cells in rows)]


def write_page(page: Path, *sections: Sequence[str]) -> str:
    """Write the lines of the sections to ``page`` and return the text."""
    text = "\n".join(text for section in sections for text in section)
    write_text(page, text)
    return text


def written_by(command: str, page: Path) -> str:
    """Return the line that says which command wrote the page."""
    return f"Written by `{command} --report {page.name if page.is_absolute() else page}`"


def reader_note(asked: Mapping[str, Any], begin: str = "Read") -> list[str]:
    """Return a note for results that an earlier version of the reader measured, else no lines.

    ``begin``: start of the note, naming the figures concerned.
    """
    version = reader_version(asked)
    if version == VERSION:
        return []
    return [
        f"*{begin} by version {version} of the reader of micro scenes. Version {VERSION} finds objects that it missed, "
        "stars and rings above all:",
        "[what that changes](evaluation.md#the-reader-against-the-eye).*",
        "",
    ]


def base_note(asked: Mapping[str, Any]) -> list[str]:
    """Return a note for results that were measured on a former generation of the embedded base, else no lines."""
    generation = former_base(asked)
    if generation is None:
        return []
    return [
        f"*All figures and images of this page are of the {generation} generation of the embedded base ([what came",
        "after](results.md#the-base-itself)). They were not measured again with the base that is shipped now.*",
        "",
    ]


def figure(image: Image.Image, page: Path, name: str, alt: str) -> str:
    """Save ``image`` in the folder named like the page, and return the Markdown that shows it."""
    path = page.with_suffix("") / f"{name}.png"
    save_image(image, path)
    return f"![{alt}]({path.parent.name}/{path.name})"


def save_image(image: Image.Image, path: Path) -> None:
    """Save ``image``, making its folder if needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def save_strip(images: Sequence[Image.Image], path: Path) -> None:
    """Save the images one below the other; save nothing if there are none."""
    if images:
        save_image(Image.fromarray(np.concatenate([np.asarray(image) for image in images])), path)


def sheet(strips: Mapping[str, Path]) -> tuple[Image.Image, int]:
    """Return a sheet with one column per strip, headed by its title, and the number of rows."""
    columns = []
    for path in strips.values():
        with Image.open(path) as strip:
            side = strip.width
            columns.append([strip.crop((0, y, side, y + side)) for y in range(0, strip.height, side)])
    rows = [list(row) for row in zip(*columns, strict=False)]
    return grid(rows, list(strips)), len(rows)


def warnings_of(provenance: Mapping[str, Any]) -> list[str]:
    """Return the warnings of the distances' extractors as a Markdown list."""
    return [f"- {text}" for features in provenance.get("distances", {}).values() for text in features["warnings"]]


def sources(provenance: Mapping[str, Any], results: Path, page: Path, more: str = "") -> list[str]:
    """Return the section on where a page's figures come from; ``more`` follows its first sentence."""
    place = Path(os.path.relpath(results, page.parent)).as_posix()
    lines = [
        "## Where it comes from",
        "",
        *f"`{place}/*.json`: every image's figures, settings, seeds, weights, versions.{more}".splitlines(),
    ]
    for name, features in provenance.get("distances", {}).items():
        sha, n_real, n_fake = features["weights_sha256"][:12], features["n_real"], features["n_fake"]
        lines.append(f"- {name}: sha256 {sha}, {n_real} scenes against {n_fake} images, {features['preprocessing']}")
    return [*lines, "- " + ", ".join(f"{name} {version}" for name, version in provenance["versions"].items())]
