"""The studio as its users meet it, in a headless Chromium on the embedded base: mouse, keyboard, uploads, reloads."""

from __future__ import annotations

import io
import json
import re
import shutil
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw
from playwright.sync_api import APIResponse, Page, Route, expect
from studio_page import choose, drag_box, fill_number, finish_job, gallery_images, press_and_move, type_text, upload

from localctl.boxes import Found
from localctl.metrics.detection import best_matches
from localctl.micro.detect import find_objects

pytest_plugins = ["browser"]
pytestmark = pytest.mark.flaky(reruns=2)  # a page on a busy machine may answer late
CIRCLE, SQUARE = (0.08, 0.1, 0.45, 0.5), (0.55, 0.5, 0.92, 0.9)
PROMPT = "a red circle and a blue square"
# Whether the middle of a canvas has another colour than its lower edge.
PAINTED = """(selector) => {
  const stage = document.querySelector(selector);
  const at = (x, y) => stage.getContext('2d').getImageData(x * stage.width, y * stage.height, 1, 1).data.join();
  return at(0.45, 0.45) !== at(0.45, 0.9);
}"""
ROOT = Path(__file__).resolve().parents[2]


def place_two(page: Page) -> None:
    """Drag two regions with the mouse, give each its phrase, and type the prompt."""
    type_text(page, "#place-prompt textarea", PROMPT)
    for number, (box, phrase) in enumerate(((CIRCLE, "a red circle"), (SQUARE, "a blue square"))):
        drag_box(page, "#place-canvas", box)
        page.locator("#place-canvas .scene-phrase").nth(number).fill(phrase)


def type_steps(page: Page, prefix: str, steps: int) -> None:
    page.get_by_role("button", name="Sampling").locator("visible=true").click()
    fill_number(page, f"{prefix}-steps", steps)


def open_local_control(page: Page) -> None:
    page.get_by_role("tab", name="Local control").click()
    page.locator("#follow-canvas canvas").wait_for()


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "png")
    return file.getvalue()


def both_inside(image: Image.Image) -> bool:
    """Whether the scene reader finds each object in its region."""
    wanted = [
        Found(label, tuple(side * image.width for side in box))
        for label, box in (("red circle", CIRCLE), ("blue square", SQUARE))
    ]
    scores = best_matches(wanted, find_objects(np.asarray(image)))
    return all(score is not None and score > 0.4 for score in scores)


def test_objects_lie_in_the_regions_that_were_dragged(page: Page) -> None:
    place_two(page)
    expect(page.locator("#place-prompt-view .phrase")).to_have_count(2)
    choose(page, "place-method", "Bias + dense")
    fill_number(page, "place-images", 4)
    type_steps(page, "place", 20)
    page.locator("#place-generate").click()
    assert "4 images" in finish_job(page, "place", 120)
    images = gallery_images(page, "place-gallery")
    assert len(images) == 4
    assert sum(map(both_inside, images)) >= 3


def test_edges_are_followed_inside_a_brushed_mask(page: Page) -> None:
    open_local_control(page)
    chosen = "for (const index of [0, 5]) document.querySelectorAll('#follow-examples button')[index].click()"
    page.evaluate(f"() => {{ {chosen} }}")  # the first is not answered yet: the last one counts
    expect(page.locator("#follow-prompt textarea")).to_have_value(re.compile("cyan hexagon"))
    expect(page.locator("#follow-conditions img")).to_have_count(1)
    rows = [(x, 0.15 + 0.05 * row) for row in range(16) for x in (0.1, 0.65)]
    press_and_move(page, "#follow-canvas", rows)
    type_steps(page, "follow", 20)
    page.locator("#follow-generate").click()
    assert "1 image" in finish_job(page, "follow")
    for field in ("guidance-scale", "width", "height"):  # what is left empty is not 0
        expect(page.locator(f"#follow-{field} textarea, #follow-{field} input")).to_have_value("")
    expect(page.locator("#leaving-command textarea")).to_have_value(re.compile("--guidance_scale=2"))
    expect(page.locator("#follow-figures img")).to_have_count(3)  # condition, result, edges
    score = page.locator("#follow-figures .figures-score").inner_text()
    found = re.search(r"F1 inside the mask: ([\d.]+)", score)
    assert found and float(found[1]) > 0.6, score


