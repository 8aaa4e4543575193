from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from localctl.masks import MASK_RESIZE, MaskConfig, resize_mask, sample_mask

SIZES = [(8, 8), (1, 1), (3, 40), (64, 96), (97, 61), (1024, 640)]
RANDOM_SHAPES = ["box", "circle", "square", "strokes"]


def draw(config: MaskConfig, size: tuple[int, int], seed: int = 0, objects: torch.Tensor | None = None) -> torch.Tensor:
    return sample_mask(config, size, np.random.default_rng(seed), objects)


def two_objects(size: tuple[int, int] = (64, 96)) -> torch.Tensor:
    masks = torch.zeros(2, *size)
    masks[0, 5:25, 5:25] = 1
    masks[1, 30:60, 50:90] = 1
    masks[1, 30] = masks[1, 30] * 0.6  # an anti-aliased border
    return masks


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", RANDOM_SHAPES)
def test_random_shapes_keep_to_their_area_at_every_size(kind: str, size: tuple[int, int]) -> None:
    for seed in range(8):
        mask = draw(MaskConfig(kind=kind), size, seed)
        assert mask.shape == (1, *size) and mask.dtype == torch.float32
        assert set(mask.unique().tolist()) <= {0.0, 1.0}
        assert mask.mean() >= 0.038


@pytest.mark.parametrize("kind", RANDOM_SHAPES)
@pytest.mark.parametrize(("low", "high"), [(0.2, 0.25), (0.9, 1.0), (0.0, 0.01), (0.5, 0.5)])
@pytest.mark.parametrize("size", [(64, 96), (16, 16)])
def test_both_bounds_hold(kind: str, low: float, high: float, size: tuple[int, int]) -> None:
    for seed in range(8):
        area = draw(MaskConfig(kind=kind, min_area=low, max_area=high), size, seed).double().mean().item()
        assert low <= area <= high and area > 0


@pytest.mark.parametrize("kind", RANDOM_SHAPES)
def test_whole_picture_is_feasible_for_every_shape(kind: str) -> None:
    assert draw(MaskConfig(kind=kind, min_area=1.0), (24, 200)).min() == 1


@pytest.mark.parametrize("kind", RANDOM_SHAPES)
def test_every_pixel_can_be_drawn_the_last_row_and_column_too(kind: str) -> None:
    seen = torch.stack([draw(MaskConfig(kind=kind), (16, 24), seed) for seed in range(400)]).amax(dim=0)
    assert seen.min() == 1


def test_small_boxes_reach_the_last_row_and_column() -> None:
    config = MaskConfig(kind="box", min_area=0.01, max_area=0.04)  # too small to span the picture
    seen = torch.stack([draw(config, (16, 24), seed) for seed in range(400)]).amax(dim=0)[0]
    assert seen[0].any() and seen[-1].any() and seen[:, 0].any() and seen[:, -1].any()


@pytest.mark.parametrize("kind", [*RANDOM_SHAPES, "objects", "mixture"])
def test_the_rng_alone_decides(kind: str) -> None:
    config = MaskConfig(kind=kind, mixture={"box": 1, "strokes": 2, "circle": 1} if kind == "mixture" else None)
    first = draw(config, (64, 96), 3, two_objects())
    np.random.seed(99)
    torch.manual_seed(99)
    assert torch.equal(first, draw(config, (64, 96), 3, two_objects()))
    assert any(not torch.equal(first, draw(config, (64, 96), seed, two_objects())) for seed in range(4, 12))


def test_shapes_are_what_they_are_called() -> None:
    for seed in range(20):
        box = draw(MaskConfig(kind="box"), (40, 56), seed)[0]
        assert torch.equal(box, box.amax(1, keepdim=True) * box.amax(0, keepdim=True))  # a product of two intervals
        config = MaskConfig(kind="square", count=1, min_area=0.0)
        square = draw(config, (200, 200), seed)[0]
        rows, columns = square.amax(1), square.amax(0)
        assert torch.equal(square, rows[:, None] * columns[None])
        touches = bool(rows[0] + rows[-1] + columns[0] + columns[-1])
        assert touches or abs(rows.sum() - columns.sum()) <= 1
        circle = draw(MaskConfig(kind="circle", count=1, min_area=0.0), (200, 200), seed)[0]
        rows, columns = circle.amax(1), circle.amax(0)
        if not bool(rows[0] + rows[-1] + columns[0] + columns[-1]):  # not cut by the border
            assert circle.sum() == pytest.approx(np.pi / 4 * float(rows.sum() * columns.sum()), rel=0.03)


