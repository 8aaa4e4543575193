"""The jobs of the tab Place: from the settings of a run to images in the session's folder, with previews on the way."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from localctl.bases import same_base
from localctl.control.attention_maps import AttentionMaps
from localctl.jobs.embedded import Record, embedded
from localctl.jobs.files import read_inputs, save, save_images, write_inputs
from localctl.jobs.generate import StepProgress, generate_job, load_models
from localctl.jobs.prepare import Job, prepare
from localctl.jobs.settings import SampleSettings
from localctl.jobs.sheets import save_sheets, verdict
from localctl.jobs.variants import Variant
from localctl.sampling import GenerateOutput
from localctl.studio.jobs_queue import Check
from localctl.studio.studio import Studio


@dataclass(frozen=True)
class Shown:
    """An image for the gallery.

    kind: image, heat or sheet. lines: what is found in it. figures: what else is shown of it, as HTML.
    """

    path: Path
    caption: str
    kind: str
    lines: tuple[str, ...] = ()
    figures: str = ""


@dataclass(frozen=True)
class Note:
    """A sentence on the page while a job runs."""

    text: str


@dataclass(frozen=True)
class Step:
    """A sampling step: a sentence, the part of the job that is done, and what the images would be now."""

    text: str
    share: float
    previews: tuple[Image.Image, ...]


def run_job(
    studio: Studio, settings: Mapping[str, Any], folder: Path, report: Callable[[Any], None], check: Check, heat: bool
) -> None:
    """Run ``settings`` and report a :class:`Note`, each :class:`Step`, and :class:`Shown` for each file.

    heat: also render where each phrase is attended to. ValueError for settings that cannot be used, in one sentence.
    """
    job = prepare(SampleSettings(**settings))
    for note in job.notes:
        report(Note(note))
    inputs = read_inputs(vars(job.options), job.layouts)
    models, studio.models = studio.models, None
    if models is None or models.pipe is None or models.base != job.base:
        report(Note("Loading the base, once ..."))
    studio.models = models = load_models(job, models)
    check()
    mapped = heat and any(region.phrase for layout in job.layouts for region in layout.regions)
    if heat and not mapped:
        report(Note("No region has a phrase, so there are no heat maps."))
    maps = [AttentionMaps() if mapped else None for _ in job.variants]
    watched = replace(job, variants=list(map(_watched, job.variants, maps)))

    def on_step(step: StepProgress) -> None:
        check()
        previews = () if step.latents is None else tuple(models.preview(step.latents))
        of = f" of {step.variant.label}" if len(job.variants) > 1 else ""
        report(Step(f"Step {step.step} of {step.of}{of}", step.done, previews))
        check()

    copies = write_inputs(inputs, vars(job.options), folder)
    record = embedded({**vars(job.options), **copies}, folder)
    outputs = []
    for (_, output), variant, seen in zip(generate_job(watched, models, on_step), job.variants, maps, strict=True):
        outputs.append((variant, output))
        images = _written(job, len(outputs) - 1, output, folder, record)
        for shown in [*images, *_heat(seen, images, output, record)]:
            report(shown)
    if len(outputs) > 1:
        save_sheets(outputs, job, folder, record)
        for path in [*sorted(folder.glob("*_sweep.png")), *folder.glob("compare.png")]:
            report(Shown(path, "side by side", "sheet"))


def _watched(variant: Variant, maps: AttentionMaps | None) -> Variant:
    return variant if maps is None else replace(variant, controls=(*variant.controls, maps))


def _written(job: Job, index: int, output: GenerateOutput, folder: Path, record: Record) -> list[Shown]:
    """Write the images of the variant with this index, each with the record that repeats it."""
    variant, several = job.variants[index], len(job.variants) > 1
    reads = same_base(job.base.name, "micro") and bool(job.options.layout)
    shown = []
    paths = save_images(output, index, job.variants, folder, record)
    for path, image, seed, layout in zip(paths, output.images, output.seeds, output.layouts, strict=True):
        caption = f"{variant.label}, seed {seed}" if several else f"seed {seed}"
        lines = (f"{caption}: {', '.join(verdict(image, layout))}",) if reads else ()
        shown.append(Shown(path, caption, "image", lines))
    return shown


def _heat(maps: AttentionMaps | None, images: Sequence[Shown], output: GenerateOutput, record: Record) -> list[Shown]:
    """Write a heat map per phrase beside each of the images."""
    if maps is None:
        return []
    shown = []
    for index, (item, image) in enumerate(zip(images, output.images, strict=True)):
        for number, (phrase, overlay) in enumerate(maps.overlays(index, image), start=1):
            path = item.path.with_name(f"{item.path.stem}_heat_{number}.png")
            save(overlay, path, record)
            shown.append(Shown(path, f"heat of {phrase}, {item.caption}", "heat"))
    return shown
