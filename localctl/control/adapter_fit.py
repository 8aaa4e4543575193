"""Whether the features of an adapter are what the U-Net of a base takes, from configs alone."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from diffusers import T2IAdapter

from localctl.adapter import SHAPE, check_level_weights
from localctl.adapter_files import SavedAdapter
from localctl.architectures import BaseShape
from localctl.control.local_adapter import residual_shapes
from localctl.diffusion import latent_size


def check_fit(options: Mapping[str, Any], shape: BaseShape, way_out: str) -> None:
    """ValueError, which ends in ``way_out``, unless an adapter of these options makes what the U-Net takes; nothing is
    computed. options: ``SHAPE`` and ``level_weights`` are looked at, with their defaults."""
    factor = shape.vae_scale_factor
    side = 64 * factor
    known = {name: options[name] for name in SHAPE if name in options}
    made: list[tuple[int, ...]] | None = None
    # A RuntimeError where levels do not fit each other: full_adapter_xl widens on its second and third only. The others
    # are of configs that were written by hand.
    with suppress(RuntimeError, TypeError, IndexError, ZeroDivisionError), torch.device("meta"):
        features = T2IAdapter(**known)(torch.zeros(1, known.get("in_channels", 3), side, side))
        made = [tuple(feature.shape[1:]) for feature in features]
    taken = residual_shapes(shape.build("unet"), latent_size(side, side, factor))
    if made is None or made != taken[: len(made)]:
        raise ValueError(
            f"For {side}x{side} pixels the adapter would make features {made or 'that do not fit each other'} but the "
            f"base's U-Net takes {taken}; {way_out}."
        )
    check_level_weights(options.get("level_weights"), len(made))


def check_base(adapter: SavedAdapter, base: str, shape: BaseShape) -> str | None:
    """ValueError for an adapter that does not fit the base of this name and shape; a sentence on one that was trained
    on another base."""
    trained = f", which was trained on the base {adapter.base}," if adapter.base else ""
    check_fit(adapter.config, shape, f"the adapter {adapter.name}{trained} does not fit {base}")
    return adapter.used_on(base)
