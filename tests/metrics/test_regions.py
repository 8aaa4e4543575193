"""Regions, relations and leak: shapes with known answers, and the reader of micro scenes on true scenes."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from localctl.boxes import Found, box_iou
from localctl.data import MicroScenes
from localctl.metrics.detection import best_matches, transformers_detector
from localctl.metrics.regions import Leak, RegionAccuracy, RelationAccuracy
from localctl.micro.detect import find_objects, find_shapes, truth_of
from localctl.micro.scenes import scene

IMAGE = np.zeros((100, 100, 3), np.uint8)


def finds(*found: Found) -> Any:
    """A detector that always returns the same objects."""
    return lambda image, labels: list(found)


def test_half_a_shift_is_one_third() -> None:
    assert box_iou((0, 0, 20, 10), (10, 0, 30, 10)) == pytest.approx(1 / 3)
    metric = RegionAccuracy(finds(Found("red circle", (10, 0, 30, 10))), threshold=0.3)
    metric.update(IMAGE, [Found("Red  circle", (0, 0, 20, 10))])
    result = metric.compute()
    assert result["iou"] == pytest.approx(1 / 3) and (result["accuracy"], result["coverage"]) == (1, 1)
    assert box_iou((0, 0, 1, 1), (2, 2, 3, 3)) == 0 == box_iou((1, 1, 1, 1), (1, 1, 1, 1))


def test_the_order_of_detections_is_irrelevant() -> None:
    wanted = [Found("cat", (0, 0, 10, 10)), Found("cat", (6, 0, 16, 10)), Found("dog", (50, 50, 60, 60))]
    found = [Found("cat", (4, 0, 14, 10)), Found("cat", (0, 0, 9, 10)), Found("bird", (50, 50, 60, 60))]
    for order in ([0, 1, 2], [1, 0, 2], [2, 1, 0]):
        assert best_matches(wanted, [found[i] for i in order]) == [0.9, pytest.approx(2 / 3), None]
    # A detection is assigned to one region: the one with the best match.
    assert best_matches(wanted[:2], found[:1]) == [None, pytest.approx(2 / 3)]
    assert best_matches([], found) == [] and best_matches(wanted, []) == [None] * 3


def test_objects_that_are_not_found_count_as_zero() -> None:
    metric = RegionAccuracy(finds(Found("cat", (0, 0, 10, 10))))
    metric.update(IMAGE, [Found("cat", (0, 0, 10, 10)), Found("dog", (0, 0, 10, 10))])
    assert metric.compute() == {
        **{"accuracy": 0.5, "iou": 0.5, "iou_found": 1.0, "coverage": 0.5, "n": 2},
        **{"undefined_accuracy": 0, "undefined_iou": 0, "undefined_iou_found": 1, "undefined_coverage": 0},
    }


def test_true_scenes_and_others() -> None:
    right, wrong, related, turned = (
        RegionAccuracy(find_objects),
        RegionAccuracy(find_objects),
        RelationAccuracy(find_objects),
        RelationAccuracy(find_objects),
    )
    scenes = [scene(i, "basic", "test") for i in range(60)]
    for item, other in zip(scenes, scenes[1:] + scenes[:1], strict=True):
        regions = [Found(o.phrase, o.box) for o in item.objects]
        right.update(item.image, regions)
        wrong.update(other.image, regions)
        if item.relation:
            first, relation, second = item.relation
            names = item.objects[first].phrase, relation, item.objects[second].phrase
            related.update(item.image, *names)
            turned.update(item.image[::-1, ::-1].copy(), *names)
    assert right.compute()["accuracy"] >= 0.98 and wrong.compute()["accuracy"] < 0.1
    assert related.compute()["n"] >= 5 and related.compute()["accuracy"] >= 0.98
    assert turned.compute()["accuracy_of_both"] == 0 < turned.compute()["both"]


def test_a_relation_needs_two() -> None:
    one = Found("cat", (0, 0, 10, 10))
    alone = RelationAccuracy(finds(one))
    alone.update(IMAGE, "cat", "to the left of", "cat")
    assert alone.compute()["accuracy"] == 0 and alone.compute()["undefined_accuracy_of_both"] == 1
    pair = RelationAccuracy(finds(one, Found("cat", (40, 0, 50, 10))))
    pair.update(IMAGE, "cat", "to the left of", "cat")
    pair.update(IMAGE, "cat", "above", "cat")
    assert pair.per_sample().tolist() == [[1, 1, 1], [1, 0, 0]]


def test_leak_is_what_the_base_does_not_generate_anyway() -> None:
    hidden = [Found("circle", (0, 0, 10, 10)), Found("star", (50, 50, 60, 60))]
    seen: list[Sequence[str]] = []

    def detector(image: np.ndarray, labels: Sequence[str]) -> list[Found]:
        seen.append(labels)
        return hidden if image.any() else hidden[:1]

    metric = Leak(detector)
    metric.update(IMAGE + 1, IMAGE, hidden)
    metric.update(IMAGE, IMAGE, hidden)
    metric.update(IMAGE + 1, IMAGE, [])
    assert metric.per_sample()[:2].tolist() == [[0.5, 1.0], [0.0, 0.5]]
    assert metric.compute()["undefined_leak"] == 1 and metric.compute()["leak"] == 0.25
    assert seen[0] == ["circle", "star"]


def test_leak_reads_shapes_where_colours_are_free() -> None:
    item = scene(3, "basic", "test")
    metric = Leak(find_shapes)
    blank = np.full_like(item.image, 128)
    metric.update(item.image[..., ::-1].copy(), blank, [Found(o.shape, o.box) for o in item.objects])
    assert metric.compute()["leak"] == 1
    assert {found.label for found in find_shapes(item.image)} == {o.shape for o in item.objects}


@pytest.mark.parametrize("task", ["object-detection", "zero-shot-object-detection"])
def test_pipelines_of_transformers_are_detectors(task: str) -> None:
    calls: list[dict[str, Any]] = []

    class Pipeline:
        def __call__(self, image: Any, **options: Any) -> list[dict[str, Any]]:
            assert image.size == (100, 100)
            calls.append(options)
            return [{"label": "cat", "score": 0.7, "box": {"xmin": 1, "ymin": 2, "xmax": 3, "ymax": 4}}]

    pipeline = Pipeline()
    pipeline.task = task  # type: ignore[attr-defined]
    detector = transformers_detector(pipeline, threshold=0.2)
    assert detector(IMAGE, ["cat", "dog", "cat"]) == [Found("cat", (1, 2, 3, 4), 0.7)]
    labels = {"candidate_labels": ["cat", "dog"]} if task.startswith("zero") else {}
    assert calls == [{"threshold": 0.2, **labels}]


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="must be uint8"):
        RegionAccuracy(finds()).update(IMAGE / 255, [])
    with pytest.raises(ValueError, match=r"in \(0, 1\], not 0"):
        RegionAccuracy(finds(), threshold=0)
    with pytest.raises(ValueError, match=r"in \(0, 1\], not 2"):
        Leak(finds(), threshold=2)


def test_examples_of_known_content_bring_their_truth_and_who_finds_it() -> None:
    scenes = MicroScenes("test", count=12)
    for index in range(12):
        truth, item = scenes[index].truth, scene(index, "basic", "test")
        assert truth is not None and truth == truth_of(item)
        assert [found.label for found in truth.objects] == [thing.phrase for thing in item.objects]
        assert [found.label for found in truth.shapes] == [thing.shape for thing in item.objects]
        assert (truth.relation is None) == (item.relation is None)
        if truth.relation is not None:
            metric = RelationAccuracy(truth.find)
            metric.update(item.image, *truth.relation)
            assert metric.compute()["accuracy"] == 1


def test_without_a_detector_the_reader_of_micro_scenes_is_meant_for_one_version() -> None:
    with pytest.warns(DeprecationWarning, match="localctl.micro.detect.find_objects"):
        assert RegionAccuracy().detector is find_objects
    with pytest.warns(DeprecationWarning, match="localctl.micro.detect.find_shapes"):
        assert Leak().detector is find_shapes
