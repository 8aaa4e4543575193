"""Measure control and leak: the cases, the images with and without an adapter, and their figures."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from localctl.adapter import LocalAdapter
from localctl.adapter_files import SavedAdapter, find_adapter
from localctl.architectures import read_shape
from localctl.boxes import box_iou
from localctl.conditions import ConditionConfig
from localctl.control.compatible import check_base
from localctl.control.image_controls import LocalAdapterControl
from localctl.data import MicroScenes
from localctl.diffusion import round_trip
from localctl.drawing import grid, outline
from localctl.evaluation.provenance import REQUIRED, check_provenance, write_json
from localctl.files import sha256_of_folder
from localctl.layout import Layout
from localctl.masks import MaskConfig, sample_mask
from localctl.metrics.bootstrap import Interval, bootstrap
from localctl.metrics.edges import MIN_EDGES, YARDSTICK, canny, edge_scores
from localctl.metrics.regions import hidden_objects
from localctl.micro.detect import detect
from localctl.micro.scenes import SceneObject, scene
from localctl.pipelines import BaseConfig, load_pipeline, resolve_base, set_scheduler
from localctl.seeding import numpy_rng
from research import harness
from research.bases import sha256_of_base, suits
from research.flags import label_of
from research.harness import PROFILE, SPLIT, generate_cases, provenance
from research.page import table


@dataclass(frozen=True)
class Case(harness.Case):
    """A held-out scene, described by its caption alone, with its mask (1, 128, 128), its edges and its split."""

    mask: Tensor
    edges: np.ndarray
    split: str = SPLIT

    @property
    def inside(self) -> np.ndarray:
        return self.mask[0].numpy() > 0.5

    @property
    def hidden(self) -> list[SceneObject]:
        """Return the objects that lie wholly outside the mask, at least 8 px away."""
        return hidden_objects(self.item.objects, self.inside)


def cases(count: int, mask: MaskConfig, seed: int = 0, split: str = SPLIT) -> list[Case]:
    """Return the first ``count`` scenes of ``split`` that can be scored, the same for every adapter.

    The box of each scene is sampled until it has at least ``MIN_EDGES`` edge pixels; scenes with fewer edges in all
    (purple on black) are skipped.

    Raises:
        ValueError: masks of this kind are too small to have that many edges.
    """
    made: list[Case] = []
    index = -1
    while len(made) < count:
        index += 1
        item = scene(index, PROFILE, split)
        edges = canny(item.image)
        for attempt in range(1000 if edges.sum() >= MIN_EDGES else 0):
            sampled = sample_mask(mask, edges.shape, numpy_rng(seed, "evaluation", index, attempt))
            if edges[sampled[0].numpy() > 0.5].sum() >= MIN_EDGES:
                made.append(Case(f"{split}-{index}", item, Layout(item.caption), 1000 + index, sampled, edges, split))
                break
        if index >= 10 * count + 50:
            raise ValueError(f"Masks of kind {mask.kind!r} rarely contain {MIN_EDGES} edge pixels; use larger ones.")
    return made


def sample_all(
    pipe: Any,
    chosen: Sequence[Case],
    adapter: LocalAdapter | None,
    arguments: dict[str, Any],
    name: str = "base",
    **guidance: Any,
) -> np.ndarray:
    """Return images uint8 (n, H, W, 3), each from the noise of its own seed, with or without the adapter.

    ``guidance``: further settings of its :class:`LocalAdapterControl`.
    """

    def controls(some: Sequence[harness.Case]) -> list[LocalAdapterControl]:
        if adapter is None:
            return []
        count = 1 + max(case.item.index for case in some)
        held_out = [case for case in some if isinstance(case, Case)]
        settings = ConditionConfig(**adapter.config.condition)
        scenes = MicroScenes(held_out[0].split, PROFILE, count, settings, keep=False)
        condition = torch.stack([scenes[case.item.index].condition for case in held_out])
        masks = torch.stack([case.mask for case in held_out])
        return [LocalAdapterControl(adapter, condition, masks, **guidance)]

    return np.stack(generate_cases(pipe, chosen, controls, name=name, **arguments))


def f1_inside(chosen: Sequence[Case], images: np.ndarray) -> np.ndarray:
    """Return the F1 of each image's edges against the scene's, inside the mask, (n,)."""
    pairs = zip(chosen, images, strict=True)
    return np.asarray([edge_scores(canny(image), case.edges, case.inside, 2.0).f1 for case, image in pairs])


def reproduced(case: Case, image: np.ndarray) -> float:
    """Return the share of the hidden objects whose shape is in the image at the same place (box IoU >= 0.5)."""
    found = detect(image).objects
    hits = [any(d.shape == o.shape and box_iou(d.box, o.box) >= 0.5 for d in found) for o in case.hidden]
    return float(np.mean(hits))


@dataclass(frozen=True)
class ControlResult:
    """Intervals over scenes.

    control: (F1 adapter - F1 base) / (F1 ceiling - F1 base). leak: hidden objects reproduced, less those of the base;
    None without hidden objects.
    """

    adapter: str
    f1_base: Interval
    f1_adapter: Interval
    f1_ceiling: Interval
    control: Interval
    leak: Interval | None


def compare(
    name: str, chosen: Sequence[Case], base: np.ndarray, ceiling: np.ndarray, images: np.ndarray
) -> ControlResult:
    """Return the figures of an adapter's ``images`` against those of the base and of the VAE round trip."""
    scores = np.stack([f1_inside(chosen, some) for some in (base, ceiling, images)], axis=1)  # (n, 3)

    def share(rows: np.ndarray) -> float:
        floor, top, reached = rows.mean(0)
        return float((reached - floor) / (top - floor))

    hidden = [i for i, case in enumerate(chosen) if case.hidden]
    leaks = [reproduced(chosen[i], images[i]) - reproduced(chosen[i], base[i]) for i in hidden]
    return ControlResult(
        adapter=name,
        f1_base=bootstrap(scores[:, 0]),
        f1_adapter=bootstrap(scores[:, 2]),
        f1_ceiling=bootstrap(scores[:, 1]),
        control=bootstrap(scores, share),
        leak=bootstrap(np.asarray(leaks)) if leaks else None,
    )


