"""Shared code of the region methods: settings, the masks and tokens of each row's regions, texts of regions."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from localctl.cells import CELL_MODES
from localctl.control.attention import HIDE
from localctl.control.base import BoundControl, CallContext, Control, check_choice, check_window
from localctl.denoisers import denoiser_of
from localctl.denoisers.base import AttentionLayer
from localctl.layout import Layout, Region
from localctl.prompt_syntax import WeightedText, read_weights
from localctl.prompt_weights import Text, length_of_call, reads_weights

Key = TypeVar("Key", bound=Hashable)
Kept = TypeVar("Kept")


def once_per_call(method: Callable[[Any, CallContext], Kept]) -> Callable[[Any, CallContext], Kept]:
    """Cache what a method of a bound control returns for the running call of the denoiser, whose layers all ask."""
    name = f"_last_{method.__name__}"

    @functools.wraps(method)
    def cached(self: Any, context: CallContext) -> Kept:
        last = vars(self).get(name)
        if last is None or last[0] is not context:
            last = vars(self)[name] = (context, method(self, context))
        return last[1]

    return cached


class RegionControl(Control):
    """A control that steers the regions of a layout: a frozen dataclass with these settings and further ones.

    start, end: active in the outer steps from start up to, not including, end (fractions of the steps); each region's
        own window applies within it.
    mask_resize: how regions are resized to each layer's grid, one of ``CELL_MODES``.
    hide_phrases: see :class:`HiddenPhrases`.
    """

    start: float
    end: float
    mask_resize: str
    hide_phrases: bool = False

    def __post_init__(self) -> None:
        check_window(self.start, self.end)
        check_choice("mask_resize", self.mask_resize, CELL_MODES)

    def check_strengths(self, layouts: Sequence[Layout], factor: float = 1.0) -> None:
        """Raise a ValueError unless ``factor`` times the strength of each region lies in [0, 1]."""
        for region in (region for layout in layouts for region in layout.regions):
            if not 0 <= factor * region.strength <= 1:
                raise ValueError(
                    f"The strength of the region {region.name} must lie in [0, 1] for {type(self).__name__}, "
                    f"not {region.strength}."
                )


class BoundRegions:
    """The regions of the layouts of one ``attach``; masks and maps are cached.

    ValueError as for :func:`localctl.tokens.token_positions`.
    """

    def __init__(self, pipe: Any, layouts: Sequence[Layout], mask_resize: str) -> None:
        self.denoiser = denoiser_of(pipe)
        self.weighted = reads_weights(pipe)
        self.layouts = tuple(layouts)
        self.mask_resize = mask_resize
        self.positions = [self.denoiser.token_positions(layout) for layout in layouts]
        self._masks: dict[tuple[int, tuple[int, int]], Tensor] = {}
        self._cache: dict[Hashable, Any] = {}

    def __iter__(self) -> Iterator[tuple[tuple[int, int], Region]]:
        """Yield ((layout, index), region) for all regions of all layouts."""
        for layout, scene in enumerate(self.layouts):
            for index, region in enumerate(scene.regions):
                yield (layout, index), region

    @property
    def most(self) -> int:
        """The largest number of regions of a layout."""
        return max(len(layout.regions) for layout in self.layouts)

    def masks(self, layout: int, layer: AttentionLayer) -> Tensor:
        """Return each region of a layout on the layer's grid: (n, Q) float32 on the CPU."""
        key = (layout, layer.size)
        if key not in self._masks:
            self._masks[key] = self.layouts[layout].masks(layer.size, self.mask_resize).flatten(1)
        return self._masks[key]

    def strengths(self, layout: int, context: CallContext) -> tuple[float, ...]:
        """Return the strength of each region in this step: its own within its window, else 0."""
        regions = self.layouts[layout].regions
        return tuple(region.strength if region.within(context.step, context.num_steps) else 0.0 for region in regions)

    def phrase_strengths(self, layout: int, context: CallContext) -> tuple[float, ...]:
        """Return the strengths as :meth:`strengths` does, but 0 for regions without a phrase."""
        pairs = zip(self.layouts[layout].regions, self.strengths(layout, context), strict=True)
        return tuple(strength if region.phrase else 0.0 for region, strength in pairs)

    def tokens(self, layout: int, region: int, keys: int) -> list[int]:
        """Return the positions of a region's phrase among ``keys`` tokens."""
        return [position for position in self.positions[layout][region] if position < keys]

    def prompt(self, layout: int) -> WeightedText:
        """Return the prompt of a layout as the pipeline reads it."""
        own = self.layouts[layout].prompt
        return read_weights(own) if self.weighted else WeightedText.plain(own)

    def phrase(self, layout: int, region: int) -> Text:
        """Return the phrase of a region; with its weights, if its words have any in the prompt."""
        scene = self.layouts[layout]
        own = scene.regions[region]
        assert own.phrase is not None
        prompt, span = self.prompt(layout), scene.characters(own)
        words = prompt.cut(*prompt.span(span)) if span else prompt
        return words if words.is_weighted else own.phrase

    def encode(self, texts: Mapping[Key, Text], arguments: Mapping[str, Any]) -> dict[Key, Tensor]:
        """Return the embeddings (K, C) of each text.

        ``arguments``: of the running call's ``encode_prompt``, which give device and settings.
        """
        encoded = self.denoiser.encode_texts(list(texts.values()), arguments) if texts else ()
        return dict(zip(texts, encoded, strict=True))

    def cached(self, key: Hashable, make: Callable[[], Kept]) -> Kept:
        """Return what ``make`` returned for this key; the last 128 results are cached."""
        if key not in self._cache:
            # A control may need it for gradients later, in which tensors of inference mode cannot take part.
            with torch.inference_mode(False):
                made = make()
            while len(self._cache) >= 128:  # enough for the layers and windows of a run; runs of other sizes may follow
                self._cache.pop(next(iter(self._cache)))
            self._cache[key] = made
        return self._cache[key]

    def per_row(
        self, context: CallContext, key: tuple[Any, ...], make: Callable[[int], Tensor | None]
    ) -> Tensor | None:
        """Stack ``make(layout)`` of each row with the prompt: (n, ...) on the call's device; None if all are None.

        Rows for which ``make`` returns None are zero. Results are cached by ``key``, which must hold all that a result
        depends on apart from rows and device.
        """

        def stack() -> Tensor | None:
            made = {layout: make(layout) for layout in set(context.guided_layouts)}
            some = next((tensor for tensor in made.values() if tensor is not None), None)
            if some is None:
                return None
            empty = torch.zeros_like(some)
            rows = [made[layout] for layout in context.guided_layouts]
            return torch.stack([empty if row is None else row for row in rows]).to(context.device)

        return self.cached((key, context.guided_layouts, context.device), stack)


