"""The ablation: trains each cell, generates images with its adapter, and measures them."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from localctl.boxes import Box
from localctl.data import DataConfig
from localctl.drawing import outline
from localctl.evaluation.compare import CEILING, Comparison, compare
from localctl.evaluation.fid import make_reference, score_set
from localctl.evaluation.generated_set import generate_set, read_images, read_set
from localctl.evaluation.measuring import Target, read_targets
from localctl.evaluation.provenance import versions
from localctl.evaluation.settings import FidSettings
from localctl.files import sha256_of_folder
from localctl.messages import log_to_screen
from localctl.metrics.edges import canny
from localctl.metrics.statistics import Statistics
from localctl.micro.detect import detect
from localctl.pipelines import BaseConfig
from localctl.redaction import recorded
from localctl.training.export import ADAPTER
from localctl.training.loop import NotFiniteError, prepare
from localctl.training.resume import config_hash, setting_changes
from localctl.training.settings import TrainSettings
from research.ablation.rows import BASE, FLOOR, ROWS, WITHOUT, Cell, Protocol, row_cells
from research.cache import TableCache
from research.harness import Study, as_rows
from research.page import save_strip

logger = logging.getLogger(__name__)
CONDITIONS = "conditions"  # the strip of conditions and masks
SHOWN = 6  # scenes in the sheet
_RECORDED = ("extractor", "weights_sha256", "preprocessing", "feature_dtype", "n_real", "n_fake")


OBJECTS = ("color_in", "object_in", "color_out", "object_out")


def objects_right(image: np.ndarray, target: Target) -> list[float]:
    """Return the shares of the caption's objects that are in the image: by colour alone, and by colour and shape, first
    of those whose place in the condition is mostly inside the mask, then of those mostly outside; NaN without any.

    They count wherever they are, as the caption does not say where, so that the base's shares can be compared.
    """
    assert target.truth is not None
    phrases = [item.phrase for item in detect(image, min_match=0).objects]
    colors, whole = {phrase.split()[0] for phrase in phrases}, {item.phrase for item in detect(image).objects}
    shares = []
    for inside in (True, False):
        chosen = [item.label for item in target.truth.objects if (_covered(item.box, target.mask) >= 0.5) == inside]
        for found, names in ((colors, [label.split()[0] for label in chosen]), (whole, chosen)):
            shares.append(float(np.mean([name in found for name in names])) if names else math.nan)
    return shares


def _covered(box: Box, mask: np.ndarray) -> float:
    x0, y0, x1, y1 = box
    return float(mask[int(y0) : math.ceil(y1), int(x0) : math.ceil(x1)].mean())


def floor_of(cell: Cell) -> Cell:
    """Return the base alone, sampled with the pipeline's settings of ``cell``, to compare it with."""
    own = {name: value for name, value in cell.sampling.items() if name in ("guidance_scale", "num_inference_steps")}
    name = "_".join([FLOOR, *(f"{key}_{value:g}" for key, value in own.items())])
    return replace(BASE, name=name, sampling=own) if own else BASE


class Interrupted(Exception):
    """Raised when the signal numbered ``signal`` has stopped a training, which has saved a checkpoint."""

    def __init__(self, signal: int) -> None:
        super().__init__(f"stopped by signal {signal}")
        self.signal = signal


