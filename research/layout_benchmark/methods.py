"""The methods: plain sampling, each control, compositions of two, and for tuning, grids of a control's settings.

Labels are those of ``sample.py --compare``.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from localctl.control.base import Control
from localctl.control.presets import CONTROLS, NONE, preset, sampling_of
from localctl.jobs.variants import make_controls, read_variants
from localctl.sampling_settings import FREE, Sampling
from research.layout_benchmark.protocol import METHODS as METHODS
from research.layout_benchmark.protocol import SINGLE as SINGLE

# A few values for each setting that matters; ``--grid`` replaces the grid of a control.
GRIDS: Mapping[str, Mapping[str, Sequence[str]]] = {
    "bias": {"strength": ("1", "2", "4", "8"), "outside_strength": ("1", "2", "4"), "hide_phrases": ("false", "true")},
    "dense": {
        "rest": ("segment", "free"),
        "decay": ("0", "1"),
        "w_self": ("0.3", "1"),
        "hide_phrases": ("false", "true"),
    },
    "guidance": {"scale": ("30", "60"), "threshold": ("0.02", "0.05"), "start": ("0", "0.2"), "end": ("0.6", "0.8")},
    "forward": {"strength": ("0.5", "0.8", "1"), "end": ("0.2", "0.5", "1")},
}


@dataclass(frozen=True)
class Method:
    """Controls to measure.

    name: of its files and rows. settings: (name, value) pairs of a tuned control, as text; () for the preset.
    sampling: scheduler and guidance scale, in place of the protocol's.
    """

    name: str
    controls: tuple[Control, ...]
    settings: tuple[tuple[str, str], ...] = ()
    sampling: Sampling = FREE

    def described(self) -> list[dict[str, Any]]:
        """Return every setting of every control, which a result must agree with, as JSON would read them back."""
        return [{"control": type(control).__name__, **_plain(asdict(control))} for control in self.controls]  # type: ignore[call-overload]

    def filled(self, described: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Return the settings ``described`` by an earlier result, with the defaults of settings that are newer."""
        defaults = {type(control).__name__: _plain(asdict(type(control)())) for control in self.controls}  # type: ignore[call-overload]
        return [{**defaults.get(item.get("control", ""), {}), **item} for item in described]


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def methods(labels: Sequence[str], settings: Sequence[str], base: str, fixed: Sampling = FREE) -> list[Method]:
    """Return the methods of these labels, after plain sampling in each of their ways (scheduler and guidance scale).

    fixed: scheduler and guidance scale of all methods, in place of their presets.

    Raises:
        ValueError: as :func:`localctl.jobs.variants.read_variants`.
    """
    wanted = [NONE, *(label for label in labels if label != NONE)]
    found = [
        Method(item.label, item.controls, sampling=_free(item.sampling, fixed))
        for item in read_variants(wanted, settings, base)
    ]
    return _with_plain(found)


def _free(own: Sampling, fixed: Sampling) -> Sampling:
    """Return the method's own scheduler and guidance scale, without those that are fixed for all methods."""
    return Sampling(
        own.scheduler if fixed.scheduler is None else None, own.guidance_scale if fixed.guidance_scale is None else None
    )


def _with_plain(found: Sequence[Method]) -> list[Method]:
    """Return the methods after plain sampling in each of their ways."""
    ways = dict.fromkeys(method.sampling for method in found)
    plain = [Method(plain_name(way), (), sampling=way) for way in ways]
    return [*plain, *(method for method in found if method.controls)]


def plain_name(way: Sampling) -> str:
    """Return ``none``, with the scheduler and guidance scale where they are not the protocol's."""
    scale = None if way.guidance_scale is None else f"{way.guidance_scale:g}"
    return " ".join([NONE, *(word for word in (way.scheduler, scale) if word is not None)])


def grids(controls: Sequence[str], changes: Sequence[str], base: str, fixed: Sampling = FREE) -> list[Method]:
    """Return plain sampling, each control with its preset, and each control with every setting of its grid.

    changes: CONTROL.NAME=V,V each, in place of the built-in grid of that control. fixed: as for :func:`methods`.

    Raises:
        ValueError: a control, setting or value is unknown.
    """
    asked: dict[str, dict[str, list[str]]] = {}
    for change in changes:
        place, equals, values = change.partition("=")
        control, dot, name = place.partition(".")
        if not (equals and dot and name and values) or control not in CONTROLS:
            raise ValueError(f"{change!r} is not an axis of a grid; write CONTROL.NAME=V,V, CONTROL one of {_known()}.")
        asked.setdefault(control, {})[name] = values.split(",")
    found = [Method(NONE, ())]
    for control in controls:
        if control not in CONTROLS:
            raise ValueError(f"There is no control {control!r} to tune; choose from {_known()}.")
        grid = asked.get(control, GRIDS.get(control))
        if grid is None:
            raise ValueError(f"There is no grid for {control!r}; give --grid {control}.NAME=VALUE,VALUE.")
        way = _free(sampling_of([control], base), fixed)
        found.append(Method(control, make_controls([control], [], base), sampling=way))
        for cell in itertools.product(*grid.values()):
            chosen = tuple(zip(grid, cell, strict=True))
            name = f"{control} {' '.join(f'{key}={value}' for key, value in chosen)}"
            found.append(Method(name, make_controls([control], check_names(control, chosen), base), chosen, way))
    return _with_plain(found)


def check_names(control: str, settings: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return ``settings`` as a list. Raises ValueError for one that the control does not have."""
    known = {field for field in asdict(CONTROLS[control]())}
    for name, _ in settings:
        if name not in known:
            raise ValueError(f"The control {control!r} has no setting {name!r}; choose among {', '.join(known)}.")
    return list(settings)


def preset_words(method: Method, base: str) -> dict[str, Any]:
    """Return the tuned method's settings in the form of ``localctl.control.presets``: over the preset of the base."""
    control = method.controls[0]
    name = method.name.partition(" ")[0]
    return dict(preset(name, base)) | {key: getattr(control, key) for key, _ in method.settings}


def _known() -> str:
    return ", ".join(CONTROLS)
