"""The committed results have the settings of their pages' commands, so that nothing is measured again.

The committed pages and figures are those that the results give.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from log_helpers import logged
from PIL import Image

from localctl.micro.detect import VERSION
from research import harness
from research.ablation import __main__ as ablation
from research.ablation.report import write_report as write_ablation
from research.ablation.rows import BASE, Protocol
from research.ablation.study import Ablation
from research.bases import suits
from research.flags import PAGES, RESULTS, results_of
from research.harness import as_table, check_reader, reader_version
from research.layout_benchmark import __main__ as layout_benchmark
from research.layout_benchmark.figures import GATES
from research.layout_benchmark.methods import methods
from research.layout_benchmark.report import write_report as write_layout_benchmark
from research.layout_benchmark.study import LayoutBenchmark
from research.spacetime import ROWS
from research.spacetime.report import against_report, relation_report

# Those of former bases, with the flags that their trainings were measured with.
OF_SECOND_BASE = {
    "ablation_second_base": "",
    "ablation_250": "--max_train_steps 250",
    "ablation_choices": "--part val --count 60",
    "ablation_choices_250": "--part val --count 60 --max_train_steps 250",
}
ABLATIONS = ("ablation", *OF_SECOND_BASE, "ablation_first_base")


def test_pages_in_docs_are_of_the_committed_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(PAGES.parent)
    assert results_of(Path("docs/ablation.md")) == RESULTS / "ablation"
    assert results_of(tmp_path / "ablation.md") == tmp_path / "ablation"


def test_results_of_another_base_are_not_taken_for_those_of_this_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="base.json was made with another base_sha256.*; choose another --report"):
        Ablation(Protocol(), RESULTS / "ablation_first_base", tmp_path).run([BASE], lambda: None)


@pytest.mark.parametrize(("name", "flags"), [("ablation", ""), *OF_SECOND_BASE.items()])
def test_results_of_the_ablation(name: str, flags: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not every row was trained: those with a result are not trained again."""
    folder = RESULTS / name
    if name in OF_SECOND_BASE:
        second = next(sha for sha, generation in harness.FORMER_BASES.items() if generation == "second")
        monkeypatch.setattr(harness, "sha256_of_base", lambda base: second)
    guidance = ["--guidance", str(PAGES.parent / "examples" / "adapter")] if name == "ablation_choices" else []
    args = ablation.parse([*flags.split(), *guidance, "--report", f"docs/{name}.md"])
    study = Ablation(ablation.protocol_of(args), folder, tmp_path)
    cells = [cell for cell in [BASE, *ablation.planned(args)] if study.file(cell.name).is_file()]
    # Guidance was measured with the example adapter of that time.
    kept = [path for path in folder.glob("*.json") if guidance or not path.name.startswith("guidance_")]
    assert len(cells) == len(kept) > 1
    said = logged()
    study.run(cells, lambda: said.append("written"))
    assert said == [*(f"{cell.name}: done before" for cell in cells), "written"]


def test_results_of_the_layout_benchmark(tmp_path: Path) -> None:
    args = layout_benchmark.parse(["--report", "docs/layout_benchmark.md"])
    said = logged()
    protocol = layout_benchmark.protocol_of(args, False, suits(args.base).scheduler)
    study = LayoutBenchmark(protocol, RESULTS / "layout_benchmark", tmp_path)
    chosen = [m for m in methods(args.methods, args.set, args.base) if study.file(m.name).is_file()]
    assert {"none", *GATES} <= {method.name for method in chosen}
    study.run(chosen, lambda: said.append("written"))
    assert said == [*(f"{method.name}: done before" for method in chosen), "written"]


@pytest.mark.parametrize(
    ("name", "write"),
    [
        *((name, write_ablation) for name in ABLATIONS),
        ("layout_benchmark", write_layout_benchmark),
    ],
)
def test_a_committed_page_is_made_of_the_committed_results(
    name: str, write: Callable[[Path, Path], str], tmp_path: Path
) -> None:
    """The same words, except the page's own name."""
    pytest.importorskip("matplotlib")
    results, page = tmp_path / "research" / "results" / name, tmp_path / "docs" / f"{name}.md"
    results.parent.mkdir(parents=True)
    results.symlink_to(RESULTS / name)
    text = write(results, page)
    assert text.replace(f"--report {name}.md", f"--report docs/{name}.md") == (PAGES / f"{name}.md").read_text()
    figures = sorted(path.name for path in page.with_suffix("").iterdir())
    assert figures == sorted(path.name for path in (PAGES / name).iterdir())
    for figure in figures:
        made, committed = (np.asarray(Image.open(folder / figure)) for folder in (page.with_suffix(""), PAGES / name))
        assert made.shape == committed.shape, figure
        # Sheets are the same to the pixel; letters of plots may be rendered a little differently by another matplotlib.
        apart = np.abs(made.astype(float) - committed).mean()
        assert apart == 0 if figure == "pictures.png" else apart < 1, figure


@pytest.mark.parametrize("name", ["ddim", "ddpm", "published_ddpm", "phrases_hidden"])
def test_the_figures_of_space_time_attention_follow_from_its_samples(name: str) -> None:
    """Every recall of the page's tables, too."""
    content, tables = _spacetime(name)
    optimised = content["provenance"]["n_fake"]["optimised"]
    text, figures = relation_report(tables, optimised)
    assert figures == content["figures"]
    page = (PAGES / "spacetime.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith(("| constant - plain |", "| scheduled - plain |"))]
    recalls = [row.split("|")[2].partition(" of ")[0].strip() for row in rows]
    assert len(rows) == 2 and all(recall in page for recall in recalls if recall != "undefined")


def test_two_forms_of_space_time_attention_are_compared_as_the_page_says() -> None:
    """Caption by caption; both results are of one base, read by one version of the reader."""
    (published, here), (hidden, there) = map(_spacetime, ("published_ddpm", "phrases_hidden"))
    settings, others = (result["provenance"]["settings"] for result in (published, hidden))
    assert settings["layouts"].items() <= others["layouts"].items()
    assert settings["weights_sha256"] == others["weights_sha256"]
    assert reader_version(published["provenance"]) == reader_version(hidden["provenance"]) == VERSION
    shared = {row: values[: len(settings["layouts"])] for row, values in there.items()}
    lines = against_report(here, shared).splitlines()
    (row,) = (line for line in lines if line.startswith("| constant - constant |"))
    recall, _, relation, _, placed = (cell.partition(" of ")[0].strip() for cell in row.split("|")[2:7])
    page = (PAGES / "spacetime.md").read_text()
    assert recall in page and relation in page and placed in page


def _spacetime(name: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return a stored result of the study, and its values by row in the order of the report."""
    content = json.loads((RESULTS / "spacetime" / f"{name}.json").read_text())
    return content, {row: as_table(content["samples"][row]) for row in ROWS}


def test_results_of_two_readers_are_not_put_side_by_side(tmp_path: Path) -> None:
    (tmp_path / "base.json").write_text('{"asked": {}}')
    assert reader_version({}) == 1 and reader_version({"reader": 2}) == 2
    check_reader(tmp_path, [])
    with pytest.raises(
        ValueError, match=f"with version 1 of the reader .* version {VERSION}; choose another --report for a, b"
    ):
        check_reader(tmp_path, ["a", "b"])
