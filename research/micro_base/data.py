"""Cache rendered scenes on disk, so that training does not wait for rendering."""

from __future__ import annotations

import json
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from localctl.files import write_text
from localctl.micro.scenes import SIZE, scene


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


def _render(job: tuple[str, str, int, int]) -> tuple[np.ndarray, list[str], list[list[tuple[float, float]]]]:
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
        jobs = [(profile, split, i, min(i + 250, count)) for i in range(0, count, 250)]
        # spawn: a forked process would inherit the locks of earlier compute threads, and hang
        with ProcessPoolExecutor(workers or os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
            for job, (block, texts, points) in zip(
                jobs, tqdm(pool.map(_render, jobs), total=len(jobs), desc=f"rendering {stem}"), strict=True
            ):
                images[job[2] : job[3]] = block
                captions += texts
                centers += points
        images.flush()
        write_text(index_path, json.dumps({"captions": captions, "centers": centers}))
    index = json.loads(index_path.read_text())
    return SceneCache(np.load(array_path, mmap_mode="r"), index["captions"], index["centers"])
