"""Convert tars in the webdataset form, parquet files or a hub dataset to the parquet files that training reads.

    python data/convert.py --input tars --output dataset            # webdataset; also what img2dataset wrote
    python data/convert.py --input USER/NAME --output dataset       # a hub dataset, streamed once
    python train_adapter.py data=parquet data.path=dataset base=sd15

Every image is decoded once. Samples that training could not use are left out, named in manifest.jsonl and counted. The
files have columns image, text, height and width, and the other columns that --image_columns names. manifest.jsonl has a
line per file, with its sha256. A second call continues where the first one stopped; --verify reads finished files, and
writes damaged ones again.

Training does not stream such data: the shuffle of a stream is not exact after a resume, that of rows is.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from sources import Sample, Unit, find_units
from tqdm import tqdm

from localctl.cli.arguments import Arguments
from localctl.cli.program import one_sentence
from localctl.data.bad_rows import SHOWN, BadRow
from localctl.data.geometry import same_shape
from localctl.data.rows import captions_of, split_lines
from localctl.files import append, first_line, json_lines, open_to_append, parse_json, sha256, write_text
from localctl.images import ImageError, Limits, read_photo
from localctl.labels import shorten
from localctl.lock import FolderLock
from localctl.sizes import PHOTO_PIXELS

MANIFEST = "manifest.jsonl"
GROUP = 100  # rows that are in memory at a time
OTHER_NAMES = {"image": ("jpg", "jpeg", "png", "webp"), "text": ("caption", "txt")}  # of img2dataset and webdataset
IMAGE = pa.struct({"bytes": pa.binary(), "path": pa.string()})
FIXED = ("input", "split", "image_column", "caption_column", "image_columns", "rows_per_file", "max_pixels")


@one_sentence("convert.py")
def main(argv: Sequence[str] | None = None) -> int:
    """Convert. Returns 0 even if some samples were bad; 2 after a user's error; 1 on a full disk or a lost network."""
    args = parse(argv)
    units = find_units(args.input, args.split, args.dataset_config_name, args.revision)
    lock = FolderLock(args.output)
    try:
        job = Conversion(args, units)
        try:
            for unit in tqdm(units, desc="converting", unit="part", mininterval=1):
                job.convert(unit)
        except OSError as error:
            raise OSError(
                f"The conversion stopped: {(error.strerror and str(error)) or first_line(error)}. What is written is "
                "complete; call again to continue."
            ) from error
        finally:
            job.close()
    finally:
        lock.release()
    print(job.summary())
    if not job.rows:
        raise ValueError(f"No sample of {args.input} is usable; see the reasons in {args.output / MANIFEST}.")
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the flags."""
    parser = Arguments("convert.py", __doc__)
    add = parser.add_argument
    add("--input", required=True, help="a tar, a parquet file, a folder of either, or a dataset of the hub, USER/NAME")
    add("--output", type=Path, required=True, help="folder for the parquet files and manifest.jsonl")
    add("--split", default="train", help="of a hub dataset; also the name of the files")
    add("--dataset_config_name", help="of a hub dataset that has several")
    add("--revision", help="branch, tag or commit of a hub dataset")
    add("--image_column", default="image", help="in a tar: what stands between the name's first dot and the extension")
    add("--caption_column", default="text", help="a column, or a value of a tar's .json")
    add("--image_columns", nargs="*", default=[], help="further columns of images, such as mask conditioning_image")
    add("--rows_per_file", type=int, default=1000, help="samples of the input per parquet file")
    add("--max_pixels", type=int, default=PHOTO_PIXELS, help="larger images are bad; see data.max_pixels")
    add("--threads", type=int, default=os.cpu_count() or 1, help="images decoded at a time")
    add("--verify", action="store_true", help="compare finished files with their sha256")
    args = parser.read(argv)
    args.output = args.output.expanduser()
    if not (args.rows_per_file > 0 and args.threads > 0 and args.max_pixels > 0):
        parser.error("--rows_per_file, --threads and --max_pixels must be above 0")
    return args


class Conversion:
    """Writes the files that are missing. rows: of all files. bad: samples left out, by reason."""

    def __init__(self, args: argparse.Namespace, units: Sequence[Unit]) -> None:
        self.args, self.manifest = args, args.output / MANIFEST
        self.stems = file_stems(units)
        self.limits = Limits(args.max_pixels)
        self.rows, self.written = 0, 0
        self.bad: Counter[str] = Counter()
        self.examples: list[str] = []
        self.unused: set[str] = set()
        for left in args.output.glob(".*.part"):  # of a killed run
            left.unlink()
        header = {name: str(getattr(args, name)) for name in FIXED}
        self.done = self._read_manifest(header, {unit.name: unit for unit in units})
        self.pool = ThreadPoolExecutor(args.threads)

    def close(self) -> None:
        """End the threads."""
        self.pool.shutdown(cancel_futures=True)

    def _read_manifest(self, header: dict[str, str], units: dict[str, Unit]) -> dict[tuple[str, int], dict[str, Any]]:
        """Return (unit, number) -> record of the finished files, and write a manifest of these alone.

        ValueError if the folder holds something else, or was written with other arguments.
        """
        lines = split_lines(self.manifest.read_bytes()) if self.manifest.exists() else []
        records = [record for line in lines if (record := parsed(line))]
        if not records:
            others = [file.name for file in self.args.output.iterdir() if not file.name.startswith(".")]
            if set(others) - {MANIFEST}:
                raise ValueError(f"{self.args.output} exists and is not empty; choose another --output.")
        elif changed := [name for name in FIXED if records[0].get(name) != header[name]]:
            raise ValueError(
                f"{self.args.output} was converted with another --{changed[0]} ({records[0].get(changed[0])!r}, now "
                f"{header[changed[0]]!r}); choose another --output."
            )
        done = {
            (record["unit"], record["number"]): record
            for record in records[1:]
            if (record["unit"] not in units or units[record["unit"]].unchanged(record)) and self._is_complete(record)
        }
        write_text(self.manifest, json_lines([header, *done.values()]))
        return done

    def _is_complete(self, record: dict[str, Any]) -> bool:
        file = self.args.output / record["file"]
        if not record["rows"]:
            return True
        if not file.is_file() or file.stat().st_size != record["bytes"]:
            return False
        if self.args.verify and sha256(file) != record["sha256"]:
            print(f"{file} is damaged (sha256) and is written again", file=sys.stderr)
            return False
        return True

    def convert(self, unit: Unit) -> None:
        """Write the files of ``unit`` that are missing."""
        number, rows_per_file = 0, self.args.rows_per_file
        while True:
            samples: Iterator[Sample] | None = None
            if (unit.name, number) not in self.done:
                samples = unit.samples(number * rows_per_file)
            while samples is not None and (unit.name, number) not in self.done:
                part = islice(samples, rows_per_file)
                record = self._write(unit, number, part)
                following = next(samples, None)
                record["last"] = following is None
                self._record(record)
                if following is None:
                    self._count(record)
                    return
                samples = chain([following], samples)
                self._count(record)
                number += 1
            while (record := self.done.get((unit.name, number))) is not None:
                self._count(record)
                if record["last"]:
                    return
                number += 1

    def _write(self, unit: Unit, number: int, samples: Iterator[Sample]) -> dict[str, Any]:
        """Write a file of usable samples atomically, and return its record."""
        name = f"{self.args.split}-{self.stems[unit.name]}-{number:04}.parquet"
        file, part = self.args.output / name, self.args.output / f".{name}.part"
        rows, bad, read = 0, [], number * self.args.rows_per_file
        writer = None
        try:
            while group := list(islice(samples, GROUP)):
                made = list(self.pool.map(lambda pair: self._row(unit, *pair), enumerate(group, start=read)))
                read += len(group)
                good = [row for row in made if isinstance(row, dict)]
                bad += [row for row in made if not isinstance(row, dict)]
                if good:
                    writer = writer or pq.ParquetWriter(part, self._schema(), use_dictionary=False, compression="none")
                    writer.write_table(pa.Table.from_pylist(good, self._schema()))
                rows += len(good)
        finally:
            if writer is not None:
                writer.close()
        about = {"unit": unit.name, "size": unit.size, "modified": unit.modified}
        record = {**about, "number": number, "file": name, "rows": rows, "bad": bad}
        if rows:
            with part.open("rb+") as written:
                os.fsync(written.fileno())
            record |= {"bytes": part.stat().st_size, "sha256": sha256(part)}
            part.replace(file)
            self.written += 1
        return record

    def _schema(self) -> pa.Schema:
        images = {name: IMAGE for name in ("image", *self.args.image_columns)}
        return pa.schema({**images, "text": pa.list_(pa.string()), "height": pa.int32(), "width": pa.int32()})

    def _row(self, unit: Unit, number: int, sample: Sample) -> dict[str, Any] | list[str]:
        """Return the row of a sample, or [name, reason, detail] if it is bad."""
        name = sample.name or f"{unit.name}/{number:08}"
        try:
            if sample.problem is not None:
                raise sample.problem
            return self._checked(unit, name, sample.fields)
        except BadRow as bad:
            return [name, bad.reason, str(bad)]
        except ImageError as error:
            return [name, f"image {error.reason}", str(error)]

    def _checked(self, unit: Unit, name: str, fields: dict[str, Any]) -> dict[str, Any]:
        args = self.args
        names = {"image": args.image_column, **{column: column for column in args.image_columns}}
        used = {own: there for own, column in names.items() if (there := found(fields, column)) is not None}
        caption = found(fields, args.caption_column)
        self.unused.update(fields.keys() - {*used.values(), caption})
        row: dict[str, Any] = {"text": list(captions_of(None if caption is None else fields[caption]))}
        for own, column in names.items():
            if own not in used:
                raise BadRow(f"{own} missing", f"it has no {column}")
            content, path = as_image(fields[used[own]])
            if content is None:
                raise BadRow(f"{own} missing", f"its {column} is empty")
            size = read_photo(content, f"the {own}", self.limits)[1]
            if own == "image":
                row |= {"height": size[0], "width": size[1]}
            elif not same_shape(size, (row["height"], row["width"])):
                raise BadRow(f"{own} of another shape", f"the {own} is {size[1]}x{size[0]}, another shape")
            row[own] = {"bytes": content, "path": f"{unit.name}/{path}" if path else name}
        return row

    def _record(self, record: dict[str, Any]) -> None:
        descriptor = open_to_append(self.manifest)
        try:
            append(descriptor, json_lines([record]).encode(), self.manifest)
        finally:
            os.close(descriptor)

    def _count(self, record: dict[str, Any]) -> None:
        self.rows += record["rows"]
        self.bad.update(reason for _, reason, _ in record["bad"])
        lines = (f"left out {shorten(name)}: {detail}" for name, _, detail in record["bad"])
        self.examples += islice(lines, max(0, SHOWN - len(self.examples)))

    def summary(self) -> str:
        """Return what was converted and what was not."""
        left_out = ", ".join(f"{number} {reason}" for reason, number in self.bad.most_common())
        lines = [f"{self.rows} samples in {self.args.output} ({self.written} files written now)"]
        lines += [f"left out: {left_out}; all are named in {self.manifest}", *self.examples] if left_out else []
        if self.unused:
            lines.append(f"columns not used: {', '.join(sorted(self.unused))} (--image_columns, --caption_column)")
        return "\n".join(lines)


def file_stems(units: Sequence[Unit]) -> dict[str, str]:
    """Return name of unit -> part of its files' names. ValueError if two are the same."""
    stems = {unit.name: re.sub(r"[^\w.-]", "_", unit.name.partition(".")[0]) for unit in units}
    double = [name for name, count in Counter(stems.values()).items() if count > 1]
    if double:
        raise ValueError(f"Two parts of the input would write the same files {double[0]}; rename one of them.")
    return stems


def found(fields: dict[str, Any], column: str) -> str | None:
    """Return the name under which ``fields`` have ``column``, or one of its usual names; None if they do not."""
    names = (column, *OTHER_NAMES.get(column, ()))
    return next((name for name in names if fields.get(name) is not None), None)


def as_image(value: Any) -> tuple[bytes | None, str]:
    """Return the bytes of an image and its name, if it has one."""
    if isinstance(value, dict):
        return value.get("bytes"), str(value.get("path") or "")
    return (value if isinstance(value, bytes) else None), ""


def parsed(line: bytes) -> dict[str, Any]:
    """Return a line of the manifest; empty for one that a killed run left incomplete."""
    try:
        record = parse_json(line)
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


if __name__ == "__main__":
    sys.exit(main())
