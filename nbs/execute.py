"""Run the notebooks and keep what they show: python nbs/execute.py [01 03 ...].

All share one kernel, since half of a notebook's time is importing libraries; names of one never reach the next.
"""

from __future__ import annotations

import base64
import io
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import nbformat
from jupyter_client.manager import KernelManager
from nbclient import NotebookClient
from nbformat import NotebookNode
from PIL import Image

FOLDER = Path(__file__).parent
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
SECONDS = 300  # per cell; a whole notebook takes well under 90 s where nothing else runs
FORGET = """%reset -f
import warnings
from tqdm import TqdmWarning
warnings.filterwarnings("ignore", category=TqdmWarning)  # that bars would need ipywidgets; there are none here
del warnings, TqdmWarning
"""  # no name of the notebook before


@contextmanager
def shared_kernel(folder: Path) -> Iterator[KernelManager]:
    """Yield a kernel that works in ``folder``, imports this tree's package, and draws no progress bars: kept, they
    would be a line per step."""
    manager = KernelManager(kernel_name="python3")
    environment = {**os.environ, "PYTHONPATH": str(FOLDER.resolve().parent), "TQDM_DISABLE": "1"}
    manager.start_kernel(cwd=str(folder), env=environment)
    try:
        yield manager
    finally:
        manager.shutdown_kernel(now=True)


def execute(path: Path, kernel: KernelManager, changes: str = "") -> NotebookNode:
    """Return the notebook with its outputs; CellExecutionError where a cell fails.

    changes: code that gives its parameters, which stand in its first code cell, other values.
    """
    notebook = nbformat.read(path, as_version=4)
    (parameters, *_), kept = code_cells(notebook), notebook.cells
    place = kept.index(parameters) + 1
    extra = [nbformat.v4.new_code_cell(source) for source in (FORGET, changes)]
    notebook.cells = [extra[0], *kept[:place], extra[1], *kept[place:]]
    NotebookClient(notebook, timeout=SECONDS, km=kernel, record_timing=False).execute()
    notebook.cells = [cell for cell in notebook.cells if cell not in extra]
    for number, cell in enumerate(code_cells(notebook), start=1):
        cell.execution_count = number
        for output in cell.outputs:
            data = output.get("data", {})
            data.pop("image/jpeg", None)  # the same picture again, not as it is
            if "image/png" in data:
                data["image/png"] = packed(data["image/png"])
            if output.output_type == "execute_result":
                output.execution_count = number
    notebook.metadata.pop("language_info", None)  # of the interpreter that happened to run it
    return notebook


def packed(png: str) -> str:
    """Return the same pixels in a smaller file; both in base64."""
    file = io.BytesIO()
    Image.open(io.BytesIO(base64.b64decode(png))).save(file, format="PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def main(chosen: Sequence[str]) -> None:
    """Run the notebooks whose names begin with one of ``chosen``, or all, and write their outputs into them."""
    with shared_kernel(FOLDER) as kernel:
        for path in NOTEBOOKS:
            if not chosen or path.name.startswith(tuple(chosen)):
                nbformat.write(execute(path, kernel), path)
                print(f"{path.name}: {path.stat().st_size // 1000} kB")


if __name__ == "__main__":
    main(sys.argv[1:])
