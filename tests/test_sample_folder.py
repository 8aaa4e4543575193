"""The output folder of ``sample.py``: one run at a time, and nothing outside it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from sample_helpers import pixels

import sample
from localctl.run.lock import LOCK, FolderLock, _began


@pytest.fixture
def plain(sd_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    Path("base").symlink_to(sd_folder)
    return ["--prompt", "a b", "--base", "base", "--num_inference_steps", "1", "--output_dir", "out"]


def test_a_folder_in_use_is_refused_before_the_base_is_loaded(
    plain: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    lock = FolderLock(Path("out"), print)
    owner = json.loads(lock.path.read_text())
    lock.path.write_text(json.dumps({**owner, "pid": os.getppid(), "began": _began(os.getppid())}))
    assert sample.main(plain) == 2
    printed = capsys.readouterr().err
    assert "in use by process" in printed and "loading the base" not in printed
    lock.path.unlink()
    assert sample.main(plain) == 0 and len(pixels("out")) == 1
    assert not (Path("out") / LOCK).exists()


def test_links_are_replaced_or_refused(plain: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    Path("out").mkdir()
    for name in ("00_seed0.png", "sheet.png", "sample.json"):
        Path(f"mine_{name}").write_text("mine")
        Path("out", name).symlink_to(Path(f"mine_{name}").absolute())
    assert sample.main(plain) == 0 and len(pixels("out")) == 1
    assert {path.read_text() for path in Path().glob("mine_*")} == {"mine"}
    assert not any(path.is_symlink() for path in Path("out").iterdir())
    Path("out/inputs").rmdir()
    Path("mine").mkdir()
    Path("out/inputs").symlink_to(Path("mine").absolute())
    assert sample.main(plain) == 2 and "inputs is a link" in capsys.readouterr().err
