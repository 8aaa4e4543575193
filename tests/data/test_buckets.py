"""Aspect-ratio buckets: which image goes where, in which order, and what arrives in a batch."""

from __future__ import annotations

from collections import Counter

import datasets
import numpy as np
import pytest
import torch
from file_data import identities, to_parquet, write_imagefolder
from PIL import Image

from localctl.conditions import ConditionConfig
from localctl.data import BucketPlan, Buckets, DataConfig, MaskedSamples, PlanSampler, SampleRef, collate, open_files
from localctl.data.bucket_sizes import automatic_buckets, parse_buckets
from localctl.data.buckets import assign
from localctl.data.image_sizes import image_sizes
from localctl.data.workers import loading
from localctl.masks import MaskConfig

COLUMN = ConditionConfig(kind="column", channels=1)
LIST = "32,32;24,48;48,24;16,16"
SHAPES = ((40, 40), (30, 60), (64, 32), (20, 22))  # (height, width), one for each bucket


def config(path, **options):
    return DataConfig(**{"path": str(path), "validation_share": 0, "aspect_ratio_buckets": LIST, **options})


def bucketed(path, **options):
    source = open_files(config(path, **options), COLUMN, "train")
    return source.in_buckets(image_sizes(source.rows, source.indices, source.data.max_pixels))


def test_lists_are_written_as_in_diffusers():
    assert parse_buckets("672,1568; 688,1504;") == ((672, 1568), (688, 1504))
    for text, said in (
        ("512", "'512' is not a bucket"),
        ("512x640", r"for 512x640, write 640,512"),
        ("512,640,1", "is not a bucket"),
        ("512,-8", "is not a bucket"),
        (";", "names no bucket"),
    ):
        with pytest.raises(ValueError, match=f"data.aspect_ratio_buckets is no list of sizes: .*{said}.* auto"):
            DataConfig(path="x", aspect_ratio_buckets=text)
    with pytest.raises(ValueError, match="side of data.aspect_ratio_buckets 500 is not a positive multiple of 8"):
        DataConfig(path="x", aspect_ratio_buckets="500,512")
    with pytest.raises(ValueError, match="embedded scenes .* do not set .*aspect_ratio_buckets"):
        DataConfig(aspect_ratio_buckets="auto")


def test_the_single_size_beside_buckets():
    assert DataConfig(path="x", aspect_ratio_buckets="512,768;640,576;768,512").size == (640, 576)
    automatic = DataConfig(path="x", aspect_ratio_buckets="auto", resolution=768)
    assert automatic.size == (768, 768) and (768, 768) in automatic.buckets
    assert DataConfig(path="x", resolution=(64, 96)).largest_size == (64, 96)
    assert DataConfig(path="x", aspect_ratio_buckets="64,64;64,96", resolution=32).largest_size == (64, 96)


