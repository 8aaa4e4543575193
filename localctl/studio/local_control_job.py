"""From what the tab Local control sends to a run: adapters by name, conditions at the run's size, masks; and what is
said of its images: edges matched, missed and invented inside the mask."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from localctl.adapter_files import SavedAdapter, find_adapter
from localctl.architectures import read_shape
from localctl.bases import same_base
from localctl.condition_models import load_model
from localctl.conditions import extract
from localctl.data.geometry import IMAGE, geometry
from localctl.denoisers.abilities import Abilities
from localctl.drawing import overlay_edges
from localctl.images import condition_to_pil
from localctl.jobs.inputs import Size, choose_size, size_multiple
from localctl.labels import one_line
from localctl.metrics.edges import MIN_EDGES, EdgeScores, canny, edge_scores, match_edges
from localctl.pipelines import BaseConfig
from localctl.settings import ConditionConfig
from localctl.studio.addon_fields import model_settings
from localctl.studio.config import StudioConfig
from localctl.studio.training_runs import adapters_of_runs

MOST_ADAPTERS = 3
EXAMPLE = Path(__file__).parents[2] / "examples" / "adapter"  # in a checkout
EXAMPLE_NAME = "example: edges"
TOLERANCE = 2.0  # pixels between an edge and its match


@dataclass(frozen=True)
class Follow:
    """One adapter of a run. mask: white = controlled; None: everywhere."""

    adapter: str
    weight: float = 1.0
    start: float = 0.0
    end: float = 1.0
    mask: Image.Image | None = None


@dataclass(frozen=True)
class Thresholds:
    """How conditions are extracted, where it is not as in training. None: as in training."""

    low: float | None = None
    high: float | None = None
    cells: int | None = None


@dataclass(frozen=True)
class Order:
    """What the page asks for. photo, condition: one of them, the other is None."""

    photo: Image.Image | None
    condition: Image.Image | None
    follows: Sequence[Follow]
    thresholds: Thresholds
    height: int | None = None
    width: int | None = None

    @property
    def source(self) -> Image.Image:
        """The image to follow. ValueError when there is none."""
        source = self.photo or self.condition
        if source is None:
            raise ValueError("There is no photo to follow; upload one, or choose an example.")
        return source


def adapter_places(config: StudioConfig) -> dict[str, str]:
    """Return the adapters that the page may choose: name -> place. Those of the flags come first, then the example and
    those of the runs."""
    last = Counter(map(_short, config.adapter))
    places = {_short(place) if last[_short(place)] == 1 else _short(place, 2): place for place in config.adapter}
    if same_base(config.base, "micro") and EXAMPLE.is_dir():
        places.setdefault(EXAMPLE_NAME, str(_from_here(EXAMPLE)))
    for name, place in adapters_of_runs(Path(config.runs).expanduser()).items():
        places.setdefault(name, str(place))
    return places


def _from_here(path: Path) -> Path:
    """Return a path relative to the working folder, if it lies in it: so it may stand in a record."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _short(place: str, parts: int = 1) -> str:
    """Return the last parts of a place: the page shows no paths of the server."""
    return "/".join(place.rstrip("/").split("/")[-parts:])[-60:]


def find_adapters(config: StudioConfig, names: Sequence[str]) -> list[SavedAdapter]:
    """Return the adapters of these names. ValueError for a name that the page did not offer."""
    places = adapter_places(config)
    for name in names:
        if name not in places:
            raise ValueError(f"There is no adapter {one_line(str(name))!r} on this server; choose one of the list.")
    found = [find_adapter(places[name], bool(config.local_files_only)) for name in names]
    return [_with_model(adapter, config) for adapter in found]


def _with_model(adapter: SavedAdapter, config: StudioConfig) -> SavedAdapter:
    """Return the adapter with the server's model for its kind of condition, where it was trained without one."""
    trained = adapter.condition
    if trained is None or trained.from_image or trained.kind not in config.condition_models:
        return adapter
    return replace(adapter, config={**adapter.config, "condition": config.computed(trained.kind).recorded()})


def run_size(config: StudioConfig, adapters: Sequence[SavedAdapter], order: Order) -> Size:
    """Return the (height, width) of the images: as asked, or about the base's area in the photo's aspect ratio."""
    base = BaseConfig(
        name=config.base,
        vae=config.vae,
        revision=config.revision,
        variant=config.variant,
        local_files_only=bool(config.local_files_only),
    )
    source = (order.source.height, order.source.width)
    known = Abilities(base, read_shape(base))
    return choose_size((order.height, order.width), source, known.size, size_multiple(adapters, known.multiple))


def conditions(order: Order, adapters: Sequence[SavedAdapter], size: Size) -> list[Image.Image]:
    """Return the condition of each adapter at ``size``, in mode L or RGB: extracted from the photo as the adapter was
    trained, but for the thresholds; or the one that was uploaded."""
    if order.photo is None:
        return [order.source] * len(adapters)
    photo = np.asarray(scaled(order.photo, size))
    wanted = [condition_of(adapter, order.thresholds) for adapter in adapters]
    for adapter, condition in zip(adapters, wanted, strict=True):
        if condition.model is not None:
            load_model(condition, adapter.local_files_only)  # extract() would ask the network
    return [condition_to_pil(extract(condition, photo)) for condition in wanted]


