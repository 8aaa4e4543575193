"""The variants and the protocol: rows, each an experiment in ``config/experiment``, and the settings of a sweep.

Nothing here loads torch.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from localctl.cli.config import load_config
from localctl.training.settings import ALIASES, FREE_GROUPS, TrainSettings
from research import flags

FLOOR = "base"
WITHOUT, METHOD = "feature_masked", "sobel"  # the two headline rows
SWEEP = "sweep"
GUIDANCE = "guidance"
CHECKPOINTS = 100  # steps between two


@dataclass(frozen=True)
class Protocol(flags.Protocol):
    """Every cell is measured on ``count`` test scenes, with the same masks and noise."""

    LEAST: ClassVar[Mapping[str, int]] = {"count": 2, **flags.Protocol.LEAST}

    part: str | None = None  # of the scenes; None: test
    count: int = 100
    num_inference_steps: int = 20
    guidance_scale: float = 2.0
    batch_size: int = 16
    references: int = 512


PROMPT_ROWS = {"unconditional_scale": 0.0}  # the features are on the rows of the prompt alone


@dataclass(frozen=True)
class Row:
    """A variant of the training, or of the sampling of one.

    title: its name in tables. headline: whether it is trained with every seed, not with the first alone. against: the
    row that lacks the one thing that this one adds. trained: the row whose trainings it samples; None: its own.
    sampling: settings of its images.
    """

    name: str
    title: str
    headline: bool = False
    against: str | None = None
    trained: str | None = None
    sampling: Mapping[str, float] = field(default_factory=dict, hash=False)

    @property
    def experiment(self) -> str:
        """The name of its experiment in ``config/experiment``."""
        return f"ablation_{self.trained or self.name}"


ROWS = {
    row.name: row
    for row in (
        Row("plain", "plain T2I-Adapter, whole condition", headline=True),
        Row("input_masked", "masked at the input"),
        Row(WITHOUT, "features masked", headline=True),
        Row("mse", "+ latent MSE in the mask"),
        Row(METHOD, "+ Sobel in the mask (the method)", headline=True, against=WITHOUT),
        Row("sobel_snr", "the method, weighted by the SNR"),
        Row("sobel_nearest", "the method, mask_resize nearest"),
        Row("sobel_inside", "the method, mask_resize inside"),
        Row("sobel_cover", "the method, mask_resize cover"),
        Row("edges", "+ edges of the decoded image in the mask", against=WITHOUT),
        Row("logit_normal", "features masked, logit-normal timesteps", against=WITHOUT),
        Row("inside_weight", "features masked, denoising weighted 3 in the mask", against=WITHOUT),
        Row("cover", "features masked, mask_resize cover", headline=True, against=WITHOUT),
        Row("cover_edges", "mask_resize cover + edges", headline=True, against="cover"),
        Row("cover_edges_strong", "mask_resize cover + edges, weight 0.5", headline=True, against="cover"),
        Row("cover_edges_late", "mask_resize cover + edges in the second half", True, "cover"),
        Row("cover_prompt", "cover, on the prompt's rows", True, "cover", "cover", PROMPT_ROWS),
        Row(
            "cover_edges_prompt",
            "cover + edges, on the prompt's rows",
            True,
            "cover_prompt",
            "cover_edges",
            PROMPT_ROWS,
        ),
        Row(
            "cover_edges_late_prompt",
            "cover + edges in the second half, on the prompt's rows",
            True,
            "cover_prompt",
            "cover_edges_late",
            PROMPT_ROWS,
        ),
        Row("plain_prompt", "plain T2I-Adapter, on the prompt's rows", True, "cover_prompt", "plain", PROMPT_ROWS),
        Row("full", "cover, trained with full masks", headline=True, against="cover"),
        Row("full_prompt", "cover, full masks, on the prompt's rows", True, "cover_prompt", "full", PROMPT_ROWS),
        Row("best_all", "cover, full masks, margin 8", True, "cover", "best"),
        Row("best", "cover, full masks, margin 8, on the prompt's rows", True, "cover", sampling=PROMPT_ROWS),
        Row("best_edges", "cover, full masks, margin 8 + edges, on the prompt's rows", True, "best", None, PROMPT_ROWS),
    )
}


@dataclass(frozen=True)
class Cell:
    """One training to measure.

    name: of its files. row: name of its row, or ``sweep``. title: its name in tables. overrides: of the training
    settings, as on the command line. sampling: of the settings of its images. trained: name of its training, which
    other cells may share. adapter: the folder of an adapter that is there already, in place of a training.
    """

    name: str
    row: str
    title: str
    seed: int
    overrides: tuple[str, ...]
    sampling: Mapping[str, float] = field(default_factory=dict, hash=False)
    adapter: str | None = None
    trained: str | None = None

    def settings(self, base: str, output_dir: str) -> TrainSettings:
        """Return the settings of the training. Raises ValueError for overrides that are not valid."""
        more = (f"base={base}", f"seed={self.seed}", f"output_dir={output_dir}", f"checkpointing_steps={CHECKPOINTS}")
        return _loaded(
            (*self.overrides, *more, "validation_steps=0", "report_to=none", "resume_from_checkpoint=latest")
        )


@functools.cache  # asked for again and again, and slow to compose
def _loaded(argv: tuple[str, ...]) -> TrainSettings:
    return load_config(argv, TrainSettings, aliases=ALIASES, free_groups=FREE_GROUPS)


@dataclass(frozen=True)
class Sweep:
    """Every combination of these is trained for ``steps`` with the first seed, as is one run without the local term."""

    weights: Sequence[float]
    schedules: Sequence[str]
    normalise: Sequence[str]
    steps: int


BASE = Cell(FLOOR, FLOOR, "base alone", 0, ())  # not trained: the floor; its result has the ceiling, too


# How an adapter's features take part in guidance: title -> settings of its images.
GUIDANCES: dict[str, Mapping[str, float]] = {
    "on all rows": {},
    "on the rows of the prompt alone": {"unconditional_scale": 0.0},
    "own guidance 1.5": {"control_guidance_scale": 1.5},
    "own guidance 3": {"control_guidance_scale": 3.0},
    "weight 1.3": {"weight": 1.3},
    "guidance 3, on all rows": {"guidance_scale": 3.0},
    "guidance 3, own guidance 2": {"guidance_scale": 3.0, "control_guidance_scale": 2.0},
}


def guidance_cells(adapter: str) -> list[Cell]:
    """Return the cells that sample a trained adapter with each of ``GUIDANCES``."""
    return [
        Cell(f"{GUIDANCE}_{number}", GUIDANCE, title, 0, (), sampling, adapter)
        for number, (title, sampling) in enumerate(GUIDANCES.items())
    ]


def row_cells(names: Sequence[str], seeds: Sequence[int], steps: int | None, more: Sequence[str] = ()) -> list[Cell]:
    """Return the cells of the rows in ``names``: headline rows with every seed, the others with the first alone.

    All rows of the first seed are first, so that their table is complete early. more: overrides of every cell.

    Raises:
        ValueError: a row is unknown, or seeds are repeated or missing.
    """
    for name in names:
        if name not in ROWS:
            raise ValueError(f"There is no row {name!r}; choose from {', '.join(ROWS)}.")
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"The seeds must be different, and there must be at least one, not {list(seeds)}.")
    length = () if steps is None else (f"max_train_steps={steps}",)
    rows = [row for name, row in ROWS.items() if name in names]
    return [
        Cell(
            f"{row.name}_seed{seed}",
            row.name,
            row.title,
            seed,
            (f"experiment={row.experiment}", *length, *more),
            row.sampling,
            trained=f"{row.trained or row.name}_seed{seed}",
        )
        for seed in seeds
        for row in rows
        if row.headline or seed == seeds[0]
    ]


def sweep_cells(sweep: Sweep, seed: int, more: Sequence[str] = ()) -> list[Cell]:
    """Return the cells of a sweep; the first is trained without the local term, the weight 0 of every curve."""
    length = f"max_train_steps={sweep.steps}"
    zero = (f"experiment={ROWS[WITHOUT].experiment}", length, *more)
    cells = [Cell(f"{SWEEP}_none", SWEEP, "no local term", seed, zero)]
    for schedule in sweep.schedules:
        for normalise in sweep.normalise:
            for weight in sweep.weights:
                changed = (f"loss.schedule={schedule}", f"loss.normalise={normalise}", f"loss.weight={weight!r}")
                overrides = (f"experiment={ROWS[METHOD].experiment}", length, *more, *changed)
                name, title = f"{SWEEP}_{schedule}_{normalise}_{weight:g}", f"{schedule}, {normalise}, {weight:g}"
                cells.append(Cell(name, SWEEP, title, seed, overrides))
    return cells
