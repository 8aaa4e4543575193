"""Settings of the adapter of a training run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any

from pydantic import Field

from localctl.base_specs import BaseSpec
from localctl.records import Finite, Positive, Rate, record
from localctl.settings import MAX_MARGIN, AdapterType, ConditionSpace, MaskResize

# What null stands for in an adapter that continues no other one of ours.
MASKING = {"mask_condition": False, "mask_features": True, "dim_condition": False}


@record("adapter")
@dataclass(kw_only=True)
class AdapterConfig:
    """Shape of the inner T2I-Adapter, and how its features are masked (``LocalAdapter`` documents each option).

    null: as in the adapter to continue from, or else what fits the base: ``full_adapter`` for SD 1.x and 2.x,
    ``full_adapter_xl`` for SDXL, the U-Net's channels, 2 residual blocks, downscale factor 8 (SDXL: 16); a
    ``token_adapter`` for transformers.

    adapter_type: full_adapter, full_adapter_xl or light_adapter, or token_adapter for transformers; null = what fits
        the base.
    channels: of each feature level, like [320, 640, 1280, 1280]; null = the U-Net's, or for a transformer its width, 8
        times, for as many blocks.
    num_res_blocks: residual blocks per level; null = 2, or 1 of a token_adapter.
    downscale_factor: pixels per cell of the finest level; null = 8 (SDXL: 16), or the side of a token.
    token_width: channels of a token_adapter between its patches and its residuals; null = 384.
    condition_space: how a token_adapter gets the condition, as pixels or as latents of the base's VAE; null = pixels.
    mask_resize: how the mask is resized to each feature map's grid: area, nearest, inside or cover; null = the base's
        own.
    mask_condition: also blank the condition outside the mask; null = false.
    mask_features: multiply every feature map by the mask; false = a plain T2I-Adapter; null = true.
    dim_condition: with mask_condition, a soft mask dims the condition, as published, instead of blanking it outside;
        null = false.
    level_weights: a factor of each level's features, finest first; null = all 1.
    unconditional_scale: factor of the features beside the negative prompt when images are generated, saved with the
        adapter; 0 = control is stronger, as guidance multiplies it; null = the base's own, 0 for micro, 1 for others.
    mask_margin: by how many pixels the mask is grown before it masks the features, saved with the adapter; null = the
        base's own, 8 for micro, 0 for others.
    """

    adapter_type: AdapterType | None = None
    channels: Annotated[tuple[Positive, ...], Field(min_length=1)] | None = None
    num_res_blocks: Positive | None = None
    downscale_factor: Positive | None = None
    token_width: Positive | None = None
    condition_space: ConditionSpace | None = None
    mask_resize: MaskResize | None = None
    mask_condition: bool | None = None
    mask_features: bool | None = None
    dim_condition: bool | None = None
    level_weights: tuple[Rate, ...] | None = None
    unconditional_scale: Finite | None = None
    mask_margin: Annotated[int, Field(ge=0, le=MAX_MARGIN)] | None = None

    def __post_init__(self) -> None:
        if self.mask_margin and self.mask_features is False:
            raise ValueError(
                f"adapter.mask_margin={self.mask_margin} grows the mask of the features, and adapter.mask_features is "
                "false; leave one of them out."
            )
        if self.dim_condition and self.mask_condition is False:
            raise ValueError(
                "adapter.dim_condition has no effect unless the condition is masked; set adapter.mask_condition."
            )
        if self.level_weights is not None and not any(self.level_weights):
            raise ValueError("adapter.level_weights are all 0, so the adapter would have no effect; set one above 0.")

    def filled(self, **values: Any) -> AdapterConfig:
        """Return the settings with these in the place of null."""
        return replace(self, **{name: value for name, value in values.items() if getattr(self, name) is None})

    def of_new(self, own: BaseSpec) -> AdapterConfig:
        """Return the settings of a new adapter, or one that continues a T2IAdapter, with what null stands for."""
        found = self.filled(**MASKING)
        of_plain = {"mask_margin": 0, "unconditional_scale": 1.0}  # a T2IAdapter, used as others use it
        return found.filled(**own.adapter | ({} if found.mask_features else of_plain))
