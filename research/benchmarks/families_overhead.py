"""What each control adds to sampling on small transformers of each family."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from localctl.control.base import Control
from localctl.files import first_line
from research.benchmarks.family_shapes import CLASSES
from research.benchmarks.sample import CONTROLS, SMALL_SD3, Row, Runs, call_of, load, make_controls

STEPS = 4
SIDES: Mapping[str, int] = {SMALL_SD3: 128}  # in pixels; that of the others:
SIDE = 256


def overhead_rows(rounds: int, bases: Sequence[str] = (SMALL_SD3, *CLASSES)) -> Iterator[Row]:
    """Yield a row for each base and control, those of a base measured in turns; a control that the base's ordinary call
    refuses has a row with the sentence."""
    for base in bases:
        pipe, parts = load(base, torch.device("cpu"), torch.float32)
        side = SIDES.get(base, SIDE)
        runs = Runs(pipe, base, side, batch=1, steps=STEPS, call=call_of(base))
        controls, refused = _accepted(runs, make_controls(CONTROLS, pipe, base, side, parts))
        shown = {"base": base, "pixels": side}
        for row in runs.overheads(controls, rounds):
            yield {**shown, **row}
        for name, why in refused.items():
            yield {**shown, "control": name, "refused": why}


def _accepted(
    runs: Runs, controls: Mapping[str, Sequence[Control]]
) -> tuple[dict[str, Sequence[Control]], dict[str, str]]:
    """Return the controls that a run takes, and the sentences that refuse the others."""
    taken: dict[str, Any] = {}
    refused: dict[str, str] = {}
    for name, used in controls.items():
        try:
            runs(used)
        except ValueError as error:
            refused[name] = first_line(error)
        else:
            taken[name] = used
    return taken, refused
