"""Controls by name, with the settings that suit a base: ``controls("bias+guidance", base="micro")``.

For Stable Diffusion the settings are the published ones; a setting that is missing here has the control's own default.
The embedded base has coarser grids and another text encoder, so its settings were tuned with
``python -m research.layout_benchmark --tune`` (see docs/log.md), on layouts that the benchmark does not use,
and with its second generation; those of the bias with its third.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from types import MappingProxyType
from typing import Any

from localctl.bases import BASES, same_base
from localctl.sampling_settings import FREE, Sampling

NONE = "none"  # the name for no control


class _Controls(Mapping[str, type[Any]]):
    """The classes of the controls, by name; each is imported on first access."""

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
        """Return the name of a class, or None for a class without presets."""
        return next((name for name, kind in self._classes.items() if kind == control.__name__), None)


CONTROLS = _Controls()

# With sites None, guidance reads the middle block and the first up block with cross-attention, as published for SD.
PRESETS: Mapping[str, Mapping[str, Mapping[str, Any]]] = MappingProxyType(
    {
        "sd15": {"guidance": {"sites": ("mid/8", "up/4")}},
        "sd21": {"guidance": {"sites": ("mid/8", "up/4")}},
        "sdxl": {"guidance": {"sites": ("mid/4", "up/4")}},
        # In the first third of its steps there is almost only noise (abar 0.01 at t = 670); the second settles the
        # layout.
        "micro": {
            "bias": {"strength": 4.0, "outside_strength": 2.0},
            "dense": {
                "rest": "free",
                "separate_texts": False,
                "hide_phrases": True,
                "decay": 0.0,
                "end": 0.7,
                "w_self": 0.6,
                "mask_resize": "area",
            },
            "guidance": {"sites": ("mid/4", "up/2"), "threshold": 0.02, "start": 0.2, "end": 0.7},
            # The published first fifth of the steps is noise here, too.
            "forward": {"strength": 1.0, "end": 1.0},
            # Its text encoder was trained on the names of the scenes' objects, not on "a photo of".
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

# Changes to a control's preset when another control is used too: (control, other) -> settings. While the bias holds
# attention in the regions, the energy of the guidance is low and it does nothing, so the bias starts after it.
BESIDE: Mapping[str, Mapping[tuple[str, str], Mapping[str, Any]]] = MappingProxyType(
    {"micro": {("bias", "guidance"): {"start": 0.6}}}
)

# Default ``scheduler`` and ``guidance_scale`` for a control or a combination of them. Controls of attention act only
# through the prompt's rows, and against the places that the initial noise suggests: a higher scale and fresh noise in
# each step make them stronger. Layout guidance moves the latents themselves, and fresh noise undoes some of that,
# unless another control holds the objects in place.
SAMPLING: Mapping[str, Mapping[str, Mapping[str, Any]]] = MappingProxyType(
    {
        "micro": {
            "bias": {"scheduler": "ddpm", "guidance_scale": 4.0},
            "dense": {"scheduler": "ddpm", "guidance_scale": 4.0},
            "forward": {"scheduler": "ddpm", "guidance_scale": 4.0},
            "spacetime": {"scheduler": "ddpm", "guidance_scale": 4.0},
            "spacetime_optimized": {"guidance_scale": 4.0},  # found with DDIM
            "bias+guidance": {"scheduler": "ddpm", "guidance_scale": 4.0},
        }
    }
)


def controls(names: str | Sequence[str], base: str = "micro", **settings: Any) -> list[Any]:
    """Return the controls of these names, with the presets for the base and for their combination.

    Args:
        names: ``bias``, ``dense``, ``guidance``, ``forward``, ``spacetime`` or ``spacetime_optimized``; several as a
            list, or joined by +. ``none`` alone for no control.
        base: micro, sd15, sd21, sdxl, or a folder or id of one of them; for any other base, each control has its own
            defaults.
        settings: override the presets, in each control that has such a setting; with the control's name and a dot in
            front, in that control alone: ``**{"bias.start": 0.5}``.

    Raises:
        ValueError: an unknown name or setting, a value out of range, or controls that cannot be combined.
    """
    names = control_names(names)
    check_settings(settings, names)
    return build_controls(names, base, settings)


def build_controls(names: Sequence[str], base: str, settings: Mapping[str, Any]) -> list[Any]:
    """Build the controls of a list of single names, as :func:`controls`; a setting that none of them has is ignored."""
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
    """Split words joined by + into names of controls, without ``none``.

    ValueError for an unknown name, or names that cannot be combined.
    """
    names = [name for word in ([words] if isinstance(words, str) else words) for name in word.split("+")]
    for name in names:
        if name not in CONTROLS and name != NONE:
            raise ValueError(f"Unknown control {name!r}; choose among {', '.join(CONTROLS)} and {NONE}.")
    if len(set(names)) < len(names) or (NONE in names and len(names) > 1):
        raise ValueError(f"The controls {' '.join(names)} cannot be combined; name each once, or {NONE} alone.")
    if {"spacetime_optimized", "guidance"} <= set(names):
        raise ValueError("spacetime_optimized and guidance cannot be combined; use spacetime with guidance.")
    return [name for name in names if name != NONE]


def setting_of(control: str, setting: str) -> str | None:
    """Return the field of ``control`` that ``setting`` names, as "field" or "control.field"; None if it has none."""
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
    """Return the preset settings of a control, by its name in :data:`CONTROLS`, for a base.

    ``beside``: the names of all controls in use, some of which change the preset. Empty for an unknown control or base.
    """
    values = dict(_of_base(PRESETS, base).get(control, {}))
    for (own, other), changed in _of_base(BESIDE, base).items():
        if own == control and other in beside:
            values |= changed
    return values


def sampling_of(names: str | Sequence[str], base: str = "micro") -> Sampling:
    """Return the sampling settings that suit the controls of these names, given as for :func:`controls`.

    Without settings for their combination, only those that are the same for all of them.
    """
    names = control_names(names)
    known = _of_base(SAMPLING, base)
    together = known.get("+".join(sorted(names)))
    wanted = [known.get(name, {}) for name in names] if together is None else [together]
    if not wanted:
        return FREE
    return Sampling(**{name: value for name, value in wanted[0].items() if all(w.get(name) == value for w in wanted)})


def _of_base(table: Mapping[str, Mapping[Any, Any]], base: str) -> Mapping[Any, Any]:
    return next((found for name, found in table.items() if name in BASES and same_base(name, base)), {})
