"""The colours of regions are told apart by people with every kind of colour vision, and text on them can be read."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from localctl.studio.theme import COLORS, GROUNDS, GROUNDS_DARK, SUBDUED, SUBDUED_DARK, color_of, text_on

# Machado, Oliveira and Fernandes 2009, severity 1: from linear sRGB to what is seen.
VISION = {
    "all cones": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}


def linear(color: str) -> np.ndarray:
    value = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def oklab(rgb: np.ndarray) -> np.ndarray:
    to_cones = [[0.41222, 0.53633, 0.05145], [0.21190, 0.68070, 0.10740], [0.08830, 0.28172, 0.62998]]
    to_lab = [[0.21045, 0.79362, -0.00407], [1.97800, -2.42859, 0.45059], [0.02590, 0.78277, -0.80868]]
    return np.array(to_lab) @ np.cbrt(np.array(to_cones) @ np.clip(rgb, 0, 1))


@pytest.mark.parametrize("vision", VISION)
def test_every_two_colours_of_regions_differ(vision: str) -> None:
    seen = {color: oklab(np.array(VISION[vision]) @ linear(color)) for color in COLORS}
    nearest = min(combinations(COLORS, 2), key=lambda pair: np.linalg.norm(seen[pair[0]] - seen[pair[1]]))
    assert np.linalg.norm(seen[nearest[0]] - seen[nearest[1]]) > 0.08, nearest  # 0.02 is just noticeable


def test_there_are_twelve_colours_and_they_begin_anew() -> None:
    assert len(set(COLORS)) == 12 and color_of(12) == color_of(0)


def contrast(first: str, second: str) -> float:
    """As of WCAG 2."""
    weights = np.array([0.2126, 0.7152, 0.0722])
    light, dark = sorted((weights @ linear(first), weights @ linear(second)), reverse=True)
    return float((light + 0.05) / (dark + 0.05))


@pytest.mark.parametrize("color", COLORS)
def test_text_on_a_colour_has_contrast(color: str) -> None:
    assert contrast(color, text_on(color)) > 4.0


@pytest.mark.parametrize(("text", "grounds"), [(SUBDUED, GROUNDS), (SUBDUED_DARK, GROUNDS_DARK)])
def test_less_important_text_has_contrast(text: str, grounds: tuple[str, ...]) -> None:
    assert min(contrast(text, ground) for ground in grounds) >= 4.5
