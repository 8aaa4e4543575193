"""Write the pages of the benchmark and of the tuning: gates, tables, plots and images."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from localctl.control.presets import NONE
from localctl.evaluation.plots import bars
from localctl.jobs.variants import file_label
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
    read_figures,
)
from research.layout_benchmark.study import SHOWN, TIMED_STEPS
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
    "- `clip_score`: 100 cos of image and prompt under the {clip}'s own CLIP",
)


def write_report(results: Path, page: Path) -> str:
    """Write ``page``, and its figures into the folder named like it; return the text.

    Raises:
        ValueError: plain sampling has no result, or results do not belong together.
    """
    figures = read_figures(results)
    return write_page(
        page,
        _introduction(figures, page),
        _gates(figures),
        _tables(figures),
        _attention(figures),
        _costs(figures),
        _plots(figures, page),
        _sheet(figures, results, page),
        _sources(figures, results, page),
    )


def write_tuning(results: Path, page: Path) -> str:
    """Write the tables of a tuning, the best settings of each control first, and return the text.

    Raises:
        ValueError: as :func:`write_report`.
    """
    figures = read_figures(results)
    introduction = [
        f"# Settings of the controls on {_base(figures)}",
        "",
        f"Written by `{_command(figures)} --tune`:",
        f"{len(figures.plain.ids)} layouts of two regions that the benchmark does not use, {_generating(figures)}.",
        f"Plain sampling first, then by the sum of {', '.join(f'`{column}`' for column in RANKED)};",
        f"settings with a Fréchet distance over {MOST_FRECHET:g} times plain's come last.",
        "The best of many flatters itself: only the benchmark's figures count.",
        "",
    ]
    return write_page(page, introduction, *_tuned(figures))


def _base(figures: Figures) -> str:
    return "the embedded base" if figures.base == "micro" else f"the base `{figures.base}`"


def _command(figures: Figures) -> str:
    if figures.base == "micro":
        return COMMAND
    scale, names = figures.plain["asked"]["protocol"].get("guidance_scale"), " ".join(figures.results)
    asked = f"{COMMAND} --base {figures.base} --methods {names}"
    return asked if scale is None else f"{asked} --guidance_scale {scale:g}"


def _tuned(figures: Figures) -> Iterator[list[str]]:
    """Yield a section for each control."""
    columns, order = (*RANKED, "clip_score"), ranked(figures)
    for control in dict.fromkeys(name.partition(" ")[0] for name in order if not is_plain(name)):
        own = [name for name in order if name.partition(" ")[0] == control]
        rows = [
            (
                "preset" if name == control else name.removeprefix(f"{control} "),
                [*(cell(figures.mean(name, c)) for c in columns), f"{figures.frechet(name):.2f}"],
            )
            for name in (figures.plain_of(own[0]).name, *own)
        ]
        yield [f"## {control}", "", *table([*columns, "Fréchet over plain"], rows), ""]


def explain(figures: Figures, gate: Gate) -> str:
    """Return where the attention is under a method whose gate was missed, and under plain sampling."""
    return "\n".join(
        f"  {name}: {_attention_words(figures, name)}"
        for name in (figures.plain_of(gate.name).name, gate.name)
        if figures.results[name]["attention"]
    )


def _attention_words(figures: Figures, name: str) -> str:
    found = figures.results[name]["attention"]
    shares = ", ".join(f"{kind} {found[kind]:.1%}" for kind in KINDS)
    return f"attention on {shares}; of the phrases' {found['inside']:.1%} inside their boxes (area {found['area']:.1%})"


def _introduction(figures: Figures, page: Path) -> list[str]:
    numbers = figures.counts()
    counts = ", ".join(f"{int((numbers == n).sum())} of {n}" for n in sorted(set(numbers)))
    return [
        "# Do objects stand where the layout asks for them?",
        "",
        written_by(_command(figures), page),
        f"from the results named below, on {_base(figures)} and its small scenes.",
        "",
        *base_note(figures.plain["asked"]),
        *reader_note(figures.plain["asked"]),
        f"{len(figures.plain.ids)} held-out layouts by number of regions ({counts}); {_generating(figures)};",
        "the same noise for every method. The prompt names the objects, their boxes are random. Intervals",
        "are 95 % bootstrap intervals over layouts, differences to plain sampling (`none`) paired.",
        *_ways(figures),
        "",
        *(line.format(clip="base" if figures.base == "micro" else "embedded base") for line in _MEANINGS),
        "",
    ]


def _ways(figures: Figures) -> list[str]:
    """Return which methods are generated in another way, and with what they are compared."""
    lines = []
    for plain in (name for name in figures.results if is_plain(name) and name != NONE):
        own = [name for name in _names(figures) if not is_plain(name) and figures.plain_of(name).name == plain]
        way = figures.results[plain]["asked"]["sampling"]
        words = " and ".join(f"{key.replace('_', ' ')} {value}" for key, value in way.items() if value is not None)
        lines.append(f"Generated with {words}, which suits them, and compared with `{plain}`: {', '.join(own)}.")
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
        if not gate.met and figures.results[gate.name]["attention"]:
            plain = figures.plain_of(gate.name).name
            lines += ["", f"{gate.name}, where it looks:", f"- {plain}: {_attention_words(figures, plain)}"]
            lines.append(f"- {gate.name}: {_attention_words(figures, gate.name)}")
    if figures.several:
        name = figures.several[0]
        gain = figures.difference(name, "right", 2)
        lines += [
            "",
            f"The best composition of two: {name}, {signed(gain)} (Fréchet {figures.frechet(name):.2f} times).",
        ]
    return [*lines, ""]


def _tables(figures: Figures) -> list[str]:
    names, lines = _names(figures), []
    for regions in (None, *sorted(set(figures.counts().tolist()))):
        title = "All layouts" if regions is None else f"{regions} region{'s' if regions > 1 else ''}"
        lines += [f"## {title}", ""]
        for columns in (SHAPED, COLORED):
            rows = [(n, [cell(figures.mean(n, c, regions)) for c in columns]) for n in names]
            lines += [*table(columns, rows), ""]
    differences = [(n, [signed(figures.difference(n, c, 2)) for c in COMPARED]) for n in names if not is_plain(n)]
    distances = list(figures.plain["distances"])
    of_sets = [
        (n, [*(f"{figures.results[n]['distances'][d]:.4g}" for d in distances), f"{figures.frechet(n):.2f}"])
        for n in names
    ]
    return [
        *lines,
        "## Less plain sampling, two regions",
        "",
        *table(COMPARED, differences),
        "",
        "## Distances to scenes of the training part",
        "",
        *table([*distances, "Fréchet over plain"], of_sets),
        "",
        *warnings_of(figures.plain["provenance"]),
        "",
    ]


def _attention(figures: Figures) -> list[str]:
    kinds = (*KINDS, "inside", "area")
    found = {name: shares for name in _names(figures) if (shares := figures.results[name]["attention"])}
    if not found:
        return []
    return [
        "## Where the attention sits",
        "",
        "Shares of the cross-attention by kind of token, over layers, heads, cells and steps, and the share of the",
        "phrases' that lies inside their boxes (a spread-out one: the boxes' area). Eight images of two regions.",
        "",
        *table(kinds, ((name, [f"{shares[kind]:.3f}" for kind in kinds]) for name, shares in found.items())),
        "",
    ]


def _costs(figures: Figures) -> list[str]:
    rows = []
    for name in _names(figures):
        if cost := figures.results[name]["cost"]:
            peak = "not known" if cost["peak_mib"] is None else f"{cost['peak_mib']:.0f}"
            rows.append((name, [f"{cost['seconds']:.3f}", f"{cost['overhead']:+.0%}", peak]))
    if not rows:
        return []
    device, steps = figures.plain["provenance"]["device"], figures.plain["asked"]["protocol"]["num_inference_steps"]
    return [
        "## Cost",
        "",
        f"Measured on {device}, in turns with plain sampling, medians of runs of {min(TIMED_STEPS, steps)} steps with",
        "the methods' own windows, each method in its own hour: compare them by the ratio. Memory is what a run holds",
        "beside what was there before.",
        "",
        *table(["seconds per image", "over plain", "peak MiB"], rows),
        "",
    ]


def _plots(figures: Figures, page: Path) -> list[str]:
    panels = {f"{c}, two regions": {n: figures.mean(n, c, 2) for n in _names(figures)} for c in PLOTTED}
    if all(interval is None for panel in panels.values() for interval in panel.values()):
        return []
    return ["## Plots", "", figure(bars(panels), page, "bars", "bars with intervals"), ""]


def _sheet(figures: Figures, results: Path, page: Path) -> list[str]:
    """Return the sheet of the first layouts of several regions under every method, with the first seed."""
    image, rows = sheet({name: results / f"{file_label(name)}.png" for name in _names(figures)})
    shown = figure(image, page, "pictures", "every method")
    return ["## Images", "", f"The first {min(SHOWN, rows)} layouts.", "", shown, ""]


def _sources(figures: Figures, results: Path, page: Path) -> list[str]:
    about = figures.plain["provenance"]
    lines = sources(about, results, page, f" Weights of the base: sha256\n{about['base_sha256'][:12]}.")
    for name in _names(figures):
        if not is_plain(name):
            lines.append(f"- {name}: {'; '.join(map(_words, figures.results[name]['asked']['controls']))}")
    return [*lines, ""]


def _words(control: dict[str, object]) -> str:
    settings = ", ".join(f"{key} {value}" for key, value in control.items() if key != "control")
    return f"{control['control']} ({settings})"


def _names(figures: Figures) -> list[str]:
    """Return the names in the order of the tables: plain sampling, single controls, compositions."""
    plain = sorted(filter(is_plain, figures.results))
    singles = [name for name in figures.results if not is_plain(name) and "+" not in name]
    order = [*GATES, *(name for name in singles if name not in GATES)]
    return [*plain, *sorted(singles, key=order.index), *figures.several]


def _generating(figures: Figures) -> str:
    protocol = figures.plain["asked"]["protocol"]
    seeds = ", ".join(map(str, protocol["seeds"]))
    said = f"seeds {seeds}, {protocol['scheduler']}, {protocol['num_inference_steps']} steps"
    scale = protocol.get("guidance_scale")
    return said if scale is None or figures.base == "micro" else f"{said}, guidance scale {scale:g}"
