"""The local adapter: a T2I-Adapter that acts only inside a mask (arXiv 2602.01991, section on masked features)."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin, T2IAdapter
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from localctl.masks import MASK_RESIZE, grow_mask, mask_feature
from localctl.settings import ADAPTER_TYPES, MAX_MARGIN
from localctl.sizes import shown
from localctl.token_adapter import TokenAdapter

TOKENS, TOKEN_WIDTH = "token_adapter", 384  # the type of adapters for transformers, and its default width
# Bounds on the modules that an untrusted config can build. Published adapters have up to 8e7 weights in 4 or 5 levels.
MAX_WEIGHTS, MAX_LEVELS, MAX_BLOCKS, MAX_FACTOR = 500_000_000, 8, 64, 64


class LocalAdapter(ModelMixin, ConfigMixin):
    """A diffusers ``T2IAdapter`` whose features are multiplied by a mask.

    Training and sampling both call this module, so the masking cannot differ between them.

    Args:
        in_channels: C, the channels of the condition without the mask.
        channels, num_res_blocks, downscale_factor, adapter_type: as for ``T2IAdapter``.
        mask_resize: how the mask is resized to each feature's (h, w): ``area``, ``nearest``, ``inside`` or ``cover``.
        mask_features: multiply the features by the mask, which makes an adapter local. False is for baselines: a plain
            adapter, or with ``mask_condition`` one that is masked only at its input. Then features outside the mask are
            not 0, and an all-zero mask does not give the base's image.
        mask_condition: also set the condition to 0 where the mask is 0, so that the condition outside has no effect.
            Without it, convolutions carry some of it across the border of the mask.
        dim_condition: with ``mask_condition``, multiply the condition by the mask, as published, so that a soft mask
            dims it. False sets it to 0 where the mask is 0 and leaves it unchanged elsewhere, since a soft mask already
            scales the features.
        token_width: of a ``token_adapter``, for transformers (:class:`~localctl.token_adapter.TokenAdapter`): channels
            between its patches and its residuals. It takes the mask as an input, too.
        level_weights: a factor for each level's features, finest level first; saved with the adapter, so that training
            and sampling use the same. None: all 1.
        latent_channels: of a ``token_adapter`` that gets the condition as latents of the base's VAE, their channels;
            0: it gets pixels. latent_factor: pixels per latent. See :meth:`inputs`.
        mask_margin: by how many pixels the mask is grown before it masks the features, so that they also see what is
            around its border. The condition is not affected (``mask_condition``).
        unconditional_scale: factor of the features on the rows of the negative prompt, the default when sampling
            (:class:`~localctl.control.LocalAdapterControl`); training does not use it.
        condition: how conditions were made in training (``kind`` and its options), the default when sampling.
        base: name, id or folder of the base that the adapter was trained on.

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
        token_width: int = TOKEN_WIDTH,
        latent_channels: int = 0,
        latent_factor: int = 8,
        unconditional_scale: float = 1.0,
        mask_margin: int = 0,
    ) -> None:
        super().__init__()
        check_shape(in_channels, channels, num_res_blocks, downscale_factor, adapter_type, token_width)
        check_latents(latent_channels, latent_factor, downscale_factor, adapter_type)
        if latent_channels and mask_condition:
            raise ValueError("mask_condition blanks pixels, and the condition is given as latents; leave one out.")
        if mask_resize not in MASK_RESIZE:
            raise ValueError(f"Unknown mask_resize {mask_resize!r}; choose one of {', '.join(MASK_RESIZE)}.")
        for weight in level_weights or ():
            if not is_finite(weight) or weight < 0:
                raise ValueError(
                    f"level_weights must be finite numbers of at least 0, one per level, not {level_weights!r}."
                )
        check_margin(mask_margin, mask_features)
        if not is_finite(unconditional_scale):
            raise ValueError(f"unconditional_scale must be a finite number, not {shown(unconditional_scale)}.")
        if adapter_type == TOKENS:
            # The mask is one more channel; beside latents, each of its pixels.
            inputs = latent_channels + latent_factor**2 if latent_channels else in_channels + 1
            side = downscale_factor // latent_factor if latent_channels else downscale_factor
            self.adapter = TokenAdapter(inputs, list(channels), num_res_blocks, side, token_width)
            return
        self.adapter = T2IAdapter(
            in_channels=in_channels,
            channels=list(channels),
            num_res_blocks=num_res_blocks,
            downscale_factor=downscale_factor,
            adapter_type=adapter_type,
        )

    @property
    def channels_of_condition(self) -> int:
        """The channels C of the condition; the mask is one channel more."""
        return self.config["in_channels"]

    @property
    def size_multiple(self) -> int:
        """The number of pixels of which the condition's height and width must be multiples."""
        return self.config["downscale_factor"]

    def inputs(self, condition: Tensor, mask: Tensor, encode: Callable[[Tensor], Tensor]) -> Tensor:
        """Return what :meth:`forward` takes: condition and mask, joined along channels.

        Args:
            condition: (B, C, H, W) in [0, 1]. mask: (B, 1, H, W) in [0, 1].
            encode: from pixels (B, 3, H, W) in [-1, 1] to latents of the base's VAE, scaled; for adapters that get the
                condition as these, which then join the mask's pixels at each latent, (B, c + f^2, H / f, W / f).

        Raises:
            ValueError: latents of another VAE than the adapter's.
        """
        channels = self.config["latent_channels"]
        if not channels:
            return torch.cat([condition, mask], dim=1)
        with torch.no_grad():
            latents = encode(condition.expand(-1, 3, -1, -1) * 2 - 1).to(mask)
        pixels = F.pixel_unshuffle(mask, self.config["latent_factor"])
        if latents.shape[1] != channels or latents.shape[-2:] != pixels.shape[-2:]:
            raise ValueError(
                f"The adapter takes conditions as latents of {channels} channels, {pixels.shape[-1]}x"
                f"{pixels.shape[-2]}, but the base's VAE makes {latents.shape[1]}, {latents.shape[-1]}x"
                f"{latents.shape[-2]}; use it on a base with the VAE it was trained with."
            )
        return torch.cat([latents, pixels], dim=1)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Compute the masked features of a condition and a mask.

        Args:
            x: (B, C + 1, H, W) in [0, 1], the last channel is the mask; or as :meth:`inputs` returns it. H and W:
                multiples of ``size_multiple``.

        Returns:
            One feature (B, c_i, h_i, w_i) per level of the U-Net, or per chosen block of a transformer; with
            ``mask_features`` exactly 0 where the resized mask is 0. Halved sizes are rounded up, as in the U-Net.

        Raises:
            ValueError: a wrong number of channels, or a size that does not fit.
        """
        self._check(x)
        condition, mask = x[:, :-1], x[:, -1:]  # (B,C,H,W), (B,1,H,W)
        if channels := self.config["latent_channels"]:
            condition, mask = x, F.pixel_shuffle(x[:, channels:], self.config["latent_factor"])
        if self.config["mask_condition"]:
            inside = condition * mask if self.config["dim_condition"] else condition
            condition = torch.where(mask > 0, inside, torch.zeros_like(condition))
        tokens = self.config["adapter_type"] == TOKENS
        joined = torch.cat([condition, mask], dim=1) if tokens and not channels else condition
        features = list(self.adapter(joined))
        if self.config["mask_features"]:
            grown = grow_mask(mask.float(), self.config["mask_margin"])
            features = [mask_feature(f, grown, self.config["mask_resize"]) for f in features]
        weights = self.config["level_weights"]
        if weights is None:
            return features
        check_level_weights(weights, len(features))
        return [feature * weight for feature, weight in zip(features, weights, strict=True)]

    @property
    def levels(self) -> int:
        """The number of levels of features: one for each of ``channels``, and one more for a light adapter."""
        tokens = isinstance(self.adapter, TokenAdapter)
        return len(self.adapter.body if tokens else self.adapter.adapter.body)

    def _check(self, x: Tensor) -> None:
        latents, factor = self.config["latent_channels"], self.config["latent_factor"]
        wanted = latents + factor**2 if latents else self.channels_of_condition + 1
        if x.ndim != 4 or x.shape[1] != wanted:
            raise ValueError(
                f"The adapter takes (B, {wanted}, H, W), {wanted - 1} channels of the condition and the mask, not "
                f"{tuple(x.shape)}; check the kind of condition."
            )
        height, width = (side * (factor if latents else 1) for side in x.shape[-2:])
        if height % self.size_multiple or width % self.size_multiple:
            raise ValueError(
                f"The condition is {width}x{height} pixels (width x height), but this adapter needs multiples of "
                f"{self.size_multiple}; resize or crop it."
            )

    @classmethod
    def from_t2iadapter(cls, adapter: T2IAdapter, **options: Any) -> LocalAdapter:
        """Wrap any T2I-Adapter without copying it; ``options``: the arguments that a T2I-Adapter does not have."""
        with torch.device("meta"):  # only the shapes: the weights are replaced below
            wrapped = cls(**{name: adapter.config[name] for name in SHAPE}, **options)
        wrapped.adapter = adapter
        return wrapped

    def save_t2iadapter(self, save_directory: str | os.PathLike[str], **options: Any) -> None:
        """Save the inner adapter alone; ``T2IAdapter.from_pretrained`` loads it without this package.

        ValueError for an adapter for transformers, for which diffusers has no class.
        """
        if not isinstance(self.adapter, T2IAdapter):
            raise ValueError(
                "This adapter is for a transformer, which diffusers' T2IAdapter is not; use save_pretrained and "
                "LocalAdapter.from_pretrained."
            )
        self.adapter.save_pretrained(save_directory, **options)


def is_finite(value: Any) -> bool:
    """Return whether ``value`` is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def cast(adapter: LocalAdapter, dtype: torch.dtype) -> LocalAdapter:
    """Convert the weights of ``adapter`` in place, without diffusers' warning about modules to keep in float32: there
    are none."""
    return torch.nn.Module.to(adapter, dtype)


