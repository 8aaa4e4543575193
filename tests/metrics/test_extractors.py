"""Extractors: identified by their weights, always in eval mode and float32, and sound as instruments."""

import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from depth import depth
from safetensors.torch import load_file
from tolerances import rounding
from torch import nn

import localctl.metrics.extractors
from localctl.files import sha256
from localctl.layout import Layout, Region
from localctl.metrics.clip import Clip, CLIPScore, RegionCLIPScore
from localctl.metrics.extractors import (
    LITE0_NETWORK,
    LITE0_PACKAGE,
    MICRO_CLIP,
    ModuleExtractor,
    describe,
    load_extractor,
)
from localctl.metrics.statistics import FeatureStatistics, Statistics
from localctl.metrics.weights import resize
from localctl.micro.scenes import scene

COUNT = 24
CLIP = rounding(16 * 16 * 3 + 4 * (4 * 128 + 128 + 512))  # patches, then per layer q, k, v, out and the two of the MLP


@pytest.fixture(scope="module")
def clip() -> Clip:
    return Clip(MICRO_CLIP)


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.stack([scene(i, "basic", "test").image for i in range(COUNT)])


def statistics(extractor: Any, images: np.ndarray) -> Statistics:
    metric = FeatureStatistics(extractor.dim)
    metric.update(extractor(images), [str(i) for i in range(len(images))])
    return metric.statistics(**describe(extractor))


def test_resizing_a_checkerboard_neither_aliases_nor_shifts() -> None:
    board = (np.indices((512, 512)).sum(0) % 2 * 255).astype(np.uint8)[None, ..., None].repeat(3, -1)
    small = resize(board, 299)
    assert small.shape == (1, 3, 299, 299)
    assert abs(float(small.mean()) / 127.5 - 1) < 0.01 and float(small.std()) < 0.05 * 255
    aliased = torch.nn.functional.interpolate(torch.from_numpy(board).permute(0, 3, 1, 2).float(), 299, mode="bilinear")
    assert float(aliased.std()) > 0.05 * 255
    assert torch.equal(resize(board, 512), torch.from_numpy(board).permute(0, 3, 1, 2).float())


def test_a_module_stays_in_eval_and_float32() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 8, 8), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten())
    extractor = ModuleExtractor(module.half().train(), "tiny", 16, 16, "ab")
    images = np.random.default_rng(0).integers(0, 256, (3, 20, 20, 3), dtype=np.uint8)
    first = extractor(images)
    assert first.shape == (3, 16) and first.dtype == torch.float32
    module.train()
    assert torch.equal(extractor(images), first) and not module[1].running_mean.any()
    torch.testing.assert_close(extractor(images[1:2]), first[1:2])
    assert describe(extractor)["extractor"] == "tiny" and "antialias" in describe(extractor)["preprocessing"]


def test_clip_score_is_the_cosine_and_knows_whose_caption_it_is(clip: Clip, images: np.ndarray) -> None:
    captions = [scene(i, "basic", "test").caption for i in range(COUNT)]
    matched, shuffled = CLIPScore(clip), CLIPScore(clip)
    matched.update(images, captions)
    shuffled.update(images, captions[1:] + captions[:1])
    assert matched.compute()["clip_score"] > shuffled.compute()["clip_score"] + 10
    first = (clip.embed_images(images[:1])[0].double(), clip.embed_texts(captions[:1])[0].double())
    by_hand = 100 * float(first[0] @ first[1] / first[0].norm() / first[1].norm())
    assert matched.per_sample()[0, 0] == pytest.approx(by_hand, abs=100 * rounding(depth(clip.model)))


def test_the_clip_score_of_a_segment_is_that_of_its_box(clip: Clip, images: np.ndarray) -> None:
    captions = [scene(i, "basic", "test").caption for i in range(2)]
    both = np.concatenate([images[0], images[1]], axis=1)
    left, right, middle = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0), (0.1, 0.1, 0.2, 0.2)

    def scores(*regions: Region) -> np.ndarray:
        metric = RegionCLIPScore(clip)
        prompt = ", ".join(region.phrase for region in regions if region.phrase)
        metric.update(both, Layout(prompt, regions=regions))
        return metric.per_sample()[:, 0]

    own, swapped = (
        scores(Region(first, left), Region(second, right)) for first, second in (captions, reversed(captions))
    )
    alone = CLIPScore(clip)
    alone.update(images[:2], captions)
    np.testing.assert_allclose(own, alone.per_sample()[:, 0], atol=100 * rounding(depth(clip.model)))
    assert (own > swapped + 10).all()
    under = scores(Region("a red dot", middle), Region(captions[0], left), Region(None, right))
    assert len(under) == 2 and under[1] == own[0]  # a row for each phrase, and the box of a region as it was placed
    with pytest.raises(ValueError, match="no region with a phrase"):
        scores(Region(None, left))


def test_clip_score_takes_images_of_any_layout(clip: Clip, images: np.ndarray) -> None:
    one = images[0]
    scores = []
    for image in (one, one.transpose(2, 0, 1), torch.from_numpy(one) / 255, torch.from_numpy(one)[None]):
        metric = CLIPScore(clip)
        metric.update(image, "a red circle")
        scores.append(metric.compute()["clip_score"])
    assert max(scores) - min(scores) < 100 * rounding(depth(clip.model))


def test_long_captions_are_cut_before_the_end_token_and_counted(clip: Clip, images: np.ndarray) -> None:
    long = "a red circle " * 60
    metric = CLIPScore(clip)
    metric.update(images[:2], ["a red circle", long])
    assert metric.compute()["cut"] == 0.5
    ids = clip.tokenizer(long, truncation=True, max_length=77).input_ids
    assert len(ids) == 77 and ids[-1] == clip.tokenizer.eos_token_id


