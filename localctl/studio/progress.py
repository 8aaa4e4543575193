"""What the page says of a job: its place in the queue, its steps with previews, its end."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from PIL import Image

from localctl.studio.canvas import data_url

_PREVIEW = 256  # pixels of the longer side
IDLE = '<div class="job-idle">The images appear here.</div>'


def waiting(ahead: int) -> str:
    """Return the place in the queue as HTML."""
    jobs = "1 job is" if ahead == 1 else f"{ahead} jobs are"
    return _status(f"Waiting: {jobs} before this one.", 0.0)


def starting(text: str) -> str:
    """Return what happens before the first step as HTML."""
    return _status(text, 0.0)


def stepping(text: str, share: float, previews: Sequence[Image.Image] = ()) -> str:
    """Return a step as HTML: the bar, and what the images would be now."""
    urls = [data_url(_enlarged(image)) for image in previews]
    shown = "".join(f'<img alt="preview {number}" src="{url}">' for number, url in enumerate(urls, start=1))
    return _status(text, share) + (f'<div class="job-previews">{shown}</div>' if shown else "")


def done(text: str, lines: Sequence[str] = ()) -> str:
    """Return the end of a job as HTML; ``lines``: what is found in its images."""
    found = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f'<div class="job job-done" role="status">{escape(text)}{f"<ul>{found}</ul>" if found else ""}</div>'


def failed(text: str) -> str:
    """Return why there is no image as HTML."""
    return f'<div class="job job-failed" role="alert">{escape(text)}</div>'


def _status(text: str, share: float) -> str:
    percent = round(100 * min(1.0, max(0.0, share)))
    return (
        f'<div class="job" role="status"><span>{escape(text)}</span>'
        f'<div class="job-bar" role="progressbar" aria-valuenow="{percent}" aria-valuemin="0" aria-valuemax="100">'
        f'<div style="width:{percent}%"></div></div></div>'
    )


def _enlarged(image: Image.Image) -> Image.Image:
    """Return a small preview at a size that can be looked at."""
    scale = _PREVIEW / max(image.size)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    return image.resize(size, Image.Resampling.BICUBIC)
