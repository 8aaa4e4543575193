import io
import json
import os
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from file_data import identities, picture, png, read_metadata, to_folders, write_imagefolder, write_metadata
from PIL import Image
from torch.utils.data import DataLoader

from localctl.conditions import ConditionConfig
from localctl.data import (
    BadRow,
    DataConfig,
    MaskedSamples,
    PlanSampler,
    SamplePlan,
    SampleRef,
    collate,
    open_files,
)
from localctl.data.sample import ATTEMPTS
from localctl.masks import MaskConfig

COLUMN = ConditionConfig(kind="column", channels=1)


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(size=64):
    return Image.effect_noise((size, size), 80).convert("RGB")


@cache
def bomb():
    return encoded(Image.new("1", (14_000, 14_000)), "PNG")  # more than Pillow opens at all


BAD_IMAGES = {
    "empty file": (lambda: b"", "image of unknown format"),
    "html": (lambda: b"<html><body>404 Not Found</body></html>", "image of unknown format"),
    "truncated jpeg": (lambda: encoded(noise(), "JPEG")[:900], "image damaged"),
    "truncated png": (lambda: encoded(noise(), "PNG")[:2000], "image damaged"),
    "bomb": (bomb, "image too large"),
    "svg": (lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>", "image of unknown format"),
}
GOOD_MODES = ("CMYK", "P", "LA", "RGBA", "L", "1", "I;16")


def opened(root, **options):
    data = DataConfig(path=str(root), resolution=32, validation_share=0, **options)
    return open_files(data, options.pop("condition", COLUMN), "train")


@pytest.fixture
def folder(tmp_path):
    return write_imagefolder(tmp_path / "data", 6)


def change(folder, index, **values):
    lines = read_metadata(folder)
    lines[index] = {k: v for k, v in (lines[index] | values).items() if v is not None}
    write_metadata(folder, lines)


def problem(source, index):
    with pytest.raises(BadRow) as bad:
        source[index]
    assert bad.value.key == source.key(index) and str(bad.value)
    return bad.value.reason


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_broken_files_are_named(folder, name):
    content, reason = BAD_IMAGES[name]
    (folder / "images" / "002.png").write_bytes(content())
    (folder / "masks" / "003.png").write_bytes(content())
    (folder / "conditions" / "004.png").write_bytes(content())
    source = opened(folder)
    assert problem(source, 2) == reason
    assert problem(source, 3) == reason.replace("image", "mask")
    assert problem(source, 4) == reason.replace("image", "condition")
    assert identities(source[1].mask[None]) == [1]


@pytest.mark.parametrize("mode", GOOD_MODES)
def test_every_mode_is_read_as_it_looks(folder, mode):
    gray = picture(9)
    if mode == "I;16":
        odd = Image.fromarray(np.asarray(gray.convert("L")).astype(np.uint16) * 257)
    else:
        odd = gray.convert("L").convert(mode) if mode in ("LA", "1") else gray.convert(mode)
    kind = "JPEG" if mode == "CMYK" else "PNG"
    for part in ("images", "masks", "conditions"):
        (folder / part / "002.png").write_bytes(encoded(odd, kind, **({"quality": 100} if kind == "JPEG" else {})))
    example = opened(folder)[2]
    shown = ((example.pixels.mean() + 1) / 2, example.mask.mean(), example.condition.mean())
    wanted = 110 / 255
    for value in shown:
        assert abs(float(value) - wanted) < (0.03 if mode == "1" else 2 / 255), mode


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"text": None}, "caption missing"),
        ({"text": "  "}, "caption missing"),
        ({"text": []}, "caption missing"),
        ({"text": 7}, "caption not text"),
        ({"text": "half \ud83d"}, "caption not UTF-8"),
        ({"file_name": None}, "image missing"),
        ({"file_name": "images/none.png"}, "image missing"),
        ({"mask_file_name": None}, "mask missing"),
        ({"conditioning_image_file_name": None}, "condition missing"),
        ({"file_name": 3}, "image unreadable"),
        ({"file_name": "a\0b"}, "image unreadable"),
        ({"file_name": "../secret.png"}, "image outside the data"),
        ({"mask_file_name": "/etc/hostname"}, "mask outside the data"),
        ({"conditioning_image_file_name": "link.png"}, "condition outside the data"),
    ],
)
def test_broken_metadata_is_named(folder, values, reason):
    picture(0).save(folder.parent / "secret.png")
    (folder / "link.png").symlink_to(folder.parent / "secret.png")
    change(folder, 2, **values)
    source = opened(folder)
    assert problem(source, 2) == reason
    assert source[3].caption == "picture 3"


