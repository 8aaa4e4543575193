import json

import datasets
import numpy as np
import pytest
import torch
from file_data import identities, png, read_metadata, to_folders, to_parquet, write_imagefolder, write_metadata
from PIL import Image
from torch.utils.data import DataLoader

from localctl.conditions import ConditionConfig, extract
from localctl.data import DataConfig, MaskedSamples, PlanSampler, SamplePlan, SampleRef, collate, open_files
from localctl.data.held_out import places_of
from localctl.images import to_pil
from localctl.masks import MaskConfig

COLUMN = ConditionConfig(kind="column", channels=1)
SIZES = ((40, 56), (64, 48), (33, 90))


@pytest.fixture(autouse=True)
def quiet_and_own_cache(monkeypatch, tmp_path):
    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def folder(tmp_path):
    return write_imagefolder(tmp_path / "data", 6, sizes=SIZES)


def config(path, name="imagefolder", **options):
    return DataConfig(**{"name": name, "path": str(path), "resolution": 32, "validation_share": 0, **options})


def source(path, name="imagefolder", condition=COLUMN, split="train", **options):
    return open_files(config(path, name, **options), condition, split)


def epochs(files, workers, count=3, batch=3):
    """Return the batches of ``count`` epochs, with their sampled crops, flips and masks."""
    steps = count * len(files) // batch
    loader = DataLoader(
        MaskedSamples(files, MaskConfig(), 0),
        batch_sampler=PlanSampler(SamplePlan(len(files), 0), batch, 0, steps),
        collate_fn=collate,
        num_workers=workers,
        generator=torch.Generator(),
    )
    return list(loader)


def test_image_condition_mask_and_caption_stay_together_with_any_number_of_workers(folder):
    files = source(folder, center_crop=False, random_flip=True)
    alone, workers = epochs(files, 0), epochs(files, 2)
    visited = []
    for batch, other in zip(alone, workers, strict=True):
        named = [int(caption.split()[1]) for caption in batch.captions]
        assert identities((batch.pixels + 1) / 2) == identities(batch.condition) == identities(batch.mask) == named
        assert [int(key[-7:-4]) for key in batch.keys] == named
        visited += named
        assert batch.keys == other.keys and batch.captions == other.captions and batch.views == other.views
        for name in ("pixels", "condition", "mask"):
            assert torch.equal(getattr(batch, name), getattr(other, name))
    assert [sorted(visited[i : i + 6]) for i in (0, 6, 12)] == [list(range(6))] * 3
    assert len({tuple(visited[i : i + 6]) for i in (0, 6, 12)}) == 3


def same_examples(one, other, atol=0.0):
    assert len(one) == len(other)
    for index in range(len(one)):
        for a, b in (
            (one[index], other[index]),
            (one.visit(SampleRef(index, 3), 7), other.visit(SampleRef(index, 3), 7)),
        ):
            assert a.caption == b.caption and a.view == b.view
            for name in ("pixels", "condition", "mask"):
                assert torch.allclose(getattr(a, name), getattr(b, name), atol=atol, rtol=0)


def test_parquet_gives_what_the_imagefolder_gives(folder, tmp_path):
    options = {"center_crop": False, "random_flip": True, "validation_share": 0.4}
    for split in ("train", "val"):
        files = source(folder, split=split, **options)
        table = source(to_parquet(folder, tmp_path / "table" / "all.parquet"), "parquet", split=split, **options)
        assert [files.key(i) for i in range(len(files))] == [table.key(i) for i in range(len(table))]
        assert files.fingerprints == table.fingerprints
        same_examples(files, table)


