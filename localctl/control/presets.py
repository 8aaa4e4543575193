"""Controls by name, with the settings that suit a base: ``controls("bias+guidance", base="micro")``.

Stable Diffusion's are the published ones; what is not named here has the control's own default. The embedded base has
coarser grids and a text encoder of its own, so its settings come from ``python -m research.layout_benchmark
--tune`` and docs/log.md, on layouts that the benchmark does not use.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from types import MappingProxyType
from typing import Any

from localctl.bases import BASES, same_base
from localctl.sampling_settings import FREE, Sampling

NONE = "none"  # in place of a control


class _Controls(Mapping[str, type[Any]]):
    """The classes of the controls, by name; each is imported when it is asked for."""

    _classes = MappingProxyType(
        {
            "bias": "RegionBias",
            "dense": "DenseModulation",
            "guidance": "LayoutGuidance",
            "forward": "ForwardGuidance",
            "spacetime": "SpaceTimeAttention",
            "spacetime_optimized": "OptimizedSpaceTime",
        }
    )

    def __getitem__(self, name: str) -> type[Any]:
        return getattr(importlib.import_module("localctl"), self._classes[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._classes)

    def __len__(self) -> int:
        return len(self._classes)

    def name_of(self, control: type[Any]) -> str | None:
        """Return the name of a class, None for one that has no presets."""
        return next((name for name, called in self._classes.items() if called == control.__name__), None)


CONTROLS = _Controls()

# sites None would be the middle block and the first up block with cross-attention, as published for Stable Diffusion.
PRESETS: Mapping[str, Mapping[str, Mapping[str, Any]]] = MappingProxyType(
    {
        "sd15": {"guidance": {"sites": ("mid/8", "up/4")}},
        "sd21": {"guidance": {"sites": ("mid/8", "up/4")}},
        "sdxl": {"guidance": {"sites": ("mid/4", "up/4")}},
        # The first third of its steps is noise (abar 0.01 at t = 670); the layout is settled in the second.
        "micro": {
            "bias": {"strength": 2.0, "outside_strength": 2.0, "hide_phrases": True},
            "dense": {
                "rest": "free",
                "separate_texts": False,
                "hide_phrases": True,
                "decay": 0.0,
                "end": 0.7,
                "w_self": 1.0,
            },
            "guidance": {"sites": ("mid/4", "up/2"), "threshold": 0.02, "start": 0.2, "end": 0.7},
            # Its text encoder has read no "photo", only the names of the scenes' objects.
            "spacetime": {"weight": 1.0, "hide_phrases": True, "end": 0.7, "template": "{}"},
            "spacetime_optimized": {
                "weight": 1.0,
                "hide_phrases": True,
                "end": 0.7,
                "template": "{}",
                "learning_rate": 0.1,
            },
        },
    }
)

# What a control's preset changes beside another control: where attention lies in the regions already, the energy of the
# guidance is low, and it does nothing. So they come one after the other.
BESIDE: Mapping[str, Mapping[tuple[str, str], Mapping[str, Any]]] = MappingProxyType(
    {"micro": {("bias", "guidance"): {"start": 0.6}}}
)

# What images are sampled with under a control or a composition, where nothing else is said: ``scheduler``,
# ``guidance_scale``. Controls of attention act through the prompt's rows alone, and against a place that the first
# noise suggests: a higher scale and fresh noise in each step let them through. Guidance moves the latents itself, and
# fresh noise undoes some of it, unless another control holds the objects.
SAMPLING: Mapping[str, Mapping[str, Mapping[str, Any]]] = MappingProxyType(
    {
        "micro": {
            "bias": {"scheduler": "ddpm", "guidance_scale": 4.0},
            "dense": {"scheduler": "ddpm", "guidance_scale": 4.0},
            "spacetime": {"scheduler": "ddpm", "guidance_scale": 4.0},
            "spacetime_optimized": {"guidance_scale": 4.0},  # found with DDIM
            "bias+guidance": {"scheduler": "ddpm", "guidance_scale": 4.0},
        }
    }
)


def controls(names: str | Sequence[str], base: str = "micro", **settings: Any) -> list[Any]:
    """Return the controls of these names, with the presets of the base and of their company.

    Args:
        names: ``bias``, ``dense``, ``guidance``, ``forward``, ``spacetime`` or ``spacetime_optimized``; several as a
            list, or joined by +. ``none`` alone for no control.
        base: micro, sd15, sd21, sdxl, or a folder or id of one of them; for any other, each control's own defaults.
        settings: instead of the presets', for each of the controls that has such a setting; with the control's name and
            a dot before it, for that control alone: ``**{"bias.start": 0.5}``.

    Raises:
        ValueError: an unknown name or setting, a value out of range, or controls that do not go together.
    """
    names = control_names(names)
    check_settings(settings, names)
    return build_controls(names, base, settings)


def build_controls(names: Sequence[str], base: str, settings: Mapping[str, Any]) -> list[Any]:
    """As :func:`controls`, of separate names; a setting that none of them has is left out."""
    built = []
    for name in names:
        values = dict(preset(name, base, names))
        for setting, value in settings.items():
            field = setting_of(name, setting)
            if field is not None:
                values[field] = value
        built.append(CONTROLS[name](**values))
    return built


def control_names(words: str | Sequence[str]) -> list[str]:
    """Return the names meant by words that may be joined by +, without ``none``. ValueError for an unknown one, or
    names that do not go together."""
    names = [name for word in ([words] if isinstance(words, str) else words) for name in word.split("+")]
    for name in names:
        if name not in CONTROLS and name != NONE:
            raise ValueError(f"Unknown control {name!r}; choose among {', '.join(CONTROLS)} and {NONE}.")
    if len(set(names)) < len(names) or (NONE in names and len(names) > 1):
        raise ValueError(f"The controls {' '.join(names)} do not go together; name each once, or {NONE} alone.")
    if {"spacetime_optimized", "guidance"} <= set(names):
        raise ValueError("spacetime_optimized and guidance do not go together; use spacetime with guidance.")
    return [name for name in names if name != NONE]


def setting_of(control: str, setting: str) -> str | None:
    """Return the field of a control that ``setting`` means: its name, or control.name for one control alone; else
    None."""
    owner, dot, name = setting.rpartition(".")
    return name if name in _fields(control) and (not dot or owner == control) else None


def check_settings(settings: Iterable[str], names: Sequence[str]) -> None:
    """Raise a ValueError for a setting that none of the controls of these names has."""
    for setting in settings:
        if not any(setting_of(name, setting) for name in names):
            known = sorted({field for name in names for field in _fields(name)})
            choice = f"choose among {', '.join(known)}" if known else "there is no control to set"
            raise ValueError(f"No control of this run has a setting {setting!r}; {choice}.")


def _fields(control: str) -> list[str]:
    return [field.name for field in fields(CONTROLS[control])]


def preset(control: str, base: str, beside: Sequence[str] = ()) -> Mapping[str, Any]:
    """Return the settings of a control, by its name in :data:`CONTROLS`, that suit the base, also beside the others of
    these names; empty for one that is not known."""
    values = dict(_of_base(PRESETS, base).get(control, {}))
    for (own, other), changed in _of_base(BESIDE, base).items():
        if own == control and other in beside:
            values |= changed
    return values


def sampling_of(names: str | Sequence[str], base: str = "micro") -> Sampling:
    """How to sample with the controls of these names, given as for :func:`controls`: what suits them together; where
    nothing is known of them together, what all ask for."""
    names = control_names(names)
    known = _of_base(SAMPLING, base)
    together = known.get("+".join(sorted(names)))
    wanted = [known.get(name, {}) for name in names] if together is None else [together]
    if not wanted:
        return FREE
    return Sampling(**{name: value for name, value in wanted[0].items() if all(w.get(name) == value for w in wanted)})


def _of_base(table: Mapping[str, Mapping[Any, Any]], base: str) -> Mapping[Any, Any]:
    return next((found for name, found in table.items() if name in BASES and same_base(name, base)), {})
