"""From the settings of a run, as an image's record holds them, back to the fields of the tab Place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from localctl.bases import SIGMAS
from localctl.control.presets import NONE, control_names, setting_of
from localctl.images import load_image
from localctl.jobs.settings import REGION
from localctl.layout_io import load_layout
from localctl.sizes import shown
from localctl.studio import limits
from localctl.studio.canvas import scene as canvas_value
from localctl.studio.config import StudioConfig
from localctl.studio.leaving import each
from localctl.studio.methods import METHODS, Setting, settings_of, shown_presets
from localctl.studio.place_addons import EVERYWHERE, READY, conditions_of
from localctl.studio.place_form import AUTO, PHOTO_USES
from localctl.studio.scenes import scene_of

_PLAIN = {
    "negative_prompt": "",
    "scheduler": AUTO,
    "guidance_rescale": 0,
    "clip_skip": 0,
    "upscale": 1,
    "upscale_strength": 0.5,
}


def values_of(options: Mapping[str, Any], base: str, size: tuple[int, int]) -> dict[str, Any]:
    """Return the values of the fields, by name, for the settings of a run; ``photo`` is a path.

    Args:
        options: settings of :class:`localctl.jobs.settings.SampleSettings`, with the paths of files that are there.
        base: of the server, for the presets.
        size: (height, width) where the settings have none.

    Raises:
        ValueError: a run of several layouts, of a method that the page does not have, or more regions than it takes.
    """
    values: dict[str, Any] = {name: options.get(name) or usual for name, usual in _PLAIN.items()}
    values |= {"steps": options.get("num_inference_steps", 30), **_seeds(options.get("seeds") or [0])}
    scale = options.get("guidance_scale")
    values["guidance_scale"] = "" if scale is None else f"{scale:g}"
    values["sigmas"] = next((name for name in SIGMAS if options.get(f"use_{name}_sigmas")), AUTO)
    return values | _scene(options, size) | _method(options, base) | _photo(options)


def _seeds(seeds: Sequence[int]) -> dict[str, int]:
    """Return the first seed, and how many follow one another from it."""
    count = next((index for index, seed in enumerate(seeds) if seed != seeds[0] + index), len(seeds))
    return {"seed": seeds[0], "images": min(count, limits.MAX_IMAGES)}


def _scene(options: Mapping[str, Any], size: tuple[int, int]) -> dict[str, Any]:
    layouts, prompts = options.get("layout") or [], options.get("prompt") or []
    if len(layouts) + len(prompts) != 1:
        raise ValueError(f"The run has {len(layouts) or len(prompts)} scenes; the page shows one at a time.")
    own = (options.get("height") or size[0], options.get("width") or size[1])
    if not layouts:
        return {"prompt": prompts[0], "scene": canvas_value(own)}
    layout = load_layout(layouts[0])
    return {"prompt": layout.prompt, "scene": scene_of(layout, own), "overlap": layout.overlap}


def _method(options: Mapping[str, Any], base: str) -> dict[str, Any]:
    """Return the method with the value of each of its settings."""
    if not options.get("layout") or options.get("compare"):
        return {}
    names = control_names(options.get("control") or ["bias"])
    wanted = "+".join(names) or NONE
    label = next(
        (label for label, name in METHODS.items() if sorted(name.split("+")) == sorted(wanted.split("+"))), None
    )
    if label is None:
        raise ValueError(f"The page has no method {wanted}; use the command line for it.")
    values = shown_presets(wanted, base)
    fields = {(name, setting.field): setting for name in names for setting in settings_of(name)}
    for item in options.get("set") or ():
        given, _, text = item.partition("=")
        for (control, field), setting in fields.items():
            if setting_of(control, given) == field:
                values[setting.name] = _parsed(setting, text)
    return {"method": label, **values}


def _parsed(setting: Setting, text: str) -> Any:
    """Return the text of a setting as the value of its field. ValueError for a text that is no such value."""
    if setting.kind == "bool":
        return text.lower() == "true"
    try:
        if setting.kind == "int":
            return int(text)
        return float(text) if setting.kind.startswith("float") else text
    except ValueError:
        raise ValueError(
            f"The record in the image sets {setting.name} to {shown(text)}, which is no number; give another image."
        ) from None


def addon_values(options: Mapping[str, Any], config: StudioConfig) -> dict[str, Any]:
    """Return the values of the fields of the server's addons, by name, for the settings of a run; images are paths.

    ValueError for an addon that the server does not have, or one that is used as the page cannot.
    """
    values: dict[str, Any] = {f"lora{index}_scale": 0 for index in range(len(config.lora))}
    if config.controlnet:
        values["guess_mode"] = bool(options.get("guess_mode"))
    for kind in ("controlnet", "ip_adapter"):
        values |= {f"{kind}{index}_image": None for index in range(len(getattr(config, kind)))}
        values |= _images(kind, options, config)
    for place in options.get("textual_inversion") or ():
        _index("learned word", place, config.textual_inversion)
    if options.get("lora_per_prompt"):
        raise ValueError("The image has LoRAs of its own for each prompt, which the page does not; use sample.py.")
    places = options.get("lora") or []
    for place, scale in zip(places, each(options.get("lora_scale") or [1.0], len(places)), strict=True):
        values[f"lora{_index('LoRA', place, config.lora)}_scale"] = scale
    return values


def _images(kind: str, options: Mapping[str, Any], config: StudioConfig) -> dict[str, Any]:
    """Return the values of the fields of the addons of one kind that acted in a run."""
    title = {"controlnet": "ControlNet", "ip_adapter": "IP-Adapter"}[kind]
    places, values = options.get(kind) or [], dict[str, Any]()
    images = options.get(f"{kind}_image") or options.get(f"{kind}_condition_image") or []
    masks = options.get(f"{kind}_mask") or [None]
    if len(images) not in (1, len(places)):
        raise ValueError(f"The image has {len(images)} images for {len(places)} {title}s; use sample.py for it.")
    for number, place in enumerate(places):
        name = f"{kind}{_index(title, place, getattr(config, kind))}"
        values[f"{name}_image"] = each(images, len(places))[number]
        values[f"{name}_where"] = _where(each(masks, len(places))[number], options)
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


def _where(mask: str | None, options: Mapping[str, Any]) -> str:
    """Return the place of an addon as the page calls it. ValueError for a mask that is no region of the layout."""
    if mask is None:
        return EVERYWHERE
    phrases = [region.phrase for layout in options.get("layout") or () for region in load_layout(layout).regions]
    if mask.removeprefix(REGION) not in phrases:
        raise ValueError("The image has an addon with a mask that is no region, which the page has not; use sample.py.")
    return f"region {phrases.index(mask.removeprefix(REGION)) + 1}"


def _index(title: str, place: str, known: Sequence[str]) -> int:
    """Return the number of an addon among those of the server, which may have it by another path or name."""
    last = _last(place)
    for number, other in enumerate(known):
        if _last(other) == last:
            return number
    raise ValueError(
        f"The image was made with the {title} {last!r}, which this server does not have; start it with it."
    )


def _last(place: str) -> str:
    """Return the last part of NAME=PLACE or PLACE."""
    return PurePath(place.rpartition("=")[2]).name


def _photo(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the photo that the run started from, and its use."""
    labels = {name: label for label, name in PHOTO_USES.items()}
    images = options.get("init_image") or []
    if not images:
        return {"photo": None, "photo_use": labels["behind"]}
    load_image(images[0])  # ValueError for a file that is not an image
    use = "inpaint" if options.get("inpaint_mask") else "image"
    return {"photo": images[0], "photo_use": labels[use], "photo_strength": options.get("strength") or 0.7}