def condition_of(adapter: SavedAdapter, thresholds: Thresholds) -> ConditionConfig:
    """Return how the condition of an adapter is extracted. ValueError for a kind that no photo gives."""
    trained = adapter.condition or ConditionConfig()
    if not trained.from_image:
        raise ValueError(
            f"The adapter {_short(adapter.name)} follows a {trained.kind} condition, which came with its data and is "
            "not extracted from a photo; upload the condition instead."
        )
    changes: dict[str, Any] = {}
    if trained.kind == "canny":
        changes = {name: getattr(thresholds, name) for name in ("low", "high") if getattr(thresholds, name) is not None}
    elif trained.kind == "palette" and thresholds.cells is not None:
        changes = {"cells": thresholds.cells}
    return replace(trained, **changes)


def scaled(image: Image.Image, size: Size) -> Image.Image:
    """Return the image scaled and cropped to ``size`` (height, width), as a run does it."""
    source = (image.height, image.width)
    return image if source == size else geometry(source, size).apply(image, IMAGE)


def settings_of(
    order: Order, config: StudioConfig, folder: Path, sampling: Mapping[str, Any]
) -> tuple[dict[str, Any], list[Image.Image]]:
    """Write conditions and masks into ``folder``; return the settings of a run of ``sample.py``, and the conditions.

    sampling: further settings, such as prompt and seeds. ValueError for adapters, images or sizes that cannot be used.
    """
    if not order.follows:
        raise ValueError("There is no adapter; choose one.")
    adapters = find_adapters(config, [follow.adapter for follow in order.follows])
    size = run_size(config, adapters, order)
    found = conditions(order, adapters, size)
    # As trained, the photo itself is the input, so that the record holds it; at the run's size it is not scaled again.
    as_trained = order.photo is not None and all(
        adapter.condition == condition_of(adapter, order.thresholds) for adapter in adapters
    )
    inputs = [scaled(order.source, size)] * len(adapters) if as_trained else found
    source = "image" if as_trained else "condition_image"
    files: dict[str, list[str]] = {source: [], "mask": []}
    for index, (follow, condition) in enumerate(zip(order.follows, inputs, strict=True)):
        mask = follow.mask or Image.new("L", (size[1], size[0]), 255)
        if mask.getbbox() is None:
            raise ValueError(f"The mask of adapter {index + 1} is empty; paint where it acts, or clear it: everywhere.")
        for name, image in ((source, condition), ("mask", mask.resize((size[1], size[0])))):
            path = folder / f"{name}_{index}.png"
            image.save(path)
            files[name].append(str(path))
    settings: dict[str, Any] = {
        **config.run_settings,
        "adapter": [adapter.name for adapter in adapters],  # as the server was told, not its absolute path
        **files,
        "weight": [follow.weight for follow in order.follows],
        "start": [follow.start for follow in order.follows],
        "end": [follow.end for follow in order.follows],
        "height": size[0],
        "width": size[1],
        "output_dir": str(folder),
    }
    if as_trained:
        served = [adapter.condition for adapter in adapters]
        own = [config.computed(kind) for kind in config.condition_models]
        settings |= model_settings([condition if condition in own else None for condition in served], "")
    return {**settings, **sampling}, found


@dataclass(frozen=True)
class Verdict:
    """How well an image follows the edges. scores: inside the mask of each adapter."""

    overlay: Image.Image
    scores: list[EdgeScores]

    @property
    def text(self) -> str:
        """One sentence for each adapter."""
        lines = []
        for index, scores in enumerate(self.scores):
            where = f"mask {index + 1}" if len(self.scores) > 1 else "the mask"
            if scores.defined:
                lines.append(
                    f"F1 inside {where}: {scores.f1:.2f} (precision {scores.precision:.2f}, recall "
                    f"{scores.recall:.2f}; {scores.n_target} edge pixels, matches within {TOLERANCE:.0f} pixels)."
                )
            else:
                lines.append(
                    f"F1 inside {where}: not defined, there are {scores.n_target} edge pixels and {MIN_EDGES} are "
                    "needed."
                )
        return " ".join(lines)


def judge(image: Image.Image, target: np.ndarray, masks: Sequence[Image.Image]) -> Verdict:
    """Compare the edges of an image with ``target``, bool (H,W), inside each of ``masks``, and in all of them together
    on the overlay."""
    prediction = canny(np.asarray(image.convert("RGB")))
    inside = [np.asarray(mask.convert("L").resize(image.size)) > 127 for mask in masks]
    scores = [edge_scores(prediction, target, mask, TOLERANCE, MIN_EDGES) for mask in inside]
    together = np.logical_or.reduce(inside)
    return Verdict(overlay_edges(image, *match_edges(prediction, target, together, TOLERANCE), mask=together), scores)


def target_edges(order: Order, adapters: Sequence[SavedAdapter], size: Size) -> np.ndarray | None:
    """Return the edges to follow, bool (H,W): those of the photo, or of an uploaded edge map; None for others."""
    image = scaled(order.source, size)
    if order.photo is not None:
        return canny(np.asarray(image.convert("RGB")))
    if all((adapter.condition or ConditionConfig()).kind == "canny" for adapter in adapters):
        return np.asarray(image.convert("L")) > 127
    return None
