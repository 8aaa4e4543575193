"""The notebooks run from their first cell to their last, keep outputs to look at, and no logic of their own."""

import ast
import base64
import importlib
import io
import re
from collections.abc import Iterator
from pathlib import Path

import nbformat
import numpy as np
import pytest
from jupyter_client.manager import KernelManager
from nbformat import NotebookNode
from PIL import Image

from nbs.execute import FOLDER, NOTEBOOKS, code_cells, execute, shared_kernel

QUICK = {  # what is changed here, so that it takes less time
    "01_train_and_look": "STEPS, BATCH, SAMPLING_STEPS = 2, 2, 2",
    "02_evaluate_and_compare": "COUNT, SAMPLING_STEPS = 8, 2",
    "03_mask_and_loss": "MORE_TIMESTEPS, SCENES = [1, 500, 999], SCENES[:2]",
    "04_sample_on_a_base": "SAMPLING_STEPS = 3",
}
KILOBYTES = 400
PUBLIC = ("localctl", "localctl.data", "localctl.evaluation", "localctl.micro")


def outputs(notebook: NotebookNode) -> list[NotebookNode]:
    return [output for cell in code_cells(notebook) for output in cell.outputs]


def text_data(output: NotebookNode) -> list[str]:
    return [data for kind, data in output.get("data", {}).items() if kind.startswith("text/")]


def pictures(notebook: NotebookNode) -> list[Image.Image]:
    shown = [output.data["image/png"] for output in outputs(notebook) if "image/png" in output.get("data", {})]
    return [Image.open(io.BytesIO(base64.b64decode(png))) for png in shown]


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KernelManager]:
    """One for all, in a folder that lies beside ``examples`` as ``nbs`` does, and stays clean of what they write."""
    root = tmp_path_factory.mktemp("tree")
    (root / "nbs").mkdir()
    (root / "examples").symlink_to(FOLDER.resolve().parent / "examples", target_is_directory=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # as all tests: threads that wait for a core of others burn its time
        with shared_kernel(root / "nbs") as manager:
            yield manager


def test_there_are_four() -> None:
    assert [path.stem for path in NOTEBOOKS] == [*QUICK]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs_and_shows_as_much_as_is_kept(path: Path, kernel: KernelManager) -> None:
    fresh = execute(path, kernel, QUICK[path.stem])
    kept = nbformat.read(path, as_version=4)
    assert [p.size for p in pictures(fresh)] == [p.size for p in pictures(kept)]
    assert not any(output.get("name") == "stderr" for output in outputs(fresh))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_kept_is_clean(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert [cell.execution_count for cell in code_cells(notebook)] == list(range(1, len(code_cells(notebook)) + 1))
    assert {output.output_type for output in outputs(notebook)} <= {"stream", "display_data", "execute_result"}
    assert not any(output.get("name") == "stderr" for output in outputs(notebook))  # warnings and progress bars
    texts = [str(part) for output in outputs(notebook) for part in (output.get("text"), *text_data(output))]
    assert not re.search(r"(^|[\s'\"=(])(/\w|[A-Z]:\\|~/)|\r", "\n".join(texts))  # absolute paths, redrawn lines
    assert len(pictures(notebook)) >= 2
    assert all(len(np.unique(np.asarray(picture.convert("L")))) > 8 for picture in pictures(notebook))  # none is blank
    assert path.stat().st_size < KILOBYTES * 1000


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_import_public_names_alone(path: Path) -> None:
    tree = ast.parse("\n".join(cell.source for cell in code_cells(nbformat.read(path, as_version=4))))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            assert not any(name.name.startswith("localctl.") for name in node.names)
        if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] == "localctl":
            assert node.module in PUBLIC
            assert {name.name for name in node.names} <= set(importlib.import_module(node.module).__all__)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_define_nothing(path: Path) -> None:
    cells = code_cells(nbformat.read(path, as_version=4))
    for cell in cells:
        nodes = list(ast.walk(ast.parse(cell.source)))
        assert not any(isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Lambda, ast.While)) for node in nodes)
    parameters = ast.parse(cells[0].source).body
    assert all(isinstance(node, ast.Assign) for node in parameters)  # what a reader may change stands first
