from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from localctl.conditions import FROM_IMAGE, ConditionConfig, extract
from localctl.settings import CHANNELS


def scene(size: tuple[int, int] = (48, 80)) -> np.ndarray:
    image = np.full((*size, 3), 200, np.uint8)
    cv2.circle(image, (size[1] // 2, size[0] // 2), min(size) // 4, (220, 30, 40), -1, cv2.LINE_AA)
    return image


@pytest.mark.parametrize("kind", FROM_IMAGE)
@pytest.mark.parametrize("size", [(48, 80), (97, 61), (5, 3), (1, 1)])
def test_shape_range_and_dtype(kind: str, size: tuple[int, int]) -> None:
    config = ConditionConfig(kind=kind)
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    condition = extract(config, image)
    assert condition.shape == (config.channels, *size) and condition.dtype == torch.float32
    assert condition.min() >= 0 and condition.max() <= 1 and condition.is_contiguous()


def test_channels() -> None:
    assert {kind: ConditionConfig(kind=kind).channels for kind in CHANNELS} == {
        "canny": 1,
        "sobel": 1,
        "palette": 3,
        "depth": 1,
        "normals": 3,
        "segmentation": 3,
        "pose": 3,
        "hed": 1,
        "lineart": 1,
        "column": 3,
    }
    assert ConditionConfig(kind="column", channels=1).channels == 1
    assert replace(ConditionConfig(), kind="segmentation").channels == 3
    for kind, channels in (("canny", 2), ("column", 2), ("column", -1)):
        with pytest.raises(ValueError, match=f"condition.channels {channels}"):
            ConditionConfig(kind=kind, channels=channels)


def test_canny_is_opencvs_on_gray_with_these_thresholds() -> None:
    image = scene()
    gray = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    for low, high in ((50, 100), (300, 600)):
        condition = extract(ConditionConfig(low=low, high=high), image)
        assert np.array_equal(condition[0].numpy() * 255, cv2.Canny(gray, low, high))
    assert set(extract(ConditionConfig(), image).unique().tolist()) == {0.0, 1.0}
    assert (
        extract(ConditionConfig(low=50, high=100), image).sum()
        > extract(ConditionConfig(low=900, high=990), image).sum()
    )


def test_channel_order_is_rgb() -> None:
    # Blue weighs 0.114 in gray and red 0.299: only the red step of 100 reaches a threshold of 100.
    def edges(channel: int) -> float:
        image = np.zeros((16, 16, 3), np.uint8)
        image[:, 8:, channel] = 100
        return extract(ConditionConfig(low=100, high=100), image).sum().item()

    assert edges(0) > 0 and edges(2) == 0
    image = np.zeros((8, 8, 3), np.uint8)
    image[..., 0] = 255
    assert extract(ConditionConfig(kind="palette"), image)[:, 0, 0].tolist() == [1, 0, 0]


def test_sobel_has_a_fixed_scale() -> None:
    step = np.zeros((16, 16, 3), np.uint8)
    step[:, 8:] = 255
    full = extract(ConditionConfig(kind="sobel"), step)[0]
    assert torch.equal(full.nonzero()[:, 1].unique(), torch.tensor([7, 8]))
    assert full[:, 7].tolist() == pytest.approx([1.0] * 16)
    weak = extract(ConditionConfig(kind="sobel"), step // 5)[0]  # not stretched to the picture's own maximum
    torch.testing.assert_close(weak, full / 5, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(extract(ConditionConfig(kind="sobel"), step.transpose(1, 0, 2))[0], full.T)


def test_palette_is_the_mean_of_each_cell() -> None:
    image = np.random.default_rng(1).integers(0, 256, (32, 64, 3), dtype=np.uint8)
    palette = extract(ConditionConfig(kind="palette", cells=8), image).permute(1, 2, 0).numpy()
    means = image.reshape(8, 4, 8, 8, 3).mean(axis=(1, 3)) / 255
    np.testing.assert_allclose(palette, means.repeat(4, axis=0).repeat(8, axis=1), atol=1e-6)


@pytest.mark.parametrize("size", [(37, 50), (9, 8), (3, 100)])
def test_palette_of_sizes_the_cells_do_not_divide(size: tuple[int, int]) -> None:
    image = np.random.default_rng(2).integers(0, 256, (*size, 3), dtype=np.uint8)
    palette = extract(ConditionConfig(kind="palette", cells=8), image)
    cells = torch.unique(palette.flatten(1), dim=1).shape[1]
    assert cells == min(8, size[0]) * min(8, size[1])
    # Every pixel lies in one cell, so the mean of the picture is kept.
    np.testing.assert_allclose(palette.mean(dim=(1, 2)).numpy(), image.mean(axis=(0, 1)) / 255, atol=1e-5)


@pytest.mark.parametrize("kind", ["depth", "segmentation"])
def test_kinds_from_the_data_ask_for_a_condition_image(kind: str) -> None:
    with pytest.raises(ValueError, match=f"A {kind} condition.*pass it as a condition image"):
        extract(ConditionConfig(kind=kind), scene())


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((8, 8), np.uint8),
        np.zeros((8, 8, 4), np.uint8),
        np.zeros((8, 8, 3), np.float32),
        np.zeros((0, 8, 3), np.uint8),
    ],
)
def test_other_arrays_are_refused(image: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"uint8 \(H, W, 3\), not"):
        extract(ConditionConfig(), image)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"channels_used": "red"}, "channels_used 'red'; choose one of gray, rgb"), ({"palette_filter": "box"}, "'box'")]
    + [
        ({"kind": "scribble"}, "'scribble'; choose one of canny"),
        ({"low": 200}, "low=200"),
        ({"cells": 0}, "at least 1"),
    ],
)
def test_settings_without_sense_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ConditionConfig(**settings)


