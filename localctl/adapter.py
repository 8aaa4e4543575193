"""The local adapter: a T2I-Adapter that only speaks inside a mask (arXiv 2602.01991, section on masked features)."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin, T2IAdapter
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from localctl.masks import MASK_RESIZE, mask_feature
from localctl.settings import ADAPTER_TYPES
from localctl.sizes import shown

# A config may be anybody's, and modules are built by it. Published adapters have up to 8e7 weights in 4 or 5 levels.
MAX_WEIGHTS, MAX_LEVELS, MAX_BLOCKS, MAX_FACTOR = 500_000_000, 8, 64, 64


class LocalAdapter(ModelMixin, ConfigMixin):
    """A diffusers ``T2IAdapter`` whose features are multiplied by a mask.

    Training and sampling both call this module, so the masking cannot differ between them.

    Args:
        in_channels: C, the channels of the condition without the mask.
        channels, num_res_blocks, downscale_factor, adapter_type: as for ``T2IAdapter``.
        mask_resize: how the mask comes to each feature's own (h, w): ``area``, ``nearest``, ``inside`` or ``cover``.
        mask_features: multiply the features by the mask, which is what makes an adapter local. False is for baselines:
            a plain adapter, or with ``mask_condition`` one that is masked at its input alone; then features outside the
            mask are not 0, and an all-zero mask is not the base.
        mask_condition: blank the condition where the mask is 0, too. Then nothing outside can change anything; without
            it, convolutions carry some of what is outside over the border of the mask.
        dim_condition: with ``mask_condition``, multiply the condition by the mask, as published, so that a soft mask
            dims it. False blanks it where the mask is 0 and keeps it whole elsewhere: a soft mask already scales the
            features.
        level_weights: a factor of each level's features, finest level first; part of the adapter, so training and
            sampling use the same. None: all 1.
        condition: how conditions were made in training (``kind`` and its options); kept for the record and as the
            default while sampling.
        base: name, id or folder of the base the adapter was trained for.

    Raises:
        ValueError: as for :func:`check_shape`; an unknown ``mask_resize``.
    """

    config_name = "config.json"

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        channels: Sequence[int] = (320, 640, 1280, 1280),
        num_res_blocks: int = 2,
        downscale_factor: int = 8,
        adapter_type: str = "full_adapter",
        mask_resize: str = "area",
        mask_condition: bool = False,
        mask_features: bool = True,
        condition: dict[str, Any] | None = None,
        base: str | None = None,
        dim_condition: bool = False,
        level_weights: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        check_shape(in_channels, channels, num_res_blocks, downscale_factor, adapter_type)
        if mask_resize not in MASK_RESIZE:
            raise ValueError(f"Unknown mask_resize {mask_resize!r}; choose one of {', '.join(MASK_RESIZE)}.")
        for weight in level_weights or ():
            if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight < math.inf:
                raise ValueError(f"level_weights are finite numbers from 0, one for each level, not {level_weights!r}.")
        self.adapter = T2IAdapter(
            in_channels=in_channels,
            channels=list(channels),
            num_res_blocks=num_res_blocks,
            downscale_factor=downscale_factor,
            adapter_type=adapter_type,
        )

    @property
    def channels_of_condition(self) -> int:
        """C: the mask is one channel more."""
        return self.config["in_channels"]

    @property
    def size_multiple(self) -> int:
        """Height and width of the condition must be multiples of this many pixels."""
        return self.config["downscale_factor"]

    def forward(self, x: Tensor) -> list[Tensor]:
        """Condition and mask -> masked features.

        Args:
            x: (B, C + 1, H, W) in [0, 1], the last channel is the mask. H and W: multiples of ``size_multiple``.

        Returns:
            One feature (B, c_i, h_i, w_i) per level of the U-Net, with ``mask_features`` exactly 0 where the resized
            mask is 0. Coarser levels halve with ceil, as the U-Net does.

        Raises:
            ValueError: wrong number of channels, or a size that does not fit.
        """
        self._check(x)
        condition, mask = x[:, :-1], x[:, -1:]  # (B,C,H,W), (B,1,H,W)
        if self.config["mask_condition"]:
            seen = condition * mask if self.config["dim_condition"] else condition
            condition = torch.where(mask > 0, seen, torch.zeros_like(condition))
        features = list(self.adapter(condition))
        if self.config["mask_features"]:
            features = [mask_feature(f, mask, self.config["mask_resize"]) for f in features]
        weights = self.config["level_weights"]
        if weights is None:
            return features
        check_level_weights(weights, len(features))
        return [feature * weight for feature, weight in zip(features, weights, strict=True)]

    @property
    def levels(self) -> int:
        """How many levels of features it makes: one for each of ``channels``, and of a light adapter one more."""
        return len(self.adapter.adapter.body)

    def _check(self, x: Tensor) -> None:
        wanted = self.channels_of_condition + 1
        if x.ndim != 4 or x.shape[1] != wanted:
            raise ValueError(
                f"The adapter takes (B, {wanted}, H, W): {wanted - 1} condition channels and the mask, "
                f"not {tuple(x.shape)}; check the kind of condition."
            )
        height, width = x.shape[-2:]
        if height % self.size_multiple or width % self.size_multiple:
            raise ValueError(
                f"The condition is {width}x{height} pixels (width x height), but this adapter needs multiples of "
                f"{self.size_multiple}; resize or crop it."
            )

    @classmethod
    def from_t2iadapter(cls, adapter: T2IAdapter, **options: Any) -> LocalAdapter:
        """Wrap (not copy) any T2I-Adapter; ``options`` are those of the class that are not the T2I-Adapter's own."""
        with torch.device("meta"):  # the shape only: the weights are replaced on the next line
            wrapped = cls(**{name: adapter.config[name] for name in SHAPE}, **options)
        wrapped.adapter = adapter
        return wrapped

    def save_t2iadapter(self, save_directory: str | os.PathLike[str], **options: Any) -> None:
        """Save the inner adapter alone; ``T2IAdapter.from_pretrained`` loads it without this package."""
        self.adapter.save_pretrained(save_directory, **options)