def test_lines_that_are_no_text_or_no_json(folder):
    lines = (folder / "metadata.jsonl").read_bytes().splitlines()
    lines[1] = lines[1].replace(b"picture 1", b"caf\xe9")
    lines[2] = lines[2][:20]
    lines[3] = b"[1, 2]"
    lines[5] = b"[" * 100_000
    (folder / "metadata.jsonl").write_bytes(b"\n".join(lines))
    source = opened(folder)
    assert [problem(source, i) for i in (1, 2, 3, 5)] == ["caption not UTF-8"] + ["metadata damaged"] * 3
    assert source.key(1) == "images/001.png" and source.key(2) == "metadata.jsonl:3"
    assert source[4].caption == "picture 4"


def test_parts_of_another_shape(folder):
    picture(1, (40, 40)).save(folder / "masks" / "001.png")
    picture(2, (56, 40)).save(folder / "conditions" / "002.png")  # turned
    picture(3, (20, 28)).save(folder / "masks" / "003.png")  # half the size is the same shape
    source = opened(folder)
    assert problem(source, 1) == "mask of another shape" and problem(source, 2) == "condition of another shape"
    assert identities(source[3].mask[None]) == [3]


def test_broken_folders(folder, tmp_path):
    root = to_folders(folder, tmp_path / "folders")
    (root / "000" / "caption.txt").unlink()
    (root / "001" / "caption.txt").write_bytes(b"caf\xe9")
    (root / "002" / "original.jpg").unlink()
    (root / "003" / "depth.png").write_bytes(b"")
    (root / "004" / "mask.png").unlink()
    data = DataConfig(name="folder", path=str(root), resolution=32, validation_share=0)
    source = open_files(data, ConditionConfig(kind="depth"), "train")
    reasons = ["caption missing", "caption not UTF-8", "image missing", "condition of unknown format", "mask missing"]
    assert [problem(source, i) for i in range(5)] == reasons
    assert source[5].caption == "picture 5"


def test_broken_rows_of_a_table(tmp_path):
    good = png(picture(0))
    text = pa.Array.from_buffers(pa.string(), 4, [None, *pa.array([b"fine", b"caf\xe9", b"fine", b"x"]).buffers()[1:]])
    images = [{"bytes": data, "path": None} for data in (good, good, b"<html>")] + [None]
    pq.write_table(pa.table({"image": images, "text": text}), tmp_path / "rows.parquet")
    data = DataConfig(
        name="parquet", path=str(tmp_path), resolution=32, validation_share=0, cache_dir=str(tmp_path / "cache")
    )
    source = open_files(data, ConditionConfig(), "train")
    assert source[0].key == "row 0" and source[0].caption == "fine"
    assert [problem(source, i) for i in (1, 2, 3)] == ["caption not UTF-8", "image of unknown format", "image missing"]


def test_a_table_may_name_files_beside_it_but_no_others(folder, tmp_path):
    names = ["images/000.png", "../secret.png", "/etc/hostname"]
    pq.write_table(pa.table({"image": names, "text": ["a", "b", "c"]}), folder / "rows.parquet")
    data = DataConfig(
        name="parquet", path=str(folder), resolution=32, validation_share=0, cache_dir=str(tmp_path / "cache")
    )
    source = open_files(data, ConditionConfig(), "train")
    assert source[0].key == "images/000.png"
    assert [problem(source, i) for i in (1, 2)] == ["image outside the data"] * 2


ODD_NAMES = ("loop.png", "a" * 300 + ".png", "b" * 5000, "loop.png/x.png", "pipe.png", "folder.png", "chain/1.png")


def put_odd_files(root):
    (root / "loop.png").symlink_to("loop.png")
    (root / "chain").symlink_to("nwod")
    (root / "nwod").symlink_to("chain")
    os.mkfifo(root / "pipe.png")
    (root / "folder.png").mkdir()


@pytest.mark.parametrize("part", ["file_name", "mask_file_name", "conditioning_image_file_name"])
def test_names_that_the_disk_refuses(folder, part):
    lines = read_metadata(folder)
    put_odd_files(folder)
    write_metadata(folder, [*lines, *({**lines[0], part: name} for name in ODD_NAMES)])
    source = opened(folder)
    what = {"file_name": "image", "mask_file_name": "mask"}.get(part, "condition")
    reasons = [problem(source, 6 + number) for number in range(len(ODD_NAMES))]
    assert set(reasons) <= {f"{what} unreadable", f"{what} missing"} and reasons[0] == f"{what} unreadable"
    assert source[5].caption == "picture 5"
    for number in range(len(ODD_NAMES)):
        with pytest.raises(BadRow) as bad:
            source[6 + number]
        assert len(str(bad.value)) <= 500


@pytest.mark.parametrize("workers", [0, 2])
def test_odd_rows_are_replaced_in_workers_too(folder, workers):
    lines = read_metadata(folder)
    put_odd_files(folder)
    odd = [{**lines[0], "file_name": name} for name in ODD_NAMES] + [{**lines[0], "text": "x\ud83d"}]
    write_metadata(folder, [*lines, *odd])
    loaded = batches(opened(folder), workers, stop=8)
    assert len(loaded) == 8 and sum(len(batch) for batch in loaded) == 24
    assert {p.reason for batch in loaded for p in batch.problems} >= {"image unreadable", "image missing"}


