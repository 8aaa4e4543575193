"""Compute what is needed of many scenes, in several processes; cache the rendered ones on disk."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import numpy as np
from tqdm import tqdm

from localctl.files import write_text
from localctl.micro.scenes import SIZE, scene

Job = tuple[str, str, int, int]  # profile, split, first scene, and the scene after the last
Block = TypeVar("Block")
BLOCK = 250  # scenes


@dataclass(frozen=True)
class SceneCache:
    """Rendered scenes. images: uint8 memmap (n, 128, 128, 3). centers: (x, y) of each scene's objects in pixels."""

    images: np.ndarray
    captions: list[str]
    centers: list[list[tuple[float, float]]]

    def __len__(self) -> int:
        return len(self.captions)

    def head(self, count: int) -> SceneCache:
        """Return the first ``count`` scenes."""
        return SceneCache(self.images[:count], self.captions[:count], self.centers[:count])


class TrainingScenes:
    """The scenes that the base is trained on, rendered into ``folder`` at first use."""

    def __init__(self, folder: Path, count: int) -> None:
        """``count``: number of basic scenes; of rich ones, two for every fifteen, and at least 200."""
        self._folder, self._count = folder, count

    @cached_property
    def basic(self) -> SceneCache:
        """Basic scenes."""
        return scene_cache(self._folder, "basic", self._count)

    @cached_property
    def both(self) -> list[SceneCache]:
        """Basic and rich scenes."""
        return [self.basic, scene_cache(self._folder, "rich", max(200, self._count * 2 // 15))]


def in_blocks(
    compute: Callable[[Job], Block], profile: str, split: str, count: int, workers: int | None, title: str
) -> Iterator[tuple[slice, Block]]:
    """Apply ``compute`` to blocks of the first ``count`` scenes; yield each block's place and result, in order.

    workers: number of processes; None: one for each core. A single block is computed in this process.
    """
    jobs = [(profile, split, i, min(i + BLOCK, count)) for i in range(0, count, BLOCK)]
    with tqdm(total=count, desc=title, mininterval=10) as bar:
        for job, block in zip(jobs, _computed(compute, jobs, workers), strict=True):
            yield slice(job[2], job[3]), block
            bar.update(job[3] - job[2])


def _computed(compute: Callable[[Job], Block], jobs: list[Job], workers: int | None) -> Iterator[Block]:
    workers = min(workers or os.cpu_count() or 1, len(jobs))
    if workers < 2:
        yield from map(compute, jobs)
        return
    # spawn: a forked process would inherit the locks of earlier compute threads, and hang
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(compute, jobs)


def _render(job: Job) -> tuple[np.ndarray, list[str], list[list[tuple[float, float]]]]:
    profile, split, start, stop = job
    scenes = [scene(i, profile, split) for i in range(start, stop)]
    images = np.stack([s.image for s in scenes])
    return images, [s.caption for s in scenes], [[o.center for o in s.objects] for s in scenes]


def scene_cache(folder: Path, profile: str, count: int, split: str = "train", workers: int | None = None) -> SceneCache:
    """Render the first ``count`` scenes of a profile into files, or read those of an earlier call.

    The index (JSON) is written last and marks the cache as complete.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{profile}-{split}-{count}"
    array_path, index_path = folder / f"{stem}.npy", folder / f"{stem}.json"
    if not index_path.exists():
        images = np.lib.format.open_memmap(array_path, "w+", np.uint8, (count, SIZE, SIZE, 3))
        captions: list[str] = []
        centers: list[list[tuple[float, float]]] = []
        for place, (block, texts, points) in in_blocks(_render, profile, split, count, workers, f"rendering {stem}"):
            images[place] = block
            captions += texts
            centers += points
        images.flush()
        write_text(index_path, json.dumps({"captions": captions, "centers": centers}))
    index = json.loads(index_path.read_text())
    return SceneCache(np.load(array_path, mmap_mode="r"), index["captions"], index["centers"])
