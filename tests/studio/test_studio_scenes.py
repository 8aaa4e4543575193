"""What the canvas shows becomes a layout and back; phrases are marked where they are in the prompt."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from localctl.layout import Layout, Region
from localctl.layout_io import save_layout
from localctl.studio import limits
from localctl.studio.config import StudioConfig
from localctl.studio.place_examples import example_scene, examples
from localctl.studio.place_restore import values_of
from localctl.studio.scenes import highlighted, layout_of, marks_of, prompt_of, scene_of
from localctl.studio.studio import Studio

BOX = (0.0, 0.0, 0.5, 1.0)


def scene(*regions: dict[str, Any]) -> limits.Scene:
    items = [{"id": f"r{n}", "color": n, "box": BOX, **region} for n, region in enumerate(regions)]
    return limits.scene({"width": 128, "height": 64, "regions": items})


def words(prompt: str) -> list[tuple[int, int]]:
    return [match.span() for match in re.finditer(r"\S+", prompt)]


def marks(prompt: str, *phrases: str, **changes: Any) -> list[Any]:
    seen = scene(*({"phrase": phrase, **changes} for phrase in phrases))
    return list(marks_of(seen, prompt, words(prompt_of(seen, prompt))).values())


def test_a_scene_is_a_layout_with_all_settings_of_its_regions() -> None:
    own: dict[str, Any] = {"strength": 2.0, "outside_strength": 0.5, "start": 0.1, "end": 0.9, "prompt": "a cat asleep"}
    layout = layout_of(scene({"phrase": "a cat", "negative_prompt": "dog", **own}), "a cat and a cat")
    assert layout.size == (64, 128) and layout.prompt == "a cat and a cat"
    expected = Region("a cat", BOX, negative_prompt="dog", **own)
    assert layout.regions == (expected,)


def test_without_a_prompt_the_phrases_are_joined() -> None:
    layout = layout_of(scene({"phrase": "a cat"}, {"phrase": "a dog"}, {"phrase": "a cat"}), " ")
    assert layout.prompt == "a cat, a dog, a cat"
    assert [region.occurrence for region in layout.regions] == [0, 0, 1]


@pytest.mark.parametrize(
    ("regions", "prompt", "text"),
    [
        ([{"phrase": "a cat", "box": None}], "a cat", "Region 1 has no place yet"),
        ([{"phrase": ""}], "", "There is no prompt"),
        ([{"phrase": "a cow"}], "a cat", "not in the prompt"),
        ([{"phrase": "a cat"}, {"phrase": "cat"}], "a cat", "overlap in the prompt"),
    ],
)
def test_a_scene_that_is_no_layout_is_one_sentence(regions: list[Any], prompt: str, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        layout_of(scene(*regions), prompt)


def test_a_layout_and_what_the_canvas_shows_of_it_are_the_same() -> None:
    mask = torch.zeros(1, 64, 128)
    mask[:, 20:40, 30:90] = 1
    layout = Layout(
        "a cat and a dog", 64, 128, (Region("a cat", BOX, strength=0.5), Region("a dog", mask=mask, prompt="a big dog"))
    )
    assert layout_of(limits.scene(scene_of(layout, (8, 8))), layout.prompt) == layout


def test_a_region_of_several_boxes_becomes_a_mask() -> None:
    layout = Layout("two dogs", 64, 64, (Region("dogs", [(0, 0, 0.25, 1), (0.75, 0, 1, 1)]),))
    mask = limits.scene(scene_of(layout, (64, 64))).regions[0].mask
    assert mask is not None and mask[:, :16].min() == 1 and mask[:, 16:48].max() == 0 and mask[:, 48:].min() == 1


def test_more_regions_than_the_canvas_takes_are_refused() -> None:
    layout = Layout("a", 64, 64, tuple(Region(None, BOX) for _ in range(17)))
    with pytest.raises(ValueError, match="has 17 regions; the canvas takes 16"):
        scene_of(layout, (64, 64))


def test_a_phrase_that_is_there_has_no_complaint() -> None:
    (mark,) = marks("a red cat on a mat", "red cat")
    assert (mark.kind, mark.text, mark.spans) == ("ok", "", ((2, 9),))


def test_a_phrase_that_is_not_there_shows_the_tokens() -> None:
    (mark,) = marks("a red cat", "blue cat")
    assert mark.kind == "bad" and mark.spans == ()
    assert mark.text == "“blue cat” is not in the prompt. Tokens of the prompt: a | red | cat"


def test_a_later_occurrence_that_is_not_there_says_how_many_there_are() -> None:
    (mark,) = marks("a cat and a cat", "a cat", occurrence=2)
    assert mark.kind == "bad" and "occurs 2 times" in mark.text


def test_phrases_that_overlap_name_each_other() -> None:
    one, other = marks("a red cat on a mat", "a red cat", "red cat on")
    assert one.kind == other.kind == "bad"
    assert "overlaps “red cat on”" in one.text and "overlaps “a red cat”" in other.text


def test_a_region_without_a_place_is_marked() -> None:
    (mark,) = marks("a cat", "a cat", box=None)
    assert mark.kind == "bad" and "no place yet" in mark.text


def test_the_prompt_shows_phrases_in_the_colours_of_their_regions_and_is_escaped() -> None:
    seen = scene({"phrase": "a cat"}, {"phrase": "<b>"})
    prompt = "a cat <b> & more"
    tokens = words(prompt)
    view = highlighted(seen, prompt, marks_of(seen, prompt, tokens), tokens, limit=3)
    assert view.count("<mark") == 2 and "background:#007799" in view
    assert "&lt;b&gt;" in view and "&amp;" in view and "<b>" not in view
    assert view.count("token-beyond") == 2 and "5 of 3 tokens" in view


@pytest.mark.parametrize("base", ["micro", "sd15"])
def test_examples_are_layouts_of_their_prompts(base: str) -> None:
    for name in examples(base):
        prompt, value = example_scene(base, name, (64, 128))
        layout = layout_of(limits.scene(value), prompt)
        assert layout.size == (64, 128) and len(layout.regions) >= 2


def test_the_tokens_are_those_of_the_base() -> None:
    studio = Studio(StudioConfig())
    text = "a red circle, a blue star"
    spans, limit = studio.tokens(text)
    assert [text[first:last] for first, last in spans] == ["a", "red", "circle", ",", "a", "blue", "star"]
    assert limit == 75
    studio.close()


def test_an_image_of_negative_prompts_that_did_nothing_is_refused_where_they_act(tmp_path: Path) -> None:
    for negative in (None, "dogs"):
        region = Region("cat", (0.0, 0.0, 0.5, 1.0), negative_prompt=negative)
        path = save_layout(Layout("a cat", regions=(region,)), tmp_path / "layout.json")
        options = {"layout": [str(path)], "region_negatives": True}
        assert values_of(options, "micro", (64, 64))["prompt"] == "a cat"
        earlier = {**options, "region_negatives": False}
        if negative is None:
            assert values_of(earlier, "micro", (64, 64))["prompt"] == "a cat"
            continue
        with pytest.raises(ValueError, match="made without the negative prompts of its regions, which act on the page"):
            values_of(earlier, "micro", (64, 64))