def test_thresholds_change_the_condition_at_once_and_adapters_are_added(page: Page) -> None:
    open_local_control(page)
    page.locator("#follow-examples button").first.click()
    condition = page.locator("#follow-conditions img")
    expect(condition).to_have_count(1)
    before = condition.get_attribute("src") or ""
    fill_number(page, "follow-high", 400)
    fill_number(page, "follow-low", 400)
    expect(condition).not_to_have_attribute("src", before)
    expect(page.locator("#follow-adapter2")).to_be_hidden()
    page.locator("#follow-more").click()
    expect(page.locator("#follow-adapter2")).to_be_visible()
    expect(page.locator("#follow-canvas .scene-choice")).to_have_count(2)  # a mask for each
    page.locator("#follow-fewer").click()
    expect(page.locator("#follow-adapter2")).to_be_hidden()


def test_a_late_answer_replaces_neither_a_newer_one_nor_what_was_painted(page: Page) -> None:
    open_local_control(page)
    page.locator("#follow-examples button").first.click()
    condition = page.locator("#follow-conditions img")
    expect(condition).to_have_count(1)
    held: list[tuple[Route, APIResponse]] = []

    def hold(route: Route) -> None:
        """Keep the first answer on the whole form back."""
        if held or len(route.request.post_data_json["data"]) < 5:
            route.continue_()
        else:
            held.append((route, route.fetch()))

    page.route("**/run/predict", hold)
    page.locator("#follow-examples button").nth(5).click()
    while not held:
        page.wait_for_timeout(100)
    before = condition.get_attribute("src") or ""
    fill_number(page, "follow-high", 400)
    fill_number(page, "follow-low", 400)
    expect(condition).not_to_have_attribute("src", before)
    press_and_move(page, "#follow-canvas", [(0.3, 0.3), (0.6, 0.6)])
    page.wait_for_timeout(1000)  # until the last threshold is answered
    newest = condition.get_attribute("src") or ""
    with page.expect_response("**/run/predict"):
        held[0][0].fulfill(response=held[0][1])
    page.wait_for_timeout(1000)  # in which the older answer would be shown
    expect(condition).to_have_attribute("src", newest)
    expect(page.locator("#follow-high input[type=number]")).to_have_value("400")
    page.wait_for_function(PAINTED, arg="#follow-canvas canvas")


def test_what_is_typed_before_the_memory_is_back_is_not_lost(page: Page) -> None:
    type_text(page, "#place-prompt textarea", "a pink star")
    page.wait_for_timeout(3000)  # until the browser has stored it
    asked: list[Route] = []
    page.route("**/run/predict", lambda route: asked.append(route), times=2)  # one for the memory of each tab
    page.reload()
    while len(asked) < 2:
        page.wait_for_timeout(100)
    page.wait_for_timeout(500)
    expect(page.locator("#place-prompt")).to_be_hidden()  # nothing to type into, which would then be replaced
    for route in asked:
        route.continue_()
    expect(page.locator("#place-prompt textarea")).to_have_value("a pink star")
    expect(page.locator("#place-prompt")).to_be_visible()


