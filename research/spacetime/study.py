"""The study of ``python -m research.spacetime``: its cases, its four rows, and the files it writes."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from localctl.control.base import Control
from localctl.control.presets import sampling_of
from localctl.evaluation.provenance import read_json, write_json, write_text
from localctl.files import sha256_of_folder
from localctl.jobs.variants import read_variants
from localctl.layout import Layout, Region
from localctl.layout_predictor.model import load_predictor
from localctl.metrics.clip import Clip
from localctl.micro.detect import VERSION
from localctl.micro.scenes import SIZE, Scene, article
from localctl.pipelines import BaseConfig, load_pipeline, resolve_base, set_scheduler
from localctl.weight_search.weights import OptimizedSpaceTime, find_clip, optimize_weights
from research.flags import check_least, make_folder
from research.harness import Case, as_rows, as_table, check_same, first_scenes, generate_cases, provenance, write_result
from research.spacetime import LAYOUTS
from research.spacetime.report import COLUMNS, against_report, measure, relation_report, relation_sheet

# By row: the name of the control, as in sample.py, and its settings.
ROWS: dict[str, tuple[str, tuple[str, ...]]] = {
    "plain": ("none", ()),
    "constant": ("spacetime", ()),
    # Local descriptions that fade out must leave the objects in the global prompt.
    "scheduled": ("spacetime", ("schedule=linear", "hide_phrases=false", "end=1")),
    "optimised": ("spacetime_optimized", ()),
}
_FREE = ("output_dir", "count", "optimised", "device", "against", "rows")  # options that change no image


def true_layout(item: Scene) -> Layout:
    """Return the caption with the boxes of the scene's objects, each described as "a red circle"."""
    regions = []
    for one in item.objects:
        x0, y0, x1, y1 = (value / SIZE for value in one.box)
        regions.append(Region(one.phrase, (x0, y0, x1, y1), prompt=article(one.phrase)))
    return Layout(item.caption, SIZE, SIZE, tuple(regions))


def layout_source(name: str, folder: str | None = None) -> Callable[[Scene, int], Layout]:
    """Return a function from a scene and a seed to a layout.

    name: ``true``, the layout of the scene itself, or ``auto``, predicted from the caption alone. folder: of the
    predictor for ``auto``; None = the shipped one.

    Raises:
        ValueError: the name is unknown, or there is no predictor.
    """
    if name not in LAYOUTS:
        raise ValueError(f"Unknown layout source {name!r}; choose one of {', '.join(LAYOUTS)}.")
    if name == "true":
        return lambda item, seed: true_layout(item)
    predictor = load_predictor(folder)
    return lambda item, seed: replace(predictor.predict(item.caption, seed=seed), height=SIZE, width=SIZE)


def relation_cases(count: int, layout_of: Callable[[Scene, int], Layout]) -> list[Case]:
    """Return the first ``count`` test scenes whose caption states a relation."""
    scenes = first_scenes(count, lambda item: item.relation is not None)
    seeds = [1000 + item.index for item in scenes]
    return [Case(str(item.index), item, layout_of(item, seed), seed) for item, seed in zip(scenes, seeds, strict=True)]


def controls_of_rows(settings: Sequence[str], base: str) -> dict[str, tuple[Control, ...]]:
    """Return the controls of each row. Raises ValueError for an unknown setting or a value out of range."""
    common = [text for text in settings if text.partition("=")[0].partition(".")[0] not in ROWS]
    rows = {}
    for row, (name, own) in ROWS.items():
        asked = [text.removeprefix(f"{row}.") for text in settings if text.startswith(f"{row}.")]
        if name == "none" and asked:
            raise ValueError(f"The row {row!r} has no control, so {asked[0]!r} sets nothing; remove it from --set.")
        rows[row] = () if name == "none" else read_variants([name], [*own, *common, *asked], base)[0].controls
    return rows


@dataclass
class Images:
    """Generates the images of all rows into a folder; existing ones are not generated again."""

    pipe: Any
    clip: Clip
    folder: Path
    arguments: dict[str, Any]
    batch_size: int

    def of(self, row: str, controls: Sequence[Control], cases: Sequence[Case]) -> list[np.ndarray]:
        """Return the images of a row, uint8 (H,W,3) each; generated one by one where weights are optimised."""
        optimised = any(isinstance(control, OptimizedSpaceTime) for control in controls)
        numbers = {case.id: index for index, case in enumerate(cases)}

        def steering(some: Sequence[Case]) -> Sequence[Control]:
            return self.optimise(some[0], controls, numbers[some[0].id]) if optimised else controls

        files = [self.folder / "images" / row / f"{index:06d}.png" for index in range(len(cases))]
        size = 1 if optimised else self.batch_size
        return generate_cases(self.pipe, cases, steering, size, row, files, **self.arguments)

    def optimise(self, case: Case, controls: Sequence[Control], index: int) -> list[Control]:
        """Optimise the weights for this case, store them beside the images, and return the controls with them."""
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


