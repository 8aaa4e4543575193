"""Region controls as ``sample.py`` names them: which to draw with, which settings, and what to lay side by side."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from localctl.cli.sample_record import AUTO
from localctl.cli.sample_record import NONE as NONE
from localctl.control.base import Control
from localctl.control.dense import DenseModulation
from localctl.control.forward_guidance import ForwardGuidance
from localctl.control.latent_updates import check_shiftable_kind
from localctl.control.layout_guidance import LayoutGuidance
from localctl.control.presets import BESIDE, PRESETS, SAMPLING
from localctl.control.region_bias import RegionBias
from localctl.control.spacetime import SpaceTimeAttention
from localctl.layout import Layout
from localctl.layout_io import load_layout
from localctl.pipelines import BASES, SCHEDULERS, same_base
from localctl.weight_search.weights import OptimizedSpaceTime

CONTROLS: dict[str, type[Control]] = {
    "bias": RegionBias,
    "dense": DenseModulation,
    "guidance": LayoutGuidance,
    "forward": ForwardGuidance,
    "spacetime": SpaceTimeAttention,
    "spacetime_optimized": OptimizedSpaceTime,
}
_ALL = ("none", "bias", "dense", "guidance")  # what --compare all lays side by side
_MOST_CELLS = 64  # of a sweep


@dataclass(frozen=True)
class Sampling:
    """A scheduler by its name in ``SCHEDULERS`` and a guidance scale; None: what the base or the user says."""

    scheduler: str | None = None
    guidance_scale: float | None = None


FREE = Sampling()


@dataclass(frozen=True)
class Variant:
    """One way to draw all pictures: how it is called on the sheet, its controls, its place there, and what it is drawn
    with unless the user says otherwise."""

    label: str
    controls: tuple[Control, ...]
    column: int = 0
    row: int = 0
    sampling: Sampling = FREE


def load_layouts(options: argparse.Namespace) -> list[Layout]:
    """The layouts of the flags. ValueError for flags that do not go together, or a file that is no layout."""
    if not options.layout:
        for name in ("control", "set", "sweep", "compare", "layout_seed", "predictor"):
            value = getattr(options, name)
            if value is not None and not (name == "control" and value == [NONE]):
                raise ValueError(f"--{name} needs regions to work on; give --layout.")
        return []
    if AUTO in options.layout:
        return _predicted(options)
    for name in ("layout_seed", "predictor"):
        if getattr(options, name) is not None:
            raise ValueError(f"--{name} is for --layout {AUTO}; leave it out.")
    if options.prompt:
        raise ValueError("A layout brings its own prompt; give either --layout or --prompt.")
    return [load_layout(path) for path in options.layout]


def _predicted(options: argparse.Namespace) -> list[Layout]:
    from localctl.layout_predictor.model import load_predictor  # only where it is wanted

    if len(options.layout) > 1:
        raise ValueError(f"--layout {AUTO} stands alone; leave out the other files.")
    if not options.prompt:
        raise ValueError(f"--layout {AUTO} reads the prompt; give --prompt.")
    predictor = load_predictor(None if options.predictor is None else Path(options.predictor).expanduser())
    return [predictor.predict(prompt, options.layout_seed) for prompt in options.prompt]


def plan(options: argparse.Namespace, base: str) -> list[Variant]:
    """Every way to draw that the flags ask for, at least one; settings start from the preset of the base.

    ValueError for unknown controls, settings or values, flags that do not go together, or a scheduler that loses what
    a control does to the latents.
    """
    variants = _plan(options, base)
    for variant in variants:
        kinds = {type(control) for control in variant.controls}
        if {OptimizedSpaceTime, LayoutGuidance} <= kinds:
            raise ValueError("spacetime_optimized and guidance do not go together; use spacetime with guidance.")
    if options.scheduler is not None:
        for variant in variants:
            if any(isinstance(control, LayoutGuidance) for control in variant.controls):
                check_shiftable_kind(SCHEDULERS[options.scheduler])
    return variants


def _plan(options: argparse.Namespace, base: str) -> list[Variant]:
    if not options.layout:
        return [Variant(NONE, ())]
    if options.compare:
        if options.control or options.sweep:
            raise ValueError("Give either --compare or --control and --sweep, not both.")
        return read_variants(options.compare, options.set or (), base)
    settings = [_setting(item) for item in options.set or ()]
    names = _names(options.control or ["bias"])
    _check_used(settings, names)
    if not options.sweep:
        controls = make_controls(names, settings, base)
        return [Variant("+".join(names) or NONE, controls, sampling=sampling_of(names, base))]
    return _swept(options.sweep, names, settings, base)


def read_variants(words: Sequence[str], settings: Sequence[str], base: str) -> list[Variant]:
    """What to lay side by side: ``all``, or names of controls, joined by + where they act together.

    ``settings``: NAME=VALUE each. ValueError as for :func:`plan`.
    """
    read = [_setting(item) for item in settings]
    words = _ALL if list(words) == ["all"] else tuple(words)
    if len(set(words)) < len(words):
        raise ValueError("A control is given twice in --compare; give each one once.")
    plans = [(word, _names([word])) for word in words]
    _check_used(read, [name for _, names in plans for name in names])
    return [
        Variant(label, make_controls(names, read, base), index, sampling=sampling_of(names, base))
        for index, (label, names) in enumerate(plans)
    ]


def _swept(sweep: Sequence[str], names: Sequence[str], settings: Sequence[tuple[str, str]], base: str) -> list[Variant]:
    """Columns are the values of the first setting, rows those of the second."""
    axes = [(name, values.split(",")) for name, values in map(_setting, sweep)]
    if len(axes) > 2 or len({name for name, _ in axes}) < len(axes):
        raise ValueError(f"--sweep goes over one setting or two different ones, not {' '.join(sweep)}.")
    both = {name for name, _ in axes} & {name for name, _ in settings}
    if both:
        raise ValueError(f"{both.pop()} is both in --set and in --sweep; give it once.")
    cells = list(itertools.product(*(range(len(values)) for _, values in reversed(axes))))
    if len(cells) > _MOST_CELLS:
        raise ValueError(
            f"--sweep asks for {len(cells)} pictures on a sheet, more than {_MOST_CELLS}; name fewer values."
        )
    _check_used([(name, "") for name, _ in axes], names)
    variants = []
    for cell in cells:
        chosen = [(name, values[index]) for (name, values), index in zip(axes, reversed(cell), strict=True)]
        label = " ".join(f"{name}={value}" for name, value in chosen)
        controls = make_controls(names, [*settings, *chosen], base)
        row = cell[0] if len(cell) > 1 else 0
        variants.append(Variant(label, controls, cell[-1], row, sampling_of(names, base)))
    if len({variant.label for variant in variants}) < len(variants):
        raise ValueError("A value is given twice in --sweep; give each one once.")
    return variants


def _names(words: Sequence[str]) -> list[str]:
    """The controls meant, without ``none``."""
    names = [name for word in words for name in word.split("+")]
    for name in names:
        if name not in CONTROLS and name != NONE:
            raise ValueError(f"Unknown control {name!r}; choose among {', '.join(CONTROLS)} and {NONE}.")
    if len(set(names)) < len(names) or (NONE in names and len(names) > 1):
        raise ValueError(f"The controls {' '.join(names)} do not go together; name each once, or {NONE} alone.")
    return [name for name in names if name != NONE]


def _setting(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise ValueError(f"{text!r} is no setting; write NAME=VALUE, such as strength=0.6.")
    return name, value


def _knows(control: str, setting: str) -> str | None:
    """The field of a control that ``setting`` means: its name, or control.name for one control alone; else None."""
    owner, dot, name = setting.rpartition(".")
    known = {field.name for field in fields(CONTROLS[control])}  # type: ignore[arg-type]  # all are dataclasses
    return name if name in known and (not dot or owner == control) else None


def _check_used(settings: Sequence[tuple[str, str]], names: Sequence[str]) -> None:
    for setting, _ in settings:
        if not any(_knows(name, setting) for name in names):
            known = sorted({field.name for name in names for field in fields(CONTROLS[name])})  # type: ignore[arg-type]
            choice = f"choose among {', '.join(known)}" if known else "there is no control to set"
            raise ValueError(f"No control of this run has a setting {setting!r}; {choice}.")


def make_controls(names: Sequence[str], settings: Sequence[tuple[str, str]], base: str) -> tuple[Control, ...]:
    """The controls of these names with the preset of the base, then the settings, as (name, value) in words.

    ValueError for a value that is of another kind or out of range.
    """
    controls = []
    for name in names:
        values = dict(preset(name, base, names))
        for setting, text in settings:
            field = _knows(name, setting)
            if field is not None:
                values[field] = _value(setting, text, _default(CONTROLS[name], field))
        controls.append(CONTROLS[name](**values))
    return tuple(controls)


def preset(control: str, base: str, beside: Sequence[str] = ()) -> Mapping[str, Any]:
    """The settings of a control, by its name in ``CONTROLS``, that suit the base, also beside the others of these
    names; empty for one that is not known."""
    values = dict(_of_base(PRESETS, base).get(control, {}))
    for (own, other), changed in _of_base(BESIDE, base).items():
        if own == control and other in beside:
            values |= changed
    return values


def sampling_of(names: Sequence[str], base: str) -> Sampling:
    """What suits the controls of these names together; where nothing is known of them together, what all ask for."""
    known = _of_base(SAMPLING, base)
    together = known.get("+".join(sorted(names)))
    wanted = [known.get(name, {}) for name in names] if together is None else [together]
    agreed = {
        field.name: wanted[0].get(field.name)
        for field in fields(Sampling)
        if wanted and len({item.get(field.name) for item in wanted}) == 1
    }
    return Sampling(**agreed)


def _of_base(table: Mapping[str, Mapping[Any, Any]], base: str) -> Mapping[Any, Any]:
    return next((found for name, found in table.items() if name in BASES and same_base(name, base)), {})


def _default(control: type[Control], name: str) -> Any:
    """A field's default; for numbers that may be left to the control, any number."""
    kinds = {field.name: str(field.type) for field in fields(control)}  # type: ignore[arg-type]  # all are dataclasses
    return 0.0 if kinds[name] == "float | None" else getattr(control, name)


def _value(setting: str, text: str, default: Any) -> Any:
    """``text`` as a value of the kind that ``default`` is; None stands for a list of names."""
    if default is None or isinstance(default, tuple):
        return tuple(text.split(","))
    if isinstance(default, str):
        return text
    if isinstance(default, bool):
        if text.lower() not in ("true", "false"):
            raise ValueError(f"{setting} is true or false, not {text!r}.")
        return text.lower() == "true"
    try:
        return type(default)(text)
    except ValueError as error:
        kind = "a whole number" if isinstance(default, int) else "a number"
        raise ValueError(f"{setting} is {kind}, not {text!r}.") from error


def named(label: str) -> str:
    """A variant's label as part of a file name."""
    return "".join(character if character.isalnum() or character in "+-.=" else "_" for character in label)


def layout_paths(options: argparse.Namespace) -> list[str]:
    """The files of the layouts by absolute path, to be read from anywhere; predicted ones have none yet."""
    if options.layout == [AUTO]:
        return [AUTO]
    return [str(Path(path).resolve()) for path in options.layout or ()]
