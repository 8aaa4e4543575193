"""Uploads: photos and files that the page sends, read within limits by the same code as all images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from localctl.images import load_image


class Photo(gr.Image):
    """A photo to upload or paste, as an RGB image without its metadata; one that is refused is a sentence on the page.

    Its size, format and number of pixels are checked before it is decoded.
    """

    is_template = True

    def __init__(self, **options: Any) -> None:
        """Create it. ``options``: arguments of ``gr.Image``."""
        super().__init__(type="pil", sources=["upload", "clipboard"], buttons=[], format="png", **options)

    def preprocess(self, payload: Any) -> Image.Image | None:
        """Read the upload."""
        path = None if payload is None else getattr(payload, "path", None)
        if not path:
            return None
        try:
            return load_image(Path(path).read_bytes(), "The image")
        except (ValueError, OSError) as error:
            raise gr.Error(str(error), print_exception=False) from None
