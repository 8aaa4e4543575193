"""Validation: images of held-out examples with fixed prompts, masks and noise, scored by their edges in the mask."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from localctl.adapter import LocalAdapter
from localctl.conditions import ConditionConfig, extract
from localctl.control.image_controls import LocalAdapterControl
from localctl.data.bad_rows import BadRow
from localctl.data.sample import Example, Source
from localctl.diffusion import reconstruct
from localctl.drawing import grid, outline
from localctl.files import write_bytes
from localctl.images import condition_to_pil, png_bytes, to_pil
from localctl.layout import Layout
from localctl.masks import sample_mask
from localctl.metrics.edges import MIN_EDGES, EdgeScores, edge_scores
from localctl.sampling import generate
from localctl.seeding import numpy_rng
from localctl.training.models import Models
from localctl.training.settings import TrainSettings, ValidationConfig

Beat = Callable[[], None]
COLUMNS = ("condition, mask", "generated", "its condition", "real")


@dataclass(frozen=True)
class Case:
    """A held-out example with its mask (1,H,W), the edges (H,W) bool of its image, and the prompt: its caption, or an
    empty one."""

    example: Example
    mask: Tensor
    edges: np.ndarray
    prompt: str

    @property
    def scored(self) -> bool:
        """Return whether the mask contains enough edges for a score."""
        return int((self.edges & (self.mask[0].numpy() > 0.5)).sum()) >= MIN_EDGES


@dataclass(frozen=True)
class Fidelity:
    """Means over the cases: how well the edges of generated images match those of real ones inside the mask. All NaN if
    no mask contains enough edges."""

    f1: float
    precision: float
    recall: float
    per_case: tuple[float, ...]

    @classmethod
    def of(cls, scores: Sequence[EdgeScores]) -> Fidelity:
        mean = {name: sum(getattr(s, name) for s in scores) / len(scores) for name in ("f1", "precision", "recall")}
        return cls(**mean, per_case=tuple(s.f1 for s in scores))

    @property
    def scored(self) -> bool:
        return not math.isnan(self.f1)


def unscored(count: int) -> Fidelity:
    """Return the NaN scores of ``count`` cases without enough edges in their masks."""
    return Fidelity(math.nan, math.nan, math.nan, (math.nan,) * count)


@dataclass(frozen=True)
class References:
    """The scores of the base alone (chance) and of real images encoded and decoded by the VAE (the ceiling)."""

    base: Fidelity
    round_trip: Fidelity

    def control(self, f1: float) -> float:
        """Return where ``f1`` lies between the base (0) and the ceiling (1); NaN if the ceiling is not above the
        base."""
        span = self.round_trip.f1 - self.base.f1
        return (f1 - self.base.f1) / span if span > 0 else math.nan


@dataclass(frozen=True)
class ValidationResult:
    fidelity: Fidelity
    sheet: Image.Image

    def save(self, path: Path) -> None:
        """Write the sheet as a PNG. OSError naming the file if it cannot be written."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, png_bytes(self.sheet))


def as_clause(fidelity: Fidelity, references: References) -> str:
    """Return the scores as a clause for the log."""
    if not fidelity.scored:
        return f"no score, since no held-out mask has {MIN_EDGES} edge pixels in it (larger masks would)"
    return (
        f"edges in the mask F1 {fidelity.f1:.3f} (base alone {references.base.f1:.3f}, ceiling "
        f"{references.round_trip.f1:.3f})"
    )


def validation_row(fidelity: Fidelity, references: References) -> dict[str, float]:
    """Return the scores as a row for the trackers."""
    return {
        "validation/f1": fidelity.f1,
        "validation/precision": fidelity.precision,
        "validation/recall": fidelity.recall,
        "validation/control": references.control(fidelity.f1),
        "validation/base_f1": references.base.f1,
        "validation/round_trip_f1": references.round_trip.f1,
    }


