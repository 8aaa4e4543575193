"""The pages that say what the benchmark and the tuning found: tables, gates, plots, pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from localctl.cli.sample_regions import NONE, named
from localctl.evaluation.plots import bars
from localctl.evaluation.provenance import write_text
from localctl.evaluation.tables import head, line
from localctl.images import grid
from localctl.metrics.bootstrap import Interval
from research.layout_benchmark.attention import KINDS
from research.layout_benchmark.figures import (
    GATES,
    MOST_FRECHET,
    RANKED,
    Figures,
    Gate,
    gates,
    is_plain,
    ranked,
    read_results,
)
from research.layout_benchmark.measuring import SHOWN
from research.reader import reader_note

COMMAND = "python -m research.layout_benchmark"
SHAPED = ("right", "accuracy", "iou", "present", "binding", "clip_score")
COLORED = ("color_right", "color_accuracy", "color_iou")
COMPARED = ("right", "accuracy", "iou", "color_right", "clip_score")
PLOTTED = ("right", "accuracy", "color_right", "clip_score")
_MEANINGS = (
    "- `right`: every object is there (colour and shape) with an IoU of at least 0.5 with its box",
    "- `accuracy`: the share of objects of which that is so; `iou`: their mean, 0 for objects that are missing",
    "- `present`: the share of objects that are there, wherever",
    "- `binding`: of the objects whose colour and whose shape both appear, the share that has the two together",
    "- `color_*`: the same as `right`, `accuracy` and `iou` for blobs of the right colour, whatever their shape",
    "- `clip_score`: 100 cos of picture and prompt under the base's own CLIP",
)


def write_report(folder: Path, page: Path) -> str:
    """Write ``page`` and its plots, into ``folder`` where the results lie; returns the text. ValueError where results
    are missing or do not go together."""
    figures = Figures(read_results(folder))
    link = folder.name if folder.parent == page.parent else str(folder)
    text = "\n".join(
        (
            *_introduction(figures, page),
            *_gates(figures),
            *_tables(figures),
            *_attention(figures),
            *_costs(figures),
            *_plots(figures, folder, link),
            *_sheet(figures, folder, link),
            *_provenance(figures, link),
        )
    )
    write_text(page, text)
    return text


def write_tuning(folder: Path, page: Path) -> str:
    """The table of a tuning, the best of each control first; returns the text. ValueError as for
    :func:`write_report`."""
    figures = Figures(read_results(folder))
    columns = (*RANKED, "clip_score")
    lines = [
        "# Settings of the controls on the embedded base",
        "",
        f"Written by `{COMMAND} --tune`:",
        f"{len(figures.plain.ids)} layouts of two regions that the benchmark does not use, {_drawing(figures)}.",
        f"Plain sampling first, then by the sum of {', '.join(f'`{column}`' for column in RANKED)};",
        f"settings with a Fréchet distance over {MOST_FRECHET:g} times plain's come last.",
        "The best of many flatters itself: only the benchmark's figures count.",
        "",
    ]
    order = ranked(figures)
    for control in dict.fromkeys(name.partition(" ")[0] for name in order if not is_plain(name)):
        lines += [f"## {control}", "", *head(["", *columns, "Fréchet over plain"])]
        own = [name for name in order if name.partition(" ")[0] == control]
        for name in (figures.plain_of(own[0]).name, *own):
            label = "preset" if name == control else name.removeprefix(f"{control} ")
            lines.append(
                line([label, *(_cell(figures.mean(name, c)) for c in columns), f"{figures.frechet(name):.2f}"])
            )
        lines.append("")
    text = "\n".join(lines)
    write_text(page, text)
    return text


def explain(figures: Figures, gate: Gate) -> str:
    """Where the attention sits under a method whose gate was missed, beside plain sampling."""
    return "\n".join(
        f"  {name}: {_attention_words(figures, name)}"
        for name in (figures.plain_of(gate.name).name, gate.name)
        if figures.results[name].attention
    )


def _attention_words(figures: Figures, name: str) -> str:
    found = figures.results[name].attention
    shares = ", ".join(f"{kind} {found[kind]:.1%}" for kind in KINDS)
    return f"attention on {shares}; of the phrases' {found['inside']:.1%} inside their boxes (area {found['area']:.1%})"


def _introduction(figures: Figures, page: Path) -> list[str]:
    counts = ", ".join(f"{int((figures.plain.counts == n).sum())} of {n}" for n in sorted(set(figures.plain.counts)))
    return [
        "# Do objects stand where the layout asks for them?",
        "",
        f"Written by `{COMMAND} --report {page.name if page.is_absolute() else page}`",
        "from the results beside it, on the embedded base and its small scenes.",
        "",
        *reader_note(figures.plain.asked),
        f"{len(figures.plain.ids)} held-out layouts by number of regions ({counts}); {_drawing(figures)};",
        "the same noise for every method. The prompt names the objects, their boxes were drawn at random. Intervals",
        "are 95 % bootstrap intervals over layouts, differences to plain sampling (`none`) paired.",
        *_ways(figures),
        "",
        *_MEANINGS,
        "",
    ]


def _ways(figures: Figures) -> list[str]:
    """Which methods are drawn in another way, and what they are compared with."""
    lines = []
    for plain in (name for name in figures.results if is_plain(name) and name != NONE):
        own = [name for name in _names(figures) if not is_plain(name) and figures.plain_of(name).name == plain]
        way = figures.results[plain].asked["sampling"]
        words = " and ".join(f"{key.replace('_', ' ')} {value}" for key, value in way.items() if value is not None)
        lines.append(f"Drawn with {words}, which suits them, and compared with `{plain}`: {', '.join(own)}.")
    return lines


def _gates(figures: Figures) -> list[str]:
    found = gates(figures)
    if not found:
        return []
    lines = [
        "## What is asked of the methods",
        "",
        "Two regions, every object right and in its box, against plain sampling; no Fréchet distance over",
        f"{MOST_FRECHET:g} times plain's.",
        "",
        *(f"- {gate}" for gate in found),
    ]
    for gate in found:
        if not gate.met and figures.results[gate.name].attention:
            plain = figures.plain_of(gate.name).name
            lines += ["", f"{gate.name}, where it looks:", f"- {plain}: {_attention_words(figures, plain)}"]
            lines.append(f"- {gate.name}: {_attention_words(figures, gate.name)}")
    if figures.several:
        name = figures.several[0]
        gain = figures.difference(name, "right", 2)
        lines += [
            "",
            f"The best composition of two: {name}, {_signed(gain)} (Fréchet {figures.frechet(name):.2f} times).",
        ]
    return [*lines, ""]


def _tables(figures: Figures) -> list[str]:
    numbers = sorted(set(figures.plain.counts.tolist()))
    lines = []
    for regions in (None, *numbers):
        title = "All layouts" if regions is None else f"{regions} region{'s' if regions > 1 else ''}"
        lines += [f"## {title}", "", *head(["", *SHAPED])]
        lines += [line([n, *(_cell(figures.mean(n, c, regions)) for c in SHAPED)]) for n in _names(figures)]
        lines += ["", *head(["", *COLORED])]
        lines += [line([n, *(_cell(figures.mean(n, c, regions)) for c in COLORED)]) for n in _names(figures)]
        lines.append("")
    lines += ["## Less plain sampling, two regions", "", *head(["", *COMPARED])]
    for name in _names(figures):
        if not is_plain(name):
            lines.append(line([name, *(_signed(figures.difference(name, column, 2)) for column in COMPARED)]))
    distances = list(figures.plain.distances)
    lines += ["", "## Distances to scenes of the training part", "", *head(["", *distances, "Fréchet over plain"])]
    for name in _names(figures):
        values = [f"{figures.results[name].distances[key]:.4g}" for key in distances]
        lines.append(line([name, *values, f"{figures.frechet(name):.2f}"]))
    about = figures.plain.provenance.get("distances", {})
    return [*lines, "", *(f"- {warning}" for item in about.values() for warning in item["warnings"]), ""]


def _attention(figures: Figures) -> list[str]:
    names = [name for name in _names(figures) if figures.results[name].attention]
    if not names:
        return []
    lines = [
        "## Where the attention sits",
        "",
        "Shares of the cross-attention by kind of token, over layers, heads, cells and steps, and the share of the",
        "phrases' that lies inside their boxes (a spread-out one: the boxes' area). Eight pictures of two regions.",
        "",
        *head(["", *KINDS, "inside", "area"]),
    ]
    for name in names:
        found = figures.results[name].attention
        lines.append(line([name, *(f"{found[kind]:.3f}" for kind in (*KINDS, "inside", "area"))]))
    return [*lines, ""]


def _costs(figures: Figures) -> list[str]:
    names = [name for name in _names(figures) if figures.results[name].cost]
    if not names:
        return []
    lines = [
        "## Cost",
        "",
        f"Measured on {figures.plain.provenance['device']}, in turns with plain sampling, medians of a short run with",
        "the methods' own windows; memory is what a run holds beside what was there before.",
        "",
        *head(["", "seconds per picture", "over plain", "peak MiB"]),
    ]
    for name in names:
        cost = figures.results[name].cost
        peak = "not known" if cost["peak_mib"] is None else f"{cost['peak_mib']:.0f}"
        lines.append(line([name, f"{cost['seconds']:.3f}", f"{cost['overhead']:+.0%}", peak]))
    return [*lines, ""]


def _plots(figures: Figures, folder: Path, link: str) -> list[str]:
    panels = {f"{c}, two regions": {n: figures.mean(n, c, 2) for n in _names(figures)} for c in PLOTTED}
    if all(interval is None for panel in panels.values() for interval in panel.values()):
        return []
    bars(panels).save(folder / "bars.png")
    return ["## Plots", "", f"![bars with intervals]({link}/bars.png)", ""]


def _sheet(figures: Figures, folder: Path, link: str) -> list[str]:
    """The first layouts of several regions under every method, with the first seed."""
    columns = []
    for name in _names(figures):
        with Image.open(folder / f"{named(name)}.png") as strip:
            side = strip.width
            columns.append([strip.crop((0, y, side, y + side)) for y in range(0, strip.height, side)])
    rows = [list(row) for row in zip(*columns, strict=True)]
    grid(rows, _names(figures)).save(folder / "pictures.png")
    count = min(SHOWN, len(rows))
    return ["## Pictures", "", f"The first {count} layouts.", "", f"![every method]({link}/pictures.png)", ""]


def _provenance(figures: Figures, link: str) -> list[str]:
    about = figures.plain.provenance
    lines = [
        "## Where it comes from",
        "",
        f"`{link}/*.json`: every picture's figures, settings, seeds, weights, versions. Weights of the base: sha256",
        f"{about['base_sha256'][:12]}.",
    ]
    for name, features in about["distances"].items():
        sha, n_real, n_fake = features["weights_sha256"][:12], features["n_real"], features["n_fake"]
        lines.append(f"- {name}: sha256 {sha}, {n_real} scenes against {n_fake} pictures, {features['preprocessing']}")
    lines.append("- " + ", ".join(f"{name} {version}" for name, version in about["versions"].items()))
    for name in _names(figures):
        if is_plain(name):
            continue
        controls = figures.results[name].asked["controls"]
        lines.append(f"- {name}: {'; '.join(_words(control) for control in controls)}")
    return [*lines, ""]


def _words(control: dict[str, object]) -> str:
    settings = ", ".join(f"{key} {value}" for key, value in control.items() if key != "control")
    return f"{control['control']} ({settings})"


def _names(figures: Figures) -> list[str]:
    """Plain sampling, single controls, compositions."""
    plain = sorted(filter(is_plain, figures.results))
    singles = [name for name in figures.results if not is_plain(name) and "+" not in name]
    order = [*GATES, *(name for name in singles if name not in GATES)]
    return [*plain, *sorted(singles, key=order.index), *figures.several]


def _drawing(figures: Figures) -> str:
    protocol = figures.plain.asked["protocol"]
    return f"seeds {_listed(protocol['seeds'])}, {protocol['scheduler']}, {protocol['num_inference_steps']} steps"


def _listed(values: Sequence[object]) -> str:
    return ", ".join(map(str, values))


def _cell(interval: Interval | None) -> str:
    return "undefined" if interval is None else str(interval)


def _signed(interval: Interval | None) -> str:
    return "undefined" if interval is None else f"{interval.value:+.3f} [{interval.low:+.3f}, {interval.high:+.3f}]"