def test_photos_masks_layouts_and_colour_maps_are_uploaded(page: Page) -> None:
    layout = {"prompt": "a pink star", "width": 64, "height": 64}
    layout["regions"] = [{"phrase": "a pink star", "box": [0, 0, 0.5, 1]}]  # type: ignore[assignment]
    page.get_by_role("button", name="Load a layout").click()
    upload(page, "#place-layout", "x.json", json.dumps(layout).encode())
    expect(page.locator("#place-canvas .scene-phrase")).to_have_value("a pink star")
    expect(page.locator("#place-prompt textarea")).to_have_value("a pink star")
    colors = Image.new("RGB", (64, 64), "white")
    pen = ImageDraw.Draw(colors)
    pen.rectangle((0, 0, 30, 63), fill="red")
    pen.rectangle((34, 0, 63, 63), fill="blue")
    upload(page, "#place-colors", "map.png", png(colors))
    expect(page.locator("#place-canvas .scene-row")).to_have_count(2)
    open_local_control(page)
    photo = Image.new("RGB", (96, 192), "gray")
    ImageDraw.Draw(photo).ellipse((20, 60, 76, 116), fill="red")
    upload(page, "#follow-photo button >> nth=0", "photo.png", png(photo))
    shape = page.locator("#follow-conditions img")
    expect(shape).to_have_count(1)
    tall, wide = shape.evaluate("image => image.decode().then(() => [image.naturalHeight, image.naturalWidth])")
    assert tall > wide and tall % 8 == wide % 8 == 0  # the photo's shape, at about the base's area
    upload(page, "#follow-mask", "mask.png", png(Image.new("L", (96, 192), 0)))
    expect(page.locator("#follow-progress .job-failed")).to_contain_text("black everywhere")


def test_a_phrase_that_is_not_in_the_prompt_is_marked_with_the_tokens(page: Page) -> None:
    place_two(page)
    page.locator("#place-canvas .scene-phrase").first.fill("a green dragon")
    mark = page.locator("#place-canvas .scene-mark-bad")
    expect(mark).to_contain_text("a green dragon")
    expect(mark).to_contain_text("not in the prompt")
    expect(mark).to_contain_text("square")  # the tokens that there are
    type_text(page, "#place-prompt textarea", "a green dragon and a blue square")
    expect(mark).to_have_count(0)


def test_cancelling_stops_within_two_seconds_and_the_next_job_works(page: Page) -> None:
    type_text(page, "#place-prompt textarea", "a red circle")
    type_steps(page, "place", 150)
    page.locator("#place-generate").click()
    page.locator("#place-progress .job-previews img").first.wait_for()
    asked = time.monotonic()
    page.locator("#place-cancel").click()
    assert "Cancelled" in finish_job(page, "place", 10)
    assert time.monotonic() - asked < 2
    fill_number(page, "place-steps", 2)
    page.locator("#place-generate").click()
    expect(page.locator("#place-progress .job-done")).to_contain_text("1 image")


def test_two_visitors_do_not_see_each_other(page: Page, visit: Callable[..., Page]) -> None:
    other = visit()
    type_text(page, "#place-prompt textarea", "a red circle")
    type_text(other, "#place-prompt textarea", "a blue star")
    type_steps(page, "place", 4)
    page.locator("#place-generate").click()
    finish_job(page, "place")
    assert len(gallery_images(page, "place-gallery")) == 1
    assert gallery_images(other, "place-gallery") == []
    assert other.locator("#place-progress .job-done").count() == 0
    expect(other.locator("#place-prompt textarea")).to_have_value("a blue star")
    source = page.locator("#place-gallery img").first.get_attribute("src") or ""
    assert "/file=" in source


def test_a_reload_restores_what_was_placed_and_painted(page: Page) -> None:
    place_two(page)
    page.locator("#place-canvas .scene-row").nth(1).locator("summary").click()
    open_local_control(page)
    type_text(page, "#follow-prompt textarea", "a gray ring")
    press_and_move(page, "#follow-canvas", [(0.3, 0.3), (0.6, 0.6)])
    fill_number(page, "follow-weight1", 0.5)
    page.wait_for_timeout(3000)  # until the browser has stored it
    page.reload()
    phrases = page.locator("#place-canvas .scene-phrase")
    expect(phrases).to_have_count(2)
    expect(phrases.first).to_have_value("a red circle")
    expect(page.locator("#place-prompt textarea")).to_have_value(PROMPT)
    open_local_control(page)
    expect(page.locator("#follow-prompt textarea")).to_have_value("a gray ring")
    expect(page.locator("#follow-weight1 input[type=number]")).to_have_value("0.5")
    page.wait_for_function(PAINTED, arg="#follow-canvas canvas")