def without_phrases(layout: Layout, prompt: WeightedText | None = None) -> Text:
    """Return the prompt with the phrases of all regions removed.

    ``prompt``: the layout's prompt as the pipeline reads it; None: as text. With weights, the result has some, too.
    """
    prompt = prompt or WeightedText.plain(layout.prompt)
    spans = [prompt.span(span) for region in layout.regions if (span := layout.characters(region)) is not None]
    rest = prompt.without(spans)
    return rest if rest.is_weighted else " ".join(rest.text.split())


class HiddenPhrases:
    """Hides the objects from all tokens except those of their phrases.

    In a text encoder, each token's embedding depends on all tokens before it, and those of the end token and the
    padding on the whole prompt, so that cells which attend to no phrase still read of every object. Here all
    embeddings except the phrases' come from the prompt without the phrases; with ``keep=False``, all of them.
    """

    def __init__(self, regions: BoundRegions, keep: bool = True) -> None:
        self.regions, self.keep = regions, keep
        self._texts: dict[int, Tensor] = {}  # by layout: (K, C) of its prompt without phrases
        self._last: tuple[Any, Tensor, Tensor] | None = None  # of the last call: rows, text before and after hiding

    def begin_call(self, arguments: Mapping[str, Any]) -> None:
        """Encode the prompts of this call's layouts without their phrases."""
        scenes = enumerate(self.regions.layouts)
        texts = {
            index: without_phrases(layout, self.regions.prompt(index)) for index, layout in scenes if layout.regions
        }
        self._texts = self.regions.encode(texts, arguments)
        self._last = None
        if self.regions.weighted and self._texts:
            self._fill_up(arguments)

    def replace(self, context: CallContext, text: Tensor, active: Collection[int]) -> Tensor | None:
        """Return ``text`` (R, K, C) with the phrases hidden in the prompt rows of the ``active`` layouts, or None.

        None if there is no such row. While the arguments stay the same, so does the returned tensor.
        """
        hiding = tuple(layout in active and layout in self._texts for layout in context.guided_layouts)
        if not any(hiding):
            return None
        rows = (context.guided_rows, context.guided_layouts, hiding)
        if self._last is None or self._last[0] != rows or self._last[1] is not text:
            self._last = (rows, text, self._hide(context, text, hiding))
        return self._last[2]

    def _fill_up(self, arguments: Mapping[str, Any]) -> None:
        """Give the texts as many tokens as the call's prompts have, with encodings of the empty text."""
        missing = length_of_call(self.regions.denoiser.pipe, arguments) - len(next(iter(self._texts.values())))
        if missing > 0:
            empty = self.regions.encode({"": ""}, arguments)[""]
            filled = empty.repeat(missing // len(empty), 1)
            self._texts = {index: torch.cat([text, filled]) for index, text in self._texts.items()}

    def _filled(self, hidden: Tensor, keys: int) -> Tensor:
        """Return a text (K, C) whose padding is masked out in calls, with as many tokens as the call's, by repeating
        its end token: the call's own mask then hides as many as before."""
        missing = keys - len(hidden)
        if missing <= 0 or self.regions.denoiser.weighs_prompts:
            return hidden
        return torch.cat([hidden, hidden[-1:].expand(missing, -1)])

    def _hide(self, context: CallContext, text: Tensor, hiding: tuple[bool, ...]) -> Tensor:
        changed = text.clone()
        for index, layout in enumerate(context.guided_layouts):
            if not hiding[index]:
                continue
            hidden = self._filled(self._texts[layout].to(text), text.shape[1])
            others = torch.ones(min(text.shape[1], len(hidden)), dtype=torch.bool)
            for region in range(len(self.regions.layouts[layout].regions) if self.keep else 0):
                others[self.regions.tokens(layout, region, len(others))] = False
            changed[context.guided_rows.start + index, : len(others)][others] = hidden[: len(others)][others]
        return changed


Settings = TypeVar("Settings", bound=RegionControl)


class BoundRegionControl(BoundControl, Generic[Settings]):
    """A region method on one pipeline: its settings and regions; hides the phrases while it is active, if set so.

    keep_phrases: whether hiding leaves the phrases' own tokens as they are.
    """

    keep_phrases = True

    def __init__(self, control: Settings, regions: BoundRegions) -> None:
        self.control, self.regions = control, regions
        self.hidden = HiddenPhrases(regions, self.keep_phrases) if control.hide_phrases else None

    def begin_call(self, arguments: Mapping[str, Any]) -> None:
        if self.hidden is not None:
            self.hidden.begin_call(arguments)

    def text(self, context: CallContext, text: Tensor) -> Tensor | None:
        return None if self.hidden is None else self.hidden.replace(context, text, self._active(context))

    def token_bias(self, context: CallContext, layer: AttentionLayer, keys: int) -> Tensor | None:
        if self.hidden is None or not self.keep_phrases or not self._active(context):
            return None
        active = tuple(layout in self._active(context) for layout in context.guided_layouts)

        def make(layout: int) -> Tensor | None:
            return self.hidden_columns(layout, keys) if layout in self._active(context) else None

        found = self.regions.per_row(context, ("hidden columns", keys, active), make)
        return None if found is None else found[:, None]

    def hidden_columns(self, layout: int, keys: int) -> Tensor:
        """Return a bias (K, K) that hides each phrase from all tokens but its own."""
        bias = torch.zeros(keys, keys)
        for region in range(len(self.regions.layouts[layout].regions)):
            own = self.regions.tokens(layout, region, keys)
            others = torch.ones(keys, dtype=torch.bool)
            others[own] = False
            bias[others.nonzero(), torch.tensor(own, dtype=torch.int64)] = HIDE
        return bias

    def within(self, context: CallContext) -> bool:
        """Return whether this step is in the control's window."""
        return context.within(self.control.start, self.control.end)

    @once_per_call
    def _active(self, context: CallContext) -> set[int]:
        """Return the layouts that are steered in this step."""
        if not self.within(context):
            return set()
        return {layout for layout in set(context.guided_layouts) if self.steers(layout, context)}

    def steers(self, layout: int, context: CallContext) -> bool:
        """Return whether a layout is steered in this step, which is in the control's window."""
        return any(self.regions.strengths(layout, context))