def test_folders_and_the_hubs_way_give_it_too(folder, tmp_path, monkeypatch):
    depth = ConditionConfig(kind="depth")
    whole = source(folder, condition=depth)
    folders = source(to_folders(folder, tmp_path / "folders"), "folder", condition=depth)
    assert [folders.key(i) for i in range(6)] == [f"{i:03}" for i in range(6)]
    for i in range(6):
        assert torch.allclose(whole[i].pixels, folders[i].pixels, atol=5 / 255)  # a JPEG
        assert torch.equal(whole[i].condition, folders[i].condition) and torch.equal(whole[i].mask, folders[i].mask)
        assert whole[i].caption == folders[i].caption
    monkeypatch.chdir(tmp_path)  # `datasets` finds a folder by its name as it finds a name on the hub
    hub = open_files(DataConfig(name="./data", resolution=32, validation_share=0), depth, "train")
    assert [hub.key(i) for i in range(6)] == [whole.key(i) for i in range(6)]
    same_examples(whole, hub)


def test_the_columns_are_those_of_datasets(folder):
    table = datasets.load_dataset("imagefolder", data_dir=str(folder), split="train")
    files = source(folder, condition=COLUMN)
    assert set(table.column_names) == {"image", "conditioning_image", "mask", "text"}
    assert [row["text"] for row in table] == [files[i].caption for i in range(6)]


def test_columns_can_be_called_otherwise(folder):
    lines = [
        {"photo_file_name": x["file_name"], "pose": x["conditioning_image_file_name"], "prompt": [x["text"], "other"],
         "id": i, "area": x["mask_file_name"]}
        for i, x in enumerate(read_metadata(folder))
    ]  # fmt: skip
    write_metadata(folder, lines)
    options = {"image_column": "photo", "conditioning_image_column": "pose", "caption_column": "prompt"}
    files = source(folder, mask_column="area", key_column="id", **options)
    assert files.key(2) == "2" and files[2].caption == "picture 2"
    assert identities(files[2].mask[None]) == identities(files[2].condition[None]) == [2]
    captions = {files.visit(SampleRef(2, epoch), 0).caption for epoch in range(8)}
    assert captions == {"picture 2", "other"}  # several captions: one is sampled for each visit
    assert source(folder, **options).rows.has_masks is False  # the column `mask` may be missing
    assert source(folder, **(options | {"caption_column": None}))[1].caption == ""
    for column in ("image", "conditioning_image", "mask", "caption"):
        with pytest.raises(ValueError, match=f"'nowhere' .data.{column}_column.; the columns are area, id, photo"):
            source(folder, **(options | {f"{column}_column": "nowhere"}))
    canny = source(folder, condition=ConditionConfig(), image_column="photo", caption_column="prompt")
    assert "condition" not in canny.rows.columns  # extracted from the image, no column needed


def test_the_split_is_by_key_and_survives_growth(tmp_path):
    small, large = write_imagefolder(tmp_path / "a", 12), write_imagefolder(tmp_path / "b", 20)
    lines = read_metadata(large)
    write_metadata(large, lines[::-1] + lines[:1])  # another order, and an image listed twice

    def keys(path, split):
        files = source(path, split=split, validation_share=0.3)
        return {files.key(i) for i in range(len(files))}

    assert keys(small, "train") | keys(small, "val") == {f"images/{i:03}.png" for i in range(12)}
    assert not keys(small, "train") & keys(small, "val")
    assert keys(small, "val") < keys(large, "val") and keys(small, "train") < keys(large, "train")
    assert any("#2" in key for key in keys(large, "train") | keys(large, "val"))
    assert len(set(places_of(["images/000.png#2", "images/000.png"]))) == 1
    assert abs(np.mean(places_of(f"{i}.png" for i in range(5000)) < 0.1) - 0.1) < 0.015
    with pytest.raises(ValueError, match="val part.*validation_share=0; raise data.validation_share or rest.$"):
        open_files(config(small), COLUMN, "val", " or rest")


def test_fewer_examples_on_request(folder):
    three = source(folder, count=3)
    assert len(three) == 3 and {three.key(i) for i in range(3)} < {f"images/{i:03}.png" for i in range(6)}
    assert [three.key(i) for i in range(3)] == [source(folder, count=3).key(i) for i in range(3)]


