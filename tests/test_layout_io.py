from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from localctl.layout import Layout, Region
from localctl.layout_io import from_coco, from_colors, from_dense_diffusion, load_layout, save_layout
from localctl.masks import mask_to_pil


def ellipse() -> torch.Tensor:
    picture = Image.new("L", (96, 64))
    ImageDraw.Draw(picture).ellipse((10, 20, 50, 60), fill=255)
    return torch.from_numpy(np.asarray(picture).copy()).float() / 255


def scene() -> Layout:
    return Layout(
        "a cat, a dog and a cat — 猫",
        64,
        96,
        (
            Region("cat", (0.1, 0.2, 0.3, 0.4), occurrence=1, strength=0.7, outside_strength=0.2, end=0.5),
            Region("a dog", mask=ellipse(), prompt="a brown dog", negative_prompt="fur"),
            Region("猫", [(0, 0, 0.5, 0.5), (0.5, 0.5, 1, 1)]),
            Region(None, (0, 0, 1, 1)),
        ),
        "smallest",
    )


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    path = save_layout(scene(), tmp_path / "scene.json")
    assert load_layout(path) == scene()
    assert sorted(item.name for item in tmp_path.iterdir()) == ["scene.json", "scene_mask_1.png"]
    assert load_layout(save_layout(Layout("a b"), tmp_path / "plain.json")) == Layout("a b")


def test_a_layout_by_hand_needs_no_prompt(tmp_path: Path) -> None:
    path = tmp_path / "hand.json"
    path.write_text(
        '{"regions": [{"phrase": "a cat", "box": [0, 0, 0.5, 1]}, {"phrase": "a dog", "box": [0.5, 0, 1, 1]}]}'
    )
    assert load_layout(path).prompt == "a cat, a dog"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not valid JSON"),
        ("[]", r"holds \[\], not an object"),
        ({"promt": "a"}, "unknown field 'promt'; did you mean 'prompt'"),
        ({"prompt": 3}, "one text"),
        ({"prompt": "a", "regions": {}}, "'regions' in .* must be a list"),
        ({"prompt": "a", "regions": ["a"]}, "Region 0 .* must be an object"),
        ({"prompt": "a", "regions": [{"phrase": "a", "boxx": [0, 0, 1, 1]}]}, "Region 0 .* unknown field 'boxx'"),
        ({"prompt": "a", "regions": [{"phrase": "a", "box": [0, 0, 2, 1]}]}, r"Region 0 .* is not within \[0, 1\]"),
        ({"prompt": "a", "regions": [{"phrase": "b", "box": [0, 0, 1, 1]}]}, "'b' is not in the prompt"),
        ({"prompt": "a", "regions": [{"phrase": "a", "mask": "no.png"}]}, "no image file .*no.png"),
        (
            {"prompt": "a", "regions": [{"phrase": "a", "mask": 3}]},
            "'mask' of region 0 .* must be the name",
        ),
        ({"prompt": "a", "height": "64", "width": 64}, "'height' in .* must be a number of pixels, not '64'"),
        ({"prompt": "a", "height": 60, "width": 64}, "height 60"),
        ({"prompt": "a", "overlap": "all"}, "Unknown overlap policy 'all'"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, content: Any, message: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError, match=message):
        load_layout(path)
    with pytest.raises(ValueError, match="cannot be read"):
        load_layout(tmp_path / "missing.json")


def painted(noise: int = 0) -> Image.Image:
    """A sky over a meadow with a red house; edges smooth, colours a little off with ``noise``."""
    picture = Image.new("RGB", (200, 160), "#000000")
    draw = ImageDraw.Draw(picture)
    draw.rectangle((0, 80, 200, 160), fill="#3c8a44")
    draw.rectangle((60, 60, 120, 120), fill="#e0335c")
    picture = picture.resize((400, 320), Image.Resampling.BILINEAR).resize((200, 160), Image.Resampling.BILINEAR)
    array = np.asarray(picture).astype(int)
    return Image.fromarray((array + np.random.default_rng(0).integers(0, noise + 1, array.shape)).astype(np.uint8))


