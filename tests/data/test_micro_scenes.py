import numpy as np
import pytest
import torch

from localctl.conditions import ConditionConfig, extract
from localctl.data import DataConfig, open_data
from localctl.data.micro import MicroScenes
from localctl.images import to_pil, to_pixels
from localctl.micro.scenes import PROFILES, scene
from localctl.settings import CHANNELS, FROM_IMAGE


def test_an_example_is_the_scene():
    example, expected = MicroScenes("val", "basic", 5)[3], scene(3, "basic", "val")
    assert np.array_equal(np.asarray(to_pil(example.pixels)), expected.image)
    assert torch.equal(example.pixels, to_pixels(to_pil(example.pixels)))
    assert example.caption == expected.caption and example.key == "basic-val-3"
    assert torch.equal(example.condition, extract(ConditionConfig(), expected.image))
    assert torch.allclose(example.object_masks, torch.from_numpy(expected.masks), atol=0.5 / 255 + 1e-6)


@pytest.mark.parametrize("kind", [*FROM_IMAGE, "depth", "segmentation"])
def test_every_kind_of_condition(kind):
    condition = MicroScenes("train", "basic", 2, ConditionConfig(kind=kind))[1].condition
    assert condition.shape == (CHANNELS[kind], 128, 128) and condition.dtype == torch.float32
    assert 0 <= condition.min() < condition.max() <= 1


def test_exact_conditions_come_from_the_scene():
    expected = scene(1)
    depth = MicroScenes(condition=ConditionConfig(kind="depth"))[1].condition
    assert np.allclose(depth[0], expected.depth, atol=0.5 / 255 + 1e-6)
    parts = MicroScenes(condition=ConditionConfig(kind="segmentation"))[1].condition
    assert np.allclose(parts.permute(1, 2, 0) * 255, expected.segmentation)


@pytest.mark.parametrize("keep", [True, False])
def test_the_second_visit_is_the_first(keep):
    scenes = MicroScenes(count=2, keep=keep)
    first, again = scenes[0], scenes[0]
    assert torch.equal(first.pixels, again.pixels) and torch.equal(first.object_masks, again.object_masks)
    first.pixels.zero_()  # what is handed out is the caller's own
    assert not torch.equal(first.pixels, scenes[0].pixels)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"split": "valid"}, "split 'valid'"),
        ({"profile": "poor"}, "profile 'poor'"),
        ({"count": 0}, "at least 1"),
        ({"condition": ConditionConfig(kind="column")}, "no condition images"),
    ],
)
def test_mistakes(options, words):
    with pytest.raises(ValueError, match=words):
        MicroScenes(**options)


def test_the_end():
    with pytest.raises(IndexError):
        MicroScenes(count=2)[2]


def test_the_settings_know_the_profiles() -> None:
    assert [DataConfig(profile=profile).profile for profile in PROFILES] == list(PROFILES)


def test_one_way_to_open_what_the_settings_name() -> None:
    source = open_data(DataConfig(count=7, profile="rich"), ConditionConfig(), "test")
    assert isinstance(source, MicroScenes) and len(source) == 7 and source[6].key == "rich-test-6"
    assert len(open_data(DataConfig(), ConditionConfig(), "val", 3, keep=False)) == 3
