"""The notebooks run from their first cell to their last, and keep no outputs and no logic of their own."""

import ast
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from jupyter_client.manager import KernelManager
from nbclient import NotebookClient
from nbformat import NotebookNode

NOTEBOOKS = sorted((Path(__file__).parents[1] / "nbs").glob("*.ipynb"))
SECONDS = 300  # a notebook takes a few; this is for a machine that does much else


def run(path: Path, kernel: KernelManager) -> NotebookNode:
    """The notebook with its outputs; CellExecutionError where a cell fails."""
    notebook = nbformat.read(path, as_version=4)
    forget = nbformat.v4.new_code_cell("%reset -f")  # no name of the notebook before
    notebook.cells.insert(0, forget)
    return NotebookClient(notebook, timeout=SECONDS, km=kernel).execute()


def pictures(notebook: NotebookNode) -> int:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return sum("image/png" in output.get("data", {}) for output in outputs)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all of them run, as they do in ``nbs``: later ones look at what the first has trained."""
    return tmp_path_factory.mktemp("nbs")


@pytest.fixture(scope="module")
def kernel(folder: Path) -> Iterator[KernelManager]:
    """One for all: half of a notebook's time is importing libraries."""
    manager = KernelManager(kernel_name="python3")
    manager.start_kernel(cwd=str(folder))
    yield manager
    manager.shutdown_kernel(now=True)


@pytest.fixture(scope="module")
def first(kernel: KernelManager) -> NotebookNode:
    return run(NOTEBOOKS[0], kernel)


def test_training_and_sampling(first: NotebookNode, folder: Path) -> None:
    assert pictures(first) == 3
    assert (folder / "outputs" / "adapter" / "adapter" / "config.json").is_file()


@pytest.mark.parametrize(("number", "shown"), [(2, 5), (3, 2), (4, 4)])
def test_what_follows(number: int, shown: int, first: NotebookNode, kernel: KernelManager) -> None:
    path = NOTEBOOKS[number - 1]
    assert path.name.startswith(f"{number:02d}_")
    assert pictures(run(path, kernel)) == shown


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_stripped_and_define_nothing(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in cells)
    for cell in cells:
        nodes = list(ast.walk(ast.parse(cell.source)))
        assert not any(isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Lambda, ast.While)) for node in nodes)
    parameters = ast.parse(cells[0].source).body
    assert all(isinstance(node, ast.Assign) for node in parameters)  # what a reader may change stands first
