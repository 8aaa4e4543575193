"""Render the images of the studio's page for the docs, and a tour through it, with a headless Chromium.

  python -m research.studio_tour                  # docs/studio/*.png and docs/studio/tour.webp

Needs the extra `dev` (playwright) and a Chromium: apt-get install -y chromium
"""

from __future__ import annotations

import io
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from localctl.cli.arguments import Arguments
from localctl.cli.program import one_sentence

if TYPE_CHECKING:  # imported after the flags are read
    from PIL import Image

PROGRAM = "research.studio_tour"
sys.path.append(str(Path(__file__).parents[1] / "tests" / "helpers"))  # what the tests do on the page
FOLDER = Path("docs/studio")
DESKTOP, PHONE = (1280, 1180), (390, 844)
TOUR_SIDE = 720  # pixels of its width
SECONDS = 60  # of the whole tour
# Whether the training has made at least so many steps.
REACHED = r"""(least) => {
  const text = document.querySelector('#training-progress')?.innerText || '';
  return Number((text.match(/(\d+) of/) || [])[1]) >= least;
}"""


class Tour:
    """The frames of a tour, each with a sentence below it."""

    def __init__(self, page: Any) -> None:
        self.page = page
        self.frames: list[tuple[Image.Image, float]] = []

    def show(self, text: str, weight: float = 1.0) -> None:
        """Take a frame of what the page shows now. weight: how long it is shown, relative to the others."""
        from PIL import Image, ImageDraw

        from localctl.drawing import LINE, write

        shot = Image.open(io.BytesIO(self.page.screenshot())).convert("RGB")
        shot = shot.resize((TOUR_SIDE, round(shot.height * TOUR_SIDE / shot.width)), Image.Resampling.LANCZOS)
        frame = Image.new("RGB", (shot.width, shot.height + LINE + 8), "white")
        frame.paste(shot)
        ImageDraw.Draw(frame).line((0, shot.height, shot.width, shot.height), fill="lightgray")
        write(frame, (10, shot.height + 5), text, shot.width - 20)
        self.frames.append((frame, weight))

    def save(self, path: Path) -> None:
        """Write the frames as an animated image of ``SECONDS``."""
        total = sum(weight for _, weight in self.frames)
        times = [round(1000 * SECONDS * weight / total) for _, weight in self.frames]
        first, *rest = [frame for frame, _ in self.frames]
        first.save(path, save_all=True, append_images=rest, duration=times, loop=0, quality=70, method=6)


@contextmanager
def opened(folder: str) -> Iterator[tuple[Any, str]]:
    """Serve the studio and start the browser; yields it and the address."""
    from browser import find_chromium, free_port
    from playwright.sync_api import sync_playwright

    from localctl.studio.config import StudioConfig
    from localctl.studio.server import serve

    path = find_chromium()
    if path is None:
        raise SystemExit("There is no Chromium on this machine; install it with: apt-get install -y chromium")
    port = free_port()
    blocks = serve(StudioConfig(port=port, runs=folder), block=False)
    try:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=path)
            yield browser, f"http://127.0.0.1:{port}/"
            browser.close()
    finally:
        blocks.close()
        blocks.studio.close()


def place(page: Any, show: Callable[..., None]) -> None:
    """Place two objects and generate."""
    from studio_page import choose, drag_box, fill_number, finish_job, type_text

    show("Place: the page opens on the embedded base, offline, on a CPU.", 1.5)
    drag_box(page, "#place-canvas", (0.08, 0.1, 0.45, 0.5))
    show("Drag a box for each object.")
    drag_box(page, "#place-canvas", (0.55, 0.5, 0.92, 0.9))
    show("Each region has a colour that colour-blind people tell apart, and a row.")
    for number, phrase in enumerate(("a red circle", "a blue square")):
        page.locator("#place-canvas .scene-phrase").nth(number).fill(phrase)
    show("Give each its phrase.")
    type_text(page, "#place-prompt textarea", "a red circle and a green square")
    page.wait_for_timeout(500)
    show("A phrase that the prompt does not have is marked, with the tokens that there are.", 1.5)
    type_text(page, "#place-prompt textarea", "a red circle and a blue square")
    choose(page, "place-method", "Bias + dense")
    page.wait_for_timeout(500)
    show("The phrases are highlighted in their colours. Choose a method; its sliders appear.", 1.5)
    fill_number(page, "place-images", 4)
    page.evaluate("window.scrollTo(0, 0)")
    page.locator("#place-generate").click()
    page.locator("#place-progress .job-previews img").first.wait_for()
    show("Each step shows what the images would be now; Cancel stops within one step.")
    page.wait_for_timeout(1200)
    show("Each step shows what the images would be now; Cancel stops within one step.")
    finish_job(page, "place", 120)
    page.wait_for_timeout(800)
    show("Four seeds; the scene reader says how well each object lies in its region.", 2)


