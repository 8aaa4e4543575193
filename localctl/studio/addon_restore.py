"""From the settings of a run, as an image's record holds them, back to the fields of the server's addons."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from localctl.jobs.settings import REGION
from localctl.layout_io import load_layout
from localctl.studio.addon_fields import EVERYWHERE, READY, conditions_of
from localctl.studio.config import StudioConfig
from localctl.studio.restoring import each


def addon_values(options: Mapping[str, Any], config: StudioConfig, noun: str = "region") -> dict[str, Any]:
    """Return the values of the fields of the server's addons, by name, for the settings of a run; images are paths.

    noun: what the tab calls the places where an addon may act: region, or mask. ValueError for an addon that the server
    does not have, or one that is used as the page cannot.
    """
    values: dict[str, Any] = {f"lora{index}_scale": 0 for index in range(len(config.lora))}
    if config.controlnet:
        values["guess_mode"] = bool(options.get("guess_mode"))
    for kind in ("controlnet", "ip_adapter"):
        values |= {f"{kind}{index}_image": None for index in range(len(getattr(config, kind)))}
        values |= _images(kind, options, config, noun)
    for place in options.get("textual_inversion") or ():
        _index("learned word", place, config.textual_inversion)
    if options.get("lora_per_prompt"):
        raise ValueError("The image has LoRAs of its own for each prompt, which the page does not; use sample.py.")
    places = options.get("lora") or []
    for place, scale in zip(places, each(options.get("lora_scale") or [1.0], len(places)), strict=True):
        values[f"lora{_index('LoRA', place, config.lora)}_scale"] = scale
    return values


def _images(kind: str, options: Mapping[str, Any], config: StudioConfig, noun: str) -> dict[str, Any]:
    """Return the values of the fields of the addons of one kind that acted in a run."""
    title = {"controlnet": "ControlNet", "ip_adapter": "IP-Adapter"}[kind]
    places, values = options.get(kind) or [], dict[str, Any]()
    images = options.get(f"{kind}_image") or options.get(f"{kind}_condition_image") or []
    masks = options.get(f"{kind}_mask") or [None]
    if len(images) not in (1, len(places)):
        raise ValueError(f"The image has {len(images)} images for {len(places)} {title}s; use sample.py for it.")
    found = [_index(title, place, getattr(config, kind)) for place in places]
    if len(set(found)) < len(found):
        raise ValueError(
            f"The image was made with one {title} twice, which the page has once; repeat it with sample.py --from_json."
        )
    for number, index in enumerate(found):
        name = f"{kind}{index}"
        values[f"{name}_image"] = each(images, len(places))[number]
        values[f"{name}_where"] = _where(each(masks, len(places))[number], options, noun)
        if kind == "controlnet":
            conditions = options.get("controlnet_condition") or [READY]
            values[f"{name}_condition"] = condition = each(conditions, len(places))[number]
            if condition not in conditions_of(config):
                raise ValueError(
                    f"The image follows a {condition} condition of a photo, for which this server has no model; start "
                    f"it with --condition_model {condition}=PLACE."
                )
        for field, usual in (("scale", 1.0), ("start", 0.0), ("end", 1.0)):
            values[f"{name}_{field}"] = each(options.get(f"{kind}_{field}") or [usual], len(places))[number]
    return values


def _where(mask: str | None, options: Mapping[str, Any], noun: str) -> str:
    """Return the place of an addon as the page calls it. ValueError for a mask that the tab does not have."""
    if mask is None:
        return EVERYWHERE
    if noun == "region":
        names = [
            REGION + (region.phrase or "")
            for layout in options.get("layout") or ()
            for region in load_layout(layout).regions
        ]
        index = names.index(mask) if mask in names else None
    else:
        masks = [Path(path).read_bytes() for path in options.get("mask") or ()]
        own = None if mask.startswith(REGION) else Path(mask).read_bytes()
        index = masks.index(own) if own in masks else None
    if index is None:
        raise ValueError(
            f"The image has an addon with a mask that is no {noun}, which the page has not; use sample.py."
        )
    return f"{noun} {index + 1}"


def _index(title: str, place: str, known: Sequence[str]) -> int:
    """Return the number of an addon among those of the server, which may have it by another path or name."""
    last = _last(place)
    found = [number for number, other in enumerate(known) if other == place]
    found = found[:1] or [number for number, other in enumerate(known) if _last(other) == last]
    if len(found) > 1:
        raise ValueError(
            f"The image was made with a {title} {last!r}, and this server has {len(found)} of that name; repeat it "
            "with sample.py --from_json."
        )
    if not found:
        raise ValueError(
            f"The image was made with the {title} {last!r}, which this server does not have; start it with it."
        )
    return found[0]


def _last(place: str) -> str:
    """Return the last part of NAME=PLACE or PLACE."""
    return PurePath(place.rpartition("=")[2]).name