def test_a_square_shrunk_to_the_maximum_area_stays_a_square() -> None:
    for seed in range(20):
        square = draw(MaskConfig(kind="square", count=1, min_area=0.005, max_area=0.02), (100, 100), seed)[0]
        assert torch.equal(square, square.amax(1, keepdim=True) * square.amax(0, keepdim=True))


def test_count_is_the_number_of_shapes() -> None:
    def parts(mask: torch.Tensor) -> int:
        return cv2.connectedComponents(mask[0].to(torch.uint8).numpy())[0] - 1

    config = MaskConfig(kind="circle", count=2, min_area=0.0)
    counts = [parts(draw(config, (128, 128), seed)) for seed in range(60)]
    assert set(counts) == {1, 2}  # two that may overlap
    assert {parts(draw(MaskConfig(kind="circle", count=1), (128, 128), seed)) for seed in range(20)} == {1}


def test_infeasible_areas_are_said() -> None:
    with pytest.raises(ValueError, match="8x8 pixels has an area between 0.04 and 0.045.*widen"):
        draw(MaskConfig(kind="circle", min_area=0.04, max_area=0.045), (8, 8))
    with pytest.raises(ValueError, match="No box in 7x7 pixels has an area of 11 to 11 pixels; widen"):
        draw(MaskConfig(kind="box", min_area=11 / 49, max_area=11 / 49), (7, 7))
    # The same area is no problem for a shape that can be cut anywhere.
    assert draw(MaskConfig(kind="circle", min_area=11 / 49, max_area=11 / 49), (7, 7)).sum() == 11


def test_fixed_and_full() -> None:
    mask = draw(MaskConfig(kind="fixed", box=(0.25, 0.0, 1.0, 0.5)), (8, 16))
    expected = torch.zeros(1, 8, 16)
    expected[:, :4, 4:] = 1
    assert torch.equal(mask, expected)
    assert draw(MaskConfig(kind="full", soft_edge=4), (5, 9)).min() == 1
    with pytest.raises(ValueError, match="contains no pixel of a 8x8"):
        draw(MaskConfig(kind="fixed", box=(0.51, 0.51, 0.55, 0.55)), (8, 8))


def test_objects_are_the_samples_own() -> None:
    objects = two_objects()
    one = {tuple(draw(MaskConfig(kind="objects", count=1), (64, 96), s, objects).flatten().tolist()) for s in range(20)}
    assert one == {tuple(m.flatten().tolist()) for m in objects}
    both = draw(MaskConfig(kind="objects", count=5), (64, 96), 0, objects)
    assert torch.equal(both[0], objects.amax(0))


def test_small_objects_grow_to_the_minimum_area() -> None:
    objects = torch.zeros(1, 64, 64)
    objects[0, 30:33, 30:33] = 1
    mask = draw(MaskConfig(kind="objects", min_area=0.1), (64, 64), 0, objects)
    assert 0.1 <= mask.mean() < 0.12
    assert (mask >= objects).all()
    rows, columns = torch.nonzero(mask[0], as_tuple=True)
    assert (rows.double().mean() - 31).abs() < 1 and (columns.double().mean() - 31).abs() < 1


