"""The variants of a run of ``sample.py``: layouts, and the controls and settings to generate their images with."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from localctl.control.base import Control
from localctl.control.negative_prompts import NegativePrompts
from localctl.control.presets import (
    CONTROLS,
    NONE,
    build_controls,
    check_settings,
    control_names,
    sampling_of,
    setting_of,
)
from localctl.jobs.scenes import is_image, read_layouts
from localctl.jobs.settings import AUTO, Presets, SampleSettings
from localctl.layout import Layout
from localctl.sampling_settings import FREE, Sampling

ALL, COMPARED_ALL = "all", ("none", "bias", "dense", "guidance")  # the variants of --compare all
_MOST_CELLS = 64  # of the grid of a sweep
ABSENT = "none"  # None as the text of a setting


@dataclass(frozen=True)
class Variant:
    """One way to generate all images of a run.

    label: its name on the sheet. column, row: its cell there. sampling: used where the user gives no other.
    """

    label: str
    controls: tuple[Control, ...]
    column: int = 0
    row: int = 0
    sampling: Sampling = FREE


def optimized_controls(variant: Variant) -> list[Any]:
    """Return the controls whose weights are optimised for each image (``OptimizedSpaceTime``)."""
    return [control for control in variant.controls if CONTROLS.name_of(type(control)) == "spacetime_optimized"]


def has_negatives(layouts: Sequence[Layout]) -> bool:
    """Return whether a region of the layouts has a negative prompt."""
    return any(region.negative_prompt for layout in layouts for region in layout.regions)


def with_negatives(variants: list[Variant], options: SampleSettings) -> tuple[list[Variant], list[str]]:
    """Return the variants with the negative prompts of regions, but for those without any control of regions; and a
    note where the options leave these prompts out."""
    if not options.region_negatives:
        return variants, ["Negative prompts of regions do nothing with --region_negatives false."]
    return [
        replace(variant, controls=(*variant.controls, NegativePrompts())) if variant.controls else variant
        for variant in variants
    ], []


def load_layouts(options: SampleSettings) -> list[Layout]:
    """Load or predict the layouts; none without ``--layout``. ValueError for flags that exclude each other, or a file
    that is not a layout."""
    if not options.layout:
        for name in ("control", "set", "sweep", "compare", "layout_seed", "predictor", "color"):
            value = getattr(options, name)
            if value is not None and not (name == "control" and value == [NONE]):
                raise ValueError(f"--{name} needs a layout with regions; give --layout.")
        if not options.region_negatives:
            raise ValueError("--region_negatives needs a layout with regions; give --layout.")
        return []
    if AUTO in options.layout:
        return _predict_layouts(options)
    for name in ("layout_seed", "predictor"):
        if getattr(options, name) is not None:
            raise ValueError(f"--{name} is for --layout {AUTO}; leave it out.")
    colored = [path for path in options.layout if is_image(path)]
    if options.prompt and not colored:
        raise ValueError("A layout contains its own prompt; give either --layout or --prompt.")
    if options.color and not colored:
        raise ValueError("--color is for a --layout that is an image; leave it out.")
    if colored and (len(options.layout) > 1 or len(options.prompt or ()) > 1):
        raise ValueError("A --layout that is an image comes alone, with one --prompt at most.")
    layouts = read_layouts(vars(options))
    if not options.from_json and not any(layout.regions for layout in layouts):  # records of before may have them
        for name in ("control", "set", "sweep", "compare"):
            if getattr(options, name) not in (None, [NONE]):
                raise ValueError(f"--{name} needs a layout with regions, and {' '.join(options.layout)} has none.")
    return layouts


def _predict_layouts(options: SampleSettings) -> list[Layout]:
    from localctl.layout_predictor.model import load_predictor  # only needed here

    if len(options.layout or ()) > 1:
        raise ValueError(f"--layout {AUTO} cannot be combined with other layouts; leave them out.")
    if not options.prompt:
        raise ValueError(f"--layout {AUTO} predicts the layout from a prompt; give --prompt.")
    if options.color:
        raise ValueError("--color is for a --layout that is an image; leave it out.")
    predictor = load_predictor(options.predictor)
    return [predictor.predict(prompt, options.layout_seed) for prompt in options.prompt]


def plan(options: SampleSettings, base: str) -> list[Variant]:
    """Return the variants that the flags ask for, at least one; settings not given come from the preset of the base.

    ValueError for unknown controls, settings or values, or flags that exclude each other.
    """
    if not options.layout:
        return [Variant(NONE, ())]
    if options.compare:
        if options.control or options.sweep:
            raise ValueError("Give either --compare or --control and --sweep, not both.")
        return read_variants(options.compare, options.set or (), base, options.presets)
    settings = [_split_setting(item) for item in options.set or ()]
    names = control_names(options.control or ["bias"])
    check_settings([name for name, _ in settings], names)
    if not options.sweep:
        controls = make_controls(names, settings, base, options.presets)
        return [Variant(_key(names), controls, sampling=sampling_with(names, base, options.presets))]
    return _sweep_variants(options, names, settings, base)


def compared(words: Sequence[str]) -> list[str]:
    """Return the names of the variants to compare.

    words: names of controls, joined by + where several act together; ``all`` stands for those of ``COMPARED_ALL`` that
    are not named, too. ValueError for a word that is given twice.
    """
    if len(set(words)) < len(words):
        raise ValueError("A control is given twice in --compare; give each one once.")
    return list(dict.fromkeys(name for word in words for name in (COMPARED_ALL if word == ALL else (word,))))


def read_variants(
    words: Sequence[str], settings: Sequence[str], base: str, presets: Presets | None = None
) -> list[Variant]:
    """Return the variants to compare.

    words: as for :func:`compared`. settings: NAME=VALUE each. presets: of a record. ValueError as for :func:`plan`.
    """
    read = [_split_setting(item) for item in settings]
    plans = [(word, control_names(word)) for word in compared(words)]
    check_settings([name for name, _ in read], [name for _, names in plans for name in names])
    return [
        Variant(label, make_controls(names, read, base, presets), index, sampling=sampling_with(names, base, presets))
        for index, (label, names) in enumerate(plans)
    ]


def _sweep_variants(
    options: SampleSettings, names: Sequence[str], settings: Sequence[tuple[str, str]], base: str
) -> list[Variant]:
    """Return a variant per cell of the grid: columns are the values of the first setting, rows those of the second."""
    sweep = options.sweep or ()
    axes = [(name, values.split(",")) for name, values in map(_split_setting, sweep)]
    if len(axes) > 2 or len({name for name, _ in axes}) < len(axes):
        raise ValueError(f"--sweep varies one setting or two different ones, not {' '.join(sweep)}.")
    both = {name for name, _ in axes} & {name for name, _ in settings}
    if both:
        raise ValueError(f"{both.pop()} is both in --set and in --sweep; give it once.")
    cells = list(itertools.product(*(range(len(values)) for _, values in reversed(axes))))
    if len(cells) > _MOST_CELLS:
        raise ValueError(
            f"--sweep asks for {len(cells)} images on a sheet, more than {_MOST_CELLS}; give fewer values."
        )
    check_settings([name for name, _ in axes], names)
    variants = []
    for cell in cells:
        chosen = [(name, values[index]) for (name, values), index in zip(axes, reversed(cell), strict=True)]
        label = " ".join(f"{name}={value}" for name, value in chosen)
        controls = make_controls(names, [*settings, *chosen], base, options.presets)
        row = cell[0] if len(cell) > 1 else 0
        variants.append(Variant(label, controls, cell[-1], row, sampling_with(names, base, options.presets)))
    if len({variant.label for variant in variants}) < len(variants):
        raise ValueError("A value is given twice in --sweep; give each one once.")
    return variants


def _split_setting(text: str) -> tuple[str, str]:
    """Split NAME=VALUE. ValueError for other text."""
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise ValueError(f"{text!r} is not a setting; write NAME=VALUE, such as strength=0.6.")
    return name, value


def make_controls(
    names: Sequence[str], settings: Sequence[tuple[str, str]], base: str, presets: Presets | None = None
) -> tuple[Control, ...]:
    """Return the controls of these names: the preset of the base, changed by that of a record, and by the settings,
    (name, value) as text each.

    ValueError for a value of another type or out of range.
    """
    recorded = [item for item in _recorded(names, presets) if "." in item[0]]
    check_settings([name for name, _ in recorded], names)
    read = {
        f"{name}.{field}": _read_value(setting, text, CONTROLS[name], field)
        for name in names
        for setting, text in (*recorded, *settings)
        if (field := setting_of(name, setting)) is not None
    }
    return tuple(build_controls(names, base, read))


def acting_presets(variants: Sequence[Variant], options: SampleSettings, guidance_scale: float | None) -> Presets:
    """Return, for the record, what acts without being given: the settings of each variant's controls, and its sampling
    where ``options`` leave it open. A later version may have other presets.

    guidance_scale: of the base.
    """
    given = [_split_setting(item)[0] for item in (*(options.set or ()), *(options.sweep or ()))]
    found: Presets = {}
    for variant in variants:
        every: Sequence[Any] = variant.controls
        named = [(name, control) for control in every if (name := CONTROLS.name_of(type(control)))]
        values = {
            f"{name}.{field.name}": getattr(control, field.name)
            for name, control in named
            for field in fields(control)
            if not any(setting_of(name, one) == field.name for one in given)
        }
        if options.guidance_scale is None:
            values["guidance_scale"] = variant.sampling.guidance_scale or guidance_scale
        if options.scheduler is None:
            values["scheduler"] = variant.sampling.scheduler
        texts = {name: _as_text(value) for name, value in values.items()}
        found[_key([name for name, _ in named])] = [f"{name}={text}" for name, text in texts.items() if text]
    return {key: items for key, items in found.items() if items}


def _key(names: Sequence[str]) -> str:
    """Return what stands for controls that act together."""
    return "+".join(names) or NONE


def _as_text(value: Any) -> str:
    """Return a value as ``set`` takes it; nothing for one that has no text."""
    if value is None:
        return ABSENT
    if isinstance(value, tuple):
        return ",".join(value)
    return str(value).lower() if isinstance(value, bool) else str(value) if isinstance(value, (int, float, str)) else ""


def _recorded(names: Sequence[str], presets: Presets | None) -> list[tuple[str, str]]:
    return [_split_setting(item) for item in (presets or {}).get(_key(names), ())]


def sampling_with(names: Sequence[str], base: str, presets: Presets | None) -> Sampling:
    """Return how to sample with these controls: as recorded, else as suits the base."""
    recorded = {name: text for name, text in _recorded(names, presets) if "." not in name}
    if not recorded:
        return sampling_of(names, base)
    given = {name: None if text == ABSENT else text for name, text in recorded.items()}
    scale = given.get("guidance_scale")
    scale = None if scale is None else _parse_value("guidance_scale", scale, 0.0)
    return Sampling(scheduler=given.get("scheduler"), guidance_scale=scale)


def _read_value(setting: str, text: str, control: type[Any], name: str) -> Any:
    """Return ``text`` as a value of the field ``name`` of a control."""
    kind = next(str(field.type) for field in fields(control) if field.name == name)
    if text == ABSENT and kind.endswith("| None"):
        return None
    return _parse_value(setting, text, 0.0 if kind == "float | None" else getattr(control, name))


def _parse_value(setting: str, text: str, default: Any) -> Any:
    """Return ``text`` as a value of the type of ``default``; of None, as names separated by commas."""
    if default is None or isinstance(default, tuple):
        return tuple(text.split(","))
    if isinstance(default, str):
        return text
    if isinstance(default, bool):
        if text.lower() not in ("true", "false"):
            raise ValueError(f"{setting} must be true or false, not {text!r}.")
        return text.lower() == "true"
    try:
        return type(default)(text)
    except ValueError as error:
        kind = "a whole number" if isinstance(default, int) else "a number"
        raise ValueError(f"{setting} must be {kind}, not {text!r}.") from error


def file_label(label: str) -> str:
    """Return a variant's label as part of a file name: letters, digits and ``+-.=``, and _ for any other character."""
    return "".join(character if character.isalnum() or character in "+-.=" else "_" for character in label)