class Ablation(Study[Cell]):
    """Trains and measures cells, and the base alone.

    Raises:
        ValueError: the base cannot be used.
    """

    protocol: Protocol

    def __init__(self, protocol: Protocol, folder: Path, work: Path) -> None:
        super().__init__(protocol, folder, work)
        self.cache = TableCache(work / "measured")
        self.example = row_cells([WITHOUT], [0], None)[0].settings(protocol.base, "unused")

    def asked(self, variant: Cell) -> dict[str, Any]:
        asked = super().asked(variant)
        if variant == BASE:
            return asked
        if variant.sampling:
            asked["sampling"] = dict(variant.sampling)
        if variant.adapter is not None:
            return {**asked, "adapter_sha256": sha256_of_folder(variant.adapter)}
        settings = self.training(variant)
        overrides, steps = list(variant.overrides), settings.max_train_steps
        trained = {"overrides": overrides, "seed": variant.seed, "steps": steps, "config_sha256": config_hash(settings)}
        return {**asked, **trained}

    def earlier(self, variant: Cell, content: Mapping[str, Any]) -> dict[str, Any]:
        asked = super().earlier(variant, content)
        if variant.adapter is not None:
            return asked
        trained = content.get("training", {}).get("settings")
        if trained and not setting_changes(trained, recorded(self.training(variant))):
            asked["config_sha256"] = config_hash(self.training(variant))
            if asked.get("steps") == trained["max_train_steps"] == self.training(variant).max_train_steps:
                asked["overrides"] = list(variant.overrides)  # the same settings, written otherwise
        return asked

    def measured(self, variant: Cell) -> dict[str, Any]:
        """Train, generate and measure. Raises Interrupted after a signal."""
        assert self.extractors  # loaded now, so that a missing one is an error before the training
        about = {"row": variant.row, "title": variant.title, "seed": variant.seed}
        adapter, training = None if variant.adapter is None else Path(variant.adapter), {}
        if variant != BASE and adapter is None:
            settings = self.training(variant)
            logger.info(f"{variant.name}: training {settings.max_train_steps} steps")
            try:
                adapter = train(settings)
            except NotFiniteError as error:
                return {"failed": str(error), **about, "provenance": {"versions": versions()}}
            training = {"settings": recorded(settings), "device": "cuda" if torch.cuda.is_available() else "cpu"}
        # The base may have been measured on another machine, which has its images.
        floor = self.generated(floor_of(variant), None)
        folder = floor if variant == BASE else self.generated(variant, adapter)
        comparison = compare({FLOOR: floor, variant.name: folder}, self.clip, self.cache.tables)
        objects = self._objects(variant, folder, comparison.ids)
        if variant == BASE or variant.row in ROWS:
            self._save_strips(variant, folder, comparison)
        distances, features = self._distances(folder)
        ceiling = np.full_like(objects, np.nan)
        return {
            **about,
            "ids": list(comparison.ids),
            "columns": [*comparison.columns, *OBJECTS],
            "samples": as_rows(np.hstack([comparison.tables[variant.name], objects])),
            "ceiling": as_rows(np.hstack([comparison.tables[CEILING], ceiling])) if variant == BASE else None,
            "distances": distances,
            "training": training,
            "provenance": {**comparison.provenance, "distances": features},
        }

    def training(self, cell: Cell) -> TrainSettings:
        """Return the training settings of ``cell``."""
        return cell.settings(self.protocol.base, str(self.work / "runs" / (cell.trained or cell.name)))

    def generated(self, cell: Cell, adapter: Path | None) -> Path:
        """Generate the images that are missing, and return their folder."""
        settings = self._settings(cell.name, adapter, **cell.sampling)
        generate_set(settings, "with_prompts")
        return settings.folder / "with_prompts"

    def _settings(self, name: str, adapter: Path | None, **changes: Any) -> FidSettings:
        protocol = self.protocol
        options: dict[str, Any] = {
            "base": BaseConfig(name=protocol.base),
            "data": DataConfig(),
            "condition": self.example.condition,
            "mask": self.example.mask,
            "output_dir": str(self.work / "drawn" / name),
            "part": protocol.part or "test",
            "adapter": None if adapter is None else str(adapter),
            "num_images": protocol.count,
            "batch_size": protocol.batch_size,
            "num_inference_steps": protocol.num_inference_steps,
            "guidance_scale": protocol.guidance_scale,
            "scheduler": protocol.scheduler,
            "unconditional_scale": 1.0,  # not the adapter's own
        }
        return FidSettings(**(options | changes))

    def _distances(self, folder: Path) -> tuple[dict[str, float], dict[str, Any]]:
        """Return the distances of the images in ``folder`` to training scenes, and their provenance by extractor."""
        generated_with, ids = read_set(folder)
        values: dict[str, float] = {}
        provenance = {}
        for extractor in self.extractors:
            changes = {"part": "train", "num_images": self.protocol.references, "extractor": extractor.name}
            settings = self._settings("reference", None, **changes)
            reference = Statistics.load(make_reference(settings))
            scored = score_set(folder, ids, generated_with, reference, extractor, settings)
            values |= {key: value for key, value in scored["values"].items() if not key.startswith("clip_score")}
            provenance[extractor.name] = {key: scored["provenance"][key] for key in _RECORDED}
            provenance[extractor.name]["warnings"] = scored["warnings"]
        return values, provenance

    def _objects(self, cell: Cell, folder: Path, ids: Sequence[str]) -> np.ndarray:
        """Return the figures ``OBJECTS`` of each image in ``folder``, (n, 4)."""
        images = [item.image for item in read_images(folder, ids)]
        targets = read_targets(self._settings(cell.name, None), folder, ids)
        return np.array([objects_right(image, target) for image, target in zip(images, targets, strict=True)])

    def _save_strips(self, cell: Cell, folder: Path, comparison: Comparison) -> None:
        """Save the strip of the first scenes' images; with that of the base, the strip of conditions and masks."""
        f1 = comparison.tables[FLOOR][:, comparison.columns.index("f1")]
        ids = [comparison.ids[i] for i in np.flatnonzero(~np.isnan(f1))[:SHOWN]]
        items = list(read_images(folder, ids))
        masks = [torch.from_numpy(item.mask) for item in items]
        images = [Image.fromarray(item.image) for item in items]
        save_strip([outline(*pair) for pair in zip(images, masks, strict=True)], self.strip(cell.name))
        if cell == BASE:
            targets = read_targets(self._settings(FLOOR, None), folder, ids)
            edges = [Image.fromarray((canny(t.image) * 255).astype(np.uint8)).convert("RGB") for t in targets]
            save_strip([outline(*pair) for pair in zip(edges, masks, strict=True)], self.strip(CONDITIONS))


def train(settings: TrainSettings) -> Path:
    """Train, resuming from the newest checkpoint, and return the adapter's folder. Raises Interrupted on a signal."""
    with log_to_screen(tolerant=True):
        result = prepare(settings).train()
    if result.interrupted or result.signal:
        raise Interrupted(result.signal)
    return result.output_dir / ADAPTER
