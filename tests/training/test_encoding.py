"""Images and captions are encoded by batch, once where all fit in memory, and to the same bits after a resume."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from depth import depth
from tolerances import rounding
from torch.utils._python_dispatch import TorchDispatchMode
from training_helpers import silent_run, tiny_settings

from localctl.data import Batch, MaskedSamples, MicroScenes, SampleRef, collate
from localctl.masks import MaskConfig
from localctl.pipelines import is_xl
from localctl.training.memo import Memo
from localctl.training.models import Models, load_models

COUNT, SIDE = 12, 64


class Launches(TorchDispatchMode):
    """Counts the operations that are not views: the kernels a device would start."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def scenes() -> Batch:
    samples = MaskedSamples(MicroScenes(count=COUNT), MaskConfig(), 0)
    batch = collate([samples[SampleRef(i, 0)] for i in range(COUNT)])
    return replace(batch, pixels=batch.pixels[:, :, ::2, ::2].contiguous())


def part(scenes: Batch, *places: int) -> Batch:
    """The scenes at ``places``, in that order."""
    index = list(places)
    names = {name: tuple(getattr(scenes, name)[i] for i in index) for name in ("keys", "epochs", "captions", "views")}
    return replace(scenes, **names, pixels=scenes.pixels[index], condition=scenes.condition[index], sizes=())


@pytest.fixture(params=["sd", "sdxl"])
def models(request, tmp_path) -> Models:
    folder = request.getfixturevalue(f"{request.param}_folder")
    return load_models(tiny_settings(folder, tmp_path), torch.device("cpu"), None)


def keeping(models: Models) -> Models:
    """The same models with nothing in memory yet, which keep all."""
    other = Models(models.pipe, models.plain_adapter)
    other.keep_encodings(COUNT, (SIDE, SIDE), images=True)
    assert other.kept == ("images", "captions")
    return other


def encoded(models: Models, batch: Batch):
    """Latents, states and pooled states."""
    texts = models.texts(batch, [False] * len(batch))
    posterior = torch.zeros(len(batch), *models.latent_shape(SIDE, SIDE))
    return models.encode(batch, posterior), texts.states, texts.states if texts.pooled is None else texts.pooled


@pytest.mark.parametrize(("threads", "size"), [(1, 8), (2, 8), (2, 5)])
def test_a_kept_encoding_does_not_depend_on_what_else_was_missing(models, scenes, threads, size):
    torch.set_num_threads(threads)
    whole = encoded(keeping(models), part(scenes, *range(size)))
    for order in ((3, 9, 10, 11, 8, 1, 9, 2), (7, 6, 5, 4, 3, 2, 1, 0), (3, 3, 3, 3, 3, 3, 3, 3)):
        resumed = keeping(models)
        encoded(resumed, part(scenes, *([11, 10, 9, 8] * 2)[:size]))  # then few are missing, the rest is filled up
        for found, expected in zip(encoded(resumed, part(scenes, *order[:size])), whole, strict=True):
            for row, place in enumerate(order[:size]):
                assert place >= size or torch.equal(found[row], expected[place]), (order, place)


def test_kept_or_not_encodings_are_those_of_the_pipeline(models, scenes):
    batch = part(scenes, 0, 4, 7, 2)
    passed = depth(models.vae.encoder, models.pipe.text_encoder)
    for one in (models, keeping(models)):
        latents, states, pooled = encoded(one, batch)
        own = models.pipe.encode_prompt(list(batch.captions), device="cpu", num_images_per_prompt=1,
                                        do_classifier_free_guidance=False)  # fmt: skip
        assert torch.equal(states, own[0]) and (not is_xl(models.pipe) or torch.equal(pooled, own[2]))
        with torch.no_grad():
            expected = models.vae.encode(batch.pixels).latent_dist.mean * models.vae.config.scaling_factor
        atol = expected.abs().max().item() * rounding(passed)
        torch.testing.assert_close(latents, expected, rtol=0, atol=atol)
        again = encoded(one, batch)
        assert all(torch.equal(a, b) for a, b in zip(again, (latents, states, pooled), strict=True))