def claim(options: argparse.Namespace, cases: Sequence[Case]) -> dict[str, Any]:
    """Write what the images depend on into settings.json, and return it.

    Raises:
        ValueError: the folder has images made with other settings.
    """
    base = Path(resolve_base(options.base).id_or_path)
    content = {name: value for name, value in vars(options).items() if name not in _FREE}
    content["weights_sha256"] = {part: sha256_of_folder(base / part) for part in ("unet", "vae", "text_encoder")}
    content["layouts"] = {case.id: [region.box for region in case.layout.regions] for case in cases}
    content = json.loads(json.dumps(content))
    path = options.output_dir / "settings.json"
    if path.is_file():
        earlier = {name: value for name, value in read_json(path, "settings").items() if name in content}
        # A run may have another number of cases than an earlier one; those of both must be the same.
        shared = {id: boxes for id, boxes in earlier["layouts"].items() if id in content["layouts"]}
        asked = {**content, "layouts": {id: content["layouts"][id] for id in shared}}
        check_same(path, {**earlier, "layouts": shared}, asked, "another --output_dir")
    write_json(path, content)
    return content


def other_run(path: Path, cases: Sequence[Case], weights: dict[str, str]) -> dict[str, np.ndarray]:
    """Return the values of a stored run on ``cases`` by row.

    Raises:
        ValueError: the file is not a result of the study, lacks a caption, or is of another base or reader.
    """
    content = read_json(path, "results")
    about = content.get("provenance", {})
    layouts = about.get("settings", {}).get("layouts")
    if "samples" not in content or layouts is None:
        raise ValueError(f"{path} is no result of research.spacetime; give the results.json of a run.")
    if {case.id for case in cases} != set(sorted(layouts, key=int)[: len(cases)]):
        raise ValueError(f"{path} has {len(layouts)} captions, and not all {len(cases)} of this run; lower --count.")
    check_same(
        path,
        {"weights": about["settings"]["weights_sha256"], "reader": about.get("reader", 1)},
        {"weights": weights, "reader": VERSION},
        "the results of another run",
    )
    return {row: as_table(samples)[: len(cases)] for row, samples in content["samples"].items()}


def run(options: argparse.Namespace) -> str:
    """Generate, measure, write all files, and return the report."""
    rows = controls_of_rows(options.set, options.base)
    if options.guidance_scale is None:
        preset = sampling_of(["spacetime_optimized"], options.base).guidance_scale
        options.guidance_scale = preset or resolve_base(options.base).guidance_scale
    cases = relation_cases(options.count, layout_source(options.layout, options.layout_predictor))
    settings = claim(options, cases)
    others = other_run(options.against, cases, settings["weights_sha256"]) if options.against else {}
    pipe = load_pipeline(BaseConfig(name=options.base), device=options.device)
    pipe.set_progress_bar_config(disable=True)
    set_scheduler(pipe, options.scheduler)
    optimised = next(control for control in rows["optimised"] if isinstance(control, OptimizedSpaceTime))
    clip = find_clip(optimised.clip, pipe)
    arguments = {"num_inference_steps": options.num_inference_steps, "guidance_scale": options.guidance_scale}
    images = Images(pipe, clip, options.output_dir, arguments, options.batch_size)
    asked = {row: options.optimised if row == "optimised" else len(cases) for row in options.rows}
    counts = {row: asked.get(row, 0) for row in rows}
    generated = {row: images.of(row, controls, cases[: counts[row]]) for row, controls in rows.items()}
    tables = {}
    for row, some in generated.items():
        tables[row] = np.full((len(cases), len(COLUMNS)), np.nan)
        for index, image in enumerate(some):
            tables[row][index] = measure(image, cases[index].item, cases[index].layout, clip)
    report, figures = relation_report(tables, counts["optimised"])
    report += against_report(tables, others) if others else ""
    about = provenance(
        COLUMNS,
        len(cases),
        counts,
        "none",
        "1000 + number of the scene, the same for every row",
        reader=VERSION,
        clip={"weights_sha256": clip.weights_sha256, "side": clip.side},
        settings=settings,
    )
    samples = {row: as_rows(values, digits=None) for row, values in tables.items()}
    write_result(options.output_dir / "results.json", {"figures": figures, "samples": samples, "provenance": about})
    write_text(options.output_dir / "report.md", report)
    pil_images = {row: [Image.fromarray(image) for image in some] for row, some in generated.items()}
    relation_sheet([case.layout for case in cases], pil_images).save(options.output_dir / "sheet.png")
    return report


def check(options: argparse.Namespace) -> None:
    """Raise ValueError for options out of range, a device that cannot be used, or a folder that cannot be made."""
    check_least(options, {"count": 1, "optimised": 0, "num_inference_steps": 1, "batch_size": 1}, "--")
    if options.optimised > options.count:
        raise ValueError(f"--optimised {options.optimised} is more than --count {options.count}; lower it.")
    try:
        torch.empty(0, device=options.device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"The device {options.device!r} cannot be used here; try --device cpu.") from error
    make_folder(options.output_dir)
