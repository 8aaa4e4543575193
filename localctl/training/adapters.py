"""The adapter to train: fresh, or continued from a published T2I-Adapter or one of ours; checked before slow work."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from localctl.adapter import CHOSEN, SHAPE, LocalAdapter
from localctl.adapter_files import SavedAdapter, find_adapter
from localctl.architectures import BaseShape, read_shape
from localctl.control.compatible import check_fit
from localctl.pipelines import lasting_name
from localctl.seeding import key_seed
from localctl.training.settings import TrainSettings


@dataclass(frozen=True)
class AdapterPlan:
    """What the adapter will be, checked against the base. options: of ``LocalAdapter``. saved: where its weights are
    taken from; None = from the seed."""

    options: dict[str, Any]
    saved: SavedAdapter | None = None

    def make(self, seed: int) -> LocalAdapter:
        """The adapter, float32 and trainable; the global random state is left alone."""
        if self.saved is not None:
            kept = {name: value for name, value in self.options.items() if name not in SHAPE}
            return LocalAdapter.from_t2iadapter(self.saved.load().adapter, **kept).requires_grad_(True)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(key_seed(seed, "adapter"))
            return LocalAdapter(**self.options)


def plan_adapter(settings: TrainSettings, shape: BaseShape | None = None) -> AdapterPlan:
    """Decide the adapter of a run from configs alone. ValueError where settings, saved adapter and base do not fit.

    shape: of the base; None = read it.
    """
    wanted = asdict(settings.adapter)
    saved = None
    if settings.adapter_model_name_or_path is not None:
        saved = find_adapter(settings.adapter_model_name_or_path, settings.base.local_files_only)
        _check_saved(settings, saved)
    shape = shape or read_shape(settings.base)
    fallback = saved.config if saved else _defaults(wanted["adapter_type"], shape)
    options: dict[str, Any] = {name: fallback[name] if wanted[name] is None else wanted[name] for name in CHOSEN}
    options["channels"] = list(options["channels"])
    options |= {name: wanted[name] for name in ("mask_resize", "mask_condition", "mask_features", "dim_condition")}
    weights = wanted["level_weights"] or (saved.config.get("level_weights") if saved else None)
    options["level_weights"] = weights and list(weights)
    options["in_channels"] = settings.condition.channels
    way_out = "choose adapter=auto, which takes type, channels and downscale factor from the base"
    check_fit(options, shape, f"the adapter {saved.place} belongs to another kind of base" if saved else way_out)
    options |= {"condition": asdict(settings.condition), "base": lasting_name(settings.base.name)}
    return AdapterPlan(options, saved)


def _defaults(adapter_type: str | None, shape: BaseShape) -> dict[str, Any]:
    """What fits the U-Net: one feature per level for SD, two on the finest level that attends for SDXL."""
    kind = adapter_type or ("full_adapter_xl" if shape.xl else "full_adapter")
    channels = tuple(shape.parts["unet"]["block_out_channels"])
    if kind == "full_adapter_xl":
        channels = (*channels, channels[-1])
    elif kind == "light_adapter":  # which repeats its last level by itself
        channels = channels[:-1]
    factor = shape.vae_scale_factor * (2 if shape.xl else 1)
    return {"adapter_type": kind, "channels": channels, "num_res_blocks": 2, "downscale_factor": factor}


def _check_saved(settings: TrainSettings, saved: SavedAdapter) -> None:
    """ValueError where the settings ask for another shape than the saved adapter has."""
    saved.check_channels(settings.condition)
    name = saved.name
    for key in CHOSEN:
        asked, there = getattr(settings.adapter, key), saved.config.get(key)
        there = tuple(there) if isinstance(there, list) else there
        if asked is not None and asked != there:
            raise ValueError(
                f"adapter.{key} is {asked} but the adapter {name} has {there}; set adapter.{key}=null to take its own."
            )
