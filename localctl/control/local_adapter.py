"""The trained control: a LocalAdapter's features, added to the U-Net's down blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from localctl.adapter import LocalAdapter
from localctl.control.base import BoundControl, CallContext, Control, check_strength, check_window
from localctl.control.control_images import check_counts, check_mask, check_size, rows_of
from localctl.denoisers import denoiser_of
from localctl.denoisers.base import Denoiser
from localctl.inputs import ImageField, as_condition, as_mask
from localctl.layout import Layout


@dataclass(eq=False)
class LocalAdapterControl(Control):
    """Follow ``condition`` inside ``mask``.

    Args:
        adapter: the trained adapter; it stays on its own device and in its own dtype.
        condition: a PIL image, an array (H, W) or (H, W, C), or a tensor (C, H, W) for all layouts, or one per layout:
            a list, or a tensor (n, C, H, W). Numbers in [0, 1]; read as float32 (n, C, H, W).
        mask: the same with one channel, 1 or white = controlled; read as float32 (n, 1, H, W). n may be 1 or the number
            of layouts.
        weight: factor of the features, or one for each level of them, finest first. Several controls on one U-Net add
            up.
        start, end: active in the outer steps from start up to, not including, end (fractions of all steps).

    Raises:
        ValueError: shapes, sizes, channels, ranges or the window do not fit.
    """

    adapter: LocalAdapter
    condition: ImageField = ImageField()
    mask: ImageField = ImageField()
    weight: float | Sequence[float] = 1.0
    start: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.adapter, LocalAdapter):
            raise ValueError(
                f"The adapter is a {type(self.adapter).__name__}, not a LocalAdapter; "
                "wrap a T2IAdapter with LocalAdapter.from_t2iadapter."
            )
        check_window(self.start, self.end)
        self.weight = _checked_weight(self.weight, self.adapter.levels)
        channels = self.adapter.channels_of_condition
        self.condition, self.mask = as_condition(self.condition, channels), as_mask(self.mask)
        if self.condition.shape[1] != channels:
            raise ValueError(
                f"The condition has {self.condition.shape[1]} channels but the adapter was made for {channels}; "
                "use the kind of condition it was trained with."
            )
        check_mask(self.mask, self.condition)

    def bind(self, pipe: DiffusionPipeline, layouts: Sequence[Layout]) -> BoundControl:
        check_counts(self.condition, self.mask, layouts)
        return _BoundLocalAdapter(self, denoiser_of(pipe))


def _checked_weight(weight: float | Sequence[float], levels: int) -> float | tuple[float, ...]:
    """The weight, or those of the levels as a tuple. ValueError unless they are finite numbers, one per level."""
    if not isinstance(weight, Sequence):
        check_strength("weight", weight)
        return weight
    weights = tuple(weight)
    if len(weights) != levels:
        raise ValueError(
            f"There are {len(weights)} weights for {levels} levels of features; give one weight for all or one each."
        )
    for one in weights:
        check_strength("weight", one)
    return weights


class _BoundLocalAdapter(BoundControl):
    """Runs the adapter once and keeps the features while the same layouts are drawn."""

    def __init__(self, control: LocalAdapterControl, denoiser: Denoiser) -> None:
        self.control = control
        self.denoiser = denoiser
        self.shared = control.condition.shape[0] == control.mask.shape[0] == 1  # one set of features for all layouts
        self._key: tuple[object, ...] | None = None
        self._features: list[Tensor] = []

    def down_residuals(self, context: CallContext) -> list[Tensor] | None:
        if not context.within(self.control.start, self.control.end):
            return None
        drawn = self._drawn(context)
        key = (drawn, context.device, context.dtype, context.image_size, self.control.weight)
        if key != self._key:
            self._features = self._compute(drawn, context)
            self._key = key
        rows = [0 if self.shared else drawn.index(layout) for layout in context.layout_of_row]
        index = torch.tensor(rows, device=context.device)
        return [feature.index_select(0, index) for feature in self._features]  # always a copy

    def _drawn(self, context: CallContext) -> tuple[int, ...]:
        """The layouts whose features this call needs."""
        return (0,) if self.shared else tuple(sorted(set(context.layout_of_row)))

    @torch.no_grad()
    def _compute(self, drawn: tuple[int, ...], context: CallContext) -> list[Tensor]:
        control, adapter = self.control, self.control.adapter
        check_size(control.condition, context.image_size)
        condition, mask = (rows_of(tensor, drawn) for tensor in (control.condition, control.mask))
        x = torch.cat([condition, mask], dim=1).to(adapter.device, adapter.dtype)  # (n, C+1, H, W)
        features = adapter(x)
        self._check_shapes([tuple(feature.shape[1:]) for feature in features], context.latent_size)
        weights = control.weight if isinstance(control.weight, tuple) else [control.weight] * len(features)
        return [
            (feature * weight).to(context.device, context.dtype)
            for feature, weight in zip(features, weights, strict=True)
        ]

    def _check_shapes(self, features: list[tuple[int, ...]], latent_size: tuple[int, int]) -> None:
        wanted = self.denoiser.residual_shapes(latent_size)
        if features != wanted[: len(features)]:
            raise ValueError(
                f"The adapter makes features of shapes {features} but the {self.denoiser.name} takes {wanted}; "
                "this adapter belongs to another kind of base."
            )
