"""Space-time attention: mix in cross-attention to each object's own description inside the object's region.

The method of arXiv 2304.03869. With x the cells of a cross-attention layer, m_i the region of object i and w_i its
weight in this step, the output in the rows of the prompt becomes

    (1 - sum_i w_i m_i) * attn(x, global) + sum_i w_i m_i * attn(x, local_i),   w_i in [0, 1],

where the weights of regions that cover the same cell are scaled down to a sum of 1 if they exceed it.
``mix="released"`` is the form of the published code, with unbounded coefficients c_i and the negative prompt's row:

    attn(x, global) + sum_i c_i m_i * (attn(x, local_i) - attn(x_negative, negative)).

The weight of each object in each step may be constant, fade out, or be given, as by ``optimize_weights``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from localctl.cells import CELL_MODES
from localctl.control.base import BoundControl, CallContext, Mixture, check_choice, check_strength, check_window
from localctl.control.mixing import Pair, TextMixer
from localctl.control.regions import BoundRegionControl, BoundRegions, RegionControl, once_per_call
from localctl.denoisers.base import AttentionLayer
from localctl.layout import Layout, Region
from localctl.phrases import DETERMINERS
from localctl.prompt_syntax import WeightedText
from localctl.prompt_weights import Text

MIXES = ("convex", "released")
SCHEDULES = ("constant", "linear", "cosine")
_RELEASED_SUM = 5.0  # the published coefficients start at 5 / number of objects


@dataclass(frozen=True)
class SpaceTimeSettings:
    """The settings of space-time attention: the regions' descriptions and their weights over the steps.

    Args:
        weight: of every object, multiplied by its region's strength; in [0, 1] with the convex mix, 0 = no effect.
            None: 0.5 for ``convex``, 5 / number of objects for ``released``.
        schedule: ``constant``; ``linear`` or ``cosine`` fade from ``weight`` at ``start`` to 0 at ``end``.
        template: makes a description from an object's name, which replaces ``{}``. The name is the region's phrase, or
            its prompt where that is only the phrase with an article; any other prompt is used unchanged. As published,
            "a photo of {}"; "{}" gives the bare name.
        mix: ``convex`` (the paper's equation) or ``released`` (the published code's form; needs guidance).
        start, end: active in the outer steps from start up to, not including, end (fractions of the steps); each
            region's own window applies within it.
        mask_resize: how regions are resized to each layer's grid, as for :class:`~localctl.control.RegionBias`;
            ``nearest`` is the published form for discs (:meth:`localctl.layout.Region.disc`).
        hide_phrases: in steps with a mixed-in description, encode the global prompt without the phrases, so that the
            objects come only from their descriptions, inside their regions.

    Raises:
        ValueError: an unknown mix, schedule or mask_resize, an invalid window or template, a weight out of range.
    """

    weight: float | None = None
    schedule: str = "constant"
    mix: str = "convex"
    start: float = 0.0
    end: float = 1.0
    mask_resize: str = "area"
    hide_phrases: bool = False
    template: str = "a photo of {}"

    def __post_init__(self) -> None:
        check_window(self.start, self.end)
        for name, known in (("mix", MIXES), ("schedule", SCHEDULES), ("mask_resize", CELL_MODES)):
            check_choice(name, getattr(self, name), known)
        if self.weight is not None:
            check_strength("weight", self.weight)
            if self.mix == "convex" and not 0 <= self.weight <= 1:
                raise ValueError(
                    f"The weight of a convex mix must lie in [0, 1], not {self.weight}; 1 uses the description alone."
                )
        if not isinstance(self.template, str) or self.template.count("{}") != 1:
            raise ValueError(f"The template must hold {{}} once, in place of the name, not {self.template!r}.")

    def step_weights(self, layout: Layout, num_steps: int) -> Tensor:
        """Return the weight of every region in every step, (num_steps, regions) float32; an optimisation starts here.

        It follows from ``weight``, ``schedule``, the strengths and the windows; 0 for regions without a description.
        """
        count = sum(description(region) is not None for region in layout.regions)
        weight = self.weight
        if weight is None:
            weight = 0.5 if self.mix == "convex" else _RELEASED_SUM / max(1, count)
        strengths = torch.tensor([region.strength * bool(description(region)) for region in layout.regions])
        fade = torch.tensor([self._fade(step / num_steps) for step in range(num_steps)])
        return weight * fade[:, None] * strengths[None] * self.active(layout, num_steps)

    def active(self, layout: Layout, num_steps: int) -> Tensor:
        """Return (num_steps, regions) float32: 1 in the steps within the control's and the region's window, else 0."""
        return torch.tensor(
            [
                [
                    float(self.start <= step / num_steps < self.end and region.within(step, num_steps))
                    for region in layout.regions
                ]
                for step in range(num_steps)
            ]
        ).reshape(num_steps, len(layout.regions))

    def _fade(self, fraction: float) -> float:
        """Return the schedule's factor in [0, 1] at this fraction of the steps."""
        progress = min(max((fraction - self.start) / (self.end - self.start), 0.0), 1.0)
        if self.schedule == "linear":
            return 1 - progress
        return (1 + math.cos(math.pi * progress)) / 2 if self.schedule == "cosine" else 1.0


