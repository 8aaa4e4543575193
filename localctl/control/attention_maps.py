"""Attention maps: where in the image each phrase is attended to, with or without other controls attached."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor

from localctl.control.attention import Scores
from localctl.control.base import BoundControl, CallContext, Control, check_window
from localctl.control.regions import BoundRegions
from localctl.denoisers.base import AttentionLayer
from localctl.drawing import grid, outline, overlay_heat
from localctl.layout import Layout


@dataclass
class _Record:
    """The maps of one call of a pipeline, by the (h, w) of the layers.

    sums: the summed maps (n,r,Q), by (h, w). counts: over how many layers and steps, by (h, w).
    """

    layouts: tuple[int, ...]
    latent_size: tuple[int, int]
    sums: dict[tuple[int, int], Tensor] = field(default_factory=dict)  # (n,r,Q) float32
    counts: dict[tuple[int, int], int] = field(default_factory=dict)


class AttentionRecorder:
    """The recorded heat of each region's phrase in each image.

    Images are numbered in the order generated, over all calls.
    """

    def __init__(self) -> None:
        self.records: list[_Record] = []
        self._layouts: tuple[Layout, ...] = ()

    def begin(self, layouts: Sequence[Layout]) -> None:
        """Delete all records and restart the numbering, for images of these layouts."""
        self.records, self._layouts = [], tuple(layouts)

    def heat(self, image: int, region: int) -> Tensor:
        """Return the phrase's heat map (h, w) float32 on the latents' grid.

        That is the mean probability of the phrase's tokens, over tokens, heads, layers and steps. ValueError for an
        image that was not generated or a region without a phrase.
        """
        record, row = self._find(image)
        if not 0 <= region < len(self._layout(image).regions) or not self._layout(image).regions[region].phrase:
            raise ValueError(f"The layout of image {image} has no region {region} with a phrase; regions count from 0.")
        layers = sum(record.counts.values())
        total = torch.zeros(record.latent_size)
        for size, summed in record.sums.items():
            grown = summed[row, region].cpu().reshape(1, 1, *size)
            total += torch.nn.functional.interpolate(grown, record.latent_size, mode="bilinear")[0, 0]
        return total / layers

    def mass(self, image: int, region: int) -> float:
        """Return the share of a phrase's attention that lies inside its region, in [0, 1]."""
        heat = self.heat(image, region)
        record, _ = self._find(image)
        mask = self._layout(image).masks(record.latent_size)[region, 0]
        return float((heat * mask).sum() / heat.sum())

    def overlays(self, index: int, image: Image.Image) -> list[tuple[str, Image.Image]]:
        """Return, for each phrase, a label and the generated ``image``, number ``index``, overlaid with its heat map.

        Each heat map has its own scale, from 0 to its maximum; the region is outlined. The label holds the phrase and
        the share of its heat inside its region. ValueError when no region has a phrase.
        """
        layout = self._layout(index)
        masks = layout.masks((image.height, image.width))
        cells = [
            (
                f"{region.phrase} {self.mass(index, number):.0%}",
                outline(overlay_heat(image, self.heat(index, number)), masks[number], "white"),
            )
            for number, region in enumerate(layout.regions)
            if region.phrase
        ]
        if not cells:
            raise ValueError("The layout has no region with a phrase, so there is no map to render; add a phrase.")
        return cells

    def render(self, index: int, image: Image.Image) -> Image.Image:
        """Return the images of :meth:`overlays` in a row, with their labels."""
        cells = self.overlays(index, image)
        return grid([[overlay for _, overlay in cells]], [label for label, _ in cells])

    def _find(self, image: int) -> tuple[_Record, int]:
        first = 0
        for record in self.records:
            if first <= image < first + len(record.layouts):
                return record, image - first
            first += len(record.layouts)
        raise ValueError(f"There are maps of {first} images but none of image {image}; images count from 0.")

    def _layout(self, image: int) -> Layout:
        record, row = self._find(image)
        return self._layouts[record.layouts[row]]