def test_from_a_coloured_picture() -> None:
    table = {"#000000": "the sky", (60, 138, 68): "", "#e0335c": "a house"}
    layout = from_colors(painted(noise=3), table, "a house under the sky")
    assert layout.size == (160, 200) and [region.phrase for region in layout.regions] == ["the sky", None, "a house"]
    masks = layout.masks((160, 200))
    assert bool((masks.sum(dim=0) == 1).all())  # every pixel has its region
    assert masks.mean(dim=(1, 2, 3)).tolist() == pytest.approx([0.462, 0.423, 0.116], abs=0.01)
    assert from_colors(painted(), {"#000000": "the sky", "#e0335c": "a house"}).prompt == "the sky, a house"
    with pytest.raises(ValueError, match="colour #0000ff of the phrase 'a lake' does not occur"):
        from_colors(painted(), {**table, "#0000ff": "a lake"})
    with pytest.raises(ValueError, match="'green' is not a colour"):
        from_colors(painted(), {"green": "a lake"})
    with pytest.raises(ValueError, match="too similar"):
        from_colors(painted(), {"#000000": "a", "#000001": "b"})


COCO: dict[str, Any] = {
    "images": [{"id": 7, "height": 100, "width": 200, "file_name": "x.jpg"}],
    "categories": [{"id": 1, "name": "dog"}, {"id": 2, "name": "cat"}],
    "annotations": [
        {"image_id": 7, "category_id": 1, "bbox": [20, 10, 40, 50]},
        {"image_id": 7, "category_id": 2, "bbox": [100, 0, 120, 50]},
        {"image_id": 7, "category_id": 1, "bbox": [0, 50, 200, 50]},
        {"image_id": 7, "category_id": 1, "bbox": [0, 0, 200, 100], "iscrowd": 1},
        {"image_id": 8, "category_id": 1, "bbox": [0, 0, 1, 1]},
    ],
}


def test_from_coco(tmp_path: Path) -> None:
    layout = from_coco(COCO, 7)
    assert layout.prompt == "dog, cat, dog" and layout.size == (96, 200)
    assert [region.boxes for region in layout.regions] == [
        ((0.1, 0.1, 0.3, 0.6),),
        ((0.5, 0.0, 1.0, 0.5),),
        ((0.0, 0.5, 1.0, 1.0),),
    ]
    assert [region.occurrence for region in layout.regions] == [0, 0, 1]
    once = from_coco(COCO, 7, "a dog and a cat")
    assert [(region.phrase, len(region.boxes)) for region in once.regions] == [("dog", 2), ("cat", 1)]
    twice = from_coco(COCO, 7, "a dog and a dog", categories=["dog"])
    assert [(region.occurrence, len(region.boxes)) for region in twice.regions] == [(0, 1), (1, 1)]
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(COCO))
    assert from_coco(path, 7) == layout
    with pytest.raises(ValueError, match="'cat' is not in the prompt"):
        from_coco(COCO, 7, "a dog")
    with pytest.raises(ValueError, match="no image 9"):
        from_coco(COCO, 9)
    with pytest.raises(ValueError, match="not COCO annotations"):
        from_coco({"images": []}, 7)


def benchmark(folder: Path) -> Path:
    scenes = {
        "0": {"textual_condition": "a house on a meadow.", "segment_descriptions": ["", "a meadow", "a house"]},
        "1": {"textual_condition": "a b", "segment_descriptions": ["a", "b", "a b", ""]},
    }
    (folder / "valset.json").write_text(json.dumps(scenes))
    for index in scenes:
        # As the real ones: RGBA, an even sky in black, edges of many colours.
        (painted() if index == "0" else Image.new("RGB", (64, 64))).convert("RGBA").save(folder / f"{index}.png")
    return folder