def test_splits_by_folder_and_by_file(tmp_path):
    for split, count in (("train", 3), ("test", 2)):
        write_imagefolder(tmp_path / "data" / split, count)
        to_parquet(tmp_path / "data" / split, tmp_path / "tables" / f"{split}-00000-of-1.parquet")
    for path, name in (("data", "imagefolder"), ("tables", "parquet")):
        train = source(tmp_path / path, name, validation_split="test", validation_share=0.5)
        val = source(tmp_path / path, name, validation_split="test", validation_share=0.5, split="val")
        assert (len(train), len(val)) == (3, 2)
        with pytest.raises(ValueError, match="'dev'"):
            source(tmp_path / path, name, split="train", **{"validation_split": None}) and open_files(
                config(tmp_path / path, name, split="dev"), COLUMN, "train"
            )


@pytest.mark.parametrize("resolution", [128, (96, 192), (192, 104)])
@pytest.mark.parametrize("options", [{}, {"center_crop": False}, {"center_crop": False, "random_flip": True}])
def test_image_condition_and_mask_stay_aligned_after_every_geometry(tmp_path, resolution, options):
    canvas = np.zeros((482, 806), np.uint8)
    for rows, columns in (((50, 432), (120, 220)), ((50, 150), (120, 640)), ((220, 310), (120, 450))):
        canvas[slice(*rows), slice(*columns)] = 255  # an F: no mirror image of itself
    letter = Image.fromarray(canvas)
    letter.convert("RGB").save(tmp_path / "f.png")
    letter.resize((403, 241), Image.Resampling.BOX).save(tmp_path / "half.png")
    letter.save(tmp_path / "mask.png")
    line = {"file_name": "f.png", "conditioning_image_file_name": "half.png", "mask_file_name": "mask.png"}
    write_metadata(tmp_path, [line | {"text": "an f"}])
    files = source(tmp_path, resolution=resolution, **options)
    views, mirrored = set(), []
    for epoch in range(12):
        example = files.visit(SampleRef(0, epoch), 0)
        assert example.pixels.shape[1:] == (resolution if isinstance(resolution, tuple) else (128, 128))
        image, condition, mask = example.pixels[0] > 0, example.condition[0] > 0.5, example.mask[0] > 0.5
        assert iou(image, mask) > 0.99 and iou(image, condition) > 0.99, epoch
        mirrored.append(iou(image, mask.flip(1)))
        height, width, top, left = example.original
        scale = max(image.shape[0] / 482, image.shape[1] / 806)
        assert (height, width) == (482, 806)
        assert 0 <= top <= round(482 * scale) - image.shape[0] and 0 <= left <= round(806 * scale) - image.shape[1]
        if not options:
            assert abs(2 * top - (482 * scale - image.shape[0])) <= 1
            assert abs(2 * left - (806 * scale - image.shape[1])) <= 1
        views.add(example.view)
    assert min(mirrored) < 0.9  # the test would see a part that was not mirrored
    assert len(views) == (12 if options else 1)


def iou(a, b):
    return float((a & b).sum() / (a | b).sum())


def test_edges_are_taken_after_the_geometry(tmp_path):
    rng = np.random.default_rng(0)
    tmp_path.joinpath("a.png").write_bytes(png(Image.fromarray(rng.integers(0, 256, (60, 90, 3), dtype=np.uint8))))
    write_metadata(tmp_path, [{"file_name": "a.png", "text": "noise"}])
    for kind in ("canny", "sobel", "palette"):
        condition = ConditionConfig(kind=kind)
        files = source(tmp_path, condition=condition, center_crop=False, random_flip=True)
        for epoch in range(4):
            example = files.visit(SampleRef(0, epoch), 1)
            assert torch.equal(example.condition, extract(condition, np.asarray(to_pil(example.pixels))))