@pytest.mark.parametrize("side", [128, 512, 1024])
def test_automatic_buckets_have_the_area_of_the_resolution_or_of_smaller_ones(side):
    sizes = np.array(automatic_buckets((side, side)))
    step = min(64, side // 8)
    assert not (sizes % step).any() and len(set(map(tuple, sizes))) == len(sizes)
    areas = sizes.prod(1) / side**2
    assert all(min(abs(area / tier**2 - 1) for tier in (1, 0.75, 0.5)) < 0.15 for area in areas)
    ratios = sizes[:, 1] / sizes[:, 0]
    assert ratios.min() < 0.6 and ratios.max() > 1.7 and {*map(tuple, sizes)} == {(w, h) for h, w in sizes}


def test_an_image_goes_where_most_of_it_is_seen():
    sizes = ((64, 64), (64, 96), (96, 64), (32, 32))
    images = np.array([(64, 64), (640, 640), (600, 800), (900, 500), (64, 80), (63, 63), (31, 200), (0, 0)])
    assert assign(images, sizes, 1.0).tolist() == [0, 0, 1, 2, 0, 3, -1, 0]
    assert assign(images, sizes, 1.1).tolist()[5:7] == [0, 3]
    assert assign(np.zeros((2, 2)), sizes, 1.0).tolist() == [0, 0]  # sizes unknown: somewhere


def test_no_image_is_enlarged_beyond_the_factor():
    images = np.random.default_rng(0).integers(100, 2000, (5000, 2))
    sizes = np.array(automatic_buckets((512, 512)))
    for most in (1.0, 1.5):
        of = assign(images, [tuple(size) for size in sizes.tolist()], most)
        found = of >= 0
        assert (sizes[of[found]] / images[found]).max() <= most + 1e-6
        fits = (sizes[None] / images[~found][:, None]).max(2) <= most  # of those left out
        assert 0 < (~found).sum() < 1000 and not fits.any()


OF = np.array([0] * 11 + [1] * 5 + [2] * 1 + [3] * 23)[np.random.default_rng(1).permutation(40)]
FOUR = Buckets(((64, 64), (64, 96), (96, 64), (32, 32)), OF)


def micro_batches(world_size=1, batch_size=4, start=0, stop=60, accumulation=1, buckets=FOUR):
    plan = BucketPlan(buckets, 0, batch_size * world_size)
    options = {"accumulation": accumulation, "world_size": world_size}
    ranks = [PlanSampler(plan, batch_size, start, stop, rank=rank, **options) for rank in range(world_size)]
    return list(zip(*ranks, strict=True))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_each_sample_comes_once_per_epoch_over_all_processes(world_size):
    steps = micro_batches(world_size)
    for ranks in steps:  # one size in all processes, the same number of samples
        [size] = {ref.size for refs in ranks for ref in refs}
        assert all(len(refs) == 4 and {FOUR.size(ref.sample) for ref in refs} == {size} for refs in ranks)
    visits = Counter((ref.sample, ref.epoch) for ranks in steps for refs in ranks for ref in refs)
    assert set(visits.values()) == {1}
    batch = 4 * world_size
    for bucket in range(4):  # all epochs but the last are complete, and in proportion
        members = FOUR.members(bucket).tolist()
        turns = Counter(epoch for sample, epoch in visits if sample in members)
        assert all(turns[turn] == len(members) for turn in range(max(turns)))
        assert abs(sum(turns.values()) - 60 * batch * len(members) / 40) <= 2 * batch
    orders = {tuple(ref.sample for ref in refs) for (refs, *_) in steps}
    assert len(orders) > 50


def test_the_order_of_batches_and_samples_differs_between_epochs_and_seeds():
    def sizes(first, seed=0):
        plan = BucketPlan(FOUR, seed, 1)
        return [plan.at(position) for position in range(first, first + 40)]

    for visits in (sizes(0), sizes(40), sizes(400)):
        assert sorted(ref.sample for ref in visits) == list(range(40)) and len({ref.epoch for ref in visits}) == 1
    assert len({tuple(ref.size for ref in visits) for visits in (sizes(0), sizes(40), sizes(0, 1))}) == 3
    assert len({tuple(ref.sample for ref in visits) for visits in (sizes(0), sizes(40), sizes(0, 1))}) == 3


@pytest.mark.parametrize("step", [1, 7, 33])
def test_starting_later_continues_the_same_stream(step):
    assert micro_batches(2, start=step) == micro_batches(2)[step:]
    assert micro_batches(2, start=step, accumulation=2)[:8] == micro_batches(2, accumulation=2)[2 * step :][:8]


def test_a_bucket_smaller_than_a_batch_repeats_its_samples_and_is_named():
    [refs] = [refs for (refs,) in micro_batches(batch_size=8, stop=40) if refs[0].size == (96, 64)][:1]
    assert len({ref.sample for ref in refs}) == 1 and [ref.epoch for ref in refs] == list(range(8))
    counts, few = FOUR.remarks(6)
    assert counts == "buckets (width x height): 32x32: 23, 64x64: 11, 96x64: 5, 64x96: 1"
    assert few.startswith("2 buckets have fewer examples than the 6 of a batch") and "96x64: 5, 64x96: 1;" in few
    assert len(FOUR.remarks(1)) == 1
    with pytest.raises(ValueError, match="at least one"):
        BucketPlan(Buckets(((8, 8),), np.array([], int)), 0, 4)


@pytest.fixture
def folder(tmp_path):
    return write_imagefolder(tmp_path / "data", 16, sizes=SHAPES)


def test_batches_of_files_have_one_size_and_hold_together(folder):
    source = bucketed(folder, center_crop=False, random_flip=True)
    assert source.buckets is not None and dict(source.buckets.used()) == dict.fromkeys(source.data.buckets, 4)

    def batches(workers):
        sampler = PlanSampler(BucketPlan(source.buckets, 0, 2), 2, 0, 24)
        samples = MaskedSamples(source, MaskConfig(), 0)
        options = {"batch_sampler": sampler, "collate_fn": collate, "generator": torch.Generator()}
        with loading(samples, workers, **options) as made:
            return list(made)

    alone, workers = batches(0), batches(2)
    for batch, other in zip(alone, workers, strict=True):
        named = [int(caption.split()[1]) for caption in batch.captions]
        assert identities((batch.pixels + 1) / 2) == identities(batch.condition) == identities(batch.mask) == named
        height, width = batch.pixels.shape[-2:]
        assert {source.data.buckets[i % 4] for i in named} == {(height, width)}
        assert all(original[:2] == SHAPES[i % 4] for i, original in zip(named, batch.sizes, strict=True))
        assert (batch.keys, batch.views) == (other.keys, other.views) and torch.equal(batch.pixels, other.pixels)
    assert Counter(key for batch in alone for key in batch.keys) == dict.fromkeys(source.rows.keys, 3)
    assert {tuple(batch.pixels.shape[-2:]) for batch in alone} == set(source.data.buckets)


def test_images_too_small_for_all_buckets_are_left_out_and_named(folder):
    source = bucketed(folder, aspect_ratio_buckets="32,32;48,24")
    assert len(source) == 8 and all(source.buckets.size(i) in ((32, 32), (48, 24)) for i in range(8))
    assert source.note == (
        "8 of 16 images are too small for all of data.aspect_ratio_buckets with data.max_upscaling=1, such as "
        "images/001.png (60x30); these are left out"
    )
    assert len(bucketed(folder, aspect_ratio_buckets="32,32;48,24", max_upscaling=1.6)) == 16
    with pytest.raises(ValueError, match="16 of 16 images are too small .*choose smaller buckets, or raise"):
        bucketed(folder, aspect_ratio_buckets="512,512")


def test_the_fingerprints_tell_the_buckets(folder):
    one, other = bucketed(folder).fingerprints, bucketed(folder, aspect_ratio_buckets=LIST + ";8,8").fingerprints
    assert {name for name in one if one[name] != other[name]} == {"aspect-ratio buckets"}


@pytest.mark.parametrize("count", [8, 80])
def test_a_bad_row_is_replaced_by_one_of_its_size(tmp_path, count):
    """With few rows in the bucket another one may step in, at this size."""
    root = write_imagefolder(tmp_path / "data", 23, sizes=SHAPES)
    lines = (root / "metadata.jsonl").read_text().splitlines()
    (root / "metadata.jsonl").write_text("\n".join(lines[i % 23] for i in range(count)))
    source = bucketed(root)
    for bucket, size in enumerate(source.data.buckets):
        first = int(source.buckets.members(bucket)[0])
        (root / lines[first].split('"')[3]).write_bytes(b"")
        example = MaskedSamples(source, MaskConfig(), 0)[SampleRef(first, 0, size)]
        assert [problem.reason for problem in example.problems][:1] == ["image of unknown format"]
        assert example.pixels.shape[-2:] == example.condition.shape[-2:] == example.mask.shape[-2:] == size
        own = {source.key(int(i)) for i in source.buckets.members(bucket)}
        assert example.key in own or count == 8


def test_parquet_gives_the_same_buckets(folder, tmp_path, monkeypatch):
    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    table = bucketed(to_parquet(folder, tmp_path / "tables" / "all.parquet"), name="parquet")
    assert table.buckets.digest() == bucketed(folder).buckets.digest()
    assert list(table.rows.keys) == list(bucketed(folder).rows.keys)


def test_an_unreadable_header_stays_a_bad_row(folder):
    (folder / "images" / "002.png").write_bytes(b"<html>")
    Image.new("L", (60, 30)).save(folder / "images" / "001.png")
    source = bucketed(folder)
    assert len(source) == 16
    example = MaskedSamples(source, MaskConfig(), 0)[SampleRef(2, 0)]
    assert [problem.key for problem in example.problems] == ["images/002.png"]
