"""One cell of the ablation: train, draw, measure, and write the result, each only as far as it is not done yet."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from localctl.conditions import ConditionConfig
from localctl.data import DataConfig
from localctl.evaluation.cache import Kept
from localctl.evaluation.compare import CEILING, Comparison, compare
from localctl.evaluation.fid import make_reference, score_set
from localctl.evaluation.generated_set import draw_set, read_pictures, read_set
from localctl.evaluation.provenance import REQUIRED, check_provenance, read_json, versions, write_json
from localctl.evaluation.settings import FidSettings
from localctl.images import outline
from localctl.masks import MaskConfig
from localctl.metrics.clip import Clip
from localctl.metrics.edges import canny
from localctl.metrics.extractors import MICRO_CLIP, Extractor, load_extractor
from localctl.metrics.statistics import Statistics
from localctl.micro.detect import VERSION
from localctl.micro.scenes import scene
from localctl.pipelines import BaseConfig, resolve_base
from localctl.redaction import recorded
from localctl.training.export import ADAPTER
from localctl.training.loop import NotFiniteError, prepare
from localctl.training.resume import config_hash, setting_changes
from localctl.training.settings import TrainSettings
from research.ablation.protocol import Protocol
from research.ablation.results import CONDITIONS
from research.ablation.rows import FLOOR, ROWS, WITHOUT, Cell, row_cells
from research.reader import check_reader

Say = Callable[[str], None]
SHOWN = 6  # scenes in the pictures
DIGITS = 5


class Interrupted(Exception):
    """Training was stopped by a signal, with a checkpoint; ``signal`` is its number."""

    def __init__(self, signal: int) -> None:
        super().__init__(f"stopped by signal {signal}")
        self.signal = signal


class Bench:
    """Trains and measures cells. ``folder`` keeps the results, ``work`` what they were made from.

    ValueError for a base that cannot be used, and, before anything slow, for such an extractor.
    """

    def __init__(self, protocol: Protocol, folder: Path, work: Path, say: Say = print) -> None:
        self.protocol, self.folder, self.work, self.say = protocol, folder, work, say
        resolve_base(protocol.base)
        self.kept = Kept(work / "measured")
        example = row_cells([WITHOUT], [0], None)[0].settings(protocol.base, "unused")
        self.condition: ConditionConfig = example.condition
        self.mask: MaskConfig = example.mask

    @cached_property
    def clip(self) -> Clip:
        return Clip(MICRO_CLIP)

    @cached_property
    def extractors(self) -> list[Extractor]:
        return [load_extractor(name) for name in self.protocol.extractors]

    def base(self) -> None:
        """Draw and measure the base alone: the floor, and with it the ceiling."""
        asked = {"protocol": self._plain(), "reader": VERSION}
        if self._done(FLOOR, asked):
            return
        assert self.extractors
        folder = self._draw(FLOOR, None)
        comparison = compare({FLOOR: folder}, self.clip, self.kept)
        self._strip(folder, FLOOR, comparison)
        self._write(FLOOR, FLOOR, "base alone", 0, asked, comparison, folder, {}, ceiling=True)

    def cell(self, cell: Cell) -> bool:
        """Train, draw and measure ``cell``; whether there was anything to do. Interrupted after a signal; ValueError
        when there is a result of other settings."""
        settings = self._training(cell)
        asked = self._asked(cell, settings)
        if self._done(cell.name, asked, settings):
            self.say(f"{cell.name}: done before")
            return False
        assert self.extractors  # one that is not there must be told before the training
        self.say(f"{cell.name}: training {settings.max_train_steps} steps")
        try:
            adapter = train(settings, self.say)
        except NotFiniteError as error:
            content = {"asked": asked, "failed": str(error), **_about(cell), "provenance": {"versions": versions()}}
            write_json(self.folder / f"{cell.name}.json", content)
            self.say(f"{cell.name}: {error}")
            return True
        folder, floor = self._draw(cell.name, adapter), self._draw(FLOOR, None)  # the base's may be of another machine
        comparison = compare({FLOOR: floor, cell.name: folder}, self.clip, self.kept)
        training = {"settings": recorded(settings), "device": "cuda" if torch.cuda.is_available() else "cpu"}
        if cell.row in ROWS:
            self._strip(folder, cell.name, comparison)
        self._write(cell.name, cell.row, cell.title, cell.seed, asked, comparison, folder, training)
        return True

    def check(self, cells: Sequence[Cell]) -> None:
        """ValueError when there is a result of other settings under the name of one of ``cells``, or of the base, or
        when what is to be measured would stand beside results of another version of the reader."""
        waiting = [] if self._done(FLOOR, {"protocol": self._plain(), "reader": VERSION}) else [FLOOR]
        for cell in cells:
            settings = self._training(cell)
            if not self._done(cell.name, self._asked(cell, settings), settings):
                waiting.append(cell.name)
        check_reader(self.folder, waiting)

    def _training(self, cell: Cell) -> TrainSettings:
        return cell.settings(self.protocol.base, str(self.work / "runs" / cell.name))

    def _asked(self, cell: Cell, settings: TrainSettings) -> dict[str, Any]:
        return {
            "protocol": self._plain(),
            "overrides": list(cell.overrides),
            "seed": cell.seed,
            "steps": settings.max_train_steps,
            "config_sha256": config_hash(settings),
            "reader": VERSION,
        }

    def _plain(self) -> dict[str, Any]:
        return {**asdict(self.protocol), "extractors": list(self.protocol.extractors)}

    def _done(self, name: str, asked: Mapping[str, Any], settings: TrainSettings | None = None) -> bool:
        """Whether there is a result; ValueError for one of other settings. A setting that came up after it had its
        default then."""
        path = self.folder / f"{name}.json"
        if not path.is_file():
            return False
        content = read_json(path, "result")
        there = {**content.get("asked", {}), "reader": VERSION}
        trained = content.get("training", {}).get("settings")
        if settings is not None and trained and not setting_changes(trained, recorded(settings)):
            there["config_sha256"] = asked["config_sha256"]
        changed = sorted(key for key in {*there, *asked} if there.get(key) != asked.get(key))
        if changed:
            raise ValueError(
                f"The result {path} was made with another {', '.join(changed)}; choose another --report, or remove it."
            )
        return True

    def _settings(self, name: str, adapter: Path | None, **changes: Any) -> FidSettings:
        protocol = self.protocol
        options: dict[str, Any] = {
            "base": BaseConfig(name=protocol.base),
            "data": DataConfig(),
            "condition": self.condition,
            "mask": self.mask,
            "output_dir": str(self.work / "drawn" / name),
            "part": "test",
            "adapter": None if adapter is None else str(adapter),
            "num_images": protocol.count,
            "batch_size": protocol.batch_size,
            "num_inference_steps": protocol.num_inference_steps,
            "guidance_scale": protocol.guidance_scale,
            "scheduler": protocol.scheduler,
        }
        return FidSettings(**(options | changes))

    def _draw(self, name: str, adapter: Path | None) -> Path:
        settings = self._settings(name, adapter)
        draw_set(settings, "with_prompts", self.say)
        return settings.folder / "with_prompts"

    def _distances(self, folder: Path) -> tuple[dict[str, float], dict[str, Any]]:
        """Of the drawn set in ``folder`` to the scenes of the training part; values, and provenance by extractor."""
        drawn_with, ids = read_set(folder)
        values: dict[str, float] = {}
        provenance = {}
        for extractor in self.extractors:
            changes = {"part": "train", "num_images": self.protocol.references, "extractor": extractor.name}
            path = make_reference(self._settings("reference", None, **changes), self.say)
            scored = score_set(folder, ids, drawn_with, Statistics.load(path), extractor, self.protocol.batch_size)
            values |= {key: value for key, value in scored["values"].items() if not key.startswith("clip_score")}
            kept = ("extractor", "weights_sha256", "preprocessing", "feature_dtype", "n_real", "n_fake")
            provenance[extractor.name] = {key: scored["provenance"][key] for key in kept}
            provenance[extractor.name]["warnings"] = scored["warnings"]
        return values, provenance

    def _write(
        self,
        name: str,
        row: str,
        title: str,
        seed: int,
        asked: Mapping[str, Any],
        comparison: Comparison,
        folder: Path,
        training: Mapping[str, Any],
        ceiling: bool = False,
    ) -> None:
        distances, features = self._distances(folder)
        content = {
            "asked": asked,
            "name": name,
            "row": row,
            "title": title,
            "seed": seed,
            "ids": list(comparison.ids),
            "columns": list(comparison.columns),
            "samples": _lists(comparison.tables[name]),
            "ceiling": _lists(comparison.tables[CEILING]) if ceiling else None,
            "distances": distances,
            "training": dict(training),
            "provenance": {**comparison.provenance, "distances": features},
        }
        check_provenance(name, content, REQUIRED)
        write_json(self.folder / f"{name}.json", content)
        self.say(f"{name}: {self.folder / f'{name}.json'}")

    def _strip(self, folder: Path, name: str, comparison: Comparison) -> None:
        """The pictures of the first scenes, one below the other; beside the base's, the conditions and masks."""
        f1 = comparison.tables[FLOOR][:, comparison.columns.index("f1")]
        ids = [comparison.ids[i] for i in np.flatnonzero(~np.isnan(f1))[:SHOWN]]
        drawn = list(read_pictures(folder, ids))
        _stack(
            [outline(Image.fromarray(d.image), torch.from_numpy(d.mask)) for d in drawn], self.folder / f"{name}.png"
        )
        if name == FLOOR:
            edges = []
            for item in drawn:
                profile, split, number = item.key.split("-")
                lines = (canny(scene(int(number), profile, split).image) * 255).astype(np.uint8)
                edges.append(outline(Image.fromarray(lines).convert("RGB"), torch.from_numpy(item.mask)))
            _stack(edges, self.folder / CONDITIONS)


def train(settings: TrainSettings, say: Say) -> Path:
    """Train, or go on from the newest checkpoint; the folder of the adapter."""
    result = prepare(settings, say=say).train()
    if result.interrupted or result.signal:
        raise Interrupted(result.signal)
    return result.output_dir / ADAPTER


def _about(cell: Cell) -> dict[str, Any]:
    return {"name": cell.name, "row": cell.row, "title": cell.title, "seed": cell.seed}


def _lists(table: np.ndarray) -> list[list[float | None]]:
    return [[None if value != value else round(value, DIGITS) for value in row] for row in table.tolist()]


def _stack(pictures: Sequence[Image.Image], path: Path) -> None:
    """One below the other; nothing where there is none."""
    if pictures:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.concatenate([np.asarray(p) for p in pictures])).save(path)
