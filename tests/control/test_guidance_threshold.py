"""When layout guidance moves an image again: its energy is compared with the threshold after each move, or once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from attachment_helpers import LAYOUT
from control_helpers import bare_pipe, context
from torch import Tensor

from localctl.control.layout_guidance import BoundGuidance, EnergyReader, LayoutGuidance
from localctl.control.regions import BoundRegions
from localctl.layout import Layout, Region


def test_the_threshold_is_evaluated_anew_per_image_and_step() -> None:
    """An image below the threshold is not moved in this step, and is checked again in the next."""
    layouts = [LAYOUT, LAYOUT]
    energies = {0: [0.5, 0.1, 0.3, 0.3, 0.1], 1: [0.1, 0.5, 0.1]}  # of each image, run by run
    asked: list[list[int]] = []
    control = LayoutGuidance(end=1.0, iterations=3)
    bound = BoundGuidance(control, BoundRegions(tiny_words(), layouts, "area"), ("attn",))

    def gradient(latents: Tensor, images: Any, run: Any) -> tuple[Tensor, list[int]]:
        asked.append(list(images))
        above = [image for image in images if energies[image].pop(0) > control.threshold]
        return torch.ones(len(above), 1, 1, 1), above

    bound._gradient = gradient  # type: ignore[method-assign]
    where = context(layout_of_row=(0, 1, 0, 1), conditional=(False, False, True, True))
    first = bound.shift_latents(where, torch.zeros(2, 1, 1, 1), None)  # type: ignore[arg-type]
    second = bound.shift_latents(where, torch.zeros(2, 1, 1, 1), None)  # type: ignore[arg-type]
    assert asked == [[0, 1], [0], [0, 1], [0, 1], [0]]
    size = 30 * 25 / 26
    assert first is not None and second is not None
    torch.testing.assert_close(first.flatten(), torch.tensor([-size, 0]))
    torch.testing.assert_close(second.flatten(), torch.tensor([-2 * size, -size]))


def tiny_words() -> Any:
    from conftest import tiny_tokenizer

    return SimpleNamespace(unet=torch.nn.Identity(), tokenizer=tiny_tokenizer())


def moves_by_step(bound: BoundGuidance, energies: list[float], steps: int) -> list[int]:
    """Count the moves of each step for images with the given sequence of energies, whatever the moves do."""
    given = iter(energies)

    class Reader(EnergyReader):
        def energy(self) -> Tensor:
            return next(given) + 0.0 * self.point.flatten(1).sum(dim=1)

    moves = []
    for step in range(steps):
        latents, count = torch.zeros(1, 4, 2, 2), 0

        @contextmanager
        def run(point: Tensor, images: Any, reader: Any) -> Iterator[None]:
            nonlocal count
            count += 1
            reader.point = point
            yield

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("localctl.control.layout_guidance.EnergyReader", Reader)
            bound.shift_latents(context(step=step, layout_of_row=(0,), conditional=(True,)), latents, run)
        moves.append(count)
    return moves


def test_once_at_the_threshold_is_for_good_as_published() -> None:
    """The published loop: while the last energy is above the threshold, measure it and move, at most 5 times a step."""
    energies = [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.1, 0.9, 0.9, 0.9, 0.9, 0.9]
    layout = Layout("a b c d e f", regions=(Region("a b", (0.0, 0.0, 0.5, 0.5)),))
    seen, last, published = iter(energies), 10_000.0, []
    for _ in range(3):
        count = 0
        while last > 0.2 and count < 5:
            last, count = next(seen), count + 1
        published.append(count)
    assert published == [5, 3, 0]
    for recheck, expected in ((False, published), (True, [5, 3, 5])):
        control = LayoutGuidance(end=1.0, recheck=recheck)
        bound = BoundGuidance(control, BoundRegions(bare_pipe(), [layout], "area"), ("mid",))
        assert moves_by_step(bound, energies, 3) == expected
        bound.begin_call({})
        assert moves_by_step(bound, energies, 1) == [5]  # a new call begins anew