def check_shape(
    in_channels: Any,
    channels: Any,
    num_res_blocks: Any,
    downscale_factor: Any,
    adapter_type: Any,
    token_width: Any = TOKEN_WIDTH,
) -> None:
    """Raise a ValueError unless these options describe an adapter of reasonable size; nothing is built."""
    if adapter_type not in ADAPTER_TYPES:
        raise ValueError(f"adapter_type must be one of {', '.join(ADAPTER_TYPES)}, not {shown(adapter_type)}.")
    for name, value, most in (
        ("in_channels", in_channels, MAX_WEIGHTS),
        ("num_res_blocks", num_res_blocks, MAX_BLOCKS),
        ("downscale_factor", downscale_factor, MAX_FACTOR),
        ("token_width", token_width, MAX_WEIGHTS),
    ):
        if type(value) is not int or not 1 <= value <= most:
            raise ValueError(f"{name} of an adapter must be a whole number from 1 to {most}, not {shown(value)}.")
    if adapter_type != TOKENS and token_width != TOKEN_WIDTH:
        raise ValueError(f"token_width belongs to a {TOKENS}, not to a {adapter_type}; leave it out.")
    levels = MAX_BLOCKS if adapter_type == TOKENS else MAX_LEVELS
    if not isinstance(channels, (list, tuple)) or not 1 <= len(channels) <= levels:
        raise ValueError(f"channels of an adapter must be 1 to {levels} whole numbers, not {shown(channels)}.")
    for value in channels:
        if type(value) is not int or not 1 <= value <= MAX_WEIGHTS:
            raise ValueError(f"channels of an adapter must be positive whole numbers, not {shown(value)}.")
    # A 3x3 and a 1x1 convolution in each block, and the first convolution on pixels unshuffled into channels.
    widths = [token_width] * len(channels) if adapter_type == TOKENS else channels
    weights = 9 * in_channels * downscale_factor**2 * widths[0]
    weights += sum(10 * num_res_blocks * value**2 for value in widths)
    if adapter_type == TOKENS:
        weights += sum(token_width * value for value in channels)
    if weights > MAX_WEIGHTS:
        raise ValueError(
            f"An adapter with in_channels {in_channels}, channels {shown(list(channels))} and num_res_blocks "
            f"{num_res_blocks} has about {weights:.1e} weights, more than {MAX_WEIGHTS:.0e}; check its config.json."
        )