def test_a_locked_folder_is_a_bad_row(folder, monkeypatch):
    stat = Path.stat

    def locked(self, **options):
        if self.name == "002.png":
            raise PermissionError(13, "Permission denied", str(self))
        return stat(self, **options)

    monkeypatch.setattr(Path, "stat", locked)
    source = opened(folder)
    assert problem(source, 2) == "image unreadable" and source[3].caption == "picture 3"


def test_captions_that_the_disk_refuses(folder, tmp_path):
    root = to_folders(folder, tmp_path / "folders")
    for name in ("000", "001", "002", "003", "004"):
        (root / name / "caption.txt").unlink()
    (root / "000" / "caption.txt").symlink_to("caption.txt")
    os.mkfifo(root / "001" / "caption.txt")
    (root / "002" / "caption.txt").mkdir()
    (root / "003" / "caption.txt").write_bytes(b"word " * 300_000)
    (root / "004" / "caption.txt").write_bytes(b"word " * 20_000)
    data = DataConfig(name="folder", path=str(root), resolution=32, validation_share=0)
    source = open_files(data, ConditionConfig(kind="depth"), "train")
    assert [problem(source, i) for i in range(4)] == [
        "caption unreadable", "caption missing", "caption missing", "caption too long"
    ]  # fmt: skip
    assert len(source[4].caption) == 99_999


def test_letters_that_are_line_ends_elsewhere_stand_in_captions(folder):
    lines = read_metadata(folder)
    for number, letter in enumerate("\u2028\u2029\x85\x0b\x0c\x1e"):
        lines[number]["text"] = f"a{letter}b"
    content = "\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    (folder / "metadata.jsonl").write_text(content, encoding="utf-8")
    source = opened(folder)
    assert [source[i].caption[1] for i in range(3)] == ["\u2028", "\u2029", "\x85"]


# What happens to them while training


@pytest.fixture
def damaged(folder):
    (folder / "images" / "001.png").write_bytes(b"")
    change(folder, 4, text=None)
    return opened(folder)


def batches(source, workers, seed=0, start=0, stop=6):
    loader = DataLoader(
        MaskedSamples(source, MaskConfig(), seed),
        batch_sampler=PlanSampler(SamplePlan(len(source), seed), 3, start, stop),
        collate_fn=collate,
        num_workers=workers,
        generator=torch.Generator(),
    )
    return list(loader)


def test_bad_rows_are_replaced_alike_in_every_worker_and_after_a_resume(damaged):
    alone = batches(damaged, 0)
    for other in (batches(damaged, 2), batches(damaged, 0, stop=2) + batches(damaged, 0, start=2)):
        assert [(b.keys, b.captions, b.problems) for b in other] == [(b.keys, b.captions, b.problems) for b in alone]
        assert all(torch.equal(a.pixels, b.pixels) for a, b in zip(alone, other, strict=True))
    keys = [key for batch in alone for key in batch.keys]
    assert len(keys) == 18 and not {"images/001.png", "images/004.png"} & set(keys)
    met = {(p.key, p.reason) for batch in alone for p in batch.problems}
    assert met == {("images/001.png", "image of unknown format"), ("images/004.png", "caption missing")}
    samples = MaskedSamples(damaged, MaskConfig(), 0)
    stand_ins = {samples[SampleRef(1, epoch)].key for epoch in range(12)}
    assert len(stand_ins) > 1  # not always the same neighbour


def test_nothing_usable_is_a_batch_of_problems(folder):
    for file in (folder / "images").iterdir():
        file.write_bytes(b"")
    for batch in batches(opened(folder), 0, stop=1):
        assert len(batch) == 0 and len(batch.problems) == 3 * ATTEMPTS


def test_a_mistake_in_the_settings_is_not_a_bad_row(folder):
    change(folder, 0, mask_file_name=None)
    samples = MaskedSamples(opened(folder, mask_column=None), MaskConfig(kind="objects"), 0)
    with pytest.raises(ValueError, match="'objects' needs object masks"):
        samples[SampleRef(0, 0)]


def test_an_example_remembers_whom_it_replaces(damaged):
    samples = MaskedSamples(damaged, MaskConfig(), 0)
    example = samples[SampleRef(1, 0)]
    assert example.problems[0].key == "images/001.png"
    assert replace(example, problems=()).key == samples[SampleRef(int(example.key[-7:-4]), 0)].key


def test_names_that_are_no_text(folder):
    change(folder, 2, file_name="\udcff.png")
    source = opened(folder)
    assert problem(source, 2) == "image missing" and source.key(2) == "?.png" and source.fingerprints
