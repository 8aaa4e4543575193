"""Write the page of the ablation: the sentence on the method, tables, curves and images."""

from __future__ import annotations

from pathlib import Path

from localctl.evaluation.compare import CEILING, LOWER_IS_BETTER, verdict
from localctl.evaluation.plots import bars
from research.ablation.claims import CLAIMS, claims_section
from research.ablation.figures import CONTROL, Figures, read_figures
from research.ablation.rows import FLOOR, ROWS, WITHOUT, Protocol, Row, row_cells
from research.ablation.study import CONDITIONS
from research.ablation.sweep import sweep_section
from research.harness import former_base
from research.page import (
    base_note,
    cell,
    figure,
    reader_note,
    sheet,
    signed,
    sources,
    table,
    warnings_of,
    write_page,
    written_by,
)

SHOWN = (
    *("f1", CONTROL, "ssim", "lfmse_in", "leak", "color_in", "object_in", "color_out", "object_out"),
    *("region_accuracy", "relation", "clip_score"),
)
BESIDE = ("leak", "clip_score", "color_in", "object_in")  # what may pay for it
OF_GUIDANCE = ("f1", CONTROL, "leak", "color_in", "object_in", "color_out", "object_out", "clip_score")
COMPARED = ("f1", "ssim", "lfmse_in", "leak", "color_in", "object_in", "region_accuracy", "clip_score")


def write_report(results: Path, page: Path) -> str:
    """Write ``page``, and its figures into the folder named like it; return the text.

    Raises:
        ValueError: the base has no result, or results do not belong together.
    """
    figures = read_figures(results)
    return write_page(
        page,
        _introduction(figures, page),
        _sentence(figures),
        [] if former_base(figures.base["asked"]) == "first" else _protocol(figures, results),
        _rows_section(figures, page),
        _guidance_section(figures),
        _seeds_section(figures),
        _images(figures, results, page),
        sweep_section(figures, page),
        sources(figures.base["provenance"], results, page),
        [f"- {result.name} has no result: {result['failed']}" for result in figures.failed],
        [""],
    )


def _protocol(figures: Figures, results: Path) -> list[str]:
    """Return what was decided before the trainings, in a file beside their results, and what came of it."""
    file = results / "protocol.md"
    decided = ["Written before these trainings.", "", *file.read_text().strip().splitlines()] if file.is_file() else []
    return ["## Protocol", "", *decided, *CLAIMS.splitlines(), "", *claims_section(figures)]


def _steps(figures: Figures) -> int | None:
    """Return the length of the trainings where it is not that of the experiments, else None."""
    lengths = {result["asked"]["steps"] for trained in figures.rows.values() for result in trained}
    own = row_cells([WITHOUT], [0], None)[0].settings("micro", "unused").max_train_steps
    return next(iter(lengths - {own}), None) if len(lengths) == 1 else None


def _introduction(figures: Figures, page: Path) -> list[str]:
    protocol = figures.base["asked"]["protocol"]
    scenes = "validation" if protocol.get("part") == "val" else "held-out"
    count, steps, guidance = (protocol[key] for key in ("count", "num_inference_steps", "guidance_scale"))
    return [
        "# Does each part of the method help?",
        "",
        written_by(_command(figures), page),
        "from the results named below. Every row is an experiment (`config/experiment/ablation_*.yaml`), trained on "
        "the",
        "embedded base and its small scenes: read it as a test of the parts, not of their size on other bases.",
        "",
        f"{count} {scenes} scenes with the same masks and noise for every row; {protocol['scheduler']}, {steps} steps,",
        f"guidance {guidance:g}. Intervals are 95 % bootstrap intervals over scenes and, where there are several,",
        "seeds of training at once; few seeds make them too narrow, so their values stand below.",
        "[evaluation.md](evaluation.md) says what each figure is.",
        "",
        *base_note(figures.base["asked"]),
        *reader_note(figures.base["asked"], "`leak`, `region_accuracy` and `relation` are read"),
    ]


def _command(figures: Figures) -> str:
    """Return the command that makes the page, but for ``--report``."""
    protocol, own = figures.base["asked"]["protocol"], Protocol().plain()
    if former_base(figures.base["asked"]) == "first":
        return "python -m research.ablation"
    flags = [
        f"--{name} {protocol[name]}" for name in ("part", "count", "references") if protocol.get(name) != own.get(name)
    ]
    if steps := _steps(figures):
        flags.append(f"--max_train_steps {steps}")
    if figures.guidance:
        flags.append("--guidance examples/adapter")
    seeds = sorted({result["seed"] for trained in figures.rows.values() for result in trained})
    if figures.rows and len(seeds) == 1:
        flags.append(f"--seeds {seeds[0]}")
    return " ".join(["python -m research.ablation", *flags, "--rows", *figures.rows])


def _sentence(figures: Figures) -> list[str]:
    """Return what each pair of headline rows says of the one thing that the first adds to the second."""
    lines = []
    for name, row in ROWS.items():
        seeds = figures.common_seeds(name, row.against) if row.headline and row.against else []
        if seeds:
            lines += _comparison(figures, row, len(seeds))
    return lines or ["No two headline rows have both been trained yet.", ""]


