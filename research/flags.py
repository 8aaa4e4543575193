"""Flags and paths that the studies' commands share, without loading torch: the protocol, pages and their results."""

from __future__ import annotations

import math
from argparse import ArgumentParser
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from localctl.metrics import EXTRACTORS

RESULTS = Path(__file__).parent / "results"  # of the committed pages
PAGES = RESULTS.parents[1] / "docs"
REPORT_HELP = "page to write; its results go into a folder of the same name, or research/results/ for a page in docs/"


@dataclass(frozen=True)
class Protocol:
    """How every variant of a study is measured.

    references: number of scenes of the training split that generated images are compared with.

    Raises:
        ValueError: a value is below its minimum in ``LEAST``.
    """

    LEAST: ClassVar[Mapping[str, int]] = {"num_inference_steps": 1, "references": 2}

    base: str = "micro"
    num_inference_steps: int = 30
    scheduler: str = "ddim"
    extractors: tuple[str, ...] = ("micro_clip",)
    references: int = 2048

    def __post_init__(self) -> None:
        check_least(self, self.LEAST)

    def plain(self) -> dict[str, Any]:
        """Return the values as JSON would read them back (tuples as lists), leaving out None, with the base's label."""
        values = {name: value for name, value in asdict(self).items() if value is not None}
        values["base"] = label_of(self.base)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def label_of(place: str | Path) -> str:
    """Return what pages and results call a base or an adapter: a folder without the folders it lies in, and without a
    last part that says only what it is."""
    path = Path(place)
    if not path.is_absolute():
        return str(place)
    return path.parent.name if path.name in ("base", "adapter") else path.name


def add_protocol(
    parser: ArgumentParser, protocol: Protocol, bases: str = "micro, or the folder of another micro base"
) -> None:
    """Add the flags that all protocols share; ``bases``: the help of ``--base``."""
    add = parser.add_argument
    add("--base", default=protocol.base, help=bases)
    add("--num_inference_steps", type=int, default=protocol.num_inference_steps, help="sampling steps of each image")
    add("--extractor", nargs="+", default=list(protocol.extractors), choices=EXTRACTORS, help="for the distances")
    add("--references", type=int, default=protocol.references, help="training scenes to compare with")


def results_of(page: Path) -> Path:
    """Return the folder of a page's results: in research/results/ for a page in docs/, else beside the page.

    Raises:
        ValueError: the page has no suffix, so that it would be the folder itself.
    """
    folder = page.with_suffix("")
    if folder == page:
        raise ValueError(f"--report {page} would be page and folder of results at once; call it {page}.md.")
    return RESULTS / page.stem if page.resolve().parent == PAGES.resolve() else folder


def check_least(values: object, least: Mapping[str, int], prefix: str = "") -> None:
    """Raise ValueError for an attribute of ``values``, unless None, that is not finite or below its ``least`` value."""
    for name, bound in least.items():
        value = getattr(values, name)
        if value is not None and not (math.isfinite(value) and value >= bound):
            raise ValueError(f"{prefix}{name} must be at least {bound}, not {value}.")


def make_folder(path: Path) -> None:
    """Make the output folder and its parents; raise ValueError if that fails."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"The output folder {path} cannot be made ({error.strerror}); choose another one.") from error
