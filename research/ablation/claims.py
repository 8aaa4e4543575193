"""What was to be shown, written before the trainings, and what was measured of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from localctl.metrics.bootstrap import Interval
from research.ablation.figures import CONTROL, Figures
from research.ablation.rows import FLOOR, ROWS
from research.page import signed

# Of each claim the rows, the first pair of which both were trained counts: the row, and the row without it.
LOCAL_TERM = (
    ("best_edges", "best"),
    ("cover_edges_late_prompt", "cover_prompt"),
    ("cover_edges_prompt", "cover_prompt"),
    ("cover_edges", "cover"),
)
STRONG = ("best_all", "cover"), ("best",)  # the first of each that was trained: with features on all rows, and not
MASK = (("best", "plain_prompt"), ("cover_prompt", "plain_prompt"), ("cover", "plain"))
CLAIMS = """
- The local term is claimed to help if, against the same training without it, F1 inside the mask gains at least 0.05
  with an interval over seeds and scenes above 0, the CLIP score is not more than 1 lower, and the interval of the
  leak's change covers 0.
- Control is claimed to be strong if it is at least 0.85, `color_in` at least 0.95 of the base's, and the
  leak at most 0.05.
- The mask is claimed to cost little if F1 is at most 0.055 below that of a plain T2I-Adapter (0.11 on the first base).
- Rows with one seed are hints, not claims.
""".strip()
_SEEDS = 3


def claims_section(figures: Figures) -> list[str]:
    """Return one line for each claim: met, missed, or not measured."""
    return ["## Claims", "", *(f"- {line}" for line in _lines(figures)), ""]


def _lines(figures: Figures) -> Iterator[str]:
    pair = next((pair for pair in LOCAL_TERM if figures.common_seeds(*pair)), None)
    if pair is None:
        yield "**The local term: not measured**, as its rows have no training."
    else:
        f1, clip, leak = (figures.difference(*pair, column) for column in ("f1", "clip_score", "leak"))
        met = _all(f1, lambda i: i.value >= 0.05 and i.low > 0) and _all(clip, lambda i: i.value >= -1)
        met = met and _all(leak, lambda i: i.low <= 0 <= i.high)
        between = f"{ROWS[pair[0]].title} against {ROWS[pair[1]].title}"
        figures_of = f"F1 {signed(f1)}, CLIP score {signed(clip)}, leak {signed(leak)}"
        yield f"**The local term: {_verdict(met, len(figures.common_seeds(*pair)))}.** {between}: {figures_of}."
    judged = [next((row for row in rows if row in figures.rows), None) for rows in STRONG]
    if judged[0] is None:
        yield "**Strong control: not measured**, as its row has no training."
    for row in judged:
        if row is None:
            continue
        control, leak, share = (
            figures.mean(row, CONTROL),
            figures.mean(row, "leak"),
            figures.ratio(row, FLOOR, "color_in"),
        )
        met = _all(control, lambda i: i.value >= 0.85) and _all(leak, lambda i: i.value <= 0.05)
        met = met and _all(share, lambda i: i.value >= 0.95)
        figures_of = f"control {control}, `color_in` over the base's {share}, leak {leak}"
        yield f"**Strong control: {_verdict(met, len(figures.rows[row]))}.** {ROWS[row].title}: {figures_of}."
    pair = next((pair for pair in MASK if figures.common_seeds(*pair)), None)
    if pair is None:
        yield "**The cost of the mask: not measured**, as the plain T2I-Adapter has no training."
    else:
        f1 = figures.difference(*pair, "f1")
        met = _all(f1, lambda i: i.value >= -0.055)
        between = f"{ROWS[pair[0]].title} against {ROWS[pair[1]].title}"
        seeds = len(figures.common_seeds(*pair))
        yield f"**The cost of the mask: {_verdict(met, seeds)}.** {between}: F1 {signed(f1)}."


def _all(found: Interval | None, holds: Callable[[Interval], bool]) -> bool:
    return found is not None and holds(found)


def _verdict(met: bool, seeds: int) -> str:
    word = "met" if met else "missed"
    return f"{word} ({seeds} seeds)" if seeds >= _SEEDS else f"{word}, a hint of {seeds} seed{'s' if seeds > 1 else ''}"