def test_a_run_shows_its_curves_and_its_adapter_is_used_in_local_control(page: Page, runs_folder: Path) -> None:
    run = runs_folder / "series" / "edges"
    (run / "validation").mkdir(parents=True)
    rows = [{"step": step, "denoising": 1 / step, "local_raw": 0.1 / step} for step in (10, 20, 30)]
    (run / "stats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Image.new("RGB", (64, 32), "teal").save(run / "validation" / "step-000030.png")
    shutil.copytree(ROOT / "examples" / "adapter", run / "adapter")
    page.get_by_role("tab", name="Training").click()
    page.get_by_role("button", name="Look again").click()
    expect(page.locator("#training-runs")).to_contain_text("series/edges")
    expect(page.locator(".studio-plot canvas, .studio-plot svg").first).to_be_visible()
    expect(page.get_by_alt_text("Validation sheet").or_(page.locator("#training-sheet img")).first).to_be_visible()
    expect(page.locator("#training-adapter input")).to_have_value("finished")
    page.locator("#training-use").click()
    expect(page.locator("#follow-adapter1 input")).to_have_value("series/edges: finished")


@pytest.mark.slow
def test_a_quick_run_is_started_followed_and_stopped(page: Page, runs_folder: Path) -> None:
    page.get_by_role("tab", name="Training").click()
    page.locator("#training-start").click()
    expect(page.locator("#training-progress")).to_contain_text(re.compile(r"training \d+ of 100 steps"), timeout=90_000)
    page.reload()  # the training belongs to the server
    page.get_by_role("tab", name="Training").click()
    expect(page.locator("#training-progress")).to_contain_text(re.compile(r"training [1-9]\d* of 100"), timeout=60_000)
    page.locator("#training-stop").click()
    expect(page.locator("#training-progress")).to_contain_text("stopped, with a checkpoint", timeout=60_000)
    assert list(runs_folder.glob("quick-*/checkpoint-*/adapter/config.json"))
    expect(page.locator("#training-start")).to_be_enabled()


def test_nothing_is_cut_off_on_a_phone(visit: Callable[..., Page]) -> None:
    page = visit({"width": 390, "height": 844})
    for tab in ("Place", "Local control", "Training"):
        page.get_by_role("tab", name=tab).click()
        page.wait_for_timeout(1000)  # until the tab has been laid out
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, tab


def test_an_image_leaves_with_its_record_and_comes_back(page: Page, tmp_path: Path) -> None:
    place_two(page)
    type_steps(page, "place", 4)
    page.locator("#place-generate").click()
    finish_job(page, "place")
    [image] = gallery_images(page, "place-gallery")
    expect(page.locator("#leaving-command textarea")).to_have_value(
        re.compile("sample.py .*--layout inputs/layout_0.json")
    )
    saved = {}
    for name in ("png", "layout", "zip"):
        with page.expect_download() as download:
            page.locator(f"#leaving-{name}").click()
        saved[name] = tmp_path / download.value.suggested_filename
        download.value.save_as(saved[name])
    assert np.array_equal(np.asarray(Image.open(saved["png"]).convert("RGB")), np.asarray(image))
    assert {"command.txt", "inputs/layout_0.json", saved["png"].name} <= set(zipfile.ZipFile(saved["zip"]).namelist())
    assert json.loads(saved["layout"].read_text())["prompt"] == PROMPT
    page.evaluate("localStorage.clear()")
    page.reload()
    expect(page.locator("#place-canvas .scene-row")).to_have_count(0)
    page.locator("#leaving-drop input[type=file]").set_input_files(saved["png"])
    expect(page.locator("#place-progress")).to_contain_text("settings of the image are back")
    expect(page.locator("#place-canvas .scene-phrase")).to_have_count(2)
    expect(page.locator("#place-prompt textarea")).to_have_value(PROMPT)
    page.locator("#place-generate").click()
    expect(page.locator("#place-progress")).to_contain_text("1 image", timeout=30_000)
    [again] = gallery_images(page, "place-gallery")
    assert np.array_equal(np.asarray(again), np.asarray(image))