@dataclass(frozen=True)
class SpaceTimeAttention(SpaceTimeSettings, RegionControl):
    """Mix each region's local description into the region: its own ``prompt``, else its ``phrase`` in the template.

    Args:
        weight, schedule, mix, start, end, mask_resize, hide_phrases, template: as for :class:`SpaceTimeSettings`.
        weights: a tensor (steps, regions) that replaces weight, schedule and strengths, for one layout; or a sequence
            of such tensors, one per layout. The call must make that many steps. Windows still apply.

    Raises:
        ValueError: as for :class:`SpaceTimeSettings`; weights out of range; when attached, weights that do not fit the
            layouts; when sampling, another number of steps, or ``released`` without guidance.
    """

    weights: Tensor | Sequence[Tensor] | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        for tensor in self._given() or ():
            _check_weights(tensor, self.mix)

    def _given(self) -> list[Tensor] | None:
        """Return the weights, one tensor per layout."""
        if self.weights is None:
            return None
        return [self.weights] if isinstance(self.weights, Tensor) else list(self.weights)

    def bind(self, pipe: DiffusionPipeline, layouts: Sequence[Layout]) -> BoundControl:
        given = self._given()
        if given is None and self.mix == "convex":
            self.check_strengths(layouts)
        if given is not None and len(given) != len(layouts):
            raise ValueError(
                f"The weights are for {len(given)} layouts but {len(layouts)} are attached; give one tensor per layout."
            )
        for tensor, layout in zip(given or (), layouts, strict=False):
            if tensor.shape[1] != len(layout.regions):
                raise ValueError(
                    f"The weights are for {tensor.shape[1]} regions but the layout {layout.prompt!r} has "
                    f"{len(layout.regions)}; give one column per region."
                )
        return _BoundSpaceTime(self, BoundRegions(pipe, layouts, self.mask_resize), given)


def description(region: Region) -> str | None:
    """Return the description of a region before any template: its prompt, else its phrase, else None."""
    return region.prompt or region.phrase


def local_text(region: Region, template: str) -> str | None:
    """Return the local description of a region, with a bare name put in ``template``; None for one without words."""
    own, phrase = region.prompt, region.phrase
    if own is None or (phrase is not None and _bare_words(own) == _bare_words(phrase)):
        name = own or phrase
        return None if name is None else template.replace("{}", name)
    return own


def _bare_words(text: str) -> list[str]:
    """Return the words of ``text`` in lower case, without leading articles, numbers and the like."""
    words = text.lower().split()
    while len(words) > 1 and (words[0] in DETERMINERS or words[0].isdigit()):
        words = words[1:]
    return words


def _check_weights(weights: Any, mix: str) -> None:
    if not isinstance(weights, Tensor) or weights.ndim != 2 or not weights.is_floating_point():
        given = tuple(weights.shape) if isinstance(weights, Tensor) else repr(weights)
        raise ValueError(f"The weights of SpaceTimeAttention must be a float tensor (steps, regions), not {given}.")
    values = weights.detach()
    if not bool(values.isfinite().all()):
        raise ValueError("The weights of SpaceTimeAttention hold values that are not finite; give finite ones.")
    if mix == "convex" and not bool(((values >= 0) & (values <= 1)).all()):
        raise ValueError(
            'The weights of SpaceTimeAttention must lie in [0, 1]; for unbounded coefficients, use mix="released".'
        )


