"""What the studies' commands share before torch is loaded: how they measure, and where a page and its results lie."""

from __future__ import annotations

import math
from argparse import ArgumentParser
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from localctl.metrics import EXTRACTORS

RESULTS = Path(__file__).parent / "results"  # those of the committed pages
PAGES = RESULTS.parents[1] / "docs"
REPORT_HELP = "page; its results go into the folder of its name, those of a page in docs/ into research/results/"


@dataclass(frozen=True)
class Protocol:
    """How every variant of a study is measured. references: scenes of the training split that distances go to.

    ValueError for values below those in ``LEAST``.
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
        """Return the values as JSON reads them back, without those that are None."""
        values = {name: value for name, value in asdict(self).items() if value is not None}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def add_protocol(parser: ArgumentParser, protocol: Protocol) -> None:
    """Return the flags of what all protocols share."""
    add = parser.add_argument
    add("--base", default=protocol.base, help="micro, or the folder of another micro base")
    add("--num_inference_steps", type=int, default=protocol.num_inference_steps, help="sampling steps of each image")
    add("--extractor", nargs="+", default=list(protocol.extractors), choices=EXTRACTORS, help="of the distances")
    add("--references", type=int, default=protocol.references, help="scenes that the distances go to")


def results_of(page: Path) -> Path:
    """Return the folder of a page's results: the committed ones for a page in docs/, else the folder of the page's
    name.

    ValueError for a page without a suffix, which would be that folder itself.
    """
    folder = page.with_suffix("")
    if folder == page:
        raise ValueError(f"--report is a page, and its results go into {folder}; call it {folder}.md.")
    return RESULTS / page.stem if page.resolve().parent == PAGES.resolve() else folder


def check_least(values: object, least: Mapping[str, int], prefix: str = "") -> None:
    """ValueError for an attribute of ``values`` that is not None, and not finite or below what ``least`` says of it."""
    for name, bound in least.items():
        value = getattr(values, name)
        if value is not None and not (math.isfinite(value) and value >= bound):
            raise ValueError(f"{prefix}{name} must be at least {bound}, not {value}.")


def make_folder(path: Path) -> None:
    """ValueError when the output folder cannot be made."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"The output folder {path} cannot be made ({error.strerror}).") from error
