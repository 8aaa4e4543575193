"""Layouts to every format and back; what is no layout, or not held by a format, is said."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from PIL import Image

from localctl.bridges import LAYOUT_FORMATS, Exported, export_layout, import_layout
from localctl.layout import Layout, Region

SCENE = Layout(
    "a red ball left of a cat, under a red ball",
    256,
    512,
    (
        Region("a red ball", (0.1, 0.25, 0.3, 0.75)),
        Region("a cat", (0.5, 0.5, 1, 1), strength=0.5),
        Region("a red ball", (0, 0, 0.2, 0.125), occurrence=1),
    ),
)
DISC = Region.disc("a cat", (0.5, 0.5), 0.3)


def back(exported: Exported, **options: Any) -> Layout:
    """Import what was exported, its images by their names."""
    files = exported.files

    def image(name: str) -> Image.Image:
        return Image.open(io.BytesIO(files[name]))

    return import_layout(next(iter(files.values())), images=image, **options)


@pytest.mark.parametrize(
    ("format", "tolerance", "strengths"),
    [
        ("comfyui", 1e-9, True),
        ("latent-couple", 1e-6, True),
        ("localctl", 0, True),
        ("gligen", 0, False),
        ("ideogram", 5e-4, False),
    ],
)
def test_boxes_and_phrases_come_back(format: str, tolerance: float, strengths: bool) -> None:
    found = back(export_layout(SCENE, format))
    assert found.prompt == SCENE.prompt
    assert found.size == (SCENE.size if format not in ("gligen", "ideogram") else None)
    for region, original in zip(found.regions, SCENE.regions, strict=True):
        assert (region.phrase, region.occurrence) == (original.phrase, original.occurrence)
        assert region.boxes[0] == pytest.approx(original.boxes[0], abs=tolerance or 1e-12)
        assert region.strength == (original.strength if strengths else 1)


@pytest.mark.parametrize("format", ["comfyui-boxes", "coco"])
def test_formats_without_a_prompt_take_one(format: str) -> None:
    """Pixels of 512x256 hold these boxes to half a pixel."""
    size = None if format == "coco" else SCENE.size
    found = back(export_layout(SCENE, format), prompt=SCENE.prompt, size=size)
    assert (found.prompt, found.size) == (SCENE.prompt, SCENE.size)
    places = {(region.phrase, region.occurrence): region.boxes[0] for region in found.regions}
    for region in SCENE.regions:
        assert places[region.phrase, region.occurrence] == pytest.approx(region.boxes[0], abs=1 / 256)
    without = back(export_layout(SCENE, format), size=size)
    assert without.prompt == "a red ball, a cat, a red ball"


@pytest.mark.parametrize("format", ["comfyui", "localctl", "regional-prompter", "color-map"])
def test_masks_come_back(format: str) -> None:
    layout = Layout("a cat on a mat", 64, 96, (DISC, Region("a mat", (0, 0.875, 1, 1))))
    exported = export_layout(layout, format)
    assert all(content.startswith(b"\x89PNG") for name, content in exported.files.items() if name.endswith("png"))
    found = back(exported)
    regions = {region.phrase: region for region in found.regions if region.phrase}
    assert found.prompt == layout.prompt and list(regions) == ["a cat", "a mat"]
    wanted, seen = (r.coverage((64, 96)) > 0.5 for r in (DISC, regions["a cat"]))
    assert (wanted != seen).float().mean() < 0.01
    assert (regions["a mat"].coverage((64, 96)) > 0.5)[56:].all()
    assert not any("overlap" in note for note in exported.notes)


def test_a_region_with_a_prompt_alone_is_a_part_without_words_in_a_map() -> None:
    layout = Layout("a mat", 64, 64, (Region("a mat", (0, 0.5, 1, 1)), Region(None, (0, 0, 1, 0.5), prompt="a cat")))
    exported = export_layout(layout, "color-map")
    assert "no prompt: left out" in exported.notes[-1]
    assert [region.phrase for region in back(exported).regions] == ["a mat", None]


def test_in_a_map_the_smaller_region_lies_on_top() -> None:
    layout = Layout("a cat on a mat", 64, 64, (Region("a cat", (0.25, 0.25, 0.5, 0.5)), Region("a mat", (0, 0, 1, 1))))
    exported = export_layout(layout, "regional-prompter")
    assert any("overlap" in note for note in exported.notes)
    cat, mat = (region.coverage((64, 64)) > 0.5 for region in back(exported).regions)
    assert cat[16:32, 16:32].all() and cat.sum() == 256 and bool((cat ^ mat).all())
    tiny = Region("a cat", (0, 0, 0.001, 0.001))
    with pytest.raises(ValueError, match="The region 'a cat' is hidden or smaller than a pixel"):
        export_layout(Layout("a cat on a mat", 64, 64, (tiny, layout.regions[1])), "color-map")


def test_what_a_format_does_not_hold_is_said() -> None:
    region = Region(
        "a cat", mask=torch.ones(8, 8).triu(), strength=2, outside_strength=0, negative_prompt="fur", end=0.5
    )
    layout = Layout("a cat", regions=(region, Region(None, (0, 0, 1, 1))), overlap="first")
    notes = " ".join(export_layout(layout, "gligen").notes)
    assert "strength, outside_strength, end, negative_prompt, overlap: left out" in notes
    assert "box around it" in notes and "without words" in notes
    assert "outside_strength, overlap: left out" in " ".join(export_layout(layout, "comfyui").notes)


@pytest.mark.parametrize(
    ("boxes", "mode", "ratios", "keys"),
    [
        ([(0, 0, 0.25, 1), (0.25, 0, 1, 1)], "Columns", "0.25,0.75", ["ADDCOL"]),
        ([(0, 0, 1, 0.5), (0, 0.5, 1, 1)], "Columns", "0.5,1;0.5,1", ["ADDROW"]),
        (
            [(0, 0, 1, 0.5), (0, 0.5, 0.5, 1), (0.5, 0.5, 1, 1)],
            "Columns",
            "0.5,1;0.5,0.5,0.5",
            ["ADDROW", "ADDCOL"],
        ),
        ([(0, 0, 0.5, 1), (0.5, 0, 1, 0.25), (0.5, 0.25, 1, 1)], "Rows", "0.5;1,0.5;0.25;0.75", ["ADDCOL", "ADDROW"]),
    ],
)
def test_boxes_that_fill_the_image_are_a_matrix(
    boxes: list[tuple[float, ...]], mode: str, ratios: str, keys: list[str]
) -> None:
    words = ["sky", "hill", "sea"][: len(boxes)]
    regions = tuple(Region(word, box) for word, box in zip(words, boxes, strict=True))
    layout = Layout("sky, hill and sea" if len(boxes) == 3 else "sky and hill", 512, 512, regions)
    exported = export_layout(layout, "regional-prompter", "scene")
    text = exported.files["scene.txt"].decode()
    assert f"RP Matrix submode: {mode}" in text and f'RP Ratios: "{ratios}"' in text
    assert [word for word in text.split("\n")[0].split() if word.startswith("ADD")] == ["ADDBASE", *keys]
    assert back(exported) == layout


def test_a_workflow_with_everything_that_it_holds_comes_back() -> None:
    region = Region(
        "a boat", [(0, 0, 0.25, 0.5), (0.5, 0.5, 1, 1)], strength=0.7, start=0.1, end=0.6, negative_prompt="sail"
    )
    layout = Layout("a boat on a lake", 64, 64, (region,))
    assert back(export_layout(layout, "comfyui")) == layout


def test_every_node_of_a_workflow_has_the_inputs_that_comfyui_asks_for() -> None:
    """Names, types and ranges as in its nodes.py."""
    asked: Mapping[str, set[str]] = {
        "CheckpointLoaderSimple": {"ckpt_name"},
        "CLIPTextEncode": {"text", "clip"},
        "ConditioningSetAreaPercentage": {"conditioning", "width", "height", "x", "y", "strength"},
        "ConditioningSetMask": {"conditioning", "mask", "strength", "set_cond_area"},
        "ConditioningSetTimestepRange": {"conditioning", "start", "end"},
        "ConditioningCombine": {"conditioning_1", "conditioning_2"},
        "LoadImageMask": {"image", "channel"},
        "EmptyLatentImage": {"width", "height", "batch_size"},
        "KSampler": {
            *("model", "seed", "steps", "cfg", "sampler_name", "scheduler"),
            *("positive", "negative", "latent_image", "denoise"),
        },
        "VAEDecode": {"samples", "vae"},
        "SaveImage": {"images", "filename_prefix"},
    }
    layout = Layout("a cat, a mat", 64, 64, (DISC, Region("a mat", (0, 0, 1, 0.5), end=0.5)))
    nodes = json.loads(next(iter(export_layout(layout, "comfyui").files.values())))
    assert {node["class_type"] for node in nodes.values()} == set(asked)
    for node in nodes.values():
        assert set(node["inputs"]) == asked[node["class_type"]]
        links = [value for value in node["inputs"].values() if isinstance(value, list)]
        assert all(link[0] in nodes and type(link[1]) is int for link in links)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ("{}", "is not recognised; give one of"),
        ("a plain prompt", "is not recognised"),
        (b"\xff\xfe\x00", "neither text in UTF-8 nor a PNG"),
        ({"nodes": [], "links": []}, "export it there with 'Export .API.'"),
        ({"1": {"class_type": "KSampler", "inputs": {"positive": ["9", 0]}}}, r"link to \['9', 0\], where there is no"),
        ({"1": {"class_type": "KSampler", "inputs": {}}}, "no sampler with a positive conditioning"),
        (
            {
                "1": {"class_type": "KSampler", "inputs": {"positive": ["2", 0]}},
                "2": {
                    "class_type": "ConditioningCombine",
                    "inputs": {"conditioning_1": ["2", 0], "conditioning_2": ["2", 0]},
                },
            },
            "or a circle",
        ),
        ({"phrases": ["a"], "locations": []}, "lists of the same length"),
        ({"phrases": ["a"], "locations": [[0, 0, 2, 1]], "prompt": "a"}, r"not within \[0, 1\]"),
        ({"compositional_deconstruction": []}, "no 'compositional_deconstruction' with a list"),
        ({"compositional_deconstruction": {"elements": [{"bbox": [1, 2]}]}}, "must be .y0, x0, y1, x1."),
        ({"compositional_deconstruction": {"elements": [{"bbox": [5, 0, 5, 9], "desc": "a"}]}}, "no area in the image"),
        ([{"x": 0, "y": 0, "width": 8, "height": 8}], "give --width and --height"),
        ([{"x": 0, "y": 0, "width": 8, "height": "wide", "bbox": "x"}], "must be .y0, x0"),
        ("divisions=1:1 positions=0:0,0:1 weights=1 a AND b", "the same number"),
        ("divisions=1 positions=0:0 weights=1 a", "must be ROWS:COLUMNS"),
        ("divisions=1:x positions=0:0 weights=1 a", "'x' of Latent Couple is not a number"),
        ({"alwayson_scripts": {}, "prompt": "a"}, "no 'alwayson_scripts' with 'args'"),
        ('a BREAK b BREAK c\nSize: 64x64, RP Active: True, RP Ratios: "1,1"', "make them agree"),
        ({"image": "a.png", "colors": {"#000000": "a"}}, "needs the image 'a.png'"),
        ({"annotations": [], "categories": [], "images": [{"id": 1}, {"id": 2}]}, "choose one by its id"),
        ({"regions": [{"mask": "../x.png"}]}, "needs the image '../x.png'"),
    ],
)
def test_what_is_no_layout_is_one_sentence(content: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        import_layout(content)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("format", LAYOUT_FORMATS)
def test_files_for_people_begin_with_the_given_name(format: str) -> None:
    exported = export_layout(SCENE, format, "scene")
    assert all(name.startswith("scene") for name in exported.files) and exported.files
    if format != "localctl":
        with pytest.raises(ValueError, match="no region with words"):
            export_layout(Layout("a cat"), format)


def test_a_wrong_format_or_a_flag_of_another_is_refused() -> None:
    with pytest.raises(ValueError, match="Unknown format 'comfy' of a layout; did you mean comfyui"):
        export_layout(SCENE, "comfy")
    with pytest.raises(ValueError, match="is not of the format gligen"):
        import_layout({"regions": []}, "gligen")
    with pytest.raises(ValueError, match="index is for the format coco"):
        import_layout({"phrases": [], "locations": []}, index=1)