@dataclass(frozen=True, eq=False)
class AttentionMaps(Control):
    """Record the cross-attention of every region's phrase (as DAAM, arXiv 2210.04885) without changing it.

    Attach it together with other controls, generate images, then read the maps from this object or its ``recorder``.
    Images are numbered in the order generated, over all calls. Attaching it again deletes what was recorded.

    Args:
        start, end: record in the outer steps from start up to, not including, end (fractions of the steps).
        sites: the layers to record, as for :class:`~localctl.control.layout_guidance.LayoutGuidance`; None = all.

    Raises:
        ValueError: an invalid window; when attached, sites that the denoiser does not have.
    """

    start: float = 0.0
    end: float = 1.0
    sites: tuple[str, ...] | None = None
    recorder: AttentionRecorder = field(default_factory=AttentionRecorder, init=False, repr=False)

    def __post_init__(self) -> None:
        check_window(self.start, self.end)

    def bind(self, pipe: DiffusionPipeline, layouts: Sequence[Layout]) -> BoundControl:
        regions = BoundRegions(pipe, layouts, "area")
        names = None if self.sites is None else frozenset(regions.denoiser.choose_layers(self.sites))
        self.recorder.begin(layouts)
        return _BoundMaps(self, regions, names)

    def heat(self, image: int, region: int) -> Tensor:
        """Call :meth:`AttentionRecorder.heat`."""
        return self.recorder.heat(image, region)

    def mass(self, image: int, region: int) -> float:
        """Call :meth:`AttentionRecorder.mass`."""
        return self.recorder.mass(image, region)

    def overlays(self, index: int, image: Image.Image) -> list[tuple[str, Image.Image]]:
        """Call :meth:`AttentionRecorder.overlays`."""
        return self.recorder.overlays(index, image)

    def render(self, index: int, image: Image.Image) -> Image.Image:
        """Call :meth:`AttentionRecorder.render`."""
        return self.recorder.render(index, image)

    def draw(self, picture: int, image: Image.Image) -> Image.Image:
        """Call :meth:`render`, by its old name."""
        warnings.warn("AttentionMaps.draw is now called render.", DeprecationWarning, stacklevel=2)
        return self.render(picture, image)


class _BoundMaps(BoundControl):
    is_reader = True

    def __init__(self, control: AttentionMaps, regions: BoundRegions, layers: frozenset[str] | None) -> None:
        self.control = control
        self.regions = regions
        self.layers = layers  # None: all
        self._record: _Record | None = None

    def begin_call(self, arguments: Mapping[str, Any]) -> None:
        self._record = None

    def attends(self, context: CallContext, layer: AttentionLayer) -> bool:
        chosen = layer.cross and not context.again and (self.layers is None or layer.name in self.layers)
        return chosen and bool(context.guided_layouts) and context.within(self.control.start, self.control.end)

    @torch.no_grad()
    def read_attention(
        self, context: CallContext, layer: AttentionLayer, scores: Scores, queries: slice, bias: Tensor | None
    ) -> None:
        words = self.regions.per_row(context, ("mean", scores.keys), lambda layout: self._words(layout, scores.keys))
        assert words is not None  # (n,r,K)
        record = self._record
        if record is None:
            record = self._record = _Record(context.guided_layouts, context.latent_size)
            self.control.recorder.records.append(record)
        probabilities = scores.probabilities(queries, bias).mean(dim=1)  # (n,q,K)
        maps = words @ probabilities.transpose(1, 2)  # (n,r,q)
        if layer.size not in record.sums:
            record.sums[layer.size] = maps.new_zeros(*maps.shape[:2], layer.cells)
            record.counts[layer.size] = 0
        record.sums[layer.size][:, :, queries] += maps
        record.counts[layer.size] += int(not queries.start)  # count a layer once, at the first part of its queries

    def _words(self, layout: int, keys: int) -> Tensor:
        """Return weights (r,K) that average over each phrase's tokens; r: the largest number of regions of a layout."""
        words = torch.zeros(max(1, self.regions.most), keys)
        for region in range(len(self.regions.layouts[layout].regions)):
            tokens = self.regions.tokens(layout, region, keys)
            words[region, tokens] = 1 / max(1, len(tokens))
        return words