@pytest.mark.parametrize("captions", [[], None, ["one"], [None, None]])
def test_captions_that_do_not_match(captions: Any, clip: Clip, images: np.ndarray) -> None:
    with pytest.raises(ValueError, match="captions for 2 images"):
        CLIPScore(clip).update(images[:2], captions)


def test_efficientnet_pads_as_tensorflow_and_loads_the_published_weights(images: np.ndarray) -> None:
    conv = pytest.importorskip(f"{LITE0_NETWORK}.utils").get_same_padding_conv2d(4)(1, 1, 3, stride=2, bias=False)
    nn.init.ones_(conv.weight)
    edge = torch.zeros(1, 1, 4, 4)
    edge[..., 0, 0] = 1
    assert conv(edge)[0, 0].tolist() == [[1, 0], [0, 0]]  # padded below and to the right
    edge[..., 0, 0], edge[..., 3, 3] = 0, 1
    assert conv(edge)[0, 0].tolist() == [[0, 0], [0, 1]]
    pytest.importorskip(LITE0_PACKAGE)
    extractor = load_extractor("efficientnet_lite0")
    features = extractor(images[:6])
    torch.testing.assert_close(extractor(images[4:5]), features[4:5], atol=1e-4, rtol=1e-4)
    features = features[:3]
    assert features.shape == (3, 1280) and extractor.weights_sha256.startswith("57934424")
    assert float(features[0, 2]) == pytest.approx(1.0009968, abs=1e-4)  # as committed figures were measured
    noisy = (images[:3] + np.random.default_rng(0).normal(0, 60, images[:3].shape)).clip(0, 255).astype(np.uint8)
    near, far = ((features - extractor(other)).norm() for other in (images[:3] // 2 * 2, noisy))
    assert 0 < near < far / 3


def test_missing_packages_and_weights_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="Unknown feature extractor 'vgg'; choose one of micro_clip"):
        load_extractor("vgg")
    with pytest.raises(ValueError, match="needs weights"):
        load_extractor("clip")
    with pytest.raises(ValueError, match="There is no CLIP at .*nowhere"):
        load_extractor("clip", tmp_path / "nowhere")
    monkeypatch.setattr(localctl.metrics.extractors.importlib.util, "find_spec", lambda name: None)
    for name, extra in (("fid", "fid"), ("efficientnet_lite0", "lite0")):
        with pytest.raises(ValueError, match=rf'run `pip install "localctl\[{extra}\]"`'):
            load_extractor(name)


def test_inception_is_known_by_its_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch-fidelity is replaced: only its input and the use of its output are tested."""
    built: list[tuple[Any, ...]] = []

    class Inception(nn.Module):
        def __init__(self, *arguments: Any) -> None:
            super().__init__()
            built.append(arguments)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
            assert x.dtype == torch.uint8 and x.shape == (2, 3, 30, 30)
            return (x.float().mean((2, 3)).repeat(1, 683)[:, :2048],)

    source = SimpleNamespace(FeatureExtractorInceptionV3=Inception)
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", source)
    monkeypatch.setattr(localctl.metrics.extractors, "_need", lambda *names: tmp_path)
    file = tmp_path / "weights.pth"
    with pytest.raises(ValueError, match="no Inception weights at"):
        load_extractor("fid", file)
    file.write_bytes(b"something else")
    with pytest.raises(ValueError, match="does not hold the published weights"):
        load_extractor("fid", file)

    def unreachable(*arguments: Any, **options: Any) -> None:
        raise OSError("no route")

    monkeypatch.setattr(localctl.metrics.extractors, "download_url_to_file", unreachable)
    monkeypatch.setattr(localctl.metrics.extractors, "get_dir", lambda: str(tmp_path / "hub"))
    with pytest.raises(ValueError, match="cannot be downloaded from .* put the file at"):
        load_extractor("fid")
    monkeypatch.setattr(localctl.metrics.extractors, "INCEPTION_SHA256", sha256(file))
    extractor = load_extractor("fid", file)
    assert extractor(np.zeros((2, 30, 30, 3), np.uint8)).shape == (2, 2048)
    assert built == [("inception", ["2048"], str(file))] and extractor.name == "fid"


def test_a_damaged_clip_is_one_sentence_and_pickles_are_not_read(tmp_path: Path) -> None:
    for name, damage, words in (
        ("cut", lambda place: os.truncate(place / "model.safetensors", 4000), "There is no CLIP at"),
        ("config", lambda place: (place / "config.json").write_text("[1]"), "There is no CLIP at"),
        ("tokenizer", lambda place: (place / "tokenizer.json").write_text("{"), "There is no CLIP at"),
        ("mute", lambda place: [path.unlink() for path in place.glob("tokenizer*")], "has no tokenizer"),
        ("pickle", lambda place: pickled(place), "its .bin weights are pickles, which are not read"),
    ):
        shutil.copytree(MICRO_CLIP, tmp_path / name)
        damage(tmp_path / name)
        with pytest.raises(ValueError, match=words) as error:
            Clip(tmp_path / name)
        assert "\n" not in str(error.value) and name in str(error.value)


def pickled(place: Path) -> None:
    torch.save(load_file(place / "model.safetensors"), place / "pytorch_model.bin")
    (place / "model.safetensors").unlink()


def test_statistics_hold_no_pickles(tmp_path: Path) -> None:
    np.savez(tmp_path / "evil.npz", provenance=np.array([{"a": 1}], dtype=object), counts=np.zeros(2))
    with pytest.raises(ValueError, match="holds no statistics or is damaged"):
        Statistics.load(tmp_path / "evil.npz")
