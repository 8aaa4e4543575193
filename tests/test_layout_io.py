from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from localctl.layout import Layout, Region
from localctl.layout_io import from_coco, from_colors, from_dense_diffusion, load_layout, save_layout


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
        ("[]", "holds a list, not an object"),
        ({"promt": "a"}, "unknown field 'promt'; did you mean 'prompt'"),
        ({"prompt": 3}, "one prompt"),
        ({"prompt": "a", "regions": {}}, "'regions' in .* is a list"),
        ({"prompt": "a", "regions": ["a"]}, "Region 0 .* is an object"),
        ({"prompt": "a", "regions": [{"phrase": "a", "boxx": [0, 0, 1, 1]}]}, "Region 0 .* unknown field 'boxx'"),
        ({"prompt": "a", "regions": [{"phrase": "a", "box": [0, 0, 2, 1]}]}, r"Region 0 .* leaves \[0, 1\]"),
        ({"prompt": "a", "regions": [{"phrase": "b", "box": [0, 0, 1, 1]}]}, "'b' is not in the prompt"),
        ({"prompt": "a", "regions": [{"phrase": "a", "mask": "no.png"}]}, "no image file .*no.png"),
        ({"prompt": "a", "regions": [{"phrase": "a", "mask": 3}]}, "'mask' of region 0 .* is the name of a picture"),
        ({"prompt": "a", "height": "64", "width": 64}, "'height' in .* is a number of pixels, not '64'"),
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
    with pytest.raises(ValueError, match="colour #0000ff of the phrase 'a lake' is nowhere"):
        from_colors(painted(), {**table, "#0000ff": "a lake"})
    with pytest.raises(ValueError, match="'green' is not a colour"):
        from_colors(painted(), {"green": "a lake"})
    with pytest.raises(ValueError, match="too alike"):
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
    with pytest.raises(ValueError, match="no COCO annotations"):
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
