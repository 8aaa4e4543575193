"""The results under docs/ are still those that the commands written beside them ask for, so nothing is made again."""

from __future__ import annotations

from pathlib import Path

import pytest

from localctl.micro.detect import VERSION
from research.ablation import __main__ as ablation
from research.ablation.measuring import Bench as AblationBench
from research.ablation.measuring import Protocol
from research.layout_benchmark import __main__ as layout_benchmark
from research.layout_benchmark.measuring import Bench as LayoutBench
from research.layout_benchmark.methods import methods
from research.reader import check_reader, reader_version

DOCS = Path(__file__).parents[2] / "docs"


def test_those_of_the_ablation(tmp_path: Path) -> None:
    folder = DOCS / "ablation"
    cells = ablation.planned(ablation.parse(["--report", f"{folder}.md"]))
    said: list[str] = []
    bench = AblationBench(Protocol(), folder, tmp_path, said.append)
    bench.check(cells)
    bench.base()
    assert not any(bench.cell(cell) for cell in cells)
    assert said == [f"{cell.name}: done before" for cell in cells]


def test_those_of_the_layout_benchmark(tmp_path: Path) -> None:
    folder = DOCS / "layout_benchmark"
    args = layout_benchmark.parse(["--report", f"{folder}.md"])
    said: list[str] = []
    bench = LayoutBench(layout_benchmark.protocol_of(args, False), folder, tmp_path, say=said.append)
    chosen = methods(args.methods, args.set, args.base)
    bench.check(chosen)
    assert not any(bench.measure(method) for method in chosen)
    assert said == [f"{method.name}: done before" for method in chosen]


def test_results_of_two_readers_are_not_put_side_by_side(tmp_path: Path) -> None:
    (tmp_path / "base.json").write_text('{"asked": {}}')
    assert reader_version({}) == 1 and reader_version({"reader": 2}) == 2
    check_reader(tmp_path, [])
    with pytest.raises(
        ValueError, match=f"by version 1 of the reader, now {VERSION}; choose another --report for a, b"
    ):
        check_reader(tmp_path, ["a", "b"])