class _BoundSpaceTime(BoundRegionControl[SpaceTimeAttention]):
    keep_phrases = False

    def __init__(self, control: SpaceTimeAttention, regions: BoundRegions, given: Sequence[Tensor] | None) -> None:
        super().__init__(control, regions)
        # Read at each step on the host; weights that are optimised stay where their graph is.
        self.given = None if given is None else [w if w.requires_grad else w.detach().cpu() for w in given]
        self.mixer = TextMixer(regions)
        self._tables: dict[tuple[int, int], Tensor] = {}  # (layout, steps) -> (steps, regions)

    def begin_call(self, arguments: Mapping[str, Any]) -> None:
        super().begin_call(arguments)
        texts = {key: self._text(key, region) for key, region in self.regions if description(region) is not None}
        encoded = self.regions.encode(texts, arguments)
        self.mixer.begin_call(encoded)

    def _text(self, key: tuple[int, int], region: Region) -> Text:
        """Return the local description; a phrase in the template keeps the weights that it has in the prompt."""
        words = self.regions.phrase(*key) if region.prompt is None else ""
        if isinstance(words, WeightedText):
            before, after = map(WeightedText.plain, self.control.template.split("{}"))
            return before + words + after
        text = local_text(region, self.control.template)
        assert text is not None
        return text

    def _active(self, context: CallContext) -> set[int]:
        return {pair.region[0] for pair in self._pairs(context)[0]}

    def attends(self, context: CallContext, layer: AttentionLayer) -> bool:
        return layer.cross and bool(self._pairs(context)[0])

    def mixture(self, context: CallContext, layer: AttentionLayer) -> Mixture:
        pairs, weights = self._pairs(context)
        if self.control.mix == "released" and all(context.conditional):
            raise ValueError(
                'mix="released" subtracts the attention of the negative prompt, which this call of the denoiser '
                "does not have; generate with a guidance_scale above 1 and no LayoutGuidance, or choose "
                'mix="convex".'
            )
        return self.mixer.mixture(context, layer, pairs, weights, convex=self.control.mix == "convex")

    @once_per_call
    def _pairs(self, context: CallContext) -> tuple[list[Pair], Tensor]:
        """Return the pairs of rows of the prompt and regions with a weight in this step, and the weights (pairs,).

        The tensor is the same one for all layers of a call of the denoiser.
        """
        first = context.guided_rows.start
        less = 0
        if self.control.mix == "released":  # there, the negative prompt's attention is replaced
            less = first or -len(context.guided_layouts)
        pairs = [
            Pair(row, row - less, (layout, region))
            for row, layout in enumerate(context.guided_layouts, start=first)
            for region in self._wanted(layout, context)
        ]
        weights = self._weights_of(tuple(pair.region for pair in pairs), context) if pairs else torch.empty(0)
        return pairs, weights

    def _weights_of(self, regions: tuple[tuple[int, int], ...], context: CallContext) -> Tensor:
        """Return the weight of each (layout, region) in this step, (pairs,) on the call's device."""
        count = context.num_steps

        def at(step: int) -> Tensor:
            return torch.stack([self._weights(layout, step, count)[region] for layout, region in regions])

        if self.given is not None and any(self.given[layout].requires_grad for layout, _ in regions):
            return at(context.step)
        table = self.regions.cached(  # (steps,pairs)
            ("weights", regions, count, context.device),
            lambda: torch.stack([at(step) for step in range(count)]).to(context.device),
        )
        return table[context.step]

    def _wanted(self, layout: int, context: CallContext) -> list[int]:
        """Return the regions of a layout to mix in during this step."""
        weights = self._weights(layout, context.step, context.num_steps)
        # Weights that are optimised stay in the mixture even at 0, so that they receive gradients.
        used = self._table(layout, context.num_steps)[context.step] if weights.requires_grad else weights
        return [index for index, value in enumerate(used.tolist()) if value and (layout, index) in self.mixer.texts]

    def _weights(self, layout: int, step: int, num_steps: int) -> Tensor:
        """Return the weights (regions,) in a step; they require gradients if the given weights do."""
        row = self._table(layout, num_steps)[step]
        if self.given is None:
            return row
        weights = self.given[layout]
        if len(weights) != num_steps:
            raise ValueError(
                f"The weights are for {len(weights)} steps but this call makes {num_steps}; generate with "
                f"{len(weights)} steps."
            )
        return weights[step] * row.to(weights)

    def _table(self, layout: int, num_steps: int) -> Tensor:
        """Return (num_steps, regions): the weights by the settings; with given ones, 1 inside the windows, else 0."""
        key = (layout, num_steps)
        if key not in self._tables:
            make = self.control.step_weights if self.given is None else self.control.active
            self._tables[key] = make(self.regions.layouts[layout], num_steps)
        return self._tables[key]
