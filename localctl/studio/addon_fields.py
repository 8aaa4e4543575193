"""The addons on the page: the ControlNets, IP-Adapters and LoRAs that the server was started with, on two tabs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from localctl.jobs.settings import REGION
from localctl.settings import FROM_IMAGE, ConditionConfig
from localctl.studio import limits
from localctl.studio.config import StudioConfig, short_name
from localctl.studio.limits import MAX_REGIONS, Scene
from localctl.studio.uploads import photo, read_photo

READY, EVERYWHERE = "it is the condition", "everywhere"
PLACES = (EVERYWHERE, *(f"region {number}" for number in range(1, MAX_REGIONS + 1)))
_KINDS = ("controlnet", "ip_adapter")


@dataclass(frozen=True)
class Addon:
    """A ControlNet or IP-Adapter with its image. condition: what to compute from it; None: nothing. region: the region
    or mask where it acts, by index; None: everywhere."""

    place: str
    image: Image.Image
    condition: str | None
    region: int | None
    scale: float
    start: float
    end: float


@dataclass(frozen=True)
class Addons:
    """The addons that act in a run: those with an image, and the LoRAs by their scales."""

    controlnets: tuple[Addon, ...] = ()
    ip_adapters: tuple[Addon, ...] = ()
    guess_mode: bool = False
    loras: tuple[tuple[str, float], ...] = ()


def add_fields(fields: dict[str, Any], config: StudioConfig, tab: str, places: Sequence[str] = PLACES) -> None:
    """Add a fold for each addon of the server to a tab, and its components to ``fields``.

    tab: the beginning of their ids. places: where an addon may act, everywhere first.
    """
    for kind, title in zip(_KINDS, ("ControlNet", "IP-Adapter"), strict=True):
        for index, place in enumerate(getattr(config, kind)):
            with gr.Accordion(f"{title}: {short_name(place)}", open=False):
                _image_fields(
                    fields, f"{kind}{index}", conditions_of(config) if kind == "controlnet" else (), tab, places
                )
    if config.controlnet:
        fields["guess_mode"] = gr.Checkbox(value=False, label="Guess mode: follow the conditions without the prompt")
    if config.lora:
        with gr.Accordion("LoRA", open=False):
            for index, place in enumerate(config.lora):
                fields[f"lora{index}_scale"] = gr.Slider(0, 2, value=1, step=0.05, label=short_name(place))


def conditions_of(config: StudioConfig) -> tuple[str, ...]:
    """Return what a ControlNet of this server may follow of its image."""
    return (READY, *FROM_IMAGE, *config.condition_models)


def _image_fields(
    fields: dict[str, Any], name: str, conditions: Sequence[str], tab: str, places: Sequence[str]
) -> None:
    label = "Image; without one, this does not act"
    fields[f"{name}_image"] = photo(label, height=180, elem_id=f"{tab}-{name.replace('_', '-')}-image")
    with gr.Row():
        if conditions:
            fields[f"{name}_condition"] = gr.Dropdown(
                list(conditions), value=FROM_IMAGE[0], label="What it follows of the image"
            )
        fields[f"{name}_where"] = gr.Dropdown(list(places), value=EVERYWHERE, label="Where")
    with gr.Row():
        fields[f"{name}_scale"] = gr.Slider(0, 2, value=1, step=0.05, label="Strength", min_width=90)
        fields[f"{name}_start"] = gr.Slider(0, 1, value=0, step=0.05, label="Start", min_width=90)
        fields[f"{name}_end"] = gr.Slider(0, 1, value=1, step=0.05, label="End", min_width=90)


def photos_of(fields: Iterable[str]) -> list[str]:
    """Return the names of the fields that are photos."""
    return [name for name in fields if name == "photo" or name.endswith("_image")]


def read_addons(values: Mapping[str, Any], config: StudioConfig, places: Sequence[str] = PLACES) -> Addons:
    """Read the fields by name. ValueError in one sentence for the first that is out of bounds."""
    return Addons(
        controlnets=_with_images(values, config, "controlnet", places),
        ip_adapters=_with_images(values, config, "ip_adapter", places),
        guess_mode=limits.flag("Guess mode", values.get("guess_mode")),
        loras=tuple(
            (place, limits.number(f"The scale of {short_name(place)}", values.get(f"lora{index}_scale", 1), 0, 2))
            for index, place in enumerate(config.lora)
        ),
    )


def _with_images(
    values: Mapping[str, Any], config: StudioConfig, kind: str, places: Sequence[str]
) -> tuple[Addon, ...]:
    found = []
    for index, place in enumerate(getattr(config, kind)):
        name, title = f"{kind}{index}", short_name(place)
        image = read_photo(f"The image of {title}", values.get(f"{name}_image"))
        if image is None:
            continue
        condition = values.get(f"{name}_condition", READY)
        start, end = limits.window(title, title, values.get(f"{name}_start", 0), values.get(f"{name}_end", 1))
        where = places.index(limits.choice(f"The place of {title}", values.get(f"{name}_where", EVERYWHERE), places))
        condition = limits.choice(f"The condition of {title}", condition, conditions_of(config))
        scale = limits.number(f"The strength of {title}", values.get(f"{name}_scale", 1), 0, 2)
        found.append(
            Addon(
                place, image, None if condition == READY else condition, where - 1 if where else None, scale, start, end
            )
        )
    return tuple(found)


def addon_settings(
    addons: Addons, mask_of: Callable[[int], str], texts: Sequence[str], config: StudioConfig, folder: Path
) -> dict[str, Any]:
    """Return the settings of a run for the addons that act, with their images written to ``folder``.

    mask_of: from the index of a place to the mask of an addon there. texts: all prompts of the run, which choose the
    learned words. ValueError as of ``mask_of``, and for photos beside ready conditions.
    """
    settings: dict[str, Any] = {"textual_inversion": _words(texts, config) or None}
    if config.lora:
        settings |= {"lora": [place for place, _ in addons.loras], "lora_scale": [scale for _, scale in addons.loras]}
    if addons.controlnets:
        computed = [item.condition for item in addons.controlnets]
        if None in computed and any(computed):
            raise ValueError(f"Choose {READY!r} for all ControlNets or for none; they cannot be mixed in one run.")
        given = "controlnet_condition_image" if None in computed else "controlnet_image"
        settings |= _shared("controlnet", addons.controlnets, given, mask_of, folder)
        settings |= {
            "controlnet_condition": None if None in computed else computed,
            "guess_mode": addons.guess_mode or None,
            **model_settings([config.computed(kind) if kind in config.condition_models else None for kind in computed]),
        }
    if addons.ip_adapters:
        settings |= _shared("ip_adapter", addons.ip_adapters, "ip_adapter_image", mask_of, folder)
        settings |= {"ip_adapter_encoder": config.ip_adapter_encoder}
    return settings


def model_settings(conditions: Sequence[ConditionConfig | None], prefix: str = "controlnet_") -> dict[str, Any]:
    """Return the settings of a run that name the models of conditions; None: computed without one."""
    models = [(item and item.model) or "" for item in conditions]
    detectors = [(item and item.detector) or "" for item in conditions]
    return {
        f"{prefix}condition_model": models if any(models) else None,
        f"{prefix}condition_detector": detectors if any(detectors) else None,
    }


def _words(texts: Sequence[str], config: StudioConfig) -> list[str]:
    """Return the places of the learned words that are in one of ``texts``."""
    from localctl.addons.embeddings import find_embedding

    here = bool(config.local_files_only)
    words = {place: find_embedding(place, here).word for place in config.textual_inversion}
    return [place for place, word in words.items() if any(word in text for text in texts)]


def _shared(
    kind: str, addons: Sequence[Addon], images: str, mask_of: Callable[[int], str], folder: Path
) -> dict[str, Any]:
    paths = [folder / f"{images}_{index}.png" for index in range(len(addons))]
    for path, item in zip(paths, addons, strict=True):
        item.image.save(path)
    if len({item.region is None for item in addons}) > 1:
        raise ValueError("Choose a place for all of these, or everywhere for all; a run takes masks for all or none.")
    masks = [mask_of(item.region) for item in addons if item.region is not None]
    return {
        kind: [item.place for item in addons],
        images: list(map(str, paths)),
        f"{kind}_mask": masks or None,
        f"{kind}_scale": [item.scale for item in addons],
        f"{kind}_start": [item.start for item in addons],
        f"{kind}_end": [item.end for item in addons],
    }


def region_of(scene: Scene, index: int) -> str:
    """Return the region with this index as the mask of an addon. ValueError if it is not there or has no phrase."""
    if index >= len(scene.regions):
        raise ValueError(f"There is no region {index + 1} on the canvas for an addon to act in; choose another.")
    if not scene.regions[index].phrase:
        raise ValueError(f"Region {index + 1} has no phrase, by which an addon finds it; give it one.")
    return f"{REGION}{scene.regions[index].phrase}"