def check_shape(in_channels: Any, channels: Any, num_res_blocks: Any, downscale_factor: Any, adapter_type: Any) -> None:
    """Raise a ValueError in one sentence unless an adapter of this shape can be built within reason; nothing is
    built."""
    if adapter_type not in ADAPTER_TYPES:
        raise ValueError(f"adapter_type is one of {', '.join(ADAPTER_TYPES)}, not {shown(adapter_type)}.")
    for name, value, most in (
        ("in_channels", in_channels, MAX_WEIGHTS),
        ("num_res_blocks", num_res_blocks, MAX_BLOCKS),
        ("downscale_factor", downscale_factor, MAX_FACTOR),
    ):
        if type(value) is not int or not 1 <= value <= most:
            raise ValueError(f"{name} of an adapter is a whole number from 1 to {most}, not {shown(value)}.")
    if not isinstance(channels, (list, tuple)) or not 1 <= len(channels) <= MAX_LEVELS:
        raise ValueError(f"channels of an adapter are 1 to {MAX_LEVELS} whole numbers, not {shown(channels)}.")
    for value in channels:
        if type(value) is not int or not 1 <= value <= MAX_WEIGHTS:
            raise ValueError(f"channels of an adapter are positive whole numbers, not {shown(value)}.")
    # Convolutions of 3x3 and 1x1 in each block, and the first one on pixels that were unshuffled into channels.
    weights = 9 * in_channels * downscale_factor**2 * channels[0]
    weights += sum(10 * num_res_blocks * value**2 for value in channels)
    if weights > MAX_WEIGHTS:
        raise ValueError(
            f"An adapter of in_channels {in_channels}, channels {shown(list(channels))} and num_res_blocks "
            f"{num_res_blocks} has about {weights:.1e} weights, more than {MAX_WEIGHTS:.0e}; check its config.json."
        )


def check_level_weights(weights: Sequence[float] | None, levels: int) -> None:
    """Raise a ValueError unless there is one weight for each level of features, or None."""
    if weights is not None and len(weights) != levels:
        raise ValueError(
            f"The adapter has {levels} levels of features, but level_weights are {list(weights)}; give one weight for "
            "each level."
        )


CHOSEN = ("adapter_type", "channels", "num_res_blocks", "downscale_factor")  # in_channels are the condition's
SHAPE = ("in_channels", *CHOSEN)
ADAPTERS: dict[str, Any] = {"LocalAdapter": LocalAdapter, "T2IAdapter": T2IAdapter}
