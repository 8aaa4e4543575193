"""Placed scenes from MSCOCO's annotations, and training on them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from coco_files import HEIGHT, WIDTH, write_coco

from localctl.layout_predictor.parsing import parse
from localctl.seeding import numpy_rng
from research.layout_predictor.captions import describe
from research.layout_predictor.coco import CocoLayouts, plain_name
from research.layout_predictor.data import CaptionSettings, example
from research.layout_predictor.measure import relation_rate
from research.layout_predictor.settings import LayoutDataConfig, LayoutTrainSettings, PredictorConfig
from research.layout_predictor.training import prepare


def test_boxes_and_names(tmp_path: Path) -> None:
    content = {
        "images": [{"id": 7, "width": 200, "height": 100}, {"id": 3, "width": 100, "height": 100}],
        "categories": [{"id": 1, "name": "dining table"}, {"id": 2, "name": "Dog"}, {"id": 9, "name": "bird"}],
        "annotations": [
            {"image_id": 7, "category_id": 1, "bbox": [20, 10, 100, 50], "iscrowd": 0},
            {"image_id": 7, "category_id": 2, "bbox": [180, 60, 40, 40]},  # sticks out: cut
            {"image_id": 7, "category_id": 9, "bbox": [0, 0, 4, 4], "iscrowd": 0},  # too small
            {"image_id": 7, "category_id": 9, "bbox": [0, 0, 99, 99], "iscrowd": 1},  # a crowd
            {"image_id": 3, "category_id": 2, "bbox": [0, 0, 50, 50], "iscrowd": 0},
            {"image_id": 3, "category_id": 2, "bbox": [50, 50, 50, 50], "iscrowd": 0},  # no two different things
        ],
    }
    (tmp_path / "instances.json").write_text(json.dumps(content))
    scenes = CocoLayouts(tmp_path / "instances.json")
    assert len(scenes) == 1 and scenes[0].key == "coco-7"
    found = dict(zip(scenes[0].names, scenes[0].boxes.tolist(), strict=True))
    assert scenes.sizes() == {"dining table": [0.5, 0.5], "dog": [0.1, 0.4]}
    assert found == {"dining table": [0.35, 0.35, 0.5, 0.5], "dog": [0.95, 0.8, pytest.approx(0.1), pytest.approx(0.4)]}


def test_stuff_is_read_under_plain_names(tmp_path: Path) -> None:
    names = ("wall-brick", "sky-other", "floor-other", "building-other", "tree", "other", "things", "mirror-stuff")
    assert [plain_name(name) for name in names] == [
        "brick wall", "sky", "floor", "building", "tree", "", "", "mirror",
    ]  # fmt: skip
    instances, stuff = write_coco(tmp_path)
    alone, both = CocoLayouts(instances), CocoLayouts(instances, stuff, max_objects=4)
    assert {len(scene.names) for scene in alone.scenes} == {2}
    assert {len(scene.names) for scene in both.scenes} == {3, 4}
    assert any("brick wall" in scene.names for scene in both.scenes)
    assert not any("other" in name for scene in both.scenes for name in scene.names)
    assert CocoLayouts(instances, stuff, count=5).scenes[4].key == both.scenes[4].key
    boxes = np.concatenate([scene.boxes for scene in both.scenes])
    assert (boxes[:, :2] - boxes[:, 2:] / 2 >= -1e-9).all() and (boxes[:, :2] + boxes[:, 2:] / 2 <= 1 + 1e-9).all()
    assert WIDTH != HEIGHT


def test_sentences_of_coco_are_parsed_as_meant(tmp_path: Path) -> None:
    scenes = CocoLayouts(*write_coco(tmp_path))
    for index in range(len(scenes)):
        for kind in ("training", "held_out"):
            caption = describe(scenes[index], numpy_rng(0, index), kind)
            assert tuple(item.span for item in parse(caption.text, "rules")) == caption.spans, caption.text


@pytest.mark.parametrize("content", ["", "[]", '{"images": []}', '{"images": [{"id": 1}]}', '{"images": 3}', None])
def test_files_of_another_kind(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "x.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=r"x\.json") as error:
        CocoLayouts(path)
    assert "\n" not in str(error.value)


def test_annotations_without_pairs(tmp_path: Path) -> None:
    instances, _ = write_coco(tmp_path)
    with pytest.raises(ValueError, match="no image with two different things"):
        CocoLayouts(instances, min_area=0.9)


def overfitted(tmp_path: Path, sentences: int, steps: int, width: int) -> tuple[float, int]:
    """Return the share of relations that hold, and their number, for the sentences a small predictor was trained on."""
    instances, stuff = write_coco(tmp_path, images=2 * sentences)
    settings = LayoutTrainSettings(
        data=LayoutDataConfig(name="coco", instances=str(instances), stuff=str(stuff), count=sentences),
        captions=CaptionSettings(own=0, lists=0, rename=0, mirror=False, variants=1),
        predictor=PredictorConfig(width=width, hidden=2 * width, layers=3, buckets=1024),
        output_dir=str(tmp_path / "run"), device="cpu", max_train_steps=steps, train_batch_size=min(64, sentences),
        learning_rate=5e-3, lr_warmup_steps=10, word_dropout=0, name_dropout=0, validation_steps=0,
        checkpointing_steps=0,
    )  # fmt: skip
    run = prepare(settings)
    assert run.train() == 0
    captions = [example(run.scenes, index, 0, settings.captions, settings.seed) for index in range(sentences)]
    return relation_rate(run.model.eval(), captions), sum(len(item.relations) for item in captions)


def test_a_few_sentences_are_learned(tmp_path: Path) -> None:
    rate, count = overfitted(tmp_path, sentences=8, steps=200, width=32)
    assert count >= 6 and rate >= 0.9


@pytest.mark.slow
def test_64_sentences_are_learned_by_heart(tmp_path: Path) -> None:
    rate, count = overfitted(tmp_path, sentences=64, steps=400, width=96)
    assert count >= 60 and rate >= 0.95


def test_boxes_without_an_area_are_left_out_and_counted(tmp_path: Path) -> None:
    things = [
        {"image_id": "7", "category_id": "1", "bbox": box} for box in ([1, 1, 40, 40], [5, 5, 9, 0], [500, 0, 9, 9])
    ]
    things += [
        {"image_id": 7, "category_id": 2, "bbox": [50, 50, 40, 40]},
        {"image_id": 8, "category_id": 2, "bbox": [0, 0, 9, 9]},
    ]
    content = {
        "images": [{"id": 7, "width": 100, "height": 100}, {"id": "8", "width": 0, "height": 0}],
        "categories": [{"id": 1, "name": "cat"}, {"id": "2", "name": "dining_table"}],
        "annotations": things,
    }
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(content), encoding="utf-8-sig")
    with pytest.warns(UserWarning, match="3 of 5 boxes in .*instances.json are left out: no area in their image"):
        (scene,) = CocoLayouts(path).scenes
    assert sorted(scene.names) == ["cat", "dining table"]
    path.write_text("[" * 100_000)
    with pytest.raises(ValueError, match="not an annotation file in MSCOCO's format .*nested too deep"):
        CocoLayouts(path)