def test_the_picture_is_not_changed_and_views_work() -> None:
    image = scene()
    before = image.copy()
    for kind in FROM_IMAGE:
        flipped = extract(ConditionConfig(kind=kind), image[:, ::-1])  # negative strides
        assert flipped.shape[1:] == image.shape[:2]
    assert np.array_equal(image, before)


def photo(size: tuple[int, int] = (96, 120)) -> np.ndarray:
    """Smooth colours with edges between some of equal brightness."""
    small = np.random.default_rng(5).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    image = cv2.resize(small, size[::-1], interpolation=cv2.INTER_CUBIC)
    cv2.circle(image, (40, 50), 30, (255, 0, 0), -1)
    cv2.circle(image, (60, 50), 20, (0, 130, 0), -1)  # as bright as the red
    return image


@pytest.mark.parametrize("thresholds", [(100, 200), (50, 100)])
def test_canny_in_colour_is_the_published_one(thresholds: tuple[int, int]) -> None:
    low, high = thresholds
    image = photo()
    condition = extract(ConditionConfig(low=low, high=high, channels_used="rgb"), image)
    assert condition.shape == (1, *image.shape[:2])
    assert np.array_equal(condition[0].numpy() * 255, cv2.Canny(image, low, high))
    gray = extract(ConditionConfig(low=low, high=high), image)
    assert not torch.equal(condition, gray)
    assert condition[0, 30:70, 75:85].sum() > gray[0, 30:70, 75:85].sum()  # the green one's border on the red


def test_palette_by_pillows_resize_is_the_published_one() -> None:
    image = photo()
    condition = extract(ConditionConfig(kind="palette", palette_filter="bicubic"), image)
    small = Image.fromarray(image).resize((8, 8))  # Pillow's own default
    expected = np.asarray(small.resize((image.shape[1], image.shape[0]), resample=Image.Resampling.NEAREST))
    assert np.array_equal((condition.permute(1, 2, 0).numpy() * 255).round(), expected)
    assert not torch.equal(condition, extract(ConditionConfig(kind="palette"), image))


@pytest.mark.parametrize("size", [(97, 61), (5, 3), (1, 1)])
def test_the_published_forms_take_every_size(size: tuple[int, int]) -> None:
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    for kind in ("canny", "palette"):
        condition = extract(ConditionConfig(kind=kind, channels_used="rgb", palette_filter="bicubic"), image)
        assert condition.shape[1:] == size and condition.min() >= 0 and condition.max() <= 1


def test_conditions_of_earlier_adapters_are_as_they_were() -> None:
    saved = {"kind": "canny", "low": 50, "high": 100, "cells": 8, "channels": 1}
    assert ConditionConfig(**saved) == ConditionConfig()
    assert (ConditionConfig().channels_used, ConditionConfig().palette_filter) == ("gray", "mean")
