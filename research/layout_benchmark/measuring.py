"""One method of the benchmark: draw, measure, and write the result, each only as far as it is not done yet."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from localctl.cli.sample_regions import FREE, named
from localctl.distributed import process_device
from localctl.evaluation.fid import collect
from localctl.evaluation.provenance import FEATURES, REQUIRED, check_provenance, read_json, versions, write_json
from localctl.files import sha256
from localctl.images import load_image
from localctl.metrics.clip import Clip, CLIPScore
from localctl.metrics.extractors import MICRO_CLIP, Extractor, describe, load_extractor
from localctl.metrics.statistics import Statistics, distances
from localctl.metrics.weights import sha256_of_folder
from localctl.micro.detect import VERSION
from localctl.micro.scenes import scene
from localctl.pipelines import BaseConfig, load_pipeline, resolve_base, set_scheduler, with_scheduler
from localctl.sampling import generate
from research.layout_benchmark.attention import attention_of
from research.layout_benchmark.cases import COLUMNS, PROFILE, Case, cases, read
from research.layout_benchmark.cost import compare_cost
from research.layout_benchmark.methods import Method
from research.layout_benchmark.protocol import Protocol
from research.reader import check_reader

Say = Callable[[str], None]
ALL_COLUMNS = (*COLUMNS, "clip_score")
SHOWN = 6  # layouts on the contact sheet
LOOKED_AT = 8  # pictures whose attention is taken apart, and at most so many in a run that is timed
TIMED_STEPS = 10  # of a run that is timed
DIGITS = 5


class Bench:
    """Draws and measures methods. ``folder`` keeps the results, ``work`` the pictures they were made from.

    ValueError for a base, scheduler, device or extractor that cannot be used.
    """

    def __init__(
        self, protocol: Protocol, folder: Path, work: Path, batch_size: int = 16, device: str = "auto", say: Say = print
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"The batch size must be at least 1, not {batch_size}.")
        self.protocol, self.folder, self.work, self.say = protocol, folder, work, say
        self.batch_size, self.device = batch_size, process_device(device)
        self.base_sha256 = _sha256_of_base(Path(resolve_base(protocol.base).id_or_path))
        self.extractors: list[Extractor] = [load_extractor(name) for name in protocol.extractors]
        self.cases = cases(protocol.layouts, protocol.split, protocol.regions)

    @cached_property
    def pipe(self) -> DiffusionPipeline:
        pipe = load_pipeline(BaseConfig(name=self.protocol.base), device=self.device)
        set_scheduler(pipe, self.protocol.scheduler)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    @cached_property
    def clip(self) -> Clip:
        return Clip(MICRO_CLIP)

    @property
    def pictures(self) -> list[tuple[Case, int]]:
        """Layout by layout, each with every seed."""
        return [(case, seed) for case in self.cases for seed in self.protocol.seeds]

    def check(self, methods: Sequence[Method]) -> None:
        """ValueError when there are results or pictures of other settings under the name of one of them, or when what
        is to be measured would stand beside results of another version of the reader."""
        waiting = [method.name for method in methods if not self._done(method)]
        for method in methods:
            self._same_pictures(method)
        check_reader(self.folder, waiting)

    def measure(self, method: Method) -> bool:
        """Whether there was anything to do. ValueError as for :meth:`check`, or for a damaged picture."""
        if self._done(method):
            self.say(f"{method.name}: done before")
            return False
        self._draw(method)
        clip_score = CLIPScore(self.clip)
        rows = []
        for (case, _), image in zip(self.pictures, self._images(method), strict=True):
            clip_score.update(image, case.layout.prompt)
            rows.append(read(image, case))
        table = np.column_stack([np.array(rows), clip_score.per_sample()[:, :1]])
        measured, features = self._distances(method)
        content = {
            "asked": self._asked(method),
            "name": method.name,
            "settings": [list(pair) for pair in method.settings],
            "ids": [case.id for case in self.cases],
            "counts": [len(case.objects) for case in self.cases],
            "columns": list(ALL_COLUMNS),
            "samples": _lists(table),
            "distances": measured,
            "cost": self._cost(method) if self.protocol.cost else {},
            "attention": self._attention(method) if self.protocol.cost else {},
            "provenance": self._provenance(features),
        }
        check_provenance(method.name, content, REQUIRED)
        self._strip(method)
        write_json(self._result(method), content)
        self.say(f"{method.name}: {self._result(method)}")
        return True

    def _result(self, method: Method) -> Path:
        return self.folder / f"{named(method.name)}.json"

    def _asked(self, method: Method) -> dict[str, Any]:
        protocol = {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in asdict(self.protocol).items()
            if value is not None
        }
        asked = {
            "protocol": protocol,
            "base_sha256": self.base_sha256,
            "controls": method.described(),
            "reader": VERSION,
        }
        way = {name: getattr(method.sampling, name) for name in ("scheduler", "guidance_scale")}
        return asked if method.sampling == FREE else {**asked, "sampling": way}

    def _done(self, method: Method) -> bool:
        path = self._result(method)
        if not path.is_file():
            return False
        there = {**read_json(path, "result").get("asked", {}), "reader": VERSION}
        self._same(path, method, there, self._asked(method), "another --report")
        return True

    def _drawing(self, method: Method) -> dict[str, Any]:
        """What a picture depends on beside its own layout and seed."""
        asked = self._asked(method)
        known = {**asked["protocol"], **asked}
        names = ("num_inference_steps", "scheduler", "guidance_scale", "sampling", "base_sha256", "controls")
        return {name: known[name] for name in names if name in known}

    def _same_pictures(self, method: Method) -> None:
        path = self._pictures_of(method) / "drawn.json"
        if path.is_file():
            self._same(path, method, read_json(path, "record"), self._drawing(method), "another --work_dir")

    def _same(
        self, path: Path, method: Method, there: Mapping[str, Any], asked: Mapping[str, Any], instead: str
    ) -> None:
        there = {**there, "controls": method.filled(there.get("controls", []))}
        changed = sorted(key for key in {*there, *asked} if there.get(key) != asked.get(key))
        if changed:
            raise ValueError(f"{path} was made with another {', '.join(changed)}; choose {instead}, or remove it.")

    def _pictures_of(self, method: Method) -> Path:
        return self.work / named(method.name)

    def _picture(self, method: Method, case: Case, seed: int) -> Path:
        return self._pictures_of(method) / f"{case.id}_seed{seed}.png"

    def _options(self, method: Method, steps: int | None = None) -> dict[str, Any]:
        scale = method.sampling.guidance_scale or self.protocol.guidance_scale
        return {
            "num_inference_steps": steps or self.protocol.num_inference_steps,
            "guidance_scale": resolve_base(self.protocol.base).guidance_scale if scale is None else scale,
            "batch_size": self.batch_size,
        }

    def _draw(self, method: Method) -> None:
        """The pictures that are not there yet, batch by batch."""
        self._same_pictures(method)
        missing = [pair for pair in self.pictures if not self._picture(method, *pair).is_file()]
        if not missing:
            return
        write_json(self._pictures_of(method) / "drawn.json", self._drawing(method))
        for first in range(0, len(missing), self.batch_size):
            batch = missing[first : first + self.batch_size]
            layouts, seeds = [case.layout for case, _ in batch], [seed for _, seed in batch]
            with with_scheduler(self.pipe, method.sampling.scheduler):
                drawn = generate(self.pipe, layouts, method.controls, seeds, paired=True, **self._options(method))
            for pair, image in zip(batch, drawn.images, strict=True):
                path = self._picture(method, *pair)
                partial = path.with_name(f".{path.name}")
                image.save(partial)
                partial.replace(path)
            self.say(f"{method.name}: {first + len(batch)} of {len(missing)} pictures")

    def _keyed(self, method: Method, numbers: range) -> Iterator[tuple[str, np.ndarray]]:
        for case, seed in self.pictures[numbers.start : numbers.stop]:
            yield f"{case.id}-{seed}", np.asarray(load_image(self._picture(method, case, seed)))

    def _images(self, method: Method) -> Iterator[np.ndarray]:
        for pair in self.pictures:
            yield np.asarray(load_image(self._picture(method, *pair)))

    def _distances(self, method: Method) -> tuple[dict[str, float], dict[str, Any]]:
        """To scenes of the training part; values, and where they come from by extractor."""
        values: dict[str, float] = {}
        about = {}
        for extractor in self.extractors:
            reference = self._reference(extractor)
            pictures = partial(self._keyed, method)
            metric = collect(extractor, len(self.pictures), pictures, self.batch_size)
            drawn = metric.statistics(**describe(extractor))
            report = distances(reference, drawn)
            values |= report.values
            about[extractor.name] = {
                **describe(extractor),
                "n_real": reference.n,
                "n_fake": drawn.n,
                "warnings": list(report.warnings),
            }
            check_provenance(method.name, {"provenance": about[extractor.name]}, FEATURES)
        return values, about

    def _reference(self, extractor: Extractor) -> Statistics:
        """Made once, and again when the scenes or the extractor's weights are others."""
        path = self.work / f"reference_{extractor.name}.npz"
        about = {"scenes": f"{PROFILE}, train", "count": self.protocol.references, **describe(extractor)}
        if path.is_file():
            found = Statistics.load(path)
            if all(found.provenance.get(key) == value for key, value in about.items()):
                return found
        self.say(f"{path}: {self.protocol.references} scenes")
        made = collect(extractor, self.protocol.references, _scenes, 64).statistics(**about)
        made.save(path)
        return made

    def _cost(self, method: Method) -> dict[str, float | None]:
        """Of runs in turns with plain sampling; ``seconds`` per picture."""
        few = self.cases[: min(LOOKED_AT, self.batch_size)]
        layouts, seeds = [case.layout for case in few], [0] * len(few)
        options = self._options(method, min(TIMED_STEPS, self.protocol.num_inference_steps))

        def run(controls: Sequence[Any]) -> None:
            generate(self.pipe, layouts, controls, seeds, paired=True, **options)

        with with_scheduler(self.pipe, method.sampling.scheduler):
            cost = compare_cost(lambda: run(method.controls), lambda: run(()), self.device)
        peak = None if cost.peak is None else round(cost.peak, 1)
        return {"seconds": cost.seconds / len(few), "overhead": cost.overhead, "peak_mib": peak}

    def _attention(self, method: Method) -> dict[str, float]:
        layouts = [case.layout for case in self.cases if len(case.objects) == 2][:LOOKED_AT] or [self.cases[0].layout]
        with with_scheduler(self.pipe, method.sampling.scheduler):
            found = attention_of(self.pipe, layouts, method.controls, self.protocol.seeds[0], **self._options(method))
        return {name: round(value, DIGITS) for name, value in found.items()}

    def _provenance(self, features: Mapping[str, Any]) -> dict[str, Any]:
        first = next(iter(features.values()))
        return {
            "metrics": list(ALL_COLUMNS),
            "n_real": first["n_real"],
            "n_fake": first["n_fake"],
            "image_format": "PNG, 8 bit RGB",
            "image_size": [128, 128],
            "mask_protocol": f"boxes of micro scenes ({PROFILE}, {self.protocol.split})",
            "seeds": list(self.protocol.seeds),
            "versions": versions(),
            "base_sha256": self.base_sha256,
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type,
            "distances": dict(features),
        }

    def _strip(self, method: Method) -> None:
        """The first layouts of several regions with the first seed, outlines drawn, one below the other."""
        several = [case for case in self.cases if len(case.objects) > 1] or self.cases
        seed = self.protocol.seeds[0]
        shown = [case.layout.draw(load_image(self._picture(method, case, seed)).resize((256, 256))) for case in several]
        self.folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.concatenate([np.asarray(picture) for picture in shown[:SHOWN]])).save(
            self.folder / f"{named(method.name)}.png"
        )


def _sha256_of_base(folder: Path) -> str:
    """Of the weights that pictures depend on."""
    parts = (sha256_of_folder(folder / part) for part in ("unet", "text_encoder", "vae"))
    return sha256("".join(parts))


def _scenes(numbers: range) -> Iterator[tuple[str, np.ndarray]]:
    return ((f"train-{index}", scene(index, PROFILE, "train").image) for index in numbers)


def _lists(table: np.ndarray) -> list[list[float | None]]:
    return [[None if math.isnan(value) else round(value, DIGITS) for value in row] for row in table.tolist()]
