"""PIL images, arrays and tensors as conditions and masks give the same numbers."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from torch import Tensor

import localctl
from localctl.adapter import LocalAdapter
from localctl.inputs import as_condition, as_mask
from localctl.masks import load_mask

RNG = np.random.default_rng(0)
COLOURS = RNG.integers(0, 256, (16, 24, 3), dtype=np.uint8)
GRAY = RNG.integers(0, 256, (16, 24), dtype=np.uint8)
BLACK_AND_WHITE = (GRAY > 127).astype(np.uint8) * 255
WANTED = torch.from_numpy(COLOURS).permute(2, 0, 1)[None].float() / 255


def same(found: Tensor, wanted: Tensor) -> bool:
    return found.dtype == torch.float32 and torch.equal(found, wanted)


def test_conditions_of_every_kind() -> None:
    kinds: list[Any] = [
        Image.fromarray(COLOURS),
        COLOURS,
        COLOURS[None],
        COLOURS.astype(np.float32) / 255,
        torch.from_numpy(COLOURS).permute(2, 0, 1),
        WANTED,
        WANTED[0],
        [Image.fromarray(COLOURS)],
    ]
    assert all(same(as_condition(kind), WANTED) for kind in kinds)
    gray = torch.from_numpy(GRAY)[None, None].float() / 255
    for kind in (Image.fromarray(GRAY), GRAY, GRAY[..., None], Image.fromarray(GRAY).convert("RGB")):
        assert same(as_condition(kind, channels=1), gray)
    assert as_condition(Image.fromarray(GRAY), channels=3).shape == (1, 3, 16, 24)
    assert as_condition([COLOURS, COLOURS]).shape == (2, 3, 16, 24)


def test_masks_of_every_kind(tmp_path: Path) -> None:
    Image.fromarray(BLACK_AND_WHITE).save(tmp_path / "mask.png")
    wanted = load_mask(tmp_path / "mask.png")[None]
    ones = BLACK_AND_WHITE // 255
    kinds: list[Any] = [
        Image.fromarray(BLACK_AND_WHITE),
        Image.fromarray(BLACK_AND_WHITE).convert("1"),
        Image.fromarray(BLACK_AND_WHITE).convert("RGB"),
        BLACK_AND_WHITE,
        BLACK_AND_WHITE[..., None],
        ones,
        ones[None],
        ones.astype(bool),
        torch.from_numpy(ones),
        torch.from_numpy(ones).bool()[None],
        torch.from_numpy(BLACK_AND_WHITE)[None, None],
        wanted[0, 0],
        [wanted[0]],
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert all(same(as_mask(kind), wanted) for kind in kinds)


def test_images_of_masks_are_read_as_files_are() -> None:
    with pytest.warns(UserWarning, match="mask holds only 0 and 1 of 255; it is read as black and white"):
        assert as_mask(Image.fromarray(BLACK_AND_WHITE // 255)).max() == 1
    for dim in (Image.new("L", (8, 8), 40), np.full((8, 8), 40, np.uint8)):
        with pytest.warns(UserWarning, match="mask is dim, its brightest value is 0.16 of 1"):
            assert as_mask(dim).max() == np.float32(40 / 255)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        as_mask(torch.full((8, 8), 0.2))  # numbers are taken at their word


@pytest.mark.parametrize(
    ("read", "value", "message"),
    [
        (as_condition, "edges.png", "condition is a str; give a PIL image"),
        (as_condition, [], "condition is a list"),
        (as_condition, torch.zeros(8, 8), r"condition must be \(C, H, W\) or \(n, C, H, W\), not \(8, 8\)"),
        (as_condition, np.zeros(8), r"condition must be \(H, W\), \(H, W, C\)"),
        (as_condition, np.full((8, 8), 255.0), r"values outside \[0, 1\]; divide 8-bit values by 255"),
        (as_condition, [torch.zeros(1, 8, 8), torch.zeros(1, 8, 9)], r"\(1, 8, 8\) and \(1, 8, 9\); give one shape"),
        (lambda image: as_condition(image, 1), Image.fromarray(COLOURS), "in colour but must have one channel"),
        (lambda image: as_condition(image, 4), Image.fromarray(COLOURS), "4 channels, which no PIL image has"),
        (as_mask, np.zeros((8, 8, 3)), "one channel, not 3"),
        (as_mask, torch.zeros(2, 8, 8), "one channel, not 2"),
        (as_mask, torch.full((8, 8), torch.nan), "mask has values outside"),
    ],
)
def test_what_does_not_fit_is_said(read: Callable[[Any], Tensor], value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(value)


def test_controls_take_them(make_adapter: Callable[..., LocalAdapter], sd_pipe: StableDiffusionPipeline) -> None:
    edges, inside = Image.fromarray(np.kron(GRAY[:8, :8], np.ones((8, 8), np.uint8))), np.zeros((64, 64), bool)
    inside[:32] = True
    images = []
    for condition, mask in (
        (edges, Image.fromarray(inside)),
        (np.asarray(edges), inside),
        (torch.from_numpy(np.asarray(edges) / np.float32(255))[None], torch.from_numpy(inside)[None].float()),
    ):
        control = localctl.LocalAdapterControl(make_adapter(), condition, mask)
        layout = localctl.Layout("a cat", regions=(localctl.Region("cat", mask=mask),))
        controls = [control, localctl.RegionBias(strength=2.0)]
        images += localctl.generate(sd_pipe, layout, controls, num_inference_steps=1, output_type="latent").images
    assert torch.equal(images[0], images[1]) and torch.equal(images[0], images[2])