@pytest.mark.parametrize(
    ("objects", "message"),
    [
        (None, "needs object masks"),
        (torch.zeros(0, 64, 96), "needs object masks"),
        (torch.zeros(1, 64, 96), "empty"),
        (torch.ones(1, 32, 32), r"must be \(n, 64, 96\)"),
    ],
)
def test_objects_need_objects(objects: torch.Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw(MaskConfig(kind="objects"), (64, 96), 0, objects)


def test_mixture_follows_its_weights_not_its_order() -> None:
    def share_of_full(mixture: dict[str, float]) -> list[bool]:
        config = MaskConfig(kind="mixture", mixture=mixture, max_area=0.5)
        return [bool(draw(config, (16, 16), seed).min() == 1) for seed in range(400)]

    full = share_of_full({"full": 3, "box": 1})
    assert 0.68 < np.mean(full) < 0.82
    assert full == share_of_full({"box": 1, "full": 3})
    assert not any(share_of_full({"box": 1, "full": 0}))


@pytest.mark.parametrize("kind", [*RANDOM_SHAPES, "objects"])
def test_soft_edge_only_adds_a_ramp_outside(kind: str) -> None:
    hard = draw(MaskConfig(kind=kind, min_area=0.05, max_area=0.3), (64, 96), 1, two_objects())
    soft = draw(MaskConfig(kind=kind, min_area=0.05, max_area=0.3, soft_edge=6), (64, 96), 1, two_objects())
    assert soft.min() >= 0 and soft.max() == 1
    assert (soft[hard == 1] == 1).all()
    assert ((soft > 0) & (soft < 1)).sum() > 50
    distance = torch.from_numpy(cv2.distanceTransform((hard[0] < 0.5).to(torch.uint8).numpy(), cv2.DIST_L2, 0))
    assert (soft[0][distance >= 7] == 0).all() and (soft[0][(distance > 0) & (distance <= 6)] > 0).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "blob"}, "mask.kind 'blob'"),
        ({"min_area": 0.5, "max_area": 0.4}, "mask.min_area <= mask.max_area, not 0.5"),
        ({"min_area": -0.1}, "min_area"),
        ({"max_area": 1.5}, "max_area"),
        ({"count": 0}, "count"),
        ({"count": (3, 2)}, "count"),
        ({"count": (1, 2, 3)}, "count"),
        ({"soft_edge": -1.0}, "soft_edge"),
        ({"kind": "fixed"}, "needs box="),
        ({"kind": "fixed", "box": (0.5, 0.0, 0.4, 1.0)}, "x0 < x1"),
        ({"kind": "fixed", "box": (0.0, 0.0, 128.0, 128.0)}, "in \\[0,1\\]"),
        ({"kind": "mixture"}, "at least one kind"),
        ({"kind": "mixture", "mixture": {"mixture": 1}}, "Unknown mask.mixture 'mixture'"),
        ({"kind": "mixture", "mixture": {"blob": 1}}, "Unknown mask.mixture 'blob'; choose one of box"),
        ({"kind": "mixture", "mixture": {"box": -1}}, "mask.mixture.box must be at least 0, not -1"),
        ({"kind": "mixture", "mixture": {"box": 0}}, "all zero"),
        ({"kind": "mixture", "mixture": {"fixed": 1}}, "needs box="),
    ],
)
def test_settings_without_sense_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MaskConfig(**settings)


