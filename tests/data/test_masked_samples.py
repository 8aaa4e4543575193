from dataclasses import replace

import pytest
import torch

from localctl.data import MaskedSamples, MicroScenes, SampleRef, collate
from localctl.masks import MaskConfig


@pytest.fixture(scope="module")
def scenes():
    return MicroScenes(count=4)


def test_a_mask_is_decided_by_seed_epoch_and_sample_alone(scenes):
    def mask(seed, index, epoch, source=scenes):
        return MaskedSamples(source, MaskConfig(), seed)[SampleRef(index, epoch)].mask

    torch.rand(3)
    assert torch.equal(mask(0, 1, 2), mask(0, 1, 2, MicroScenes(count=9)))
    others = [mask(1, 1, 2), mask(0, 2, 2), mask(0, 1, 3)]
    assert not any(torch.equal(mask(0, 1, 2), other) for other in others)


def test_masks_can_follow_the_objects(scenes):
    samples = MaskedSamples(scenes, MaskConfig(kind="objects", count=1, min_area=0), 0)
    covered = [any(torch.equal(samples[SampleRef(i, 0)].mask[0], m) for m in scenes[i].object_masks) for i in range(4)]
    assert all(covered)


def test_a_mask_of_the_data_stays(scenes):
    own = torch.zeros(1, 128, 128)

    class Masked:
        def __len__(self):
            return 1

        def __getitem__(self, index):
            return replace(scenes[index], mask=own)

    assert MaskedSamples(Masked(), MaskConfig(kind="full"), 0)[SampleRef(0, 0)].mask is own
    assert MaskedSamples(Masked(), MaskConfig(), 0, full=1)[SampleRef(0, 0)].mask.all()


def test_a_share_of_the_masks_is_of_the_whole_image(scenes):
    def masks(share):
        samples = MaskedSamples(scenes, MaskConfig(max_area=0.5), 0, share)
        return [samples[SampleRef(1, epoch)].mask for epoch in range(60)]

    sampled, half = masks(0), masks(0.5)
    assert all(mask.all() for mask in masks(1)) and not any(mask.all() for mask in sampled)
    assert 15 < sum(bool(mask.all()) for mask in half) < 45
    assert all(mask.all() or torch.equal(mask, own) for mask, own in zip(half, sampled, strict=True))


def test_a_batch_keeps_rows_together(scenes):
    samples = MaskedSamples(scenes, MaskConfig(), 0)
    refs = [SampleRef(2, 0), SampleRef(0, 5)]
    batch = collate([samples[ref] for ref in refs])
    assert len(batch) == 2 and batch.keys == ("basic-train-2", "basic-train-0") and batch.epochs == (0, 5)
    assert batch.captions[1] == scenes[0].caption
    assert batch.pixels.shape == (2, 3, 128, 128) and batch.condition.shape == batch.mask.shape == (2, 1, 128, 128)
    for row, ref in enumerate(refs):
        assert torch.equal(batch.mask[row], samples[ref].mask)
        assert torch.equal(batch.pixels[row], scenes[ref.sample].pixels)
    moved = batch.to("meta")
    assert moved.condition.device.type == moved.mask.device.type == "meta" and moved.keys == batch.keys
    assert moved.pixels is batch.pixels  # whoever encodes them fetches them