class Validator:
    """Generates and scores the same cases each time. It uses the models in place and changes neither the adapter's
    weights nor the global random state, so that training continues bit for bit as without it."""

    def __init__(self, models: Models, settings: TrainSettings, source: Source) -> None:
        self.models = models
        self.config: ValidationConfig = settings.validation
        self.condition = settings.condition
        self.edge_condition = edge_condition(self.condition)
        self.cases = choose_cases(source, settings)
        self.scored = self.cases[0].scored

    @property
    def steps(self) -> int:
        """Return the number of denoising steps in a :meth:`run`."""
        return math.ceil(len(self.cases) / self.config.batch_size) * self.config.num_inference_steps

    def run(self, beat: Beat = lambda: None) -> ValidationResult:
        """Generate all cases with the present adapter, and score them. ``beat`` is called after every denoising step,
        and may raise an exception to abort."""
        images = self._generate(self.models.plain_adapter, beat)
        fidelity = self._score(images)
        return ValidationResult(fidelity, self._sheet(images, fidelity))

    def references(self, beat: Beat = lambda: None) -> References:
        """Score the images of the base alone, and real ones encoded and decoded by the VAE. ``beat``: as for
        :meth:`run`."""
        if not self.scored:
            return References(unscored(len(self.cases)), unscored(len(self.cases)))
        base = self._score(self._generate(None, beat))
        passed = [to_pil(reconstruct(self.models.vae, case.example.pixels[None])[0]) for case in self.cases]
        return References(base, self._score(passed))

    def _generate(self, adapter: LocalAdapter | None, beat: Beat = lambda: None) -> list[Image.Image]:
        def after_step(pipe: Any, index: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
            beat()
            return values

        images: list[Image.Image] = []
        sampling, arguments = self.models.sampling(self.config)
        for start in range(0, len(self.cases), self.config.batch_size):
            cases = self.cases[start : start + self.config.batch_size]
            height, width = cases[0].mask.shape[-2:]
            controls = []
            if adapter is not None:
                condition = torch.stack([case.example.condition for case in cases])
                masks = torch.stack([case.mask for case in cases])
                guidance: dict[str, Any] = {
                    "unconditional_scale": self.config.unconditional_scale,
                    "guidance_scale": self.config.control_guidance_scale,
                }
                controls = [LocalAdapterControl(adapter, condition, masks, **guidance)]
            images += generate(
                self.models.pipe,
                [Layout(case.prompt, height, width) for case in cases],
                controls,
                seeds=self.config.seed + start,
                sampling=sampling,
                prompt_weighting=False,  # captions of data, encoded as in training
                callback_on_step_end=after_step,
                **arguments,
            ).images
        return images

    def _score(self, images: Sequence[Image.Image]) -> Fidelity:
        if not self.scored:
            return unscored(len(self.cases))
        found = [edges_of(self.edge_condition, image) for image in images]
        pairs = zip(found, self.cases, strict=True)
        return Fidelity.of([edge_scores(edges, case.edges, case.mask[0].numpy() > 0.5) for edges, case in pairs])

    def _sheet(self, images: Sequence[Image.Image], fidelity: Fidelity) -> Image.Image:
        rows, labels = [], []
        for case, image, f1 in list(zip(self.cases, images, fidelity.per_case, strict=True))[: self.config.rows]:
            seen = self.condition if self.condition.from_image else self.edge_condition
            rows.append(
                [
                    outline(condition_to_pil(case.example.condition), case.mask),
                    outline(image, case.mask),
                    outline(condition_to_pil(extract(seen, np.asarray(image))), case.mask),
                    to_pil(case.example.pixels),
                ]
            )
            text = case.prompt or "(no prompt)"
            labels.append(f"F1 {f1:.2f}  {text}" if self.scored else text)
        return grid(rows, COLUMNS, labels)


def edge_condition(condition: ConditionConfig) -> ConditionConfig:
    """Return the canny condition with which images for ``condition`` are scored."""
    return condition if condition.kind == "canny" else ConditionConfig(kind="canny")


def edges_of(config: ConditionConfig, image: Image.Image) -> np.ndarray:
    """Return the edges of an image, (H,W) bool."""
    return extract(config, np.asarray(image))[0].numpy() > 0.5


def choose_cases(source: Source, settings: TrainSettings) -> list[Case]:
    """Choose the first ``validation.count`` usable examples whose mask, sampled with ``validation.seed``, contains
    enough edges for a score; if there are none, the first usable ones. ValueError if no example is usable."""
    config, edges = settings.validation, edge_condition(settings.condition)
    cases: list[Case] = []
    others: list[Case] = []
    for index in range(len(source)):
        if len(cases) == config.count:
            break
        try:
            example = source[index]
        except BadRow:
            continue
        height, width = example.pixels.shape[-2:]
        rng = numpy_rng(config.seed, "validation mask", example.key)
        mask = example.mask
        if mask is None:
            mask = sample_mask(settings.mask, (height, width), rng, example.object_masks)
        chance = numpy_rng(config.seed, "validation empty prompt", example.key).random()
        prompt = "" if chance < config.proportion_empty_prompts else example.caption
        case = Case(example, mask, edges_of(edges, to_pil(example.pixels)), prompt)
        if case.scored:
            cases.append(case)
        elif len(others) < config.count:
            others.append(case)
    if not cases and not others:
        raise ValueError(
            f"None of the {len(source)} held-out examples is usable; repair them (python -m localctl.data check names "
            "what is wrong), or pass --validation_steps 0."
        )
    return cases or others
