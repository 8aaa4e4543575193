"""Photos, an adapter and arguments of evaluations, and workers that share them."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from set_helpers import SIDE

from localctl.evaluation import compare, fid, generated_set, plain


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write twelve small photos with captions, one of them damaged."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    lines = []
    for i in range(12):
        small = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
        Image.fromarray(small).resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(folder / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": f"photo {i}"}))
    (folder / "7.png").write_bytes(b"no image")
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture
def arguments(sd_folder: Path, photos: Path, tmp_path: Path) -> list[str]:
    return [
        f"base={sd_folder}",
        "data=imagefolder",
        f"data.path={photos}",
        f"data.resolution={SIDE}",
        "part=train",
        "num_images=5",
        "batch_size=2",
        "num_inference_steps=2",
        "device=cpu",
        f"output_dir={tmp_path / 'fid'}",
    ]


@pytest.fixture
def adapter(make_adapter: Any, sd_folder: Path, tmp_path: Path) -> str:
    condition = {"kind": "canny", "low": 50, "high": 100, "cells": 8, "channels": 1}
    make_adapter(condition=condition, base=str(sd_folder)).save_pretrained(tmp_path / "adapter")
    return f"adapter={tmp_path / 'adapter'}"


@pytest.fixture
def pickled_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Instead of Ray's workers: two in this process, to which everything goes as pickled bytes, and comes back so."""

    def again(value: Any) -> Any:
        return pickle.loads(pickle.dumps(value))

    def spread(work: Any, make: Callable[[], Any], pieces: Sequence[Any], workers: int, _: str = "") -> Iterator[Any]:
        made = [again(make)() for _ in range(workers)]
        for number, piece in enumerate(pieces):
            yield again(made[number % workers](again(piece)))

    for module in (fid, generated_set, compare, plain):
        monkeypatch.setattr(module, "spread", spread)
