"""Files as the other programs write them: their own examples, and images with texts in them."""

from __future__ import annotations

import io
import json
import warnings
from typing import Any

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from localctl.bridges import import_layout
from localctl.layout import Region
from localctl.prompt_syntax import read_weights

RP_README = """(blue sky:1.2) ADDCOL
green hair twintail ADDCOL
(aquarium:1.3) ADDROW
(messy desk:1.2) ADDCOL
orange dress and sofa
Steps: 20, Size: 512x768, RP Divide mode: Matrix, RP Matrix submode: Columns, RP Ratios: "1,2,1,1;2,4,6"
"""


def test_a_matrix_as_the_extension_explains_it() -> None:
    found = import_layout(RP_README)
    assert found.size == (768, 512)
    assert found.prompt == (
        "(blue sky:1.2), green hair twintail, (aquarium:1.3), (messy desk:1.2), orange dress and sofa"
    )
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
    found = import_layout(COUPLE)
    assert found.prompt == "((ultra-detailed)), 2girls, 2girls, black hair, 2girls, blonde hair"
    assert found.size == (512, 512)
    assert [(region.boxes[0], region.strength, region.end) for region in found.regions] == [
        ((0, 0, 0.5, 1), 1.0, 0.5),
        ((0.5, 0, 1, 1), 0.5, 0.5),
    ]
    image, texts = io.BytesIO(), PngInfo()
    texts.add_text("parameters", COUPLE)
    Image.new("RGB", (8, 8)).save(image, "PNG", pnginfo=texts)
    assert import_layout(image.getvalue()) == found  # as the web UI saves images
    bare = import_layout("divisions=1:1,4:1 positions=0:0,1-3:0 weights=0.2,0.8", prompt="sea AND a boat")
    assert bare.prompt == "sea, a boat" and bare.regions[0].boxes == ((0, 0.25, 1, 0.75),)


def test_weights_of_the_web_ui_stay_and_networks_are_left_out() -> None:
    """Plain parentheses weigh 1.1 there; phrases are found without marks, unless their weights would be lost."""
    couple = "divisions=1:1,1:2,1:2 positions=0:0,0:0,0:1 weights=0.2,0.8,0.8"
    text = r"a (boat:1.2) and (a ((red) cat)) \(oil\) AND (boat:1.2) AND cat"
    with pytest.warns(UserWarning, match=r"Left out of the text: <lora:x:1>; load a LoRA by --lora.") as caught:
        found = import_layout(couple, prompt=f"<lora:x:1>{text}")
    assert len(caught) == 1
    assert found.prompt == r"a (boat:1.2) and (a ((red:1.1) cat:1.1):1.1) \(oil\)"
    assert [region.phrase for region in found.regions] == ["boat", "cat"]
    assert read_weights(found.prompt).text == "a boat and a red cat (oil)"
    other = import_layout(couple, prompt="a boat and a cat AND (boat:1.2) AND ((cat))")
    assert other.prompt == "a boat and a cat, (boat:1.2), ((cat))"
    assert [(region.phrase, region.occurrence) for region in other.regions] == [("boat", 1), ("cat", 1)]
    same = import_layout(couple, prompt="sky AND cat AND (cat:1.2)")
    assert same.prompt == "sky, cat, (cat:1.2)" and [region.occurrence for region in same.regions] == [0, 1]


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


def test_a_node_with_a_positive_and_a_negative_input() -> None:
    """ControlNetApplyAdvanced, through which both conditionings pass."""
    nodes = json.loads(json.dumps(WORKFLOW))
    both = {"positive": ["13", 0], "negative": ["7", 0], "strength": 1}
    nodes["14"] = {"class_type": "ControlNetApplyAdvanced", "inputs": both}
    nodes["3"]["inputs"]["negative"] = ["14", 1]
    with pytest.warns(UserWarning, match="the nodes ControlNetApplyAdvanced and the negative prompt are left out"):
        found = import_layout(nodes)
    assert found.regions == (Region("a red boat", (0.5, 0.5, 0.75, 0.75), strength=1.2),)


def test_a_negative_area_of_no_region_is_said() -> None:
    nodes = json.loads(json.dumps(WORKFLOW))
    nodes["15"] = {**nodes["12"], "inputs": {**nodes["12"]["inputs"], "conditioning": ["7", 0]}}
    nodes["3"]["inputs"] |= {"negative": ["15", 0], "positive": ["13", 0]}
    with warnings.catch_warnings(action="error"):
        assert import_layout(nodes).regions[0].negative_prompt == "blurry"
    nodes["15"]["inputs"]["x"] = 0
    with pytest.warns(UserWarning, match="the negative prompt are left out"):
        assert import_layout(nodes).regions[0].negative_prompt is None


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
