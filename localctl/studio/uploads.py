"""Photos that the page sends: a component to upload or paste one, and the handler's way to read it within limits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from localctl.images import load_image
from localctl.sizes import shown
from localctl.studio import progress

UNREADABLE = "This file is not an image that can be read; save it as PNG, JPEG or WebP."


def photo(label: str, **options: Any) -> Any:
    """Return a component for a photo. ``options``: arguments of ``gr.Image``.

    Its value is the upload's file, which Gradio has checked to be one; read it by :func:`read_photo`. Connect
    ``.failure`` of its events to a handler that shows :data:`UNREADABLE`, for files that Gradio itself cannot open.
    """
    return gr.Image(
        label=label, type="filepath", image_mode=None, sources=["upload", "clipboard"], buttons=[], **options
    )


def read_photo(name: str, value: Any) -> Image.Image | None:
    """Read the upload as an RGB image without its metadata, upright; None for none.

    ValueError in one sentence for another format, more than 16 million pixels, or a damaged file; size and format are
    checked before anything is decoded.
    """
    if value is None:
        return None
    if not isinstance(value, str):
        raise ValueError(f"{name} must be an upload, not {shown(value)}.")
    try:
        content = Path(value).read_bytes()
    except OSError as error:
        raise ValueError(f"{name} is not there any more ({error.strerror}); upload it again.") from None
    return load_image(content, name)


def check_photo(photo: Any) -> Any:
    """Say at once that an upload cannot be used, or nothing."""
    try:
        read_photo("The image", photo)
    except ValueError as error:
        return progress.failed(str(error))
    return gr.skip()


def unreadable_form() -> str:
    """Say that the page sent what none of its fields can hold."""
    return progress.failed("A field cannot be read; remove its upload, or reload the page.")
