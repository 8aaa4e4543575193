"""Wrong images of training scenes, and the preference of the right ones."""

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from localctl.micro.scenes import render, scene, scene_plan
from research.micro_base.loop import LoopConfig
from research.micro_base.preference import BETA, Preference, mistake, wrong_latents
from research.micro_base.unet import UNET, train_denoiser
from research.micro_base.unet_loss import LatentCache, Recipe, Sampler, UNetLoss


def test_a_mistake_is_never_what_the_caption_says() -> None:
    kinds: Counter[str] = Counter()
    for index in range(200):
        objects = scene_plan(index).objects
        wrong = mistake(objects, np.random.default_rng(index))
        said, there = (Counter(o.phrase for o in those) for those in (objects, wrong))
        assert said != there
        if len(wrong) > len(objects):
            kinds["twice"] += 1
            *same, twin = wrong
            assert tuple(same) == objects and twin.phrase in said
            assert all(math.dist(twin.center, o.center) > twin.radius + o.radius for o in objects)
        else:
            kinds["swapped" if Counter(o.color for o in objects) == Counter(o.color for o in wrong) else "changed"] += 1
            assert [o.center for o in wrong] == [o.center for o in objects]
    assert min(kinds[kind] for kind in ("twice", "swapped", "changed")) > 20


def test_a_scene_is_rendered_with_other_objects() -> None:
    item = scene(3)
    assert np.array_equal(render(3, item.objects), item.image)
    moved = render(3, item.objects[:-1])
    assert moved.shape == item.image.shape and (moved != item.image).any()


def test_wrong_images_are_encoded_once(tmp_path: Path) -> None:
    seen: list[np.ndarray] = []

    def encode(images: np.ndarray) -> torch.Tensor:
        seen.append(images)
        return torch.from_numpy(images[:, :16, :16, :1]).permute(0, 3, 1, 2).half()

    first = wrong_latents(3, encode, tmp_path / "wrong.pt")
    assert torch.equal(wrong_latents(3, encode, tmp_path / "wrong.pt"), first)
    assert len(seen) == 1 and seen[0].shape == (3, 128, 128, 3)
    assert all((image != scene(i).image).any() for i, image in enumerate(seen[0]))


def test_the_loss_starts_as_the_difference_and_ends_where_pairs_are_told_apart() -> None:
    right = torch.tensor([0.30, 0.20, 0.5], requires_grad=True)
    wrong = torch.tensor([0.35, 0.15, 0.5], requires_grad=True)
    counts = torch.tensor([True, True, False])
    preference = Preference(torch.zeros(0), lambda: torch.zeros(0), weight=0.5)
    loss, told = preference.loss(right, wrong, (right - wrong).detach(), counts)
    assert float(loss.detach()) == pytest.approx(0.5 * math.log(2) * 2 / BETA)
    loss.backward()
    assert right.grad is not None and wrong.grad is not None
    assert torch.allclose(right.grad, 0.5 * counts / 2) and torch.equal(wrong.grad, -right.grad)
    certain, told = preference.loss(right, wrong + 0.2, (right - wrong).detach(), counts)
    assert float(certain.detach()) < 1e-9 and float(told) == 1


@pytest.fixture
def cache() -> LatentCache:
    random = torch.Generator().manual_seed(0)
    latents, states = (torch.randn(*shape, generator=random).half() for shape in ((6, 4, 16, 16), (3, 77, 128)))
    return LatentCache(latents, states, torch.tensor([1, 9, 12]), torch.arange(6) % 2 + 1)


def test_training_tells_right_from_wrong(tmp_path: Path, cache: LatentCache) -> None:
    wrong = cache.latents.flip(2)
    config = LoopConfig(steps=15, learning_rate=3e-3, warmup=2)
    recipe = Recipe(empty=0.0)
    torch.manual_seed(0)
    start = UNET.new(cache).state_dict()
    unet, done = train_denoiser(UNET, cache, config, tmp_path, 6, recipe, start, wrong=wrong, prefer=5.0)
    assert done
    alphas = torch.linspace(0.9, 0.01, 1000)
    reference = UNET.new(cache)
    reference.load_state_dict(start)
    loss = UNetLoss(unet, cache, alphas, recipe, None)
    loss.preference = Preference(wrong, UNetLoss(reference, cache, alphas, recipe, None).errors, 1.0)
    sampled = Sampler(tuple(cache.latents.shape), None, 6, recipe, 1, torch.device("cpu"))(np.random.default_rng(5))
    with torch.no_grad():
        assert float(loss(sampled)["told"]) > 0.8
        empty = loss(replace(sampled, is_empty=torch.ones(6, dtype=torch.bool)))
    assert float(empty["told"]) == 0 and float(empty["loss"]) == pytest.approx(float(empty["mse"]))
