"""The layout benchmark: generates every layout under each method, and measures what is in the boxes."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from localctl.control.base import Control
from localctl.distributed import process_device
from localctl.drawing import render_layout
from localctl.evaluation.provenance import FEATURES, check_provenance, read_json, write_json
from localctl.jobs.variants import file_label
from localctl.metrics.clip import CLIPScore
from localctl.metrics.extractors import Extractor, describe
from localctl.metrics.statistics import Statistics, distances
from localctl.micro.scenes import scene
from localctl.pipelines import BaseConfig, load_pipeline, set_scheduler, with_scheduler
from localctl.sampling import generate
from localctl.sampling_settings import FREE
from research.bases import suits
from research.harness import (
    DIGITS,
    PROFILE,
    Study,
    as_rows,
    check_same,
    generate_cases,
    provenance,
    statistics_of,
)
from research.layout_benchmark.attention import attention_of
from research.layout_benchmark.cases import COLUMNS, cases, read
from research.layout_benchmark.cost import compare_cost
from research.layout_benchmark.methods import Method
from research.layout_benchmark.protocol import Protocol
from research.page import save_strip

logger = logging.getLogger(__name__)
ALL_COLUMNS = (*COLUMNS, "clip_score")
SHOWN = 6  # layouts on the sheet
FEW = 8  # images whose attention is measured, and the most images of a timed run
TIMED_STEPS = 10  # most sampling steps of a timed run


class LayoutBenchmark(Study[Method]):
    """Measures methods.

    Raises:
        ValueError: the base, scheduler, device or an extractor cannot be used, or the batch size is below 1.
    """

    protocol: Protocol

    def __init__(
        self, protocol: Protocol, folder: Path, work: Path, batch_size: int = 16, device: str = "auto"
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"The batch size must be at least 1, not {batch_size}.")
        super().__init__(protocol, folder, work)
        self.batch_size, self.device, self.own = batch_size, process_device(device), suits(protocol.base)
        assert self.extractors  # loaded now, so that a missing one is an error before any slow work
        self.cases = cases(protocol.layouts, protocol.split, protocol.regions)
        # Ordered by layout, then by seed.
        self.images = [replace(case, seed=seed) for case in self.cases for seed in protocol.seeds]

    @cached_property
    def pipe(self) -> DiffusionPipeline:
        pipe = load_pipeline(BaseConfig(name=self.protocol.base), device=self.device)
        set_scheduler(pipe, self.protocol.scheduler)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def asked(self, variant: Method) -> dict[str, Any]:
        asked = {**super().asked(variant), "controls": variant.described()}
        way = {name: getattr(variant.sampling, name) for name in ("scheduler", "guidance_scale")}
        return asked if variant.sampling == FREE else {**asked, "sampling": way}

    def earlier(self, variant: Method, content: Mapping[str, Any]) -> dict[str, Any]:
        asked = super().earlier(variant, content)
        return {**asked, "controls": variant.filled(asked.get("controls", []))}

    def check(self, variants: Sequence[Method]) -> None:
        """Check the results as :meth:`Study.check` does, and the images. Raises ValueError if their settings differ."""
        super().check(variants)
        for variant in variants:
            self._check_images(variant)

    def measured(self, variant: Method) -> dict[str, Any]:
        images = self._generated(variant)
        clip_score = CLIPScore(self.clip)
        for case, image in zip(self.images, images, strict=True):
            clip_score.update(image, case.layout.prompt)
        rows = [read(image, case) for case, image in zip(self.images, images, strict=True)]
        values, features = self._distances(variant, images)
        self._save_strip(variant, images)
        cost = self.protocol.cost
        return {
            "settings": [list(pair) for pair in variant.settings],
            "ids": [case.id for case in self.cases],
            "counts": [len(case.objects) for case in self.cases],
            "columns": list(ALL_COLUMNS),
            "samples": as_rows(np.column_stack([np.array(rows), clip_score.per_sample()[:, :1]])),
            "distances": values,
            "cost": self._cost(variant) if cost else {},
            "attention": self._attention(variant) if cost else {},
            "provenance": self._provenance(features),
        }

    def _folder(self, method: Method) -> Path:
        return self.work / file_label(method.name)

    def _images_asked(self, method: Method) -> dict[str, Any]:
        """Return all that an image depends on besides its layout and seed."""
        asked = self.asked(method)
        known = {**asked["protocol"], **asked}
        names = ("num_inference_steps", "scheduler", "guidance_scale", "sampling", "base_sha256", "controls")
        return {name: known[name] for name in names if name in known}

    def _check_images(self, method: Method) -> None:
        path = self._folder(method) / "drawn.json"
        if path.is_file():
            there = self.earlier(method, {"asked": read_json(path, "record")})
            check_same(path, there, self._images_asked(method), "another --work_dir")

    def _options(self, method: Method, steps: int | None = None) -> dict[str, Any]:
        scale = method.sampling.guidance_scale or self.protocol.guidance_scale
        return {
            "num_inference_steps": steps or self.protocol.num_inference_steps,
            "guidance_scale": self.own.guidance_scale if scale is None else scale,
            "max_sequence_length": self.own.max_sequence_length,
            "batch_size": self.batch_size,
        }

    def _generated(self, method: Method) -> list[np.ndarray]:
        self._check_images(method)
        write_json(self._folder(method) / "drawn.json", self._images_asked(method))
        files = [self._folder(method) / f"{case.id}_seed{case.seed}.png" for case in self.images]
        with with_scheduler(self.pipe, method.sampling.scheduler):
            return generate_cases(
                self.pipe,
                self.images,
                lambda _: method.controls,
                name=method.name,
                files=files,
                progress_bar=False,
                **self._options(method),
            )

    def _distances(self, method: Method, images: Sequence[np.ndarray]) -> tuple[dict[str, float], dict[str, Any]]:
        """Return the distances of the images to scenes of the training split, and their provenance by extractor."""
        values: dict[str, float] = {}
        about = {}
        keys = [f"{case.id}-{case.seed}" for case in self.images]
        for extractor in self.extractors:
            real = self._reference(extractor)
            fake = statistics_of(extractor, keys, images.__getitem__, self.batch_size, {})
            report = distances(real, fake)
            values |= report.values
            numbers = {"n_real": real.n, "n_fake": fake.n, "warnings": list(report.warnings)}
            about[extractor.name] = {**describe(extractor), **numbers}
            check_provenance(method.name, {"provenance": about[extractor.name]}, FEATURES)
        return values, about

    def _reference(self, extractor: Extractor) -> Statistics:
        """Return the statistics of the training scenes, computed anew only if the scenes or weights have changed."""
        path = self.work / f"reference_{extractor.name}.npz"
        about = {"scenes": f"{PROFILE}, train", "count": self.protocol.references, **describe(extractor)}
        if path.is_file():
            found = Statistics.load(path)
            if all(found.provenance.get(key) == value for key, value in about.items()):
                return found
        logger.info(f"{path}: {self.protocol.references} scenes")
        keys = [f"train-{index}" for index in range(self.protocol.references)]
        made = statistics_of(extractor, keys, lambda index: scene(index, PROFILE, "train").image, 64, about)
        made.save(path)
        return made

    def _cost(self, method: Method) -> dict[str, float | None]:
        """Measure time and memory of a method, run alternately with plain sampling; ``seconds`` is per image."""
        few = self.cases[: min(FEW, self.batch_size)]
        layouts, seeds = [case.layout for case in few], [0] * len(few)
        options = self._options(method, min(TIMED_STEPS, self.protocol.num_inference_steps))

        def run(controls: Sequence[Control]) -> None:
            generate(self.pipe, layouts, controls, seeds, paired=True, **options)

        with with_scheduler(self.pipe, method.sampling.scheduler):
            cost = compare_cost(lambda: run(method.controls), lambda: run(()), self.device)
        peak = None if cost.peak is None else round(cost.peak, 1)
        return {"seconds": cost.seconds / len(few), "overhead": cost.overhead, "peak_mib": peak}

    def _attention(self, method: Method) -> dict[str, float]:
        layouts = [case.layout for case in self.cases if len(case.objects) == 2][:FEW] or [self.cases[0].layout]
        with with_scheduler(self.pipe, method.sampling.scheduler):
            found = attention_of(self.pipe, layouts, method.controls, self.protocol.seeds[0], **self._options(method))
        return {name: round(value, DIGITS) for name, value in found.items()}

    def _provenance(self, features: Mapping[str, Any]) -> dict[str, Any]:
        first = next(iter(features.values()))
        return provenance(
            ALL_COLUMNS,
            first["n_real"],
            first["n_fake"],
            f"boxes of micro scenes ({PROFILE}, {self.protocol.split})",
            list(self.protocol.seeds),
            base_sha256=self.base_sha256,
            device=torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type,
            distances=dict(features),
        )

    def _save_strip(self, method: Method, images: Sequence[np.ndarray]) -> None:
        """Save the strip of the first layouts of several regions, with the first seed and the outlines of the boxes."""
        pairs = list(zip(self.images, images, strict=True))[:: len(self.protocol.seeds)]
        several = [pair for pair in pairs if len(pair[0].objects) > 1] or pairs
        outlined = [
            render_layout(case.layout, Image.fromarray(image).resize((256, 256))) for case, image in several[:SHOWN]
        ]
        save_strip(outlined, self.strip(method.name))