def test_an_empty_caption_is_the_unconditional_prompt(models, scenes):
    batch = part(scenes, 0, 1, 2)
    negative = models.pipe.encode_prompt("a", device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True)
    for one in (models, keeping(models)):
        own, mixed = one.texts(batch, [False] * 3), one.texts(batch, [False, True, False])
        assert torch.equal(mixed.states[1], negative[1][0]) and torch.equal(mixed.states[[0, 2]], own.states[[0, 2]])
        assert not is_xl(models.pipe) or torch.equal(mixed.pooled[1], negative[3][0])
        assert torch.equal(one.text_states(["", "", ""]).states, negative[1].expand(3, -1, -1))


def test_as_many_kernels_for_a_large_batch_as_for_a_small_one(models, scenes):
    counts = []
    for batch in (part(scenes, 0, 1), part(scenes, *range(COUNT))):
        first, kept = keeping(models), keeping(models)
        assert encoded(models, batch) and encoded(kept, batch)
        for one in (models, first, kept):
            with Launches() as launches:
                encoded(one, batch)
            counts.append(launches.count)
    assert counts[:3] == counts[3:]
    assert counts[2] < 10 < counts[0]


def test_a_caption_that_comes_twice_is_encoded_once(models, scenes):
    batch, seen = replace(part(scenes, 0, 1, 2), captions=("a", "b", "a")), []
    models.pipe.text_encoder.register_forward_pre_hook(lambda module, given: seen.append(len(given[0])))
    states = models.texts(batch, [False] * 3).states
    assert seen == [2] and torch.equal(states[0], states[2]) and not torch.equal(states[0], states[1])


def test_what_was_encoded_is_not_encoded_again(models, scenes, monkeypatch):
    kept = keeping(models)
    first = encoded(kept, part(scenes, 0, 1, 2, 3))
    kept.texts(part(scenes, 4, 5, 6, 7), [True] * 4)
    monkeypatch.setattr(models.vae, "encode", None)
    monkeypatch.setattr(models.pipe.text_encoder, "forward", None)
    again = encoded(kept, part(scenes, 3, 1, 0, 0))
    assert all(torch.equal(a, b[[3, 1, 0, 0]]) for a, b in zip(again, first, strict=True))
    kept.texts(part(scenes, 4, 5, 6, 7), [False] * 4)  # their captions were dropped once: kept all the same


def test_kept_only_if_all_fit(models):
    text, latents = models.empty_text.nbytes, 2 * 4 * 4 * (SIDE // 8) ** 2
    fitting = {"images": 2**29 // latents, "captions": 2**29 // text}
    for name, count in fitting.items():
        for samples, fits in ((count, True), (count + 1, False)):
            models.keep_encodings(samples, (SIDE, SIDE), images=True)
            assert (name in models.kept) == fits
    models.keep_encodings(1, (SIDE, SIDE), images=False)
    assert models.kept == ("captions",)


def test_a_run_decides_by_its_settings_and_data(sd_folder, tmp_path, monkeypatch):
    settings = tiny_settings(sd_folder, tmp_path / "a")
    assert silent_run(settings).state.models.kept == ("images", "captions")
    never = replace(settings, data=replace(settings.data, keep_latents=False), output_dir=str(tmp_path / "b"))
    assert silent_run(never).state.models.kept == ("captions",)
    monkeypatch.setattr("localctl.training.models.MEMO_BYTES", 1000)
    assert silent_run(replace(settings, output_dir=str(tmp_path / "c"))).state.models.kept == ()


def test_a_memo_never_outgrows_its_limit():
    calls = []

    def compute(places):
        calls.append(len(places))
        return torch.arange(10.0).repeat(len(places), 1)

    memo: Memo[torch.Tensor] = Memo(max_bytes=80)
    for names in ("ab", "ba", "acd", "ae"):
        found = memo.get(list(names), compute, 4)
        assert list(found) == list(dict.fromkeys(names)) and all(row.shape == (1, 10) for row in found.values())
    assert calls == [4, 4, 4]  # a and b are kept, c, d and e find no place
    assert sum(row.untyped_storage().nbytes() for row in memo._kept.values()) == 2 * 80  # both rows of one tensor