@pytest.mark.parametrize("mode", MASK_RESIZE)
@pytest.mark.parametrize("size", [(8, 8), (5, 3), (16, 24), (37, 50), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_constant_masks_stay_exactly_constant(mode: str, size: tuple[int, int], dtype: torch.dtype) -> None:
    for value in (0.0, 1.0):
        resized = resize_mask(torch.full((2, 1, 16, 24), value, dtype=dtype), size, mode)
        assert resized.dtype == dtype
        assert torch.equal(resized, torch.full((2, 1, *size), value, dtype=dtype))


def test_resize_modes() -> None:
    mask = torch.zeros(1, 1, 8, 16)
    mask[..., :6, :10] = 1
    expected = {
        "area": [[1, 1, 0.5, 0], [0.5, 0.5, 0.25, 0]],
        "nearest": [[1, 1, 1, 0], [1, 1, 1, 0]],
        "inside": [[1, 1, 0, 0], [0, 0, 0, 0]],
        "cover": [[1, 1, 1, 0], [1, 1, 1, 0]],
    }
    for mode, values in expected.items():
        assert resize_mask(mask, (2, 4), mode)[0, 0].tolist() == values, mode


def test_thin_masks_survive_cover_and_area_but_not_nearest() -> None:
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., 13, :] = 1
    assert resize_mask(mask, (8, 8), "nearest").sum() == 0
    assert resize_mask(mask, (8, 8), "cover")[0, 0, 1].min() == 1
    assert resize_mask(mask, (8, 8), "area").mean() == mask.mean()


@pytest.mark.parametrize("size", [(8, 8), (7, 9), (5, 31), (100, 130)])
def test_inside_and_cover_enclose_area(size: tuple[int, int]) -> None:
    mask = (torch.rand(2, 1, 33, 47, generator=torch.Generator().manual_seed(0)) > 0.3).float()
    inside, area, cover = (resize_mask(mask, size, mode) for mode in ("inside", "area", "cover"))
    assert (inside <= area).all() and (area <= cover).all()
    assert torch.equal(inside, 1 - resize_mask(1 - mask, size, "cover"))


def test_same_size_is_untouched_and_unknown_mode_is_named() -> None:
    mask = torch.rand(1, 1, 6, 7)
    assert all(torch.equal(resize_mask(mask, (6, 7), mode), mask) for mode in MASK_RESIZE)
    with pytest.raises(ValueError, match="'bilinear'; choose one of area, nearest, inside, cover"):
        resize_mask(mask, (3, 3), "bilinear")


def published_sides(pixels: int) -> np.ndarray:
    """(pixels,): the chance of a side of 0, 1, ... pixels: first pixel uniform, last one uniform beyond it."""
    chance = np.zeros(pixels)
    for first in range(pixels - 1):
        ends = np.arange(first + 1, pixels)
        chance[ends - first] += 1 / (pixels - 1) / len(ends)
    return chance


def test_boxes_by_their_corners_are_the_published_ones() -> None:
    """Mean and median of 4,000 areas against the law and against what the published sampler gave for as many."""
    config = MaskConfig(box_law="corners", min_area=10_000 / 512**2)
    rng = np.random.default_rng(0)
    areas = np.array([sample_mask(config, (512, 512), rng).mean().item() for _ in range(4000)])
    assert areas.min() >= 10_000 / 512**2
    sides = published_sides(512)
    pixels = np.outer(np.arange(512), np.arange(512)).ravel()
    chance = np.outer(sides, sides).ravel() * (pixels >= 10_000)
    chance /= chance.sum()
    order = np.argsort(pixels)
    median = pixels[order][np.searchsorted(np.cumsum(chance[order]), 0.5)]
    assert areas.mean() == pytest.approx((pixels * chance).sum() / 512**2, abs=0.005)
    assert np.median(areas) == pytest.approx(median / 512**2, abs=0.005)
    with np.load(Path(__file__).parent / "goldens" / "training.npz", allow_pickle=False) as published:
        assert areas.mean() == pytest.approx(published["box_area_mean"].item(), abs=0.005)
        assert np.median(areas) == pytest.approx(published["box_area_median"].item(), abs=0.005)


def test_every_box_of_the_published_law_has_its_chance() -> None:
    law = {
        (top, bottom, left, right): 1 / (4 - top) / (5 - left)
        for top in range(4) for bottom in range(top + 1, 5) for left in range(5) for right in range(left + 1, 6)
        if 6 <= (bottom - top) * (right - left) <= 12
    }  # fmt: skip
    config, rng = MaskConfig(box_law="corners", min_area=0.2, max_area=0.4), np.random.default_rng(1)
    found = dict.fromkeys(law, 0)
    for _ in range(10_000):
        mask = sample_mask(config, (5, 6), rng)[0].numpy()
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        found[rows[0], rows[-1] + 1, columns[0], columns[-1] + 1] += 1  # KeyError: a box that the law has not
    total = sum(law.values())
    for box, chance in law.items():
        share = chance / total
        assert found[box] / 10_000 == pytest.approx(share, abs=5 * np.sqrt(share * (1 - share) / 10_000))


@pytest.mark.parametrize("size", [(8, 8), (3, 40), (97, 61), (1024, 640)])
def test_boxes_by_their_corners_keep_to_their_area(size: tuple[int, int]) -> None:
    for low, high in ((0.038, 1.0), (0.2, 0.3), (0.0, 0.02)):
        for seed in range(8):
            area = draw(MaskConfig(box_law="corners", min_area=low, max_area=high), size, seed).double().mean().item()
            assert low <= area <= high and area > 0


def test_a_box_law_that_is_none_or_leaves_no_box_is_said() -> None:
    with pytest.raises(ValueError, match="box_law 'uniform'; choose one of sides, corners"):
        MaskConfig(box_law="uniform")
    for size in ((1, 1), (1, 9), (8, 8)):
        with pytest.raises(ValueError, match="No box in .* pixels has an area of .*; widen"):
            draw(MaskConfig(box_law="corners", min_area=1.0), size)
