"""The methods of the tab Place, and fields for their settings, made from the controls' own dataclasses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import Field, dataclass, fields
from typing import Any

import gradio as gr

from localctl.cells import CELL_MODES
from localctl.control.presets import CONTROLS, NONE, control_names, preset
from localctl.studio import limits

METHODS = {
    "Region bias": "bias",
    "Dense modulation": "dense",
    "Layout guidance": "guidance",
    "Space-time attention": "spacetime",
    "Forward guidance": "forward",
    "Bias + guidance": "bias+guidance",
    "Bias + dense": "bias+dense",
    "Dense + guidance": "dense+guidance",
    "Space-time + guidance": "spacetime+guidance",
    "Space-time, optimised": "spacetime_optimized",
    "None (the prompt alone)": NONE,
}
COMPARED = ("none", "bias", "dense", "guidance", "spacetime", "bias+guidance")
COMPARED_LABELS = [next(label for label, other in METHODS.items() if other == name) for name in COMPARED]
TITLES = {name: label for label, name in METHODS.items() if "+" not in name}
# The settings that matter most, shown first.
KEY = {
    "bias": ("strength", "outside_strength"),
    "dense": ("w_cross", "w_self"),
    "guidance": ("scale", "threshold", "iterations"),
    "forward": ("strength", "end"),
    "spacetime": ("weight", "end"),
    "spacetime_optimized": ("weight", "epochs", "learning_rate"),
}
_LABELS = {
    "strength": "Strength S",
    "outside_strength": "Outside strength S'",
    "w_cross": "Cross-attention w_c",
    "w_self": "Self-attention w_s",
    "hide_phrases": "Hide phrases from the rest",
}
_SHARES = ("start", "end", "size_regularisation")
_HIGHEST = {
    "w_cross": 2.0,
    "w_self": 2.0,
    "strength": 5.0,
    "outside_strength": 5.0,
    "threshold": 1.0,
    "decay": 10.0,
    "scale": 100.0,
    "weight": 1.0,
}
_LIMIT = 100_000.0  # of a number without a bound of its own
_NOT_SHOWN = ("weights", "clip", "early_exit")  # tensors, places of models, and what changes the time alone


@dataclass(frozen=True)
class Setting:
    """One setting of a control: ``name`` is CONTROL.FIELD. default: that of the control, without a preset."""

    name: str
    kind: str
    default: Any

    @property
    def field(self) -> str:
        """The name of the field alone."""
        return self.name.partition(".")[2]

    def component(self, value: Any) -> Any:
        """Return the field of the page, with this value."""
        label = _LABELS.get(self.field, self.field.replace("_", " ").capitalize())
        if known := self.known():
            return gr.Dropdown(list(known), value=value, label=label)
        if self.kind == "bool":
            return gr.Checkbox(value=value, label=label)
        if self.kind == "int":
            return gr.Slider(0, 100, value=value, step=1, label=label)
        if self.kind.startswith("float") and self.highest() < _LIMIT:
            return gr.Slider(0, self.highest(), value=field_value(self, value), step=0.01, label=label)
        if self.kind.startswith("float"):
            return gr.Number(value=value, label=label)
        return gr.Textbox(value=field_value(self, value), label=label, max_lines=1)

    def highest(self) -> float:
        """Return the largest number that the page takes."""
        return 1.0 if self.field in _SHARES else _HIGHEST.get(self.field, _LIMIT)

    def known(self) -> tuple[str, ...]:
        """Return the texts it may have; empty for any, or for another kind of value."""
        from localctl.control.region_bias import STD_FORMS
        from localctl.control.segments import RESTS
        from localctl.control.spacetime import MIXES, SCHEDULES

        known = {"std": STD_FORMS, "mask_resize": CELL_MODES, "rest": RESTS, "mix": MIXES, "schedule": SCHEDULES}
        return tuple(known.get(self.field, ()))

    def read(self, value: Any) -> str:
        """Read what the page sends, as the text of ``--set``. ValueError for anything out of range."""
        if known := self.known():
            return limits.choice(self.name, value, known)
        if self.kind == "bool":
            return str(limits.flag(self.name, value)).lower()
        if self.kind == "int":
            return str(limits.whole(self.name, value, 0, 1000))
        if self.kind.startswith("float"):
            low = -_LIMIT if self.field in ("strength", "outside_strength") else 0.0
            return repr(limits.number(self.name, value, low, max(10.0, self.highest())))
        return limits.text(self.name, value, 200).strip()


def settings_of(control: str) -> list[Setting]:
    """Return the settings of a control that the page shows, those that matter most first."""
    found = [
        Setting(f"{control}.{field.name}", str(field.type), field.default)
        for field in fields(CONTROLS[control])
        if _is_shown(field)
    ]
    first = KEY.get(control, ())
    return sorted(found, key=lambda setting: first.index(setting.field) if setting.field in first else len(first))


def _is_shown(field: Field[Any]) -> bool:
    return field.init and field.name not in _NOT_SHOWN


def presets_of(method: str, base: str) -> dict[str, Any]:
    """Return the value of every setting of the controls in ``method`` (names joined by +) with its preset."""
    names = control_names(method)
    values: dict[str, Any] = {}
    for name in names:
        own = preset(name, base, names)
        values |= {setting.name: own.get(setting.field, setting.default) for setting in settings_of(name)}
    return values


def shown_presets(method: str, base: str) -> dict[str, Any]:
    """Return :func:`presets_of` as the fields of the page show them."""
    every = {setting.name: setting for name in control_names(method) for setting in settings_of(name)}
    return {name: field_value(every[name], value) for name, value in presets_of(method, base).items()}


def field_value(setting: Setting, value: Any) -> Any:
    """Return a value of a setting as its field shows it."""
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    if value is None:
        return 0.5 if setting.kind.startswith("float") else ""
    return value


def changed_settings(method: str, base: str, values: Mapping[str, Any]) -> list[str]:
    """Return NAME=VALUE for each setting of the method whose field differs from its preset. ValueError as for a field
    out of range."""
    shown = shown_presets(method, base)
    changed = []
    for name in control_names(method):
        for setting in settings_of(name):
            if setting.name in values:
                read, usual = setting.read(values[setting.name]), setting.read(shown[setting.name])
                if read != usual:
                    if not read:
                        raise ValueError(f"{setting.name} is empty; give names separated by commas.")
                    changed.append(f"{setting.name}={read}")
    return changed
