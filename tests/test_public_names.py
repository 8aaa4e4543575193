"""Public names are found by dir(), by editors and type checkers, and load their module on first use alone."""

from __future__ import annotations

import ast
import importlib
import math
import tomllib
from pathlib import Path

import pytest

import localctl

ROOT = Path(localctl.__file__).parent


@pytest.mark.parametrize(
    "package",
    [
        "localctl",
        "localctl.bridges",
        "localctl.data",
        "localctl.evaluation",
        "localctl.layout_predictor",
        "localctl.micro",
    ],
)
def test_what_type_checkers_see_is_what_there_is(package: str) -> None:
    module = importlib.import_module(package)
    tree = ast.parse(Path(str(module.__file__)).with_suffix(".pyi").read_text())
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    seen = {alias.name: f"{package}.{node.module}" for node in imports for alias in node.names}
    assert sorted(seen) == module.__all__
    assert set(seen) <= set(dir(module))
    for name, place in seen.items():
        assert getattr(module, name) is getattr(importlib.import_module(str(place)), name)
    with pytest.raises(AttributeError, match="nothing"):
        module.nothing  # noqa: B018


def test_type_checkers_are_told_that_the_package_is_typed() -> None:
    assert (ROOT / "py.typed").is_file()
    project = tomllib.loads((ROOT.parent / "pyproject.toml").read_text())
    assert {"py.typed", "*.pyi"} <= set(project["tool"]["setuptools"]["package-data"]["localctl"])


def test_settings_of_a_training_by_words() -> None:
    assert localctl.train_settings() == localctl.TrainSettings()
    found = localctl.train_settings("experiment=quick", "--max_train_steps", "3", "data.count=5")
    assert (found.max_train_steps, found.data.count) == (3, 5)
    with pytest.raises(ValueError, match="max_train_step"):
        localctl.train_settings("max_train_stepz=3")


def test_a_dry_run_is_no_training() -> None:
    with pytest.raises(ValueError, match="dry_run trains nothing"):
        localctl.train(localctl.TrainSettings(dry_run=True))


def test_evaluation_by_public_names(tmp_path: Path) -> None:
    """What evaluate_fid.py does in three commands; training and comparisons are run by the notebooks."""
    lines: list[str] = []
    settings = localctl.FidSettings(output_dir=str(tmp_path), num_images=2, num_inference_steps=1, prompts="both")
    with pytest.deprecated_call(match="say= is deprecated"):
        found = localctl.evaluate_fid(settings, say=lines.append)
    assert set(found) == {"with_prompts", "without_prompts"} and lines
    assert all(any(map(math.isfinite, item["values"].values())) for item in found.values())
    assert (tmp_path / "with_prompts" / "score_micro_clip.json").is_file()
    assert localctl.generate_set(settings) == {name: tmp_path / name for name in found}
