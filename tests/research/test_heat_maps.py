from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from research import heat_maps

SCENE = {
    "prompt": "a cat, dogs",
    "regions": [{"phrase": "cat", "box": [0, 0, 0.5, 1]}, {"phrase": "dogs", "box": [0.5, 0, 1, 1]}],
}


def test_a_row_per_control(sd_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scene, output = tmp_path / "scene.json", tmp_path / "docs" / "heat.png"
    scene.write_text(json.dumps(SCENE))
    flags = ["--layout", str(scene), "--base", str(sd_folder), "--num_inference_steps", "2", "--output", str(output)]
    assert heat_maps.main([*flags, "--controls", "none", "bias+forward", "--set", "bias.strength=2"]) == 0
    assert capsys.readouterr().out.strip() == str(output)
    sheet = Image.open(output)
    assert sheet.width > 3 * 192 and 2 * 192 < sheet.height < 3 * 192


def test_bad_input_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for flags in (["--layout", str(tmp_path / "none.json")], ["--layout", "x", "--controls", "biass"]):
        assert heat_maps.main(flags) == 2
        assert capsys.readouterr().err.count("\n") == 1
