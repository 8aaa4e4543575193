"""Layouts to every format and back, and files as the other programs write them."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

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


RP_README = """(blue sky:1.2) ADDCOL
green hair twintail ADDCOL
(aquarium:1.3) ADDROW
(messy desk:1.2) ADDCOL
orange dress and sofa
Steps: 20, Size: 512x768, RP Divide mode: Matrix, RP Matrix submode: Columns, RP Ratios: "1,2,1,1;2,4,6"
"""


def test_a_matrix_as_the_extension_explains_it() -> None:
    with pytest.warns(UserWarning, match=r"Left out of the text: \(word:1.3\)"):
        found = import_layout(RP_README)
    assert found.size == (768, 512)
    assert {region.phrase: region.boxes[0] for region in found.regions} == {
        "blue sky": pytest.approx((0, 0, 0.5, 1 / 3), abs=1e-6),
        "green hair twintail": pytest.approx((0.5, 0, 0.75, 1 / 3), abs=1e-6),
        "aquarium": pytest.approx((0.75, 0, 1, 1 / 3), abs=1e-6),
        "messy desk": pytest.approx((0, 1 / 3, 0.4, 1), abs=1e-6),
        "orange dress and sofa": pytest.approx((0.4, 1 / 3, 1, 1), abs=1e-6),
    }


def request(prompt: str, *args: Any) -> dict[str, Any]:
    return {"prompt": prompt, "alwayson_scripts": {"Regional Prompter": {"args": list(args)}}}


def test_requests_of_the_extension() -> None:
    """The three of its README, under "Example Settings"."""
    rest = ("Attention", False, "0", "0", "0", "mask.png")
    rows = request(
        "green hair twintail BREAK red blouse BREAK blue skirt",
        *(True, False, "Matrix", "Vertical", "Mask", "Prompt", "1,1,1", "", False, False, False, *rest),
    )
    found = import_layout(rows)
    assert [region.boxes[0][1::2] for region in found.regions] == [
        pytest.approx(pair, abs=1e-6) for pair in ((0, 1 / 3), (1 / 3, 2 / 3), (2 / 3, 1))
    ]
    common = "masterpiece photo of BREAK red forest BREAK yellow chair BREAK blue dress girl"
    masked = request(common, True, False, "Mask", "Vertical", "Mask", "Prompt", "1,1,1", "", False, True, False, *rest)
    painted = np.full((30, 40, 3), 255, np.uint8)
    colors = [(128, 64, 64), (64, 128, 128), (96, 128, 64)]  # hues 0, 180 and 90 degrees
    for row, color in enumerate(colors):
        painted[10 * row : 10 * row + 10, 5:] = color
    found = import_layout(masked, images=lambda name: Image.fromarray(painted))
    assert found.prompt == "masterpiece photo of, red forest, yellow chair, blue dress girl"
    forest, chair, _ = (region.mask for region in found.regions)
    assert forest is not None and chair is not None
    assert forest[0, :10].all() and forest[0, :, :5].all()  # without a base prompt the rest is the first region's
    assert chair[0, 10:20, 5:].all() and chair.sum() == 350
    by_prompt = request(
        "a BREAK b", True, False, "Prompt", "Vertical", "Mask", "Prompt-EX", "1", "", False, True, False
    )
    with pytest.raises(ValueError, match="finds regions while sampling"):
        import_layout(by_prompt)


COUPLE = """((ultra-detailed)), 2girls
AND 2girls, black hair
AND 2girls, blonde hair
Negative prompt: (low quality, worst quality:1.4)
Steps: 28, Sampler: Euler a, CFG scale: 5, Seed: 722014241, Size: 512x512, Latent Couple: \
"divisions=1:1,1:2,1:2 positions=0:0,0:0,0:1 weights=0.2,0.8,0.4 end at step=14", Eta: 0.67
"""


def test_latent_couple_as_it_writes_it() -> None:
    with pytest.warns(UserWarning, match="Left out of the text"):
        found = import_layout(COUPLE)
    assert found.prompt == "ultra-detailed, 2girls, 2girls, black hair, 2girls, blonde hair" and found.size == (
        512,
        512,
    )
    assert [(region.boxes[0], region.strength, region.end) for region in found.regions] == [
        ((0, 0, 0.5, 1), 1.0, 0.5),
        ((0.5, 0, 1, 1), 0.5, 0.5),
    ]
    image, texts = io.BytesIO(), PngInfo()
    texts.add_text("parameters", COUPLE)
    Image.new("RGB", (8, 8)).save(image, "PNG", pnginfo=texts)
    with pytest.warns(UserWarning, match="Left out of the text"):
        assert import_layout(image.getvalue()) == found  # as the web UI saves images
    bare = import_layout("divisions=1:1,4:1 positions=0:0,1-3:0 weights=0.2,0.8", prompt="sea AND a boat")
    assert bare.prompt == "sea, a boat" and bare.regions[0].boxes == ((0, 0.25, 1, 0.75),)


WORKFLOW: dict[str, Any] = {
    "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "x.safetensors"}},
    "5": {"class_type": "EmptyLatentImage", "inputs": {"batch_size": 1, "height": 512, "width": 1024}},
    "6": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["4", 1], "text": "a lake at dusk"}},
    "7": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["4", 1], "text": "blurry"}},
    "11": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["4", 1], "text": "a red boat"}},
    "12": {
        "class_type": "ConditioningSetArea",
        "inputs": {"conditioning": ["11", 0], "width": 256, "height": 128, "x": 512, "y": 256, "strength": 1.2},
    },
    "13": {"class_type": "ConditioningCombine", "inputs": {"conditioning_1": ["6", 0], "conditioning_2": ["12", 0]}},
    "14": {"class_type": "ControlNetApply", "inputs": {"conditioning": ["13", 0], "strength": 1}},
    "3": {
        "class_type": "KSampler",
        "inputs": {"positive": ["14", 0], "negative": ["7", 0], "latent_image": ["5", 0], "seed": 1, "steps": 20},
    },
}


def test_a_workflow_of_comfyui() -> None:
    with pytest.warns(UserWarning, match="the nodes ControlNetApply and the negative prompt are left out"):
        found = import_layout(WORKFLOW)
    assert (found.prompt, found.size) == ("a lake at dusk, a red boat", (512, 1024))
    assert found.regions == (Region("a red boat", (0.5, 0.5, 0.75, 0.75), strength=1.2),)
    image = io.BytesIO()
    texts = PngInfo()
    texts.add_text("prompt", json.dumps(WORKFLOW))
    Image.new("RGB", (8, 8)).save(image, "PNG", pnginfo=texts)
    with pytest.warns(UserWarning, match="left out"):
        assert import_layout(image.getvalue()) == found  # as ComfyUI saves images


def test_masks_from_channels_and_boxes_of_gligen_in_a_workflow() -> None:
    """ComfyUI's LoadImage has the mask of what is transparent; GLIGENTextBoxApply adds to the prompt's own text."""
    nodes = {
        "1": {"class_type": "EmptyLatentImage", "inputs": {"height": 64, "width": 128}},
        "2": {"class_type": "CLIPTextEncode", "inputs": {"text": "a lake"}},
        "3": {"class_type": "LoadImage", "inputs": {"image": "boat.png"}},
        "4": {"class_type": "CLIPTextEncode", "inputs": {"text": "a boat"}},
        "5": {
            "class_type": "ConditioningSetMask",
            "inputs": {"conditioning": ["4", 0], "mask": ["3", 1], "strength": 0.5, "set_cond_area": "default"},
        },
        "6": {
            "class_type": "GLIGENTextBoxApply",
            "inputs": {"conditioning_to": ["2", 0], "text": "a duck", "width": 64, "height": 32, "x": 64, "y": 32},
        },
        "7": {"class_type": "ConditioningCombine", "inputs": {"conditioning_1": ["6", 0], "conditioning_2": ["5", 0]}},
        "8": {"class_type": "KSampler", "inputs": {"positive": ["7", 0]}},
    }
    image = Image.new("RGBA", (128, 64), (0, 0, 0, 255))
    image.paste((0, 0, 0, 0), (0, 0, 64, 64))  # the left half is transparent, so inside
    found = import_layout({"prompt": nodes}, images=lambda name: image)
    assert (found.prompt, found.size) == ("a lake, a duck, a boat", (64, 128))
    duck, boat = found.regions
    assert (duck.phrase, duck.boxes, boat.phrase, boat.strength) == ("a duck", ((0.5, 0.5, 1, 1),), "a boat", 0.5)
    assert boat.mask is not None and boat.mask[..., :64].all() and not boat.mask[..., 64:].any()


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


def test_captions_of_ideogram() -> None:
    """The example of diffusers' prompt enhancer, with boxes as ComfyUI's node writes them."""
    cup = {"type": "obj", "bbox": [400, 250, 900, 750], "desc": "A white cup."}
    sign = {
        "type": "text",
        "bbox": [0, 0, 200, 1000],
        "text": "OPEN",
        "desc": "A neon sign",
        "color_palette": ["#FF0000"],
    }
    loose = {"type": "obj", "desc": "A teaspoon."}
    parts = {"background": "An oak table.", "elements": [cup, sign, loose]}
    with pytest.warns(UserWarning, match="style and palettes"):
        found = import_layout({"high_level_description": "A cafe.", "compositional_deconstruction": parts})
    assert found.prompt == "A cafe, An oak table, A teaspoon, A white cup, A neon sign"
    assert [(region.phrase, region.boxes[0]) for region in found.regions] == [
        ("A white cup", (0.25, 0.4, 0.75, 0.9)),
        ("A neon sign", (0, 0, 1, 0.2)),
    ]
    assert import_layout([cup], size=(64, 64)).regions == (Region("A white cup", (0.25, 0.4, 0.75, 0.9)),)


def test_gligens_own_example() -> None:
    content = {
        "prompt": "a teddy bear sitting next to a bird",
        "phrases": ["a teddy bear", "a bird"],
        "locations": [[0.0, 0.09, 0.33, 0.76], [0.55, 0.11, 1.0, 0.8]],
        "alpha_type": [0.3, 0.0, 0.7],
    }
    with pytest.warns(UserWarning, match="alpha_type are left out"):
        found = import_layout(json.dumps(content))
    assert found.prompt == content["prompt"] and found.regions[1].boxes == ((0.55, 0.11, 1.0, 0.8),)


def test_a_map_of_colours() -> None:
    image = Image.new("RGB", (64, 32), "#000000")
    image.paste((192, 64, 64), (0, 0, 32, 32))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    found = import_layout(buffer.getvalue(), colors={"#c04040": "a red ball", "#000000": ""}, prompt="a red ball")
    assert [region.phrase for region in found.regions] == ["a red ball", None] and found.size == (32, 64)
    with pytest.raises(ValueError, match="no workflow and no parameters"):
        import_layout(buffer.getvalue())


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
        import_layout(WORKFLOW, "gligen")
    with pytest.raises(ValueError, match="index is for the format coco"):
        import_layout({"phrases": [], "locations": []}, index=1)