def check_latents(latent_channels: Any, latent_factor: Any, downscale_factor: int, adapter_type: str) -> None:
    """Raise a ValueError unless these options describe a condition given as latents, or as pixels."""
    for name, value, least in (("latent_channels", latent_channels, 0), ("latent_factor", latent_factor, 1)):
        if type(value) is not int or not least <= value <= MAX_FACTOR:
            raise ValueError(f"{name} of an adapter must be a whole number to {MAX_FACTOR}, not {shown(value)}.")
    if latent_channels and (adapter_type != TOKENS or downscale_factor % latent_factor):
        raise ValueError(
            f"Conditions as latents, of {latent_factor} pixels each, are of a {TOKENS} whose downscale_factor is a "
            f"multiple of that, not of a {adapter_type} with {downscale_factor}."
        )


def check_margin(margin: Any, mask_features: Any = True) -> None:
    """Raise a ValueError unless ``margin`` is a number of pixels by which an adapter's mask can be grown."""
    if type(margin) is not int or not 0 <= margin <= MAX_MARGIN:
        raise ValueError(f"mask_margin must be a whole number of pixels from 0 to {MAX_MARGIN}, not {shown(margin)}.")
    if margin and not mask_features:
        raise ValueError(f"mask_margin={margin} grows the mask of the features, and mask_features is false; set 0.")


def check_level_weights(weights: Sequence[float] | None, levels: int) -> None:
    """Raise a ValueError unless ``weights`` is None or has one weight for each level of features."""
    if weights is not None and len(weights) != levels:
        raise ValueError(
            f"The adapter has {levels} levels of features, but level_weights are {list(weights)}; give one weight per "
            "level."
        )


CHOSEN = ("adapter_type", "channels", "num_res_blocks", "downscale_factor")  # in_channels follow from the condition
SHAPE = ("in_channels", *CHOSEN)
OPTIONS = (  # what a T2IAdapter does not have
    "mask_resize",
    "mask_condition",
    "mask_features",
    "condition",
    "base",
    "dim_condition",
    "level_weights",
    "token_width",
    "latent_channels",
    "latent_factor",
    "unconditional_scale",
    "mask_margin",
)
ADAPTERS: dict[str, Any] = {"LocalAdapter": LocalAdapter, "T2IAdapter": T2IAdapter}
