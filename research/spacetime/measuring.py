"""The measurement of ``python -m research.spacetime``: cases, the four ways, and their report."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from localctl.cli.sample_regions import read_variants, sampling_of
from localctl.control.base import Control
from localctl.evaluation.generated_set import png_bytes
from localctl.evaluation.provenance import read_json, versions, write_bytes, write_json, write_text
from localctl.images import load_image
from localctl.layout import Layout
from localctl.metrics.clip import Clip
from localctl.metrics.weights import sha256_of_folder
from localctl.micro.scenes import SIZE, Scene, scene
from localctl.pipelines import BaseConfig, load_pipeline, resolve_base, set_scheduler
from localctl.sampling import generate
from localctl.weight_search.weights import OptimizedSpaceTime, find_clip, optimize_weights
from research.spacetime.layouts import layout_source
from research.spacetime.report import COLUMNS, measure, relation_report, relation_sheet

PROFILE, SPLIT = "basic", "test"
# By row: the control of sample.py, and the settings that make it this row.
ROWS: dict[str, tuple[str, tuple[str, ...]]] = {
    "plain": ("none", ()),
    "constant": ("spacetime", ()),
    # What fades out must leave the objects in the global prompt.
    "scheduled": ("spacetime", ("schedule=linear", "hide_phrases=false", "end=1")),
    "optimised": ("spacetime_optimized", ()),
}
_FREE = ("output_dir", "count", "optimised", "device")  # change no picture


@dataclass(frozen=True)
class RelationCase:
    """A held-out scene whose caption states a relation, the layout to draw it in, and the seed of its noise."""

    item: Scene
    layout: Layout
    seed: int


def relation_cases(count: int, layout_of: Callable[[Scene, int], Layout]) -> list[RelationCase]:
    """The first ``count`` test scenes whose caption states a relation."""
    cases: list[RelationCase] = []
    index = 0
    while len(cases) < count:
        item = scene(index, PROFILE, SPLIT)
        if item.relation is not None:
            cases.append(RelationCase(item, layout_of(item, 1000 + index), seed=1000 + index))
        index += 1
    return cases


def controls_of_rows(settings: Sequence[str], base: str) -> dict[str, tuple[Control, ...]]:
    """The controls of each row. ValueError for a setting that no row knows, or a value out of range."""
    common = [text for text in settings if text.partition("=")[0].partition(".")[0] not in ROWS]
    rows = {}
    for row, (name, own) in ROWS.items():
        asked = [text.removeprefix(f"{row}.") for text in settings if text.startswith(f"{row}.")]
        if name == "none" and asked:
            raise ValueError(f"The row {row!r} has no control to set; leave {asked[0]!r} out.")
        rows[row] = () if name == "none" else read_variants([name], [*own, *common, *asked], base)[0].controls
    return rows


@dataclass
class Drawing:
    """The pictures of all rows in a folder; what is there is not drawn again."""

    pipe: Any
    clip: Clip
    folder: Path
    arguments: dict[str, Any]
    batch_size: int

    def file(self, row: str, index: int) -> Path:
        return self.folder / "images" / row / f"{index:06d}.png"

    def draw(self, row: str, controls: Sequence[Control], cases: Sequence[RelationCase]) -> None:
        """Draw what is missing of a row. Batches are always the same, and one that lacks a picture is drawn anew."""
        optimised = any(isinstance(control, OptimizedSpaceTime) for control in controls)
        size = 1 if optimised else self.batch_size
        with tqdm(total=len(cases), desc=f"drawing {row}", unit="picture") as bar:
            for first in range(0, len(cases), size):
                some = range(first, min(first + size, len(cases)))
                if not all(self.file(row, index).is_file() for index in some):
                    batch = [cases[index] for index in some]
                    used = self.optimise(batch[0], controls, some[0]) if optimised else controls
                    output = generate(
                        self.pipe,
                        [case.layout for case in batch],
                        used,
                        [case.seed for case in batch],
                        paired=True,
                        batch_size=size,
                        **self.arguments,
                    )
                    for index, image in zip(some, output.images, strict=True):
                        write_bytes(self.file(row, index), png_bytes(image))
                bar.update(len(some))

    def optimise(self, case: RelationCase, controls: Sequence[Control], index: int) -> list[Control]:
        """The controls with the weights found for this case, which are kept beside the pictures."""
        changed: list[Control] = []
        for control in controls:
            if isinstance(control, OptimizedSpaceTime):
                found = optimize_weights(
                    self.pipe, case.layout, self.clip, control, seed=case.seed, progress=False, **self.arguments
                )
                content = {"weights": found.weights.tolist(), "losses": list(found.losses)}
                write_json(self.folder / "weights" / f"{index:06d}.json", content)
                control = control.with_weights(found.weights)
            changed.append(control)
        return changed


def claim(options: argparse.Namespace, cases: Sequence[RelationCase]) -> dict[str, Any]:
    """What the pictures depend on, written into the folder or compared with what is there; ValueError if it differs."""
    base = Path(resolve_base(options.base).id_or_path)
    content = {name: value for name, value in vars(options).items() if name not in _FREE}
    content["weights_sha256"] = {part: sha256_of_folder(base / part) for part in ("unet", "vae", "text_encoder")}
    content["layouts"] = {str(case.item.index): [region.box for region in case.layout.regions] for case in cases}
    content = json.loads(json.dumps(content))
    path = options.output_dir / "settings.json"
    if path.is_file():
        earlier = read_json(path, "settings")
        shared = set(earlier["layouts"]) & set(content["layouts"])
        changed = [name for name in content if name != "layouts" and earlier.get(name) != content[name]]
        changed += ["layouts" for index in shared if earlier["layouts"][index] != content["layouts"][index]][:1]
        if changed:
            raise ValueError(
                f"{options.output_dir} holds pictures drawn with another {', '.join(changed)}; choose another."
            )
    write_json(path, content)
    return content


def run(options: argparse.Namespace) -> str:
    """Draw, measure, write everything; the report."""
    rows = controls_of_rows(options.set, options.base)
    if options.guidance_scale is None:
        suits = sampling_of(["spacetime_optimized"], options.base).guidance_scale
        options.guidance_scale = suits or resolve_base(options.base).guidance_scale
    cases = relation_cases(options.count, layout_source(options.layout, options.layout_predictor))
    settings = claim(options, cases)
    pipe = load_pipeline(BaseConfig(name=options.base), device=options.device)
    pipe.set_progress_bar_config(disable=True)
    set_scheduler(pipe, options.scheduler)
    optimised = next(control for control in rows["optimised"] if isinstance(control, OptimizedSpaceTime))
    clip = find_clip(optimised.clip, pipe)
    arguments = {"num_inference_steps": options.num_inference_steps, "guidance_scale": options.guidance_scale}
    drawing = Drawing(pipe, clip, options.output_dir, arguments, options.batch_size)
    counts = {row: options.optimised if row == "optimised" else len(cases) for row in rows}
    tables, images = {}, {}
    for row, controls in rows.items():
        drawing.draw(row, controls, cases[: counts[row]])
        images[row] = [np.asarray(load_image(drawing.file(row, index))) for index in range(counts[row])]
        measured = [measure(image, case.item, clip) for image, case in zip(images[row], cases, strict=False)]
        tables[row] = np.full((len(cases), len(COLUMNS)), np.nan)
        tables[row][: counts[row]] = measured if measured else tables[row][:0]
    provenance = {
        "metrics": list(COLUMNS),
        "n_real": len(cases),
        "n_fake": counts,
        "image_format": "PNG, 8 bit RGB",
        "image_size": [SIZE, SIZE],
        "mask_protocol": "none",
        "seeds": "1000 + number of the scene, the same for every row",
        "versions": versions(),
        "clip": {"weights_sha256": clip.weights_sha256, "side": clip.side},
        "settings": settings,
    }
    report, figures = relation_report(tables, counts["optimised"])
    samples = {row: [[None if v != v else v for v in line] for line in table.tolist()] for row, table in tables.items()}
    write_json(options.output_dir / "results.json", {"figures": figures, "samples": samples, "provenance": provenance})
    write_text(options.output_dir / "report.md", report)
    pictures = {row: [Image.fromarray(image) for image in some] for row, some in images.items()}
    relation_sheet([case.layout for case in cases], pictures).save(options.output_dir / "sheet.png")
    return report


def check(options: argparse.Namespace) -> None:
    """ValueError for settings that make no sense."""
    for name, least in (("count", 1), ("optimised", 0), ("num_inference_steps", 1), ("batch_size", 1)):
        if getattr(options, name) < least:
            raise ValueError(f"--{name} must be at least {least}, not {getattr(options, name)}.")
    if options.optimised > options.count:
        raise ValueError(f"--optimised {options.optimised} is more than --count {options.count}; optimise fewer.")
    try:
        torch.empty(0, device=options.device)
        options.output_dir.mkdir(parents=True, exist_ok=True)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"The device {options.device!r} cannot be used here; try --device cpu.") from error
    except OSError as error:
        raise ValueError(f"The output folder {options.output_dir} cannot be made ({error.strerror}).") from error
