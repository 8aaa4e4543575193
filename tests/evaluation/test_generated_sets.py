"""Sets of generated images with damaged records; ``test_fid.py`` tests whole sets."""

import json
from pathlib import Path
from typing import Any

import pytest

from localctl.evaluation.generated_set import REQUIRED_SETTINGS, read_images, read_set, read_speed


@pytest.mark.parametrize(
    ("name", "text", "read"),
    [
        ("settings.json", "[]", read_set),
        ("settings.json", "[" * 100_000, read_set),
        ("settings.json", json.dumps(dict.fromkeys(REQUIRED_SETTINGS, "x")), read_set),
        ("timing/000000.json", "[]", read_speed),
        ("timing/000000.json", "{}", read_speed),
        ("timing/000000.json", json.dumps({"pictures": 1, "seconds": 0, "processes": 1}), read_speed),
        ("ids/000000.json", "3", lambda folder: list(read_images(folder, ["000000"]))),
        ("ids/000000.json", "{}", lambda folder: list(read_images(folder, ["000000"]))),
        ("images/000000.png", "cut off", lambda folder: list(read_images(folder, ["000000"]))),
    ],
)
def test_damaged_records_of_a_set_are_named(tmp_path: Path, name: str, text: str, read: Any) -> None:
    (tmp_path / "ids").mkdir()
    (tmp_path / "ids" / "000000.json").write_text(json.dumps({"key": "a", "caption": "a", "seed": 0}))
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=f"{tmp_path}.* (damaged|has no|has num_images|not valid JSON|holds)"):
        read(tmp_path)
