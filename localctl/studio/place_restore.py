"""From the settings of a run, as an image's record holds them, back to the fields of the tab Place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from localctl.bases import SIGMAS
from localctl.control.presets import NONE, control_names, sampling_of, setting_of
from localctl.images import load_image
from localctl.jobs.variants import ABSENT, compared, has_negatives, make_controls, sampling_with
from localctl.layout import Layout
from localctl.layout_io import load_layout
from localctl.masks import load_mask, mask_to_pil
from localctl.sampling_settings import own_sampling
from localctl.sizes import shown
from localctl.studio import limits
from localctl.studio.canvas import scene as canvas_value
from localctl.studio.methods import METHODS, Setting, field_value, settings_of, shown_presets
from localctl.studio.place_form import MAX_SWEEP, PHOTO_USES, sweepable
from localctl.studio.restoring import refuse_others, shared_values
from localctl.studio.scenes import scene_of
from localctl.studio.shared_form import AUTO

_PLAIN = {
    "guidance_rescale": 0,
    "clip_skip": 0,
    "upscale": 1,
    "upscale_strength": 0.5,
}
_KNOWN = (
    *(*_PLAIN, "layout", "control", "set", "sweep", "compare", "init_image", "strength", "inpaint_mask"),
    *(f"use_{name}_sigmas" for name in SIGMAS),
    *("weight", "start", "end", "unconditional_scale"),  # of adapters; without one they do nothing
)


def values_of(options: Mapping[str, Any], base: str, size: tuple[int, int]) -> dict[str, Any]:
    """Return the values of the fields, by name, for the settings of a run; ``photo`` is a path.

    Args:
        options: settings of :class:`localctl.jobs.settings.SampleSettings`, with the paths of files that are there.
        base: of the server, for the presets.
        size: (height, width) where the settings have none.

    Raises:
        ValueError: a run of several layouts, of a method that the page does not have, more regions than it takes, or
            anything else that the tab has no field for.
    """
    refuse_others(options, _KNOWN, "Place")
    values: dict[str, Any] = {name: options.get(name) or usual for name, usual in _PLAIN.items()}
    values |= shared_values(options)
    values["sigmas"] = next((name for name in SIGMAS if options.get(f"use_{name}_sigmas")), AUTO)
    values |= _scene(options, size)
    shape = values["scene"]["height"], values["scene"]["width"]
    return values | _method(options, base) | _photo(options, shape)


def _scene(options: Mapping[str, Any], size: tuple[int, int]) -> dict[str, Any]:
    layouts, prompts = options.get("layout") or [], options.get("prompt") or []
    if len(layouts) + len(prompts) != 1:
        raise ValueError(f"The run has {len(layouts) or len(prompts)} scenes; the page shows one at a time.")
    own = (options.get("height") or size[0], options.get("width") or size[1])
    if not layouts:
        return {"prompt": prompts[0], "scene": canvas_value(own)}
    layout = load_layout(layouts[0])
    if options.get("region_negatives") is False and has_negatives([layout]):
        raise ValueError(
            "The image was made without the negative prompts of its regions, which act on the page; repeat it with "
            "sample.py --from_json."
        )
    return {"prompt": layout.prompt, "scene": scene_of(layout, own), "overlap": layout.overlap}


def _method(options: Mapping[str, Any], base: str) -> dict[str, Any]:
    """Return the method with the value of each of its settings, and its sweep; or the methods that are compared."""
    if not options.get("layout"):
        return {}
    if options.get("compare"):
        if options.get("set"):
            raise ValueError("The image compares methods with --set, and the page with their presets; use sample.py.")
        methods = [control_names(word) for word in compared(options["compare"])]
        for names in methods:
            _check_presets(options, names, base, on_page=False)
        return {"compared": [_label(names) for names in methods]}
    names = control_names(options.get("control") or ["bias"])
    values = {"method": _label(names), **shown_presets("+".join(names) or NONE, base)}
    for item in (*(options.get("presets") or {}).get("+".join(names), ()), *(options.get("set") or ())):
        given, _, text = item.partition("=")
        for setting in _settings(names, given):
            values[setting.name] = _parsed(setting, text)
    _check_presets(options, names, base, on_page=True)
    return values | _sweep(options.get("sweep") or [], names)


def _check_presets(options: Mapping[str, Any], names: list[str], base: str, on_page: bool) -> None:
    """Raise a ValueError if the page would make the image of these controls with other settings than the run did, as
    there are other presets now. on_page: its fields show what the run had, where they can."""
    given = [(name, text) for name, _, text in (item.partition("=") for item in options.get("set") or ())]
    own: Any = make_controls(names, [], base), make_controls(names, given, base, options.get("presets"))
    for name, now, then in zip(names, *own, strict=True):
        shown_ones = {setting.field: setting for setting in settings_of(name)} if on_page else {}
        for field in fields(now):
            usual, value, setting = getattr(now, field.name), getattr(then, field.name), shown_ones.get(field.name)
            kept = setting and value is not None and field_value(setting, value) != field_value(setting, usual)
            if value != usual and not kept:
                raise _made_otherwise(f"{name}.{field.name}", value, usual)
    _check_sampling(options, names, base)


def _check_sampling(options: Mapping[str, Any], names: list[str], base: str) -> None:
    """Raise a ValueError if the run had another scheduler or guidance scale than suits these controls now."""
    now, then = sampling_of(names, base), sampling_with(names, base, options.get("presets"))
    usual = own_sampling(base).guidance_scale if now.guidance_scale is None else now.guidance_scale
    if options.get("scheduler") is None and then.scheduler != now.scheduler:
        raise _made_otherwise("scheduler", then.scheduler, now.scheduler)
    if options.get("guidance_scale") is None and then.guidance_scale not in (None, usual):
        raise _made_otherwise("guidance_scale", then.guidance_scale, usual)


def _made_otherwise(name: str, then: Any, now: Any) -> ValueError:
    return ValueError(
        f"The image was made with {name}={shown(then)}, and the page would make it with {shown(now)}; repeat it with "
        "sample.py --from_json."
    )


def _label(names: list[str]) -> str:
    """Return what the page calls the method of these controls. ValueError for one that it does not have."""
    for label, name in METHODS.items():
        if sorted(control_names(name)) == sorted(names):
            return label
    raise ValueError(f"The page has no method {'+'.join(names)}; use the command line for it.")


def _settings(names: list[str], given: str) -> list[Setting]:
    """Return the settings of the controls that the name in ``--set`` or ``--sweep`` means."""
    every = [(name, setting) for name in names for setting in settings_of(name)]
    return [setting for name, setting in every if setting_of(name, given) == setting.field]


def _sweep(sweep: list[str], names: list[str]) -> dict[str, Any]:
    """Return the fields of a sweep. ValueError for one over anything but numbers of the page."""
    values: dict[str, Any] = {"sweep_row": NONE} if sweep else {}
    known = sweepable("+".join(names) or NONE)
    for item, (field, of_field) in zip(sweep, (("column", "columns"), ("row", "rows")), strict=False):
        given, _, texts = item.partition("=")
        settings = [setting.name for setting in _settings(names, given)]
        if len(settings) != 1 or settings[0] not in known:
            raise ValueError(
                f"The image is of a sweep over {shown(given)}, which the page does not have; use sample.py."
            )
        limits.numbers(f"The sweep over {given}", texts, -1000, 1000, MAX_SWEEP)
        values |= {f"sweep_{field}": settings[0], f"sweep_{of_field}": texts.replace(",", ", ")}
    return values


def _parsed(setting: Setting, text: str) -> Any:
    """Return the text of a setting as the value of its field. ValueError for a text that is no such value."""
    if setting.kind == "bool":
        return text.lower() == "true"
    if text == ABSENT and setting.kind.endswith("| None"):
        return field_value(setting, None)
    try:
        if setting.kind == "int":
            return int(text)
        return float(text) if setting.kind.startswith("float") else text
    except ValueError:
        raise ValueError(
            f"The record in the image sets {setting.name} to {shown(text)}, which is no number; give another image."
        ) from None


def _photo(options: Mapping[str, Any], size: tuple[int, int]) -> dict[str, Any]:
    """Return the photo that the run started from, and its use. ValueError for a mask that is not its regions."""
    labels = {name: label for label, name in PHOTO_USES.items()}
    images = options.get("init_image") or []
    if not images:
        return {"photo": None, "photo_use": labels["behind"]}
    load_image(images[0])  # ValueError for a file that is not an image
    use = "image"
    if masks := options.get("inpaint_mask"):
        use, layouts = "inpaint", [load_layout(path) for path in options.get("layout") or ()]
        if not layouts or _repainted(layouts[0], size) != mask_to_pil(load_mask(masks[0], size)).tobytes():
            raise ValueError(
                "The image repaints a mask that is not its regions, which the page has not; use sample.py."
            )
    return {"photo": images[0], "photo_use": labels[use], "photo_strength": options.get("strength") or 0.7}


def _repainted(layout: Layout, size: tuple[int, int]) -> bytes:
    return mask_to_pil(layout.masks(size).amax(dim=0)).tobytes()
