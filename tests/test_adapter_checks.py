"""Adapters from anybody: configs that ask for too much or for nonsense, and weights that are no good."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from localctl.adapter import LocalAdapter
from localctl.adapter_files import check_config, find_adapter, load_adapter
from localctl.evaluation.generated_set import generate_set
from localctl.evaluation.settings import FidSettings
from research.control_share.study import find as load_for_scores

BAD: list[tuple[dict[str, Any], str]] = [
    ({"num_res_blocks": 10**8}, "num_res_blocks of an adapter must be a whole number from 1 to 64, not 100000000"),
    ({"num_res_blocks": 0}, "num_res_blocks .* not 0"),
    ({"num_res_blocks": "2"}, "num_res_blocks .* not '2'"),
    ({"num_res_blocks": [2]}, "num_res_blocks .* not .2."),
    ({"num_res_blocks": 2.0}, "num_res_blocks .* not 2.0"),
    ({"num_res_blocks": True}, "num_res_blocks .* not True"),
    ({"num_res_blocks": None}, "num_res_blocks .* not None"),
    ({"channels": [8] * 10**6}, "channels of an adapter must be 1 to 8 whole numbers, not .8, 8"),
    ({"channels": []}, "channels of an adapter must be 1 to 8 whole numbers"),
    ({"channels": 320}, "channels .* not 320"),
    ({"channels": "320"}, "channels .* not '320'"),
    ({"channels": [8, 0, 16, 24]}, "positive whole numbers, not 0"),
    ({"channels": [8, [16], 16, 24]}, "positive whole numbers, not .16."),
    ({"channels": {"a": 1}}, "channels .* not .'a': 1."),
    ({"channels": [10**12]}, "positive whole numbers"),
    ({"channels": [10**400]}, "positive whole numbers"),
    ({"channels": [10**5, 10**5]}, "weights, more than 5e.08"),
    ({"in_channels": 10**8}, "weights, more than 5e.08"),
    ({"in_channels": 0}, "in_channels .* not 0"),
    ({"in_channels": None}, "in_channels .* not None"),
    ({"downscale_factor": 0}, "downscale_factor .* from 1 to 64, not 0"),
    ({"downscale_factor": -8}, "downscale_factor .* not -8"),
    ({"downscale_factor": 10**9}, "downscale_factor .* not 1000000000"),
    ({"downscale_factor": "8"}, "downscale_factor .* not '8'"),
    ({"adapter_type": ["full_adapter"]}, "adapter_type must be one of"),
    ({"token_width": 8}, "token_width belongs to a token_adapter, not to a full_adapter; leave it out"),
    ({"adapter_type": "os.system"}, "adapter_type must be one of .*, not 'os.system'"),
    ({"condition": ["canny"]}, "condition must be an object with named fields, not .'canny'."),
    ({"condition": "canny"}, "condition must be an object"),
    ({"condition": {"kind": ["canny"]}}, "Unknown condition.kind \\['canny'\\]"),
    ({"condition": {"kind": "cany"}}, "Unknown condition.kind 'cany'"),
    ({"condition": {"kid": "canny"}}, "There is no setting 'condition.kid'; did you mean condition.kind"),
    ({"base": ["micro"]}, "base must be the name, id or folder of a base, not .'micro'."),
    ({"base": {"a": 1}}, "base must be the name"),
    ({"base": 15}, "base must be the name"),
    ({"mask_resize": ["area"]}, "mask_resize must be one of area"),
    ({"unconditional_scale": "0"}, "unconditional_scale must be a number, not '0'"),
    ({"mask_margin": 10**9}, "mask_margin must be a whole number of pixels from 0 to 4096, not 1000000000"),
    ({"mask_features": "yes"}, "mask_features must be true or false"),
]


@pytest.fixture
def folder(make_adapter: Callable[..., LocalAdapter], tmp_path: Path) -> Path:
    adapter = make_adapter(condition={"kind": "canny"}, base="micro")
    adapter.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def change(folder: Path, changes: dict[str, Any]) -> dict[str, Any]:
    config = {**json.loads((folder / "config.json").read_text()), **changes}
    (folder / "config.json").write_text(json.dumps(config))
    return config


@pytest.mark.parametrize("kind", ["LocalAdapter", "T2IAdapter"])
@pytest.mark.parametrize(("changes", "words"), BAD)
def test_a_config_is_refused_before_anything_is_built(
    folder: Path, changes: dict[str, Any], words: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = change(folder, {**changes, "_class_name": kind})
    monkeypatch.setattr(torch.nn, "Conv2d", None)
    with pytest.raises(ValueError, match=words) as error:
        check_config(config, folder)
    assert str(folder) in str(error.value) and len(str(error.value)) < 600 and "\n" not in str(error.value)


@pytest.mark.parametrize(("changes", "words"), BAD[:2])
def test_everything_that_loads_an_adapter_looks_at_its_config(
    folder: Path,
    changes: dict[str, Any],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    assert_refused_early: Callable[[list[str], str], None],
) -> None:
    config = change(folder, changes)
    monkeypatch.setattr(torch.nn, "Conv2d", None)
    with pytest.raises(ValueError, match=words):
        find_adapter(str(folder), local_files_only=True)
    with pytest.raises(ValueError, match=words):
        load_for_scores(folder)
    with pytest.raises(ValueError, match=words):
        generate_set(FidSettings(adapter=str(folder)), "gen")
    with pytest.raises(ValueError, match=words):
        LocalAdapter(**{name: value for name, value in config.items() if not name.startswith("_")})
    Image.fromarray(np.zeros((64, 64), np.uint8)).save(folder / "edges.png")
    argv = ["--prompt", "a", "--adapter", str(folder), "--condition_image", str(folder / "edges.png")]
    assert_refused_early(argv, words)


@pytest.mark.parametrize("content", ["[]", "3", '"LocalAdapter"', '{"_class_name": ["LocalAdapter"]}', "[" * 10**5])
def test_a_config_of_another_kind_is_named(
    folder: Path, content: str, assert_refused_early: Callable[[list[str], str], None]
) -> None:
    (folder / "config.json").write_text(content)
    for load in (
        lambda: find_adapter(str(folder), local_files_only=True),
        lambda: load_for_scores(folder),
        lambda: generate_set(FidSettings(adapter=str(folder)), "gen"),
    ):
        with pytest.raises(ValueError, match="adapter|class") as error:
            load()
        assert "\n" not in str(error.value)
    argv = ["--prompt", "a", "--adapter", str(folder), "--condition_image", "edges.png"]
    assert_refused_early(argv, "is not valid JSON|names the class")


def test_published_shapes_pass() -> None:
    """Those of SD 1.5 and SDXL, and the light one."""
    shapes: list[dict[str, Any]] = [
        {"in_channels": 3, "channels": [320, 640, 1280, 1280], "num_res_blocks": 2, "downscale_factor": 8},
        {"channels": [320, 640, 1280, 1280], "downscale_factor": 16, "adapter_type": "full_adapter_xl"},
        {"channels": [320, 640, 1280], "num_res_blocks": 4, "adapter_type": "light_adapter"},
        {},
    ]
    for shape in shapes:
        assert check_config({"_class_name": "T2IAdapter", **shape}, "x")


def test_weights_that_are_no_good_are_named(folder: Path) -> None:
    path = folder / "diffusion_pytorch_model.safetensors"
    good = load_file(path)
    name = sorted(good)[0]
    for changed, words in (
        ({**good, name: torch.full_like(good[name], torch.nan)}, rf"hold NaN or infinity .{name}."),
        ({**good, name: torch.full_like(good[name], torch.inf)}, rf"hold NaN or infinity .{name}."),
        ({key: value for key, value in good.items() if key != name}, f"missing tensors, such as '{name}'|{name}"),
        ({**good, "more": torch.zeros(2)}, "1 unexpected tensors, such as 'more'"),
        ({**good, name: torch.zeros(3, 5)}, "cannot be read|do not fit"),
        ({}, "cannot be read|do not fit"),
    ):
        save_file(changed, path)
        with pytest.raises(ValueError, match=words) as error:
            load_adapter(folder)
        assert "\n" not in str(error.value) and str(folder) in str(error.value)
    save_file(good, path)
    assert all(torch.equal(value, good[key]) for key, value in load_adapter(folder).state_dict().items())
    for length in (0, 5, 500):
        path.write_bytes(b"x" * length)
        with pytest.raises(ValueError, match="cannot be loaded: the weights .* cannot be read"):
            load_adapter(folder)


def test_pickled_weights_are_not_read_and_how_to_convert_them_is_said(
    make_adapter: Callable[..., LocalAdapter], tmp_path: Path
) -> None:
    adapter = make_adapter().adapter
    adapter.save_pretrained(tmp_path / "plain", safe_serialization=False)
    assert [path.name for path in (tmp_path / "plain").glob("*.bin")]
    with pytest.raises(
        ValueError, match="only .bin weights, which are pickles and are not loaded; convert them: "
    ) as error:
        load_adapter(tmp_path / "plain")
    eval(str(error.value).partition("convert them: ")[2].rstrip("."), {"diffusers": diffusers})  # as it says
    loaded = load_adapter(tmp_path / "plain")
    assert all(torch.equal(a, b) for a, b in zip(loaded.adapter.parameters(), adapter.parameters(), strict=True))