def _comparison(figures: Figures, row: Row, seeds: int) -> list[str]:
    assert row.against is not None
    difference = figures.difference(row.name, row.against, "f1")
    assert difference is not None
    counted = "1 seed" if seeds == 1 else f"{seeds} seeds"
    meanings = {"more": "more, and the interval leaves out 0", "less": "less, and the interval leaves out 0"}
    meaning = meanings.get(verdict(difference), "no difference, for the interval covers 0")
    loss = figures.rows[row.name][0]["training"]["settings"]["loss"]
    term = "" if loss["filter"] == "none" else f" (weight {loss['weight']:g}, {loss['schedule']})"
    beside = [column for column in BESIDE if column in figures.columns]
    others = [f"{column} {signed(figures.difference(row.name, row.against, column))}" for column in beside]
    return [
        f"**{row.title}{term} against {ROWS[row.against].title}: F1 inside the mask {signed(difference)} ({counted}, "
        f"{len(figures.base.ids)} scenes): {meaning}; {', '.join(others)}.**",
        "",
    ]


def _rows_section(figures: Figures, page: Path) -> list[str]:
    titles = {FLOOR: "base alone (floor)", **{name: ROWS[name].title for name in figures.rows}}
    titles[CEILING] = "VAE round trip (ceiling)"
    columns = [c for c in SHOWN if c in (*figures.columns, CONTROL)]
    seeds = {name: str(len(trained)) for name, trained in figures.rows.items()}
    rows = [(t, [seeds.get(n, ""), *(_mean(figures, n, c) for c in columns)]) for n, t in titles.items()]
    distances = [key for key in figures.base["distances"] if not key.startswith("split_half")]
    of_sets = [(t, [f"{figures.distance(n, d):.4g}" for d in distances]) for n, t in titles.items() if n != CEILING]
    panels = {headed(c): {t: figures.mean(n, c) for n, t in titles.items()} for c in ("f1", "leak", "clip_score")}
    return [
        "## Rows",
        "",
        *table(["seeds", *map(headed, columns)], rows),
        "",
        "(-k): k images of which the figure says nothing, left out of its mean.",
        "",
        "Distances to scenes of the training part, of whole sets, means over the seeds:",
        "",
        *table(distances, of_sets),
        "",
        *warnings_of(figures.base["provenance"]),
        "",
        *_differences(figures),
        figure(bars(panels), page, "rows", "bars with intervals"),
        "",
    ]


def _guidance_section(figures: Figures) -> list[str]:
    """Return the table of one adapter under several ways of guidance; without any, no lines."""
    measured = sorted(figures.guidance, key=lambda result: int(result.name.rpartition("_")[2]))
    if not measured:
        return []
    rows = [(r["title"], [_mean(figures, r.name, column) for column in OF_GUIDANCE]) for r in measured]
    of_base = [_mean(figures, FLOOR, column) for column in OF_GUIDANCE]
    return [
        "## Guidance",
        "",
        "One adapter, the features of which take part in guidance in several ways; no training.",
        "",
        *table(map(headed, OF_GUIDANCE), [("base alone (floor)", of_base), *rows]),
        "",
    ]


def _differences(figures: Figures) -> list[str]:
    others = [name for name in figures.rows if name != WITHOUT]
    if WITHOUT not in figures.rows or not others:
        return []
    compared = [c for c in COMPARED if c in figures.columns]
    rows = [(ROWS[name].title, [_difference(figures, name, c) for c in compared]) for name in others]
    return [f"Differences to `{WITHOUT}`, paired by scene and seed:", "", *table(compared, rows), ""]


def headed(column: str) -> str:
    """Return a column's heading."""
    return f"{column} (lower is better)" if column in LOWER_IS_BETTER else column


def _mean(figures: Figures, row: str, column: str) -> str:
    undefined = figures.undefined(row, column)
    return cell(figures.mean(row, column)) + (f" (-{undefined})" if undefined else "")


def _difference(figures: Figures, row: str, column: str) -> str:
    found = figures.difference(row, WITHOUT, column)
    nothing = found is not None and verdict(found) == "no difference"
    return signed(found) + (" no difference" if nothing else "")


def _seeds_section(figures: Figures) -> list[str]:
    several = [name for name, trained in figures.rows.items() if len(trained) > 1]
    if not several:
        return []
    columns = [
        "f1",
        "leak",
        "clip_score",
        *(d for d in figures.base["distances"] if not d.startswith(("split_half", "kid_error"))),
    ]
    rows = []
    for name in several:
        values = {column: dict(figures.per_seed(name, column)) for column in columns}
        for seed in values["f1"]:
            rows.append((ROWS[name].title, [str(seed), *(f"{values[c][seed]:.4g}" for c in columns)]))
    return ["## Each seed", "", *table(["seed", *columns], rows), ""]


def _images(figures: Figures, results: Path, page: Path) -> list[str]:
    """Return a sheet of the first scenes under every row's first seed."""
    strips = {"condition, mask": CONDITIONS, FLOOR: FLOOR}
    strips |= {name: trained[0].name for name, trained in figures.rows.items()}  # titles are too long
    paths = {title: path for title, name in strips.items() if (path := results / f"{name}.png").is_file()}
    if not paths:
        return []
    link = figure(sheet(paths)[0], page, "pictures", "the first scenes under every row")
    return ["## Images", "", f"Columns: {', '.join(paths)}.", "", link, ""]