def test_from_dense_diffusions_benchmark(tmp_path: Path) -> None:
    layout = from_dense_diffusion(benchmark(tmp_path), 0)
    assert layout.prompt == "a house on a meadow." and layout.size == (160, 200)
    assert [region.phrase for region in layout.regions] == [None, "a meadow", "a house"]
    assert layout.masks((160, 200)).mean(dim=(1, 2, 3)).tolist() == pytest.approx([0.462, 0.423, 0.116], abs=0.01)
    with pytest.raises(ValueError, match="1 colours for 4 descriptions"):
        from_dense_diffusion(tmp_path, 1)
    with pytest.raises(ValueError, match="no scene 2"):
        from_dense_diffusion(tmp_path, 2)
    with pytest.raises(ValueError, match=r"valset.json cannot be read"):
        from_dense_diffusion(tmp_path / "nowhere", 0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[" * 100_000, "is not valid JSON .nested too deep"),
        ('{"prompt": "a", "regions": ' + "[" * 100_000, "nested too deep"),
        ('{"prompt": "a", "height": 8000000000, "width": 8}', "height 8000000000 is over 8192 pixels"),
        ('{"prompt": "a", "height": 1' + "0" * 400 + ', "width": 8}', "is over 8192 pixels"),
        (
            '{"prompt": "a", "regions": [' + ",".join(['{"box": [0, 0, 1, 1]}'] * 10_000) + "]}",
            "10000 regions, more than",
        ),
        ({"prompt": "a", "regions": [{"phrase": "a", "box": [[0, 0, 1, 1]] * 20_000}]}, "20000 boxes, more than 1024"),
        ({"prompt": "a", "regions": [{"phrase": "a", "box": [0, 0, 1, 10**400]}]}, "must be four numbers"),
        (
            {"prompt": "a", "regions": [{"phrase": "a", "box": [0, 0, 1, 1], "strength": 1e308}]},
            "strength .* at most",
        ),
        (
            {"prompt": "a", "regions": [{"box": [0, 0, 1, 1], "outside_strength": -1e4}]},
            "outside_strength .* most",
        ),
        ({"prompt": "a", "regions": [{"box": [0, 0, 1, 1], "strength": 10**400}]}, "strength .* finite number"),
        ({"prompt": "a", "regions": [{"box": [0, 0, 1, 1], "occurrence": True}]}, "from 0, not True"),
        ('{"prompt": "half a letter \\ud83d"}', "prompt of a layout holds half a letter"),
        ('{"prompt": "a", "regions": [{"phrase": "\\udc00", "box": [0, 0, 1, 1]}]}', "phrase of a region holds half"),
        ({"prompt": ["a"] * 9999}, "must be one text"),
        ({"prompt": "a", "regions": [{"phrase": ["a"], "box": [0, 0, 1, 1]}]}, "phrase of a region must be a text"),
        ({"prompt": "a", "regions": [{"mask": "m" * 5000 + ".png"}]}, "mask 'mmm.* cannot be read .File name too long"),
        ({"prompt": "a", "regions": [{"mask": "a\0.png"}]}, "cannot be read .embedded null byte"),
        (
            {"prompt": "a", "regions": [{"mask": "../mask.png"}]},
            "outside the layout's folder;",
        ),
        ({"prompt": "a", "regions": [{"mask": "x/../../mask.png"}]}, "outside the layout's folder"),
        ({"prompt": "a", "regions": [{"mask": "/etc/passwd"}]}, "outside the layout's folder"),
    ],
)
def test_hostile_files_end_in_one_short_sentence(tmp_path: Path, content: Any, message: str) -> None:
    mask_to_pil(torch.ones(1, 8, 8)).save(tmp_path / "mask.png")
    (tmp_path / "inner").mkdir()
    path = tmp_path / "inner" / "bad.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError, match=message) as caught:
        load_layout(path)
    assert len(str(caught.value)) < 900 and "\n" not in str(caught.value)


def test_masks_lie_in_the_folder_or_below_and_a_mark_in_front_is_no_harm(tmp_path: Path) -> None:
    (tmp_path / "masks").mkdir()
    mask_to_pil(torch.ones(1, 8, 8)).save(tmp_path / "masks" / "all.png")
    text = '{"prompt": "a", "regions": [{"mask": "masks/all.png"}, {"mask": "./masks/../masks/all.png"}]}'
    (tmp_path / "scene.json").write_text(text, encoding="utf-8-sig")
    assert len(load_layout(tmp_path / "scene.json").regions) == 2


def test_many_equal_phrases_are_read_at_once() -> None:
    layout = Layout.from_segments([Region("cat", (0, 0, 1, 1))] * 256)
    assert [region.occurrence for region in layout.regions] == list(range(256))
    with pytest.raises(ValueError, match="3000 regions, more than 256"):
        Layout.from_segments([Region("cat", (0, 0, 1, 1))] * 3000)


def coco(names: list[str], boxes: list[Any], size: tuple[Any, Any] = (100, 100), image_id: Any = 7) -> dict[str, Any]:
    """One image with one box per name."""
    return {
        "images": [{"id": image_id, "height": size[0], "width": size[1]}],
        "categories": [{"id": i, "name": name} for i, name in enumerate(names)],
        "annotations": [{"image_id": image_id, "category_id": i, "bbox": box} for i, box in enumerate(boxes)],
    }


