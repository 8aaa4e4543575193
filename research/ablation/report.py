"""The page that says what the ablation found: tables, curves, pictures, and the sentence on the method."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from localctl.evaluation.compare import CEILING, LOWER_IS_BETTER, verdict
from localctl.evaluation.plots import bars
from localctl.evaluation.provenance import write_text
from localctl.evaluation.tables import head, line
from localctl.images import grid
from localctl.metrics.bootstrap import Interval
from research.ablation.figures import CONTROL, Figures
from research.ablation.results import CONDITIONS, Result, read_results
from research.ablation.rows import FLOOR, METHOD, ROWS, WITHOUT
from research.ablation.sweeping import sweep_section
from research.reader import reader_note

SHOWN = ("f1", CONTROL, "ssim", "lfmse_in", "leak", "region_accuracy", "relation", "clip_score")
COMPARED = ("f1", "ssim", "lfmse_in", "leak", "region_accuracy", "clip_score")
COMMAND = "python -m research.ablation"


def write_report(folder: Path, page: Path) -> str:
    """Write ``page`` and its plots, into ``folder`` where the results lie; returns the text. ValueError where results
    are missing or do not go together."""
    figures = Figures(read_results(folder))
    link = folder.name if folder.parent == page.parent else str(folder)
    text = "\n".join(
        (
            *_introduction(figures, page),
            *_sentence(figures),
            *_rows_section(figures, folder, link),
            *_seeds_section(figures),
            *_pictures(figures, folder, link),
            *sweep_section(figures, folder, link),
            *_provenance(figures, link),
        )
    )
    write_text(page, text)
    return text


def _introduction(figures: Figures, page: Path) -> list[str]:
    protocol = figures.base.training["asked"]["protocol"]
    count, steps, guidance = (protocol[key] for key in ("count", "num_inference_steps", "guidance_scale"))
    return [
        "# Does each part of the method help?",
        "",
        f"Written by `{COMMAND} --report {page.name if page.is_absolute() else page}`",
        "from the results beside it. Every row is an experiment (`config/experiment/ablation_*.yaml`), trained on the",
        "embedded base and its small scenes: read it as a test of the parts, not of their size on other bases.",
        "",
        f"{count} held-out scenes with the same masks and noise for every row; {protocol['scheduler']}, {steps} steps,",
        f"guidance {guidance:g}. Intervals are 95 % bootstrap intervals over scenes and, where there are several,",
        "seeds of training at once; few seeds make them too narrow, so their values stand below.",
        "[evaluation.md](evaluation.md) says what each figure is.",
        "",
        *reader_note(figures.base.training["asked"], "`leak`, `region_accuracy` and `relation` are read"),
    ]


def _sentence(figures: Figures) -> list[str]:
    difference = figures.headline()
    if difference is None:
        return ["The two headline rows have not both been trained yet.", ""]
    seeds = figures.common_seeds(METHOD, WITHOUT)
    counted = "1 seed" if len(seeds) == 1 else f"{len(seeds)} seeds"
    said = {"more": "more, and the interval leaves out 0", "less": "less, and the interval leaves out 0"}
    meaning = said.get(verdict(difference), "no difference, for the interval covers 0")
    loss = figures.rows[METHOD][0].training["settings"]["loss"]
    term = f"weight {loss['weight']:g}, {loss['schedule']}, {loss['normalise']}"
    return [
        f"**The method (Sobel in the mask; {term}) against the same without its local term: F1 inside the mask "
        f"{signed(difference)} ({counted}, {len(figures.base.ids)} scenes): {meaning}.**",
        "",
    ]


def signed(interval: Interval) -> str:
    return f"{interval.value:+.3f} [{interval.low:+.3f}, {interval.high:+.3f}]"


def _rows_section(figures: Figures, folder: Path, link: str) -> list[str]:
    titles = {FLOOR: "base alone (floor)", **{name: ROWS[name].title for name in figures.rows}}
    titles[CEILING] = "VAE round trip (ceiling)"
    columns = [c for c in SHOWN if c in (*figures.columns, CONTROL)]
    lines = ["## Rows", "", *head(["", "seeds", *(headed(c) for c in columns)])]
    for name, title in titles.items():
        cells = [_cell(figures, name, column) for column in columns]
        lines.append(line([title, str(len(figures.rows.get(name, ()))) if name in figures.rows else "", *cells]))
    lines += ["", "(-k): k pictures of which the figure says nothing, left out of its mean.", ""]
    lines += ["Distances to scenes of the training part, of whole sets, means over the seeds:", ""]
    distances = [key for key in figures.base.distances if not key.startswith("split_half")]
    lines += head(["", *distances])
    for name, title in titles.items():
        if name != CEILING:
            lines.append(line([title, *(f"{figures.distance(name, d):.4g}" for d in distances)]))
    lines += ["", *(f"- {warning}" for warning in _warnings(figures.base)), ""]
    others = [name for name in figures.rows if name != WITHOUT]
    if WITHOUT in figures.rows and others:
        lines += [f"Differences to `{WITHOUT}`, paired by scene and seed:", ""]
        compared = [c for c in COMPARED if c in figures.columns]
        lines += head(["", *compared])
        lines += [line([ROWS[n].title, *(_difference(figures, n, c) for c in compared)]) for n in others]
        lines.append("")
    panels = {headed(c): {t: figures.mean(n, c) for n, t in titles.items()} for c in ("f1", "leak", "clip_score")}
    write_picture(bars(panels), folder / "rows.png")
    return [*lines, f"![bars with intervals]({link}/rows.png)", ""]


def headed(column: str) -> str:
    return f"{column} (lower is better)" if column in LOWER_IS_BETTER else column


def _cell(figures: Figures, row: str, column: str) -> str:
    found, undefined = figures.mean(row, column), figures.undefined(row, column)
    return ("undefined" if found is None else str(found)) + (f" (-{undefined})" if undefined else "")


def _difference(figures: Figures, row: str, column: str) -> str:
    found = figures.difference(row, WITHOUT, column)
    if found is None:
        return "undefined"
    return signed(found) + (" no difference" if verdict(found) == "no difference" else "")


def _warnings(result: Result) -> list[str]:
    features = result.provenance.get("distances", {})
    return [warning for about in features.values() for warning in about["warnings"]]


def _seeds_section(figures: Figures) -> list[str]:
    several = [name for name, trained in figures.rows.items() if len(trained) > 1]
    if not several:
        return []
    columns = ["f1", "leak", *(d for d in figures.base.distances if not d.startswith(("split_half", "kid_error")))]
    lines = ["## Each seed", "", *head(["", "seed", *columns])]
    for name in several:
        values = {column: dict(figures.per_seed(name, column)) for column in columns}
        for seed in values["f1"]:
            lines.append(line([ROWS[name].title, str(seed), *(f"{values[c][seed]:.4g}" for c in columns)]))
    return [*lines, ""]


def _pictures(figures: Figures, folder: Path, link: str) -> list[str]:
    """A sheet of the first scenes under every row's first seed."""
    strips = {"condition, mask": CONDITIONS, FLOOR: f"{FLOOR}.png"}
    strips |= {name: f"{trained[0].name}.png" for name, trained in figures.rows.items()}  # titles are too long
    there = {title: folder / file for title, file in strips.items() if (folder / file).is_file()}
    if not there:
        return []
    columns = []
    for path in there.values():
        with Image.open(path) as strip:
            side = strip.width
            columns.append([strip.crop((0, y, side, y + side)) for y in range(0, strip.height, side)])
    rows = [list(row) for row in zip(*columns, strict=False)]
    write_picture(grid(rows, list(there)), folder / "pictures.png")
    shown = f"![the first scenes under every row]({link}/pictures.png)"
    return ["## Pictures", "", f"Columns: {', '.join(there)}.", "", shown, ""]


def write_picture(picture: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)


def _provenance(figures: Figures, link: str) -> list[str]:
    about = figures.base.provenance
    lines = [
        "## Where it comes from",
        "",
        f"`{link}/*.json`: every picture's figures, settings, seeds, weights, versions.",
    ]
    for name, features in about.get("distances", {}).items():
        sha, n_real, n_fake = features["weights_sha256"][:12], features["n_real"], features["n_fake"]
        lines.append(f"- {name}: sha256 {sha}, {n_real} scenes against {n_fake} pictures, {features['preprocessing']}")
    lines.append("- " + ", ".join(f"{name} {version}" for name, version in about["versions"].items()))
    lines += [f"- {result.name} has no result: {result.failed}" for result in figures.failed]
    return [*lines, ""]
