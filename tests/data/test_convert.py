"""data/convert.py: datasets of other forms become the parquet files that training reads, once and whole."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
import tarfile
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from file_data import identities, picture, png, write_imagefolder
from process_helpers import finish, start, wait_for

from localctl.conditions import ConditionConfig
from localctl.data import DataConfig, open_files

sys.path.append(str(Path(__file__).parents[2] / "data"))
import convert
import sources

COLUMN = ConditionConfig(kind="column", channels=1)


@pytest.fixture(autouse=True)
def quiet_and_own_cache(monkeypatch, tmp_path):
    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def sample(i, size=(40, 56), **more):
    """The files of a sample in a tar, by their endings."""
    image = png(picture(i, size))
    return {"png": image, "mask.png": image, "conditioning_image.png": image, "txt": f"picture {i}".encode(), **more}


def write_tar(path: Path, samples, names=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number, files in enumerate(samples):
            for ending, content in files.items():
                info = tarfile.TarInfo(f"{names[number] if names else f'{number:05}'}.{ending}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture
def tars(tmp_path):
    """9 samples in two tars."""
    write_tar(tmp_path / "tars" / "00000.tar", [sample(i) for i in range(5)])
    write_tar(tmp_path / "tars" / "00001.tar", [sample(i) for i in range(5, 9)])
    return tmp_path / "tars"


def run(place, output, *more):
    argv = ["--input", str(place), "--output", str(output), "--rows_per_file", "2", "--threads", "2"]
    return convert.main([*argv, *more])


BOTH = ("--image_columns", "mask", "conditioning_image")


def opened(output, condition=COLUMN, **options):
    data = DataConfig(name="parquet", path=str(output), resolution=32, validation_share=0, **options)
    return open_files(data, condition, "train")


def contents(output):
    return {file.name: file.read_bytes() for file in sorted(output.glob("*.parquet"))}


def records(output):
    return [json.loads(line) for line in (output / "manifest.jsonl").read_text().splitlines()][1:]


def test_tars_become_rows_that_training_reads(tars, tmp_path, capsys):
    assert run(tars, tmp_path / "out", *BOTH) == 0
    assert "9 samples in" in capsys.readouterr().out
    source = opened(tmp_path / "out")
    assert len(source) == 9 and source.rows.sizes().tolist() == [[40, 56]] * 9
    assert list(source.rows.keys)[:2] == ["00000.tar/00000.png", "00000.tar/00001.png"]
    for i in range(9):
        example = source[i]
        shown = [(example.pixels[None] + 1) / 2, example.condition[None], example.mask[None]]
        assert [identities(part) for part in shown] == [[i]] * 3 and example.caption == f"picture {i}"
    assert [(r["file"], r["rows"]) for r in records(tmp_path / "out")][:3] == [
        ("train-00000-0000.parquet", 2), ("train-00000-0001.parquet", 2), ("train-00000-0002.parquet", 1),
    ]  # fmt: skip


def test_what_img2dataset_writes_is_read(tmp_path, capsys):
    described = json.dumps({"caption": "from the list", "url": "http://a", "key": "0"}).encode()
    tar = write_tar(
        tmp_path / "tars" / "00000.tar", [{"jpg": png(picture(0)), "json": described, "txt": b"from the list"}]
    )
    pq.write_table(pa.table({"url": ["http://a"]}), tar.with_suffix(".parquet"))  # its statistics
    assert run(tar.parent, tmp_path / "a") == 0
    assert "columns not used: caption, key, url" in capsys.readouterr().out
    table = {"url": ["x", "y"], "caption": ["one", "two"], "jpg": [png(picture(1)), None], "status": ["success", "no"]}
    (tmp_path / "tables").mkdir()
    pq.write_table(pa.table(table), tmp_path / "tables" / "00000.parquet")
    assert run(tmp_path / "tables", tmp_path / "b") == 0
    said = capsys.readouterr().out
    assert "left out: 1 image missing" in said and "left out 00000.parquet/00000001: it has no image" in said
    for output, caption in (("a", "from the list"), ("b", "one")):
        source = opened(tmp_path / output, ConditionConfig(), mask_column=None)
        assert [source[i].caption for i in range(len(source))] == [caption]


def test_a_dataset_is_streamed_once(tmp_path):
    """A folder is opened by `datasets` as a dataset of the hub is."""
    root = write_imagefolder(tmp_path / "data", 5)
    assert run(root, tmp_path / "out", *BOTH) == 0
    source = opened(tmp_path / "out")
    assert sorted(source[i].caption for i in range(5)) == [f"picture {i}" for i in range(5)]
    assert [identities(source[i].mask[None])[0] for i in range(5)] == [int(source[i].caption[-1]) for i in range(5)]
    parts = contents(tmp_path / "out")
    (tmp_path / "out" / sorted(parts)[1]).unlink()
    assert run(root, tmp_path / "out", *BOTH) == 0 and contents(tmp_path / "out") == parts


def test_bad_samples_are_named_and_counted(tmp_path, capsys):
    bad = [
        {"png": b"<html>", "txt": b"a"},
        {"png": png(picture(1))},
        {"png": png(picture(1)), "txt": b" "},
        {"txt": b"a"},
        {"png": png(picture(1)), "json": b"{", "txt": b"a"},
        {"png": png(picture(1))[:60], "txt": b"a"},
        sample(2, **{"mask.png": png(picture(2, (40, 20)))}),
        {"png": png(picture(1, (300, 400))), "txt": b"a"},
    ]
    write_tar(tmp_path / "tars" / "x.tar", [*bad, sample(3)])
    assert run(tmp_path / "tars", tmp_path / "out", "--image_columns", "mask", "--max_pixels", "100000") == 0
    reasons = [reason for record in records(tmp_path / "out") for _, reason, _ in record["bad"]]
    assert reasons == [
        "image of unknown format", "caption missing", "caption missing", "image missing", "metadata damaged",
        "image damaged", "mask of another shape", "image too large",
    ]  # fmt: skip
    said = capsys.readouterr().out
    assert "1 samples in" in said and "2 caption missing" in said and "left out 00006: the mask is 20x40" in said
    write_tar(tmp_path / "all_bad" / "x.tar", bad)
    assert run(tmp_path / "all_bad", tmp_path / "other", "--image_columns", "mask", "--max_pixels", "100000") == 2
    assert "No sample of" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["cut", "header", "no end", "no tar"])
def test_a_damaged_tar_is_named_and_its_first_samples_are_kept(tars, tmp_path, capsys, damage):
    content = bytearray((tars / "00000.tar").read_bytes())
    with tarfile.open(tars / "00000.tar") as tar:
        third = next(member for member in tar if member.name.startswith("00002."))
    changed = {
        "cut": content[: third.offset_data + 20],
        "header": content[: third.offset] + b"x" * 512 + content[third.offset_data :],
        "no end": content[: third.offset],
        "no tar": b"x" * 2000,
    }[damage]
    (tars / "00000.tar").write_bytes(changed)
    assert run(tars, tmp_path / "out") == 0
    said, kept = capsys.readouterr().out, 0 if damage == "no tar" else 2
    assert f"{kept + 4} samples in" in said and "1 tar damaged" in said and "the tar is damaged" in said
    write_tar(tars / "00000.tar", [sample(i) for i in range(5)])  # fetched again: another size
    assert run(tars, tmp_path / "out") == 0 and "9 samples in" in capsys.readouterr().out


def test_a_second_call_writes_only_what_is_missing(tars, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    assert run(tars, out) == 0
    whole, files = contents(out), sorted(contents(out))
    assert run(tars, out) == 0 and "0 files written now" in capsys.readouterr().out
    (out / files[1]).unlink()
    (out / files[3]).write_bytes(whole[files[3]][:-1])
    assert run(tars, out) == 0 and "2 files written now" in capsys.readouterr().out
    assert contents(out) == whole
    flipped = bytearray(whole[files[0]])
    flipped[100] ^= 1
    (out / files[0]).write_bytes(flipped)
    assert run(tars, out) == 0 and contents(out) != whole  # found by --verify
    assert run(tars, out, "--verify") == 0 and contents(out) == whole
    assert f"{files[0]} is damaged (sha256)" in capsys.readouterr().err
    assert {r["file"]: r["rows"] for r in records(out)} == {name: len(pq.read_table(out / name)) for name in files}
    for file in tars.iterdir():
        file.rename(tmp_path / file.name)  # converted tars may go
    write_tar(tars / "00002.tar", [sample(9)])
    assert run(tars, out) == 0 and len(contents(out)) == len(whole) + 1


def slowly(place, out):
    """Convert; each sample takes its time."""
    unpacked = sources._unpacked

    def slow(*arguments):
        with Path(out, ".progress").open("a") as file:
            file.write("x")
        return unpacked(*arguments)

    sources._unpacked = slow
    return run(place, out)


def test_a_killed_conversion_goes_on_without_a_double_or_missing_sample(tmp_path):
    tars, out = tmp_path / "tars", tmp_path / "out"
    for tar in range(2):
        write_tar(tars / f"{tar}.tar", [sample(i % 20) for i in range(40)])
    assert run(tars, tmp_path / "whole") == 0
    out.mkdir()
    for samples in (9, 55):
        process = start(slowly, tars, out)
        wait_for(lambda at=samples: (out / ".progress").exists() and (out / ".progress").stat().st_size >= at, process)
        os.kill(process.pid, signal.SIGKILL)
        assert finish(process) == -signal.SIGKILL
        assert all(len(pq.read_table(out / name)) == 2 for name in contents(out))  # no half file
    before = contents(out)
    assert run(tars, out) == 0
    assert contents(out) == contents(tmp_path / "whole") and before.items() <= contents(out).items()
    assert not list(out.glob(".*.part")) and len(opened(out, ConditionConfig(), mask_column=None)) == 80


def test_users_errors(tars, tmp_path, capsys):
    def fails(*argv, code=2):
        assert run(*argv) == code
        return capsys.readouterr().err

    assert run(tars, tmp_path / "out") == 0
    assert "with another --image_columns ('[]', now" in fails(tars, tmp_path / "out", "--image_columns", "mask")
    assert "exists and is not empty" in fails(tars, tars)
    assert "cannot be opened" in fails(tmp_path / "nothing", tmp_path / "b")
    (tmp_path / "a.txt").write_text("x")
    assert "neither a tar nor a parquet file" in fails(tmp_path / "a.txt", tmp_path / "c")
    assert "must be above 0" in fails(tars, tmp_path / "d", "--threads", "0")
    (tars / "a").mkdir()
    write_tar(tars / "a" / "b.tar", [sample(0)])
    write_tar(tars / "a_b.tar", [sample(0)])
    assert "would write the same files" in fails(tars, tmp_path / "e")


def test_a_full_disk_is_one_sentence_and_the_next_call_continues(tars, tmp_path, capsys, monkeypatch):
    write, calls = pq.ParquetWriter.write_table, []

    def full(self, *arguments):
        calls.append(1)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        return write(self, *arguments)

    monkeypatch.setattr(pq.ParquetWriter, "write_table", full)
    assert run(tars, tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert "No space left on device" in error and "call again to continue" in error
    assert len(contents(tmp_path / "out")) == 2
    monkeypatch.undo()
    datasets.disable_progress_bars()
    assert run(tars, tmp_path / "out") == 0 and "9 samples" in capsys.readouterr().out
