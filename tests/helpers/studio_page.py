"""What users do on the studio's page, with mouse and keyboard, and what they see there."""

from __future__ import annotations

import io
from collections.abc import Sequence

from PIL import Image
from playwright.sync_api import Page


def press_and_move(page: Page, canvas: str, points: Sequence[tuple[float, float]]) -> None:
    """Press the mouse at the first point, move over the others and let go; points are shares (x, y) of the canvas."""
    stage = page.locator(f"{canvas} canvas")
    stage.scroll_into_view_if_needed()
    frame = stage.bounding_box()
    assert frame is not None
    at = [(frame["x"] + x * frame["width"], frame["y"] + y * frame["height"]) for x, y in points]
    page.mouse.move(*at[0])
    page.mouse.down()
    for point in at[1:]:
        page.mouse.move(*point, steps=4)
    page.mouse.up()


def type_text(page: Page, selector: str, text: str) -> None:
    """Type over what a field holds, key by key: Gradio does not notice text that is put in at once."""
    field = page.locator(selector).first
    field.fill("")
    field.press_sequentially(text)


def upload(page: Page, selector: str, name: str, content: bytes) -> None:
    """Upload a file by the one button, or into the field for photos, that ``selector`` names."""
    with page.expect_file_chooser() as chooser:
        page.locator(selector).click()
    kind = "application/json" if name.endswith(".json") else "image/png"
    chooser.value.set_files({"name": name, "mimeType": kind, "buffer": content})


def drag_box(page: Page, canvas: str, box: Sequence[float]) -> None:
    """Drag a box xyxy, in shares of the canvas."""
    press_and_move(page, canvas, [(box[0], box[1]), (box[2], box[3])])


def fill_number(page: Page, elem_id: str, value: float) -> None:
    """Type a number into a slider or a field of numbers."""
    field = page.locator(f"#{elem_id} input[type=number]").first
    field.fill(str(value))
    field.press("Tab")


def choose(page: Page, elem_id: str, option: str) -> None:
    """Choose an option of a dropdown."""
    page.locator(f"#{elem_id} input").click()
    page.get_by_role("option", name=option, exact=True).click()


def finish_job(page: Page, prefix: str, seconds: float = 60) -> str:
    """Wait for the end of a job; return what the page says of it."""
    end = page.locator(f"#{prefix}-progress .job-done, #{prefix}-progress .job-failed")
    end.wait_for(timeout=1000 * seconds)
    return end.inner_text()


def gallery_images(page: Page, elem_id: str) -> list[Image.Image]:
    """Return the images of a gallery, as the server sends them."""
    sources = page.locator(f"#{elem_id} img").evaluate_all("images => images.map((image) => image.src)")
    files = dict.fromkeys(source for source in sources if "/file=" in source)
    return [Image.open(io.BytesIO(page.request.get(source).body())).convert("RGB") for source in files]
