"""From the settings of a run with adapters, as an image's record holds them, back to the tab Local control."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from localctl.adapter_files import SavedAdapter
from localctl.images import load_image
from localctl.masks import load_mask, mask_to_pil
from localctl.sizes import shown
from localctl.studio.addon_restore import addon_values
from localctl.studio.canvas import data_url
from localctl.studio.canvas import scene as canvas_value
from localctl.studio.config import StudioConfig
from localctl.studio.local_control_form import PHOTO, SOURCES, USUAL, first_regions
from localctl.studio.local_control_job import MOST_ADAPTERS, Order, Thresholds, adapter_places, find_adapters, run_size
from localctl.studio.restoring import each, number_text, refuse_others, shared_values

_KNOWN = ("image", "condition_image", "mask", "condition", "weight", "start", "end") + (
    "unconditional_scale", "control_guidance_scale"
)  # fmt: skip


def follow_values(options: Mapping[str, Any], config: StudioConfig) -> dict[str, Any]:
    """Return the values of the fields of the tab Local control for the settings of a run with adapters.

    ValueError for more adapters than the page takes, one that the server does not have, several conditions, or anything
    that the tab has no field for.
    """
    refuse_others(options, _KNOWN, "Local control")
    adapters = [_known_adapter(name, config) for name in options["adapter"]]
    sources = options.get("image") or options.get("condition_image") or []
    prompts = options.get("prompt") or [""]
    if len(adapters) > MOST_ADAPTERS or len({Path(path).read_bytes() for path in sources}) != 1 or len(prompts) > 1:
        raise ValueError(
            f"The image follows {len(sources)} images with {len(adapters)} adapters and {len(prompts)} prompts; the "
            f"page takes one image, one prompt and up to {MOST_ADAPTERS} adapters. Use the command line for it."
        )
    saved = find_adapters(config, adapters)
    _check_conditions(options, saved)
    source = load_image(sources[0])
    size = options.get("height") or source.height, options.get("width") or source.width
    usual = run_size(config, saved, Order(source, None, [], Thresholds()))
    regions = first_regions(len(adapters))
    for region, path in zip(regions, each(options.get("mask") or [None], len(adapters)), strict=True):
        mask = None if path is None else load_mask(path, size)
        if mask is not None and not bool((mask == 1).all()):
            region["mask"] = data_url(mask_to_pil(mask), longest=512)
    values = {
        "prompt": prompts[0],
        "photo": source,
        "source": PHOTO if options.get("image") else next(name for name in SOURCES if name != PHOTO),
        "scene": canvas_value(size, regions),
        "height": "" if size == usual else str(size[0]),
        "width": "" if size == usual else str(size[1]),
        "control_guidance_scale": number_text(options.get("control_guidance_scale")),
        "unconditional_scale": f"{_for_all(options.get('unconditional_scale') or [1.0]):g}",
        **shared_values(options),
        **addon_values(options, config, "mask"),
    }
    for number, adapter in enumerate(adapters, start=1):
        values[f"adapter{number}"] = adapter
        for name, plain in (("weight", 1.0), ("start", 0.0), ("end", 1.0)):
            values[f"{name}{number}"] = each(options.get(name) or [plain], len(adapters))[number - 1]
    return values


def _for_all(scales: Sequence[float]) -> float:
    """Return the value that all adapters have beside the negative prompt. ValueError for several, or one over 1."""
    if len(set(scales)) > 1 or not 0 <= scales[0] <= 1:
        raise ValueError(
            f"The image was made with --unconditional_scale {shown(list(scales))}, and the page has one value from 0 "
            "to 1; repeat it with sample.py --from_json."
        )
    return scales[0]


def _check_conditions(options: Mapping[str, Any], saved: Sequence[SavedAdapter]) -> None:
    """Raise a ValueError for a condition that is not the one an adapter was trained on: the page extracts that."""
    for kind, adapter in zip(each(options.get("condition") or [None], len(saved)), saved, strict=True):
        trained = (adapter.condition or USUAL).kind
        if kind not in (None, trained):
            raise ValueError(
                f"The image follows a {kind} condition with an adapter for {trained}, which the tab Local control does "
                "not do; repeat it with sample.py --from_json."
            )


def _known_adapter(name: str, config: StudioConfig) -> str:
    """Return how the page calls an adapter, by its place, or by its last part where only one has that.

    ValueError for one that the server does not have, or a last part of several.
    """
    last, places = Path(name).name, adapter_places(config)
    labels = [label for label, place in places.items() if place == name]
    labels = labels[:1] or [label for label, place in places.items() if Path(place).name == last]
    if len(labels) == 1:
        return labels[0]
    if labels:
        raise ValueError(
            f"The image was made with an adapter {last!r}, and this server has {len(labels)} of that name; choose "
            "one of the list."
        )
    raise ValueError(
        f"The image was made with the adapter {last!r}, which this server does not have; start it with it."
    )
