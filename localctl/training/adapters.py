"""The adapter to train: fresh, or continued from a published T2I-Adapter or one of ours; checked before slow work."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import T2IAdapter
from huggingface_hub import hf_hub_download

from localctl.adapter import LocalAdapter, check_config, load_adapter
from localctl.architectures import BaseShape, read_shape
from localctl.base import lasting_name
from localctl.control.local_adapter import residual_shapes
from localctl.diffusion import latent_size
from localctl.files import first_line, parse_json
from localctl.random import key_seed
from localctl.training.settings import TrainSettings

SHAPE = ("adapter_type", "channels", "num_res_blocks", "downscale_factor")


@dataclass(frozen=True)
class SavedAdapter:
    """Where an adapter lies (an id or a folder) and its config, which says its class."""

    place: str
    config: Mapping[str, Any]

    @property
    def local(self) -> bool:
        """One of ours, not a plain T2IAdapter."""
        return self.config.get("_class_name") == LocalAdapter.__name__

    def load(self) -> T2IAdapter:
        """The inner T2I-Adapter, float32. ValueError when its weights cannot be read."""
        return load_adapter(self.place, self.config["_class_name"], dtype=torch.float32).adapter


def find_adapter(name: str, local_files_only: bool = False) -> SavedAdapter:
    """An adapter by hub id or folder (its own, or that of a training run), by its config alone.

    ValueError when there is none, or it is of another class.
    """
    folder = Path(name).expanduser()
    places = [place for place in (folder, folder / "adapter") if (place / "config.json").is_file()]
    try:
        if not places and (folder.exists() or name.startswith(("/", ".", "~"))):  # a folder, no hub id
            raise FileNotFoundError("no config.json in it" if folder.exists() else "no such folder")
        place = str(places[0]) if places else name
        path = Path(place, "config.json")
        if not places:
            path = Path(hf_hub_download(name, "config.json", local_files_only=local_files_only))
        config = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:  # a name that is no hub id is a ValueError
        reason = first_line(error)
        raise ValueError(
            f"There is no adapter {name!r} ({reason}); give the folder or hub id of a T2IAdapter or LocalAdapter."
        ) from error
    kind = config.get("_class_name") if isinstance(config, dict) else None
    if kind not in (LocalAdapter.__name__, T2IAdapter.__name__):
        raise ValueError(f"{name} is a {kind}; give a T2IAdapter or LocalAdapter to continue from.")
    return SavedAdapter(place, check_config(config, place))


@dataclass(frozen=True)
class AdapterPlan:
    """What the adapter will be, checked against the base. options: of ``LocalAdapter``. saved: where its weights are
    taken from; None = from the seed."""

    options: dict[str, Any]
    saved: SavedAdapter | None = None

    def make(self, seed: int) -> LocalAdapter:
        """The adapter, float32 and trainable; the global random state is left alone."""
        if self.saved is not None:
            kept = {name: value for name, value in self.options.items() if name not in (*SHAPE, "in_channels")}
            return LocalAdapter.from_t2iadapter(self.saved.load().float(), **kept).requires_grad_(True)
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
    options: dict[str, Any] = {name: fallback[name] if wanted[name] is None else wanted[name] for name in SHAPE}
    options["channels"] = list(options["channels"])
    options |= {name: wanted[name] for name in ("mask_resize", "mask_condition", "mask_features")}
    options["in_channels"] = settings.condition.channels
    _check_fit(options, shape, saved)
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
    name, channels = settings.adapter_model_name_or_path, saved.config.get("in_channels")
    if channels != settings.condition.channels:
        raise ValueError(
            f"The adapter {name} takes conditions of {channels} channels but {settings.condition.kind} has "
            f"{settings.condition.channels}; choose the kind of condition it was made for."
        )
    for key in SHAPE:
        asked, there = getattr(settings.adapter, key), saved.config.get(key)
        there = tuple(there) if isinstance(there, list) else there
        if asked is not None and asked != there:
            raise ValueError(
                f"adapter.{key} is {asked} but the adapter {name} has {there}; set adapter.{key}=null to take its own."
            )


def _check_fit(options: dict[str, Any], shape: BaseShape, saved: SavedAdapter | None) -> None:
    """ValueError unless an adapter of these options makes what the U-Net takes; nothing is computed."""
    factor = shape.vae_scale_factor
    side = 64 * factor
    made: list[tuple[int, ...]] | None = None
    # A RuntimeError where levels do not fit each other: full_adapter_xl widens on its second and third only.
    with suppress(RuntimeError), torch.device("meta"):
        features = LocalAdapter(**options)(torch.zeros(1, options["in_channels"] + 1, side, side))
        made = [tuple(feature.shape[1:]) for feature in features]
    taken = residual_shapes(shape.build("unet"), latent_size(side, side, factor))
    if made is None or made != taken[: len(made)]:
        way_out = "choose adapter=auto, which takes type, channels and downscale factor from the base"
        if saved is not None:
            way_out = f"the adapter {saved.place} belongs to another kind of base"
        features_made = made or "that do not fit each other"
        raise ValueError(
            f"For {side}x{side} pixels the adapter would make features {features_made} but the base's U-Net takes "
            f"{taken}; {way_out}."
        )
