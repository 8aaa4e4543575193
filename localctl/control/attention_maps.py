"""Attention maps: where in the picture each phrase is attended to, with whatever controls are attached beside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor

from localctl.control.attention import Scores, Site
from localctl.control.base import BoundControl, CallContext, Control, check_window
from localctl.control.guidance_layers import choose_sites
from localctl.control.regions import BoundRegions
from localctl.drawing import grid, outline, overlay_heat
from localctl.layout import Layout


@dataclass
class _Record:
    """What one call of a pipeline has shown, by the (h, w) of the layers: summed maps and how many layers and steps."""

    layouts: tuple[int, ...]
    latent_size: tuple[int, int]
    sums: dict[tuple[int, int], Tensor] = field(default_factory=dict)  # (n,r,Q) float32
    counts: dict[tuple[int, int], int] = field(default_factory=dict)


@dataclass(eq=False)
class AttentionMaps(Control):
    """Record the cross-attention of every region's phrase (as DAAM, arXiv 2210.04885); changes nothing.

    Attach it beside other controls, draw, and ask: pictures are numbered in the order drawn, over all calls.

    Args:
        start, end: look from start up to, not including, end (fractions of the steps).
        sites: the layers to look at, as for :class:`~localctl.control.layout_guidance.LayoutGuidance`; None = all.

    Raises:
        ValueError: a window that is none; when attached, sites that the U-Net does not have.
    """

    start: float = 0.0
    end: float = 1.0
    sites: tuple[str, ...] | None = None
    _records: list[_Record] = field(default_factory=list, init=False, repr=False)
    _layouts: tuple[Layout, ...] = field(default=(), init=False, repr=False)

    def __post_init__(self) -> None:
        check_window(self.start, self.end)

    def bind(self, pipe: DiffusionPipeline, layouts: Sequence[Layout]) -> BoundControl:
        names = None if self.sites is None else frozenset(choose_sites(pipe.unet, self.sites))
        self._records, self._layouts = [], tuple(layouts)  # attached again, it begins anew
        return _BoundMaps(self, BoundRegions(pipe, layouts, "area"), names)

    def heat(self, picture: int, region: int) -> Tensor:
        """(h, w) float32 on the latents' grid: the mean probability of one of the phrase's tokens, over heads, layers
        and steps. ValueError for a picture that was not drawn or a region that has no words."""
        record, row = self._find(picture)
        if not 0 <= region < len(self._regions(picture)) or not self._regions(picture)[region].phrase:
            raise ValueError(f"The layout of picture {picture} has no region {region} with words.")
        layers = sum(record.counts.values())
        total = torch.zeros(record.latent_size)
        for size, summed in record.sums.items():
            grown = summed[row, region].cpu().reshape(1, 1, *size)
            total += torch.nn.functional.interpolate(grown, record.latent_size, mode="bilinear")[0, 0]
        return total / layers

    def mass(self, picture: int, region: int) -> float:
        """The share of a phrase's attention that lies inside its region, in [0, 1]."""
        heat = self.heat(picture, region)
        record, row = self._find(picture)
        mask = self._layouts[record.layouts[row]].masks(record.latent_size)[region, 0]
        return float((heat * mask).sum() / heat.sum())

    def draw(self, picture: int, image: Image.Image) -> Image.Image:
        """The drawn ``image`` under each phrase's heat (its own scale, from 0 to its maximum) and outline, in a row."""
        cells = self.overlays(picture, image)
        return grid([[shown for _, shown in cells]], [label for label, _ in cells])

    def overlays(self, picture: int, image: Image.Image) -> list[tuple[str, Image.Image]]:
        """The pictures of :meth:`draw`, each with its label: the phrase and the share of its heat inside its region.

        ValueError when no region has words.
        """
        record, row = self._find(picture)
        layout = self._layouts[record.layouts[row]]
        masks = layout.masks((image.height, image.width))
        cells = [
            (
                f"{region.phrase} {self.mass(picture, index):.0%}",
                outline(overlay_heat(image, self.heat(picture, index)), masks[index], "white"),
            )
            for index, region in enumerate(layout.regions)
            if region.phrase
        ]
        if not cells:
            raise ValueError("The layout has no region with words, so there is no map to draw.")
        return cells

    def _find(self, picture: int) -> tuple[_Record, int]:
        first = 0
        for record in self._records:
            if first <= picture < first + len(record.layouts):
                return record, picture - first
            first += len(record.layouts)
        raise ValueError(f"There are maps of {first} pictures, none of picture {picture}; they count from 0.")

    def _regions(self, picture: int) -> tuple[Any, ...]:
        record, row = self._find(picture)
        return self._layouts[record.layouts[row]].regions


class _BoundMaps(BoundControl):
    only_looks = True

    def __init__(self, control: AttentionMaps, regions: BoundRegions, sites: frozenset[str] | None) -> None:
        self.control = control
        self.regions = regions
        self.sites = sites  # None: all
        self._record: _Record | None = None

    def begin_call(self, arguments: Mapping[str, Any]) -> None:
        self._record = None

    def attends(self, context: CallContext, site: Site) -> bool:
        chosen = site.cross and (self.sites is None or site.name in self.sites)
        return chosen and context.within(self.control.start, self.control.end)

    @torch.no_grad()
    def read_attention(
        self, context: CallContext, site: Site, scores: Scores, queries: slice, bias: Tensor | None
    ) -> None:
        words = self.regions.per_row(context, ("mean", scores.keys), lambda layout: self._words(layout, scores.keys))
        assert words is not None  # (n,r,K)
        record = self._record
        if record is None:
            record = self._record = _Record(context.guided_layouts, context.latent_size)
            self.control._records.append(record)
        block = scores.block(queries)  # (n,H,q,K)
        probabilities = (block if bias is None else block + bias).softmax(dim=-1).mean(dim=1)  # (n,q,K)
        maps = words @ probabilities.transpose(1, 2)  # (n,r,q)
        if site.size not in record.sums:
            record.sums[site.size] = maps.new_zeros(*maps.shape[:2], site.cells)
            record.counts[site.size] = 0
        record.sums[site.size][:, :, queries] += maps
        record.counts[site.size] += int(not queries.start)  # the first part stands for the layer

    def _words(self, layout: int, keys: int) -> Tensor:
        """(r,K): the mean over each phrase's tokens as weights; r is the largest number of regions of a layout."""
        words = torch.zeros(max(1, *(len(item.regions) for item in self.regions.layouts)), keys)
        for region in range(len(self.regions.layouts[layout].regions)):
            tokens = self.regions.tokens(layout, region, keys)
            words[region, tokens] = 1 / max(1, len(tokens))
        return words