@pytest.mark.parametrize(
    "box",
    [[10, 10, 5, 0], [10, 10, 0, 5], [200, 10, 5, 5], [-20, 10, 20, 5], [10, 10, -5, 5], [math.nan, 0, 5, 5], [], None],
)
def test_coco_boxes_without_an_area_are_left_out_and_counted(box: Any) -> None:
    content = coco(["cat", "dog"], [[10, 10, 50, 50], box])
    with pytest.warns(UserWarning, match="1 of 2 boxes of the image 7 are left out: they have no area in the image"):
        layout = from_coco(content, 7)
    assert [region.phrase for region in layout.regions] == ["cat"]
    with pytest.raises(ValueError, match="None of the 1 boxes of the image 7 has both an area"):
        from_coco(content, 7, categories=["dog"])


@pytest.mark.parametrize(
    "odd", [{"image_id": 7, "category_id": 1}, {"image_id": 7, "category_id": 9, "bbox": [1, 1, 5, 5]}]
)
def test_coco_annotations_without_a_box_or_a_listed_category_are_left_out_and_counted(odd: dict[str, Any]) -> None:
    content = coco(["cat", "dog"], [[10, 10, 50, 50]])
    content["annotations"].append(odd)
    with pytest.warns(UserWarning, match="1 of 2 boxes of the image 7 are left out"):
        assert from_coco(content, 7).prompt == "cat"


def test_a_coco_image_that_does_not_say_its_size_is_named() -> None:
    content = coco(["cat"], [[0, 0, 5, 5]])
    del content["images"][0]["height"]
    with pytest.raises(ValueError, match="image 7 .* must be from 1 to 8192 pixels"):
        from_coco(content, 7)


def test_coco_boxes_over_the_border_are_cut() -> None:
    layout = from_coco(coco(["cat"], [[-50, 50, 100, 100]]), 7)
    assert layout.regions[0].boxes == ((0.0, 0.5, 0.5, 1.0),)


@pytest.mark.parametrize("height", [0, -8, math.nan, math.inf, 10**400, "x", None, 10**9])
def test_a_coco_image_without_a_size_is_named(height: Any) -> None:
    with pytest.raises(ValueError, match="image 7 .* must be from 1 to 8192 pixels"):
        from_coco(coco(["cat"], [[0, 0, 5, 5]], (height, 8)), 7)


def test_coco_ids_are_text_or_numbers() -> None:
    for written, asked in ((7, "7"), ("7", 7), (7.0, 7), ("007", 7), ("img_7", "img_7")):
        assert from_coco(coco(["cat"], [[0, 0, 5, 5]], image_id=written), asked).prompt == "cat"
    content = coco(["cat"], [[0, 0, 5, 5]], image_id="a")
    content["annotations"][0] |= {"category_id": "0", "iscrowd": "0"}
    assert from_coco(content, "a").prompt == "cat"


@pytest.mark.parametrize(
    ("names", "prompt", "found"),
    [
        (["person"], "two persons on a hill", [("persons", 0)]),
        (["person"], "some people and a person", [("people", 0)]),
        (["dining_table"], "a dining table", [("dining table", 0)]),
        (["dining table"], "two dining tables", [("dining tables", 0)]),
        (["dining_table"], "a dining_table", [("dining_table", 0)]),
        (["hot dog"], "a hot-dog", [("hot-dog", 0)]),
        (
            ["knife", "bus", "butterfly"],
            "knives, buses and Butterflies",
            [("knives", 0), ("buses", 0), ("butterflies", 0)],
        ),
        (["Dogs"], "a dog", [("dog", 0)]),
        (["sheep"], "three sheep", [("sheep", 0)]),
    ],
)
def test_coco_names_are_found_as_prompts_say_them(names: list[str], prompt: str, found: list[tuple[str, int]]) -> None:
    layout = from_coco(coco(names, [[10 * i, 10, 10, 10] for i in range(len(names))]), 7, prompt)
    assert [(region.phrase, region.occurrence) for region in layout.regions] == found


def test_coco_names_without_a_prompt_and_unknown_ones() -> None:
    content = coco(["dining_table", "traffic light"], [[0, 0, 5, 5], [5, 5, 5, 5]])
    assert from_coco(content, 7).prompt == "dining table, traffic light"
    assert from_coco(content, 7, categories="Dining Table").prompt == "dining table"
    with pytest.raises(ValueError, match="no category 'dining_tabl'.*did you mean 'dining_table'"):
        from_coco(content, 7, categories=["dining_tabl"])
    with pytest.raises(ValueError, match="'dining table' is not in the prompt"):
        from_coco(content, 7, "a cat")