def image_sheet(chosen: Sequence[Case], base: np.ndarray, images: np.ndarray, rows: int = 8) -> Image.Image:
    """Return a sheet, a row per scene: its edges, the base's image, the adapter's image and its edges, the scene."""
    lines = []
    for case, plain, steered in list(zip(chosen, base, images, strict=True))[:rows]:
        edges = Image.fromarray((case.edges * 255).astype(np.uint8)).convert("RGB")
        pixels = [case.item.image, plain, steered, (canny(steered) * 255).astype(np.uint8)[..., None].repeat(3, -1)]
        real, of_base, result, found = (Image.fromarray(image) for image in pixels)
        framed = [outline(p, case.mask) for p in (edges, of_base, result, found)]
        lines.append([p.resize((192, 192), Image.Resampling.NEAREST) for p in (*framed, real)])
    labels = ("condition + mask", "base", "with adapter", "its edges", "scene of the edges")
    return grid(lines, labels, [case.item.caption for case in chosen[:rows]])


def base_of(asked: str | None, adapters: Sequence[SavedAdapter]) -> str:
    """Return the base that was asked for, else the first one that an adapter records, else micro.

    Warns of an adapter that was trained on another base of the same shape.

    Raises:
        ValueError: an adapter does not fit the base.
    """
    base = asked or next((adapter.base for adapter in adapters if adapter.base), "micro")
    shape = read_shape(BaseConfig(name=base))
    for adapter in adapters:
        if sentence := check_base(adapter, base, shape):
            warnings.warn(sentence, stacklevel=2)
    return base


def find(path: Path) -> SavedAdapter:
    """Return the adapter at ``path``. Raises ValueError if there is none, or if it does not record its condition."""
    adapter = find_adapter(path)
    if adapter.condition is None:
        raise ValueError(f"The adapter {path} does not record which condition it was trained on; train it again.")
    return adapter


def run(args: argparse.Namespace) -> str:
    """Load, generate, measure and write; return the table."""
    found = [find(path) for path in args.adapter]
    args.base = base_of(args.base, found)
    adapters = {label_of(adapter.name): adapter.load() for adapter in found}
    if len(adapters) < len(found):
        raise ValueError("Two adapters have the same name in the table; give their paths from this folder.")
    own = suits(args.base)
    for name in ("guidance_scale", "scheduler"):
        if getattr(args, name) is None:
            setattr(args, name, getattr(own, name))
    pipe = load_pipeline(BaseConfig(name=args.base))
    set_scheduler(pipe, args.scheduler)
    pipe.set_progress_bar_config(disable=True)
    chosen = cases(args.count, MaskConfig(kind="box"), args.seed)
    names = ("num_inference_steps", "guidance_scale", "batch_size")
    arguments = {**{name: getattr(args, name) for name in names}, "max_sequence_length": own.max_sequence_length}
    ceiling = round_trip(pipe.vae, np.stack([case.item.image for case in chosen]))
    base = sample_all(pipe, chosen, None, arguments)
    guidance = {"unconditional_scale": args.unconditional_scale, "guidance_scale": args.control_guidance_scale}
    results = []
    for number, (name, adapter) in enumerate(adapters.items()):
        images = sample_all(pipe, chosen, adapter, arguments, name, **guidance)
        results.append(compare(name, chosen, base, ceiling, images))
        image_sheet(chosen, base, images).save(args.output_dir / f"sheet_{number}.png")
    settings = {
        **vars(args),
        "base": label_of(args.base),
        "adapter": list(map(label_of, args.adapter)),
        "output_dir": label_of(args.output_dir),
    }
    about = _provenance(args, found, chosen)
    content = {"settings": settings, "results": [asdict(r) for r in results], "provenance": about}
    check_provenance("of this evaluation", content, REQUIRED)
    write_json(args.output_dir / "control.json", content)
    columns = ("F1 base", "F1 adapter", "F1 VAE round trip", "control", "leak over base")
    values = [(r.adapter, (r.f1_base, r.f1_adapter, r.f1_ceiling, r.control, r.leak)) for r in results]
    cells = [(name, ["no hidden objects" if v is None else str(v) for v in row]) for name, row in values]
    return "\n".join(table(columns, cells, "adapter"))


def _provenance(args: argparse.Namespace, found: Sequence[SavedAdapter], chosen: Sequence[Case]) -> dict[str, Any]:
    return provenance(
        [field.name for field in fields(ControlResult) if field.name != "adapter"],
        len(chosen),
        len(chosen),
        {"mask": "box", "drawn_by": "seed, scene and attempt"},
        {"masks": args.seed, "pictures": [case.seed for case in chosen]},
        image_format="8 bit RGB, in memory",
        edges=YARDSTICK,
        weights_sha256={
            "base": sha256_of_base(Path(resolve_base(args.base).id_or_path)),
            **{label_of(adapter.name): sha256_of_folder(adapter.place) for adapter in found},
        },
    )
