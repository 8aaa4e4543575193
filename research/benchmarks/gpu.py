"""Measure training and sampling on one GPU, on the real shapes of SD1.5, SDXL and FLUX.1 with random weights.

  python -m research.benchmarks.gpu --output_dir OUT  # about 5 minutes on an H100; no download, no files
  python -m research.benchmarks.gpu --minutes 8 --parts limits flux --output_dir OUT  # FLUX.1; 40 GB of memory and more
  python -m research.benchmarks.gpu --tiny --output_dir OUT  # every part at tiny size, also on a CPU
  python -m research.benchmarks.gpu --report research/results/gpu/*.jsonl --page docs/scaling.md  # the tables

Every row is written to OUT/gpu.jsonl as soon as it is measured, so a run that is cut off loses nothing. Parts come in
order of worth; one that would not end within --minutes is skipped, and one that fails is recorded with its error. All
rows of a part are measured in turns. Exit status: 1 if a part failed.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch

from localctl.files import first_line
from research.benchmarks import gpu_families, gpu_parts
from research.benchmarks.gpu_parts import Bench, Row
from research.benchmarks.gpu_report import read, report, write_page
from research.benchmarks.timing import GIB, Deadline

FILE = "gpu.jsonl"
PARTS = {**gpu_parts.PARTS, **gpu_families.PARTS}
GROUPS = {"flux": list(gpu_families.PARTS)}  # names for several parts


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output_dir", type=Path, default=Path("outputs/gpu"), help="folder for gpu.jsonl")
    add("--minutes", type=float, default=5.0, help="time limit of the whole run")
    add("--parts", nargs="+", choices=[*PARTS, *GROUPS], default=list(gpu_parts.PARTS), help="what to measure")
    add("--tiny", action="store_true", help="small shapes, to try everything on any machine")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--note", default="", help="what is special about this run; the tables show it")
    add("--report", type=Path, nargs="+", metavar="FILE", help="print the tables of earlier runs instead of measuring")
    add("--page", type=Path, help="write the tables of --report into this page, between its markers")
    options = parser.parse_args(argv)
    options.parts = [part for name in options.parts for part in GROUPS.get(name, [name])]
    if options.device == "cpu" and not (options.tiny or options.report):
        parser.error("There is no GPU here; add --tiny to try the benchmark at small size.")
    return options


class Rows:
    """The file of results. Rows are appended, each with its part and the seconds since the beginning."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self._begun = path, time.monotonic()
        path.write_text("")

    def add(self, part: str, row: Row) -> None:
        """Write a row, and print it."""
        line = json.dumps({"part": part, "at": round(time.monotonic() - self._begun, 1), **row})
        with self.path.open("a") as file:
            file.write(line + "\n")
        print(line, flush=True)


def machine(device: torch.device) -> Row:
    """Return what the figures depend on: the card and the versions."""
    card = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    versions = {name: importlib.metadata.version(name) for name in ("diffusers", "transformers", "accelerate")}
    return {
        "card": card.name if card else platform.processor() or platform.machine(),
        "card_gib": card.total_memory / GIB if card else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        **versions,
    }


def fast_folder() -> Path | None:
    """Return a folder in memory for the weights, if there is one with room for SDXL's; None = the usual one."""
    memory = Path("/dev/shm")
    return memory if memory.is_dir() and shutil.disk_usage(memory).free > 12 * GIB else None


def measure(options: argparse.Namespace) -> int:
    """Run the parts; return 1 if one failed."""
    deadline, failed = Deadline(options.minutes), False
    rows, device = Rows(options.output_dir / FILE), torch.device(options.device)
    rows.add("machine", {**machine(device), "tiny": options.tiny, "note": options.note})
    # Compiling for a CPU takes minutes, and says nothing about a GPU.
    compiling = torch.compiler.set_stance("force_eager") if device.type == "cpu" else nullcontext()
    with tempfile.TemporaryDirectory(dir=fast_folder()) as folder, compiling:
        bench = Bench(device, options.tiny, Path(folder), deadline)
        for name in options.parts:
            part, estimate = PARTS[name]
            if not options.tiny and deadline.left() < estimate:
                rows.add(name, {"skipped": f"{estimate:.0f} s needed, {max(0, deadline.left()):.0f} s left"})
                continue
            try:
                for row in part(bench):
                    rows.add(name, row)
            except Exception as error:  # the other parts are worth having
                traceback.print_exc()
                rows.add(name, {"error": f"{type(error).__name__}: {first_line(error)}"})
                failed = True
            bench.free()
    return int(failed)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, or print tables; return the exit status."""
    options = parse(argv)
    if options.report:
        text = report(read(*options.report))
        write_page(options.page, text) if options.page else print(text)
        return 0
    return measure(options)


if __name__ == "__main__":
    sys.exit(main())