def leave(page: Any, show: Callable[..., None]) -> None:
    """Show what leaves the page."""
    page.locator("#leaving").scroll_into_view_if_needed()
    page.wait_for_timeout(400)
    show("Take it away: PNG with its record, layout, ZIP, and the command that repeats it.", 2)


def follow(page: Any, show: Callable[..., None]) -> None:
    """Follow a photo inside a mask."""
    from studio_page import finish_job, press_and_move

    page.evaluate("window.scrollTo(0, 0)")
    page.get_by_role("tab", name="Local control").click()
    page.locator("#follow-examples button").nth(5).click()
    page.locator("#follow-conditions img").first.wait_for()
    page.wait_for_timeout(500)
    show("Local control: choose a photo; its condition is extracted live.", 1.5)
    rows = [(x, 0.15 + 0.05 * row) for row in range(16) for x in (0.1, 0.65)]
    press_and_move(page, "#follow-canvas", rows)
    page.wait_for_timeout(300)
    show("Paint where it is followed; outside, the prompt alone decides.", 1.5)
    page.evaluate("window.scrollTo(0, 0)")
    page.locator("#follow-generate").click()
    finish_job(page, "follow", 60)
    page.wait_for_timeout(800)
    show("Condition, result, and its edges: matched, missed, invented; the F1 inside the mask below.", 2)


def train(page: Any, show: Callable[..., None], steps: int) -> None:
    """Train a quick adapter and stop it."""
    page.evaluate("window.scrollTo(0, 0)")
    page.get_by_role("tab", name="Training").click()
    page.wait_for_timeout(500)
    page.locator("#training-start").click()
    page.get_by_text(" of 100 steps").wait_for(timeout=120_000)
    show("Training: a quick run, followed while it trains.")
    page.wait_for_function(REACHED, arg=steps, timeout=400_000)
    page.wait_for_timeout(2500)
    show("Its curves grow; checkpoints load into Local control.", 2)
    page.locator("#training-stop").click()
    page.get_by_text("stopped, with a checkpoint").wait_for(timeout=120_000)
    page.wait_for_timeout(2500)
    show("Stopped, with a checkpoint.", 1.5)


@one_sentence(PROGRAM)
def main(argv: Sequence[str] | None = None) -> int:
    """Write all images; return 0."""
    parser = Arguments(PROGRAM, __doc__)
    parser.add_argument("--steps", type=int, default=32, help="of the training that the tour shows (default 32)")
    steps = parser.read(argv).steps
    FOLDER.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as runs, opened(runs) as (browser, url):
        context = browser.new_context(viewport={"width": DESKTOP[0], "height": DESKTOP[1]})
        page = context.new_page()
        page.goto(url)
        page.locator("#place-canvas canvas").wait_for()
        page.wait_for_timeout(800)
        tour = Tour(page)
        place(page, tour.show)
        page.screenshot(path=FOLDER / "place.png")
        leave(page, tour.show)
        follow(page, tour.show)
        page.screenshot(path=FOLDER / "local_control.png")
        train(page, tour.show, steps)
        page.screenshot(path=FOLDER / "training.png")
        tour.save(FOLDER / "tour.webp")
        page.set_viewport_size({"width": PHONE[0], "height": PHONE[1]})
        page.get_by_role("tab", name="Place").click()
        page.evaluate("window.scrollTo(0, 0)")
        page.wait_for_timeout(800)
        page.screenshot(path=FOLDER / "phone.png", full_page=True)
        page.set_viewport_size({"width": DESKTOP[0], "height": DESKTOP[1]})
        page.get_by_role("button", name="Light or dark").click()
        page.wait_for_timeout(800)
        page.screenshot(path=FOLDER / "dark.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
