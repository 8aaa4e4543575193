"""The CLIP objective of an image with a layout: the whole image against the prompt, each region against its phrase."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from localctl.control.spacetime import description
from localctl.layout import Layout, Region
from localctl.metrics.clip import Clip
from localctl.prompt_syntax import read_weights


class ClipObjective:
    """The objective of arXiv 2304.03869: L = d(image, prompt) + factor * sum_i d(crop_i, "A photo of <object i>").

    d = 1 - cosine similarity of CLIP's embeddings; crop_i is the smallest box around region i. Images and crops are
    resized to CLIP's square input without keeping their aspect ratio, as for the CLIP score.

    Args:
        clip: any CLIP.
        layout: gives the prompt and the objects, which are the regions with a description.
        size: (height, width) of the images in pixels.
        region_factor: weight of the regions' terms; 5 as published.
        normalise_pixels: normalise pixels as in CLIP's training; False passes pixels in [0, 1], as the published code
            does.
    """

    def __init__(
        self,
        clip: Clip,
        layout: Layout,
        size: tuple[int, int],
        region_factor: float = 5.0,
        normalise_pixels: bool = True,
    ) -> None:
        self.clip, self.region_factor, self.normalise_pixels = clip, region_factor, normalise_pixels
        masks = layout.masks(size)
        self.crops = [
            _box(mask[0])
            for mask, region in zip(masks, layout.regions, strict=True)
            if description(region) is not None and region_factor
        ]
        texts = [object_text(region) for region in layout.regions if description(region) is not None and region_factor]
        embedded = clip.embed_texts([read_weights(layout.prompt).text, *texts])
        self.texts = torch.nn.functional.normalize(embedded, dim=-1).to(clip.device)  # (1 + objects, d)

    def parts(self, pixels: Tensor) -> Tensor:
        """Return d of the whole image, then of each object, (1 + objects,). ``pixels``: (1, 3, H, W) in [0, 1]."""
        views = [pixels, *(pixels[:, :, rows, columns] for rows, columns in self.crops)]
        embedded = torch.cat([self.clip.embed_pixels(view, self.normalise_pixels) for view in views])
        return 1 - (torch.nn.functional.normalize(embedded, dim=-1) * self.texts).sum(dim=-1)

    def __call__(self, pixels: Tensor) -> Tensor:
        """Return the loss () of one image ``pixels`` (1, 3, H, W) in [0, 1]; differentiable."""
        parts = self.parts(pixels)
        return parts[0] + self.region_factor * parts[1:].sum()


def object_text(region: Region) -> str:
    """Return "A photo of <object>", where the object is the region's phrase without "the", else its description."""
    words = region.phrase or description(region) or ""
    return f"A photo of {re.sub(r'^the ', '', words, flags=re.IGNORECASE)}"


def _box(mask: Tensor) -> tuple[slice, slice]:
    """Return the rows and columns of the smallest box around a mask (H, W)."""
    rows, columns = (mask >= mask.max() / 2).nonzero().unbind(dim=1)
    return slice(int(rows.min()), int(rows.max()) + 1), slice(int(columns.min()), int(columns.max()) + 1)
