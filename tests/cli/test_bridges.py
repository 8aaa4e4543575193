"""`localctl export` and `localctl import`."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from localctl.__main__ import main
from localctl.adapter import LocalAdapter
from localctl.adapter_files import find_adapter
from localctl.layout import Layout, Region
from localctl.layout_io import load_layout, save_layout

MakeAdapter = Callable[..., LocalAdapter]
LAYOUT = Layout("a cat on a mat", 64, 96, (Region("a cat", (0, 0, 0.5, 1)), Region.disc("a mat", (0.75, 0.5))))


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_layout_out_and_back(capsys: pytest.CaptureFixture[str]) -> None:
    save_layout(LAYOUT, "scene.json")
    assert main(["export", "scene.json", "--format", "comfyui", "--output", "flows/cat.json"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["flows/cat.json", "flows/cat_mask_1.png"] and any("folder 'input'" in line for line in lines)
    assert main(["import", "flows/cat.json", "--output_dir", "layouts"]) == 0
    assert capsys.readouterr().out.strip() == "layouts/cat.json"
    found = load_layout("layouts/cat.json")
    assert found.prompt == LAYOUT.prompt and found.regions[0] == LAYOUT.regions[0] and found.regions[1].mask is not None
    assert main(["export", "scene.json", "--format", "regional-prompter"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "outputs/exported/scene.json"
    assert main(["export", "scene.json", "--format", "localctl", "--output", "own/cat.json"]) == 0
    assert "" not in capsys.readouterr().out.splitlines()


def test_an_adapter_out_and_back(make_adapter: MakeAdapter, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = make_adapter(1, mask_resize="cover", base="sd15")
    adapter.save_pretrained("run/adapter")
    assert main(["export", "run/adapter", "--format", "tencentarc"]) == 0
    assert capsys.readouterr().out.strip() == "outputs/exported/run.safetensors"
    assert "body.0.block1.weight" in load_file("outputs/exported/run.safetensors")
    assert main(["import", "outputs/exported/run.safetensors", "--output_dir", "own", "--base", "micro"]) == 0
    found = find_adapter("own")
    assert found.base == "micro" and found.load().config["mask_resize"] == "cover"
    assert main(["export", "run", "--format", "diffusers", "--output_dir", "plain"]) == 0
    assert main(["import", "plain", "--output_dir", "again", "--condition", "paper_canny"]) == 0
    condition = find_adapter("again").condition
    assert condition is not None and (condition.high, condition.channels_used) == (200, "rgb")
    assert main(["import", "plain", "--output_dir", "no", "--condition", "paper_color"]) == 2
    assert "takes conditions of 1 channels" in capsys.readouterr().err and not Path("no").exists()


def test_several_adapters_become_one_file_and_are_listed(
    make_adapter: MakeAdapter, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("edges", "depth"):
        make_adapter(1).save_pretrained(f"{name}/adapter")
    assert main(["export", "edges", "depth", "--format", "bundle", "--output", "all.safetensors"]) == 0
    assert main(["export", "all.safetensors", ".", "--list"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[1:] == ["all.safetensors/depth", "all.safetensors/edges", "./all", "./depth", "./edges"]
    assert main(["import", "all.safetensors", "--output_dir", "parts"]) == 0
    assert sorted(path.name for path in Path("parts").iterdir()) == ["depth", "edges"]


def test_the_scenes_of_dense_diffusion(capsys: pytest.CaptureFixture[str]) -> None:
    """In the folders that its archives unpack to; a scene with too few colours is left out, and said."""
    colors = np.zeros((32, 32, 4), np.uint8)
    colors[:, 16:] = 200
    scenes = {
        0: {"textual_condition": "a cat", "segment_descriptions": ["", "a cat"]},
        1: {"textual_condition": "a b", "segment_descriptions": ["a", "b", ""]},
    }
    Path("dataset/testset_layout").mkdir(parents=True)
    Path("dataset/testset.pkl").write_bytes(pickle.dumps(scenes))
    for index in scenes:
        Image.fromarray(colors).save(f"dataset/testset_layout/{index}.png")
    with pytest.warns(UserWarning, match="The scene 1 is left out: .*2 colours for 3 descriptions"):
        assert main(["import", "dataset", "--output_dir", "out"]) == 0
    assert capsys.readouterr().out.strip() == "out/scene_0.json"
    assert [region.phrase for region in load_layout("out/scene_0.json").regions] == [None, "a cat"]
    assert main(["import", "dataset", "--prompt", "a"]) == 2
    assert "--prompt has no effect on a folder of scenes" in capsys.readouterr().err
    assert main(["import", "dataset", "--index", "1"]) == 2
    assert "2 colours for 3 descriptions" in capsys.readouterr().err


def test_a_pickle_of_scenes_runs_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return Path.touch, (Path("executed").resolve(),)

    Path("dataset").mkdir()
    Path("dataset/valset.pkl").write_bytes(pickle.dumps({0: Evil()}))
    assert main(["import", "dataset"]) == 2
    error = capsys.readouterr().err
    assert "it names pathlib.Path.touch, which is not unpickled); give it as .json." in error and error.count("\n") == 1
    assert not Path("executed").exists()
    Path("dataset/valset.pkl").write_bytes(pickle.dumps({0: 1})[:-3])
    assert main(["import", "dataset"]) == 2 and "valset.pkl cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["export", "scene.json"], "Name the format to write, --format"),
        (["export", "scene.json", "--format", "comfy"], "Unknown format 'comfy' of a layout; did you mean comfyui"),
        (
            ["export", "scene.json", "--format", "gligen", "--output", "x.txt"],
            "is written as .json; name the output x.json",
        ),
        (["export", "scene.json", "--format", "localctl", "--output", "scene.json"], "would replace scene.json"),
        (["export", "scene.json", "b", "--format", "gligen"], "export one layout at a time"),
        (["export", "scene.json", "--format", "gligen", "--dtype", "fp16"], "--dtype has no effect on a layout"),
        (["export", "a", "b", "--format", "comfyui"], "fit into one file as --format bundle alone"),
        (["export", "a", "--format", "local", "--output", "x"], "is a folder; give --output_dir"),
        (["export", "nowhere", "--format", "comfyui"], "There is no adapter 'nowhere'"),
        (["export", "nowhere", "--list"], "There is no folder or file nowhere"),
        (["export", "a/none.json", "--format", "gligen"], "There is no file a/none.json; check the path."),
        (["import", "a/none.json"], "There is no file a/none.json; check the path."),
        (["import", "none.txt"], "There is no file none.txt; check the path."),
        (["import", "nowhere.pth"], "There is no adapter 'nowhere.pth'"),
        (["import", "scene.json", "--base", "sd15"], "--base has no effect on a layout"),
        (["import", "x.pth", "--prompt", "a"], "--prompt has no effect on an adapter"),
        (["import", "x.pth", "--format", "comfyui"], "Unknown format 'comfyui' of an adapter to import"),
        (["import", "scene.json", "--height", "64"], "needs both --height and --width"),
        (["import", "scene.json", "--output_dir", "."], "would replace scene.json"),
        (["import", "scene.json", "--color", "red"], "'red' is not a colour with its phrase"),
        (["import", "outside.json"], "names the mask '../mask.png' outside the layout's folder"),
        (["import", "x.pth", "--condition", "cany"], "canny"),
        (
            ["export", "scene.json", "--format", "gligen", "--output", "x.json", "--output_dir", "y"],
            "Give either --output, the file to write, or --output_dir",
        ),
        (["export", ".", "--list", "--format", "bundle"], "--format has no effect on --list"),
        (["export", ".", "--list", "--dtype", "fp16"], "--dtype has no effect on --list"),
        (["export", ".", "--list", "--output_dir", "y"], "--output_dir has no effect on --list"),
        (
            ["export", "scene.json", "--format", "gligen", "--local_files_only"],
            "--local_files_only has no effect on a layout",
        ),
        (["import", "scene.json", "--local_files_only"], "--local_files_only has no effect on a layout"),
        (["import", "scene.json", "--color", "red=a", "#f00=b"], "given twice in --color"),
    ],
)
def test_mistakes_are_one_sentence(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    save_layout(LAYOUT, "scene.json")
    Path("outside.json").write_text(json.dumps({"regions": [{"mask": "../mask.png"}]}))
    assert main(words) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