def test_labels_are_not_blended_and_depth_keeps_16_bits(tmp_path):
    labels = np.zeros((60, 60, 3), np.uint8)
    labels[:, 31:] = (200, 30, 90)
    Image.fromarray(labels).save(tmp_path / "labels.png")
    depth = np.full((60, 60), 30_001, np.uint16)
    Image.fromarray(depth).save(tmp_path / "depth.png")
    Image.new("RGB", (60, 60)).save(tmp_path / "a.png")
    write_metadata(tmp_path, [{"file_name": "a.png", "labels": "labels.png", "depth": "depth.png", "text": "x"}])

    def condition(kind, column, **options):
        return source(tmp_path, condition=ConditionConfig(kind=kind), conditioning_image_column=column, **options)[0]

    colours = torch.unique(condition("segmentation", "labels").condition.flatten(1), dim=1)
    assert colours.shape[1] == 2
    blended = condition("column", "labels").condition.flatten(1)
    assert torch.unique(blended, dim=1).shape[1] > 2
    assert torch.unique(condition("column", "labels", conditioning_interpolation="nearest").condition).numel() <= 6
    seen = condition("depth", "depth").condition
    assert seen.shape == (1, 32, 32) and torch.allclose(seen, torch.tensor(30_001 / 65_535), atol=1e-6)


def test_settings_that_make_no_sense(tmp_path):
    for options, words in (
        ({"resolution": 100}, "multiple of 8"),
        ({"validation_share": 2}, "validation_share"),
        ({"max_bad_fraction": -1}, "max_bad_fraction"),
        ({"conditioning_interpolation": "cubic"}, "cubic"),
        ({"name": "user/data", "path": "x"}, "leave one of them out"),
        ({"random_flip": True}, "never cropped or flipped"),
        ({"resolution": 64}, "128x128"),
    ):
        with pytest.raises(ValueError, match=words):
            DataConfig(**options)
    assert DataConfig(path=str(tmp_path)).name == "imagefolder"  # as diffusers' --train_data_dir alone
    assert DataConfig(path="x", resolution=(64, 96)).size == (64, 96)
    for data, words in (
        (DataConfig(name="parquet"), "needs data.path"),
        (DataConfig(path=str(tmp_path / "none")), "There is no data at"),
        (config(tmp_path), "no metadata.jsonl"),
        (config(tmp_path, "folder"), "no folders of examples"),
        (config(tmp_path, "parquet"), r"no \*.parquet"),
    ):
        with pytest.raises(ValueError, match=words):
            open_files(data, COLUMN, "train")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(ValueError, match="cannot be loaded"):
        open_files(config(tmp_path, "parquet"), COLUMN, "train")


def test_many_rows_open_quickly_and_alone(tmp_path):
    lines = [json.dumps({"file_name": f"{i}.png", "text": f"number {i}"}) for i in range(20_000)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))  # none of the images exists: nothing may be opened
    files = source(tmp_path, condition=ConditionConfig(), validation_share=0.1)
    assert 17_500 < len(files) < 18_500


@pytest.mark.parametrize("form", ["imagefolder", "parquet"])
def test_masks_of_0_and_1_train_as_black_and_white_and_are_said_once(folder, tmp_path, form):
    half = np.zeros((40, 56), np.uint8)
    half[:, :28] = 1
    for file, line in zip(sorted((folder / "masks").iterdir()), read_metadata(folder), strict=True):
        size = Image.open(folder / line["file_name"]).size
        Image.fromarray(half).resize(size, Image.Resampling.NEAREST).save(file)
    place = folder if form == "imagefolder" else to_parquet(folder, tmp_path / "rows.parquet").parent
    with pytest.warns(
        UserWarning, match="in the data holds only 0 and 1 of 255; it is read as black and white"
    ) as said:
        files = source(place, form)
    assert len(said) == 1
    masks = torch.stack([files[i].mask for i in range(len(files))])
    assert masks.max() == 1 and masks.min() == 0 and 0.3 < masks.mean() < 0.7
