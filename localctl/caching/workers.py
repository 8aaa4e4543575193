"""The work of ``localctl cache`` inside the processes of Ray: read a row, encode it, write it.

Rows travel as Arrow tables. Networks see groups of a fixed size, filled up with repeats: so the bits of a row depend
neither on its company nor on the number of workers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from localctl.data.bad_rows import BadRow
from localctl.data.files import FileSource
from localctl.data.plan import SampleRef
from localctl.data.sample import Source
from localctl.denoisers import denoiser_of
from localctl.diffusion import posterior
from localctl.encodings.codec import pack, pack_text
from localctl.encodings.recipes import CONDITIONS, ENCODERS, TEXTS
from localctl.encodings.source import content_of, files_of, visited
from localctl.encodings.store import EncodedRow, as_batch
from localctl.files import write_json, writing
from localctl.training.data import make_source
from localctl.training.frozen import WEIGHTS, dtype_of, load_frozen
from localctl.training.resume import fingerprints
from localctl.training.settings import TrainSettings

TEXT_GROUP = 32
_MOST_GROUP, _GROUP_PIXELS = 16, 8 * 512**2
PROBLEM, FACTS = "problem", "facts.json"
Table = Any  # of Arrow, which has no types


@dataclass(frozen=True)
class Work:
    """What a worker needs to know.

    precision: no, fp16 or bf16. parts: the folder for finished rows, on a disk that all workers see.
    """

    settings: TrainSettings
    kind: str
    precision: str
    parts: Path

    @property
    def group(self) -> int:
        """How many rows a network sees at a time; it depends on the settings alone."""
        height, width = self.settings.data.size
        return TEXT_GROUP if self.kind == TEXTS else max(1, min(_MOST_GROUP, _GROUP_PIXELS // (height * width)))


class Reader:
    """Reads images, with ``conditions`` whole examples. Returns rows whose payload are the pixels as bytes (IMAGES), or
    what is to be stored (CONDITIONS); a row that cannot be used has a ``problem`` instead."""

    def __init__(self, work: Work) -> None:
        _be_quiet()
        self.work = work
        self.source: Source = make_source(work.settings, "train")

    def __call__(self, table: Table) -> Table:
        columns = (table.column(name).to_pylist() for name in ("id", "index", "variant", "size"))
        places = zip(*columns, strict=True)
        return _as_table([self._read(id, SampleRef(index, variant, size)) for id, index, variant, size in places])

    def _read(self, id: bytes, ref: SampleRef) -> EncodedRow:
        index = ref.sample
        try:
            example = visited(self.source, ref, self.work.settings.seed)
            if self.work.kind == CONDITIONS:
                assert isinstance(self.source, FileSource)
                about, payload = pack({"condition": example.condition, "mask": example.mask}, squeeze=True)
                return EncodedRow(id, files_of(self.source, index), about, payload)
            pixels = ((example.pixels + 1) * 127.5).round().to(torch.uint8)  # exact, as they were bytes
            about = {"view": example.view, "original": example.original, "caption": example.caption}
            about |= {"shape": list(pixels.shape), "size": list(pixels.shape[-2:])}
            return EncodedRow(id, content_of(self.source, index, example), about, pixels.numpy().tobytes())
        except BadRow as bad:
            return EncodedRow(id, id, {PROBLEM: [bad.key, bad.reason, str(bad)]}, b"")


class Writer:
    """Writes finished rows to a file, whole or not at all, and returns how many there are."""

    def __init__(self, work: Work) -> None:
        _be_quiet()
        self.work = work

    def __call__(self, table: Table) -> Table:
        return self._write(rows_of(table))

    def _write(self, rows: Sequence[EncodedRow]) -> Table:
        if rows:
            path = self.work.parts / f"{rows[0].id.hex()}.parquet"  # the same again if Ray repeats a task
            with writing(path) as file:
                pq.write_table(_as_table(rows), file, compression="none")
        bad = sum(PROBLEM in row.about for row in rows)
        return pa.table({"rows": [len(rows)], "bad": [bad]})


class Encoder(Writer):
    """Encodes images or captions on its own device, then writes them."""

    def __init__(self, work: Work) -> None:
        super().__init__(work)
        dtype = dtype_of(work.settings, work.precision)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        without = [part for part in WEIGHTS if part not in ENCODERS[work.kind]]
        self.device, self.pipe = device, load_frozen(work.settings, device, dtype, without)
        self.denoiser = denoiser_of(self.pipe)
        self.denoiser.text_length = work.settings.max_sequence_length
        self.half = dtype if dtype != torch.float32 else None
        facts = work.parts.parent / FACTS
        if not facts.exists():
            write_json(facts, fingerprints({part: getattr(self.pipe, part, None) for part in ENCODERS[work.kind]}))

    def __call__(self, table: Table) -> Table:
        rows = rows_of(table)
        encode = self._captions if self.work.kind == TEXTS else self._images
        return self._write(list(encode(rows)))

    def _images(self, rows: Sequence[EncodedRow]) -> Iterator[EncodedRow]:
        usable = [row for row in rows if PROBLEM not in row.about]
        found: dict[bytes, Tensor] = {}
        for shape in dict.fromkeys(tuple(row.about["shape"]) for row in usable):
            same = [row for row in usable if tuple(row.about["shape"]) == shape]
            for group, filled in _groups(same, self.work.group):
                moments = self._moments(torch.stack([_pixels(row) for row in filled]))
                found |= {row.id: moments[place] for place, row in enumerate(group)}
        for row in rows:
            if row.id not in found:
                yield row
                continue
            about, payload = pack({"moments": found[row.id]})
            facts = {name: row.about[name] for name in ("view", "original", "caption", "size")}
            yield EncodedRow(row.id, row.content, about | facts, payload)

    @torch.no_grad()
    def _moments(self, pixels: Tensor) -> Tensor:
        """Return mean and standard deviation (B,2c,h,w), in the dtype in which they are stored: that of the VAE, for
        the same bits as while training, or half precision if the U-Net takes no more."""
        moments = torch.cat(posterior(self.pipe.vae, pixels.to(self.device)), dim=1)
        stored = self.pipe.vae.dtype if self.half is None or self.pipe.vae.dtype == self.half else torch.float16
        return moments.to(stored).cpu()

    def _captions(self, rows: Sequence[EncodedRow]) -> Iterator[EncodedRow]:
        for group, filled in _groups(rows, self.work.group):
            texts = self.denoiser.encode_captions([row.about["caption"] or "-" for row in filled]).to("cpu")
            for place, row in enumerate(group):
                text = texts[place : place + 1] if row.about["caption"] else self.denoiser.empty_caption().to("cpu")
                about, payload = pack_text(text)
                yield EncodedRow(row.id, row.content, about, payload)


def _pixels(row: EncodedRow) -> Tensor:
    values = np.frombuffer(row.payload, np.uint8).reshape(row.about["shape"])
    return torch.from_numpy(values.copy()) / 127.5 - 1


def _groups(rows: Sequence[EncodedRow], size: int) -> Iterator[tuple[list[EncodedRow], list[EncodedRow]]]:
    """Yield groups of up to ``size`` rows, as they are and filled up to ``size`` with repeats of the first."""
    for start in range(0, len(rows), size):
        group = list(rows[start : start + size])
        yield group, group + group[:1] * (size - len(group))


def rows_of(table: Any) -> list[EncodedRow]:
    """Return the rows of a table, or of an Arrow batch."""
    columns = [table.column(name).to_pylist() for name in ("id", "content", "about", "payload")]
    return [
        EncodedRow(id, content, json.loads(about), payload)
        for id, content, about, payload in zip(*columns, strict=True)
    ]


def _as_table(rows: Sequence[EncodedRow]) -> Table:
    return pa.Table.from_batches([as_batch(rows)])


def _be_quiet() -> None:
    """One thread per worker, whatever the machine offers."""
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
