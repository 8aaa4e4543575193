"""Pipelines are read from their files once in a process; whoever loads the same files again gets a copy."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

_PLAIN = (str, bool, torch.dtype, type(None))
_SEVERAL = 6  # pipelines that are kept


class Copies:
    """Copies of a pipeline, made several times faster than by ``deepcopy``: it is pickled once, its tensors aside."""

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self._tensors: list[Tensor] = []
        self._pickled = io.BytesIO()
        _WithoutTensors(self._pickled, self._tensors).dump(pipe)

    def copy(self) -> Any:
        return _WithTensors(io.BytesIO(self._pickled.getvalue()), self._tensors).load()


class _WithoutTensors(pickle.Pickler):
    def __init__(self, file: io.BytesIO, tensors: list[Tensor]) -> None:
        super().__init__(file)
        self._tensors = tensors

    def persistent_id(self, obj: Any) -> int | None:
        if not isinstance(obj, Tensor):
            return None
        self._tensors.append(obj)
        return len(self._tensors) - 1


class _WithTensors(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, tensors: list[Tensor]) -> None:
        super().__init__(file)
        self._tensors = tensors
        self._known: dict[int, Any] = {}  # a tensor in two places is one in the copy

    def persistent_load(self, pid: int) -> Tensor:
        return copy.deepcopy(self._tensors[pid], self._known)


def _state(folder: Path) -> tuple[Any, ...]:
    """What changes whenever a file of ``folder`` is written, replaced or removed."""
    found = ((path, path.stat()) for path in sorted(folder.resolve().rglob("*")) if path.is_file())
    return tuple((str(path), at.st_ino, at.st_size, at.st_mtime_ns, at.st_ctime_ns) for path, at in found)


@pytest.fixture(scope="session", autouse=True)
def loaded_once() -> Iterator[None]:
    """Let ``DiffusionPipeline.from_pretrained`` read the same files with the same options once. Processes that tests
    start always read them."""
    load, kept, seen = DiffusionPipeline.from_pretrained.__func__, {}, set()

    def from_pretrained(kind: type, folder: Any, **options: Any) -> Any:
        if not Path(folder).is_dir() or not all(isinstance(value, _PLAIN) for value in options.values()):
            return load(kind, folder, **options)
        key = (kind, str(folder), _state(Path(folder)), *sorted(options.items()))
        if key not in kept:
            pipe = load(kind, folder, **options)
            if key not in seen:  # most folders of a test's own are read once
                seen.add(key)
                return pipe
            if len(kept) == _SEVERAL:
                del kept[next(iter(kept))]
            kept[key] = Copies(pipe)
        return kept[key].copy()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DiffusionPipeline, "from_pretrained", classmethod(from_pretrained))
        yield
