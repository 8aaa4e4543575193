"""The scenes are frozen: the same index is the same picture, and what a scene says of itself is true of its pixels."""

import hashlib

import numpy as np
import pytest

from localctl.micro.detect import detect
from localctl.micro.scenes import PROFILES, RELATIONS, SIZE, SPLITS, holds, scene
from localctl.micro.shapes import BACKGROUNDS, COLORS, SHAPES, shape_mask


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("split", SPLITS)
def test_a_scene_is_a_pure_function_of_its_index(profile: str, split: str) -> None:
    first, again = scene(7, profile, split), scene(7, profile, split)
    assert np.array_equal(first.image, again.image) and first.caption == again.caption
    assert not np.array_equal(first.image, scene(8, profile, split).image)


def test_splits_share_no_picture() -> None:
    seen = {scene(i, "basic", split).image.tobytes() for split in SPLITS for i in range(40)}
    assert len(seen) == 40 * len(SPLITS)


def test_the_basic_profile_is_frozen() -> None:
    """Every figure is measured on these scenes: a change of captions, boxes or drawing must not pass unseen."""
    captions = "\n".join(scene(i, "basic", "test").caption for i in range(50))
    assert hashlib.sha256(captions.encode()).hexdigest()[:16] == "14537f2f62590be6"
    means = [scene(i, "basic", "test").image.mean() for i in range(5)]
    assert np.allclose(means, [72.322, 74.396, 230.468, 232.105, 136.132], atol=0.05)


def test_basic_scenes_keep_their_promises() -> None:
    for i in range(150):
        item = scene(i)
        assert item.image.shape == (SIZE, SIZE, 3) and item.image.dtype == np.uint8
        assert 1 <= len(item.objects) <= 3
        phrases = [o.phrase for o in item.objects]
        assert len(set(phrases)) == len(phrases) and all(p in item.caption for p in phrases)
        assert (item.masks.sum(0) <= 1 + 1e-6).all(), "objects overlap"
        for mask, thing in zip(item.masks, item.objects, strict=True):
            ys, xs = np.nonzero(mask > 0.5)
            assert (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1) == thing.box
            assert 13 <= thing.radius <= 30
            inside = mask > 0.99
            assert np.abs(np.median(item.image[inside], axis=0) - COLORS[thing.color]).max() < 12
            assert np.array_equal(item.segmentation[inside][0], COLORS[thing.color])
            assert np.allclose(item.depth[inside], thing.depth)
        outside = item.masks.sum(0) == 0
        assert (item.depth[outside] == 0).all() and (item.segmentation[outside] == 0).all()


def test_stated_relations_are_true_and_all_four_occur() -> None:
    stated = [(s, *s.relation) for s in map(scene, range(400)) if s.relation]
    assert {relation for _, _, relation, _ in stated} == set(RELATIONS)
    for item, first, relation, second in stated:
        a, b = item.objects[first], item.objects[second]
        assert holds(relation, a.center, b.center) and not holds(relation, b.center, a.center)
        assert f"{a.phrase} {relation} a" in item.caption


def test_the_background_is_named_in_seventy_percent() -> None:
    scenes = [scene(i) for i in range(600)]
    share = np.mean(["background" in s.caption for s in scenes])
    assert abs(share - 0.7) < 0.06
    assert all(f"{s.background} background" in s.caption for s in scenes if "background" in s.caption)


def test_rich_scenes_overlap_count_and_have_textures() -> None:
    scenes = [scene(i, "rich") for i in range(80)]
    assert max(len(s.objects) for s in scenes) == 6
    assert any("two " in s.caption for s in scenes) and any("striped" in s.caption for s in scenes)
    for item in scenes:
        assert (item.masks.sum(0) <= 1 + 1e-6).all(), "visible parts overlap"


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_are_antialiased_and_scale(shape: str) -> None:
    small, large = shape_mask(shape, (64, 64), 15, 5, 128), shape_mask(shape, (64, 64), 30, 5, 128)
    assert ((small > 0) & (small < 1)).any()
    assert large.sum() / small.sum() == pytest.approx(4, rel=0.03)


@pytest.mark.parametrize("bad", [{"profile": "fancy"}, {"split": "dev"}])
def test_unknown_names_are_refused(bad: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="choose one of"):
        scene(0, **bad)


def test_backgrounds_all_occur() -> None:
    assert {scene(i).background for i in range(60)} == set(BACKGROUNDS)


def test_the_reader_reads_true_scenes() -> None:
    total = right = spurious = 0
    for i in range(150):
        item = scene(i, "basic", "test")
        reading = detect(item.image)
        assert reading.background == item.background
        phrases = [o.phrase for o in reading.objects]
        right += sum(o.phrase in phrases for o in item.objects)
        total += len(item.objects)
        spurious += max(0, len(phrases) - len(item.objects))
    assert right / total >= 0.98 and spurious / total <= 0.01


def test_the_reader_measures_boxes_and_relations() -> None:
    for i in range(60):
        item = scene(i, "basic", "test")
        reading = detect(item.image)
        for thing in item.objects:
            found = next(d for d in reading.objects if d.phrase == thing.phrase)
            assert np.abs(np.subtract(found.box, thing.box)).max() <= 3
        if item.relation:
            first, relation, second = item.relation
            a, b = item.objects[first].phrase, item.objects[second].phrase
            assert reading.relation(a, relation, b) and not reading.relation(b, relation, a)


@pytest.mark.parametrize("level", [0, 128, 255])
def test_an_empty_picture_has_no_objects(level: int) -> None:
    assert detect(np.full((128, 128, 3), level, np.uint8)).objects == ()


def test_noise_is_not_read_as_objects() -> None:
    noise = np.random.default_rng(0).integers(0, 255, (128, 128, 3)).astype(np.uint8)
    assert detect(noise).objects == ()


def test_a_wrong_colour_or_shape_is_read_as_such() -> None:
    item = next(s for s in map(scene, range(50)) if len(s.objects) == 1 and s.objects[0].color == "red")
    swapped = item.image[..., ::-1].copy()  # red becomes blue-ish
    found = detect(swapped).objects
    assert found and found[0].color != "red" and found[0].shape == item.objects[0].shape
