"""Controls as JSON: settings by name, adapters and ControlNets by the folder or hub id that they were loaded from.

Images belong to one call and are not saved: ``load_control(path, condition=image, mask=mask)`` sets new ones.
"""

from __future__ import annotations

import difflib
import importlib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from localctl.bases import lasting_name
from localctl.control.presets import CONTROLS, preset
from localctl.files import first_line, parse_json, read_json, write_text
from localctl.sizes import shown

_CLASS = "control"  # the key that names the class
_IMAGES = ("condition", "mask", "prompts")
Own = TypeVar("Own", bound="Serializable")


class Serializable:
    """A mixin for dataclasses of settings: create them from a base's presets, save and load them as JSON."""

    @classmethod
    def for_base(cls: type[Own], base: str, **changes: Any) -> Own:
        """Return this control with the preset of a base (micro, sd15, sd21, sdxl, or a folder or id of one).

        ``changes``: settings that override the preset. ValueError for a value out of range.
        """
        name = CONTROLS.name_of(cls)
        return cls(**{**(preset(name, base) if name else {}), **changes})

    def to_json(self) -> str:
        """Return JSON with the class and all settings except images.

        ValueError for an adapter that was not loaded from a folder or hub id.
        """
        return json.dumps(_to_dict(self), indent=1)

    @classmethod
    def from_json(cls: type[Own], text: str, **given: Any) -> Own:
        """Return the control that :meth:`to_json` wrote as ``text``.

        ``given``: images, and settings that override those of the text. ValueError unless the text describes a control
        of this class.
        """
        found = _from_dict(parse_json(text), "The text", (cls,), given)
        if not isinstance(found, cls):
            raise ValueError(
                f"The text describes a {type(found).__name__}, not a {cls.__name__}; call "
                f"{type(found).__name__}.from_json."
            )
        return found

    def save(self, path: str | Path) -> Path:
        """Write :meth:`to_json` to ``path`` and return the path. OSError when it cannot be written."""
        write_text(Path(path), self.to_json() + "\n")
        return Path(path)


def save_controls(controls: Sequence[Serializable], path: str | Path) -> Path:
    """Write a list of controls to ``path`` and return the path. ValueError and OSError as for a single control."""
    write_text(Path(path), json.dumps([_to_dict(control) for control in controls], indent=1) + "\n")
    return Path(path)


def load_control(path: str | Path, *, types: Sequence[type[Serializable]] = (), **given: Any) -> Any:
    """Return the control in a file that ``control.save(path)`` wrote.

    Args:
        types: further classes of controls that it may have, beside those of localctl.
        given: the images ``condition`` and ``mask`` (or ``prompts``), and settings that override those of the file.

    Raises:
        ValueError: a file that is missing or not JSON, an unknown class or setting, or a value that the control
            refuses.
    """
    return _from_dict(read_json(Path(path), "The control"), f"The file {path}", types, given)


def load_controls(path: str | Path, *, types: Sequence[type[Serializable]] = (), **given: Any) -> list[Any]:
    """Return the controls in a file that :func:`save_controls` wrote, in their order.

    A file with a single control gives a list of one. ``types`` and ``given`` as for :func:`load_control`, for each
    control that has such a setting; ValueError likewise.
    """
    content = read_json(Path(path), "The controls")
    items = content if isinstance(content, list) else [content]
    known = {name for item in items for name in _names(_class_of(item, f"The file {path}", types))}
    _check(given, known, "None of the controls has a")
    return [_from_dict(item, f"The file {path}", types, given, strict=False) for item in items]


def _to_dict(control: Any) -> dict[str, Any]:
    values = {name: getattr(control, name) for name in _names(type(control)) if name not in _IMAGES}
    return {_CLASS: type(control).__name__, **{name: _to_json_value(name, value) for name, value in values.items()}}


def _names(kind: type[Any]) -> list[str]:
    return [field.name for field in fields(kind) if field.init]


def _to_json_value(name: str, value: Any) -> Any:
    if isinstance(value, Tensor):
        return {"tensor": value.detach().cpu().tolist()}
    if isinstance(value, nn.Module):
        return _source_of(name, value)
    return [_to_json_value(name, item) for item in value] if isinstance(value, (list, tuple)) else value


def _source_of(name: str, module: Any) -> str:
    """Return the folder or hub id that an adapter or ControlNet was loaded from."""
    for part in (module, getattr(module, "adapter", None)):
        place = getattr(part, "config", {}).get("_name_or_path")
        if place:
            return lasting_name(str(place))
    raise ValueError(
        f"The {name} was not loaded from a folder or hub id, so it cannot be saved by name; call its save_pretrained, "
        "and load it from there."
    )


def _from_dict(
    content: Any, where: str, types: Sequence[type[Any]], given: Mapping[str, Any], strict: bool = True
) -> Any:
    kind = _class_of(content, where, types)
    known = _names(kind)
    _check([name for name in content if name != _CLASS], known, f"{where} has no")
    if strict:
        _check(given, known, f"{where} has no")
    values = {
        name: _from_json_value(name, value) for name, value in content.items() if name != _CLASS and name not in given
    }
    missing = [name for name in known if name in _IMAGES and name not in given]
    if missing:
        arguments = " and ".join(f"{name}=" for name in missing)
        raise ValueError(f"{where} describes a {kind.__name__} without its images; give {arguments}.")
    try:
        return kind(**values, **{name: value for name, value in given.items() if name in known})
    except TypeError as error:  # a setting of another type, or a missing one
        raise ValueError(
            f"{where} does not describe a valid {kind.__name__} ({first_line(error)}); check its settings."
        ) from error


def _class_of(content: Any, where: str, types: Sequence[type[Any]]) -> type[Any]:
    name = content.get(_CLASS) if isinstance(content, dict) else None
    if not isinstance(name, str):
        raise ValueError(
            f"{where} does not describe a control; it needs an object with the name of a class under {_CLASS!r}."
        )
    own = next((kind for kind in types if kind.__name__ == name), None)
    package = importlib.import_module("localctl")
    found = own or (getattr(package, name) if name in package.__all__ else None)
    if not (isinstance(found, type) and issubclass(found, Serializable) and is_dataclass(found)):
        raise ValueError(f"{where} names {shown(name)}, which is not a known control; give types= for your own ones.")
    return found


def _check(names: Iterable[str], known: Collection[str], where: str) -> None:
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"choose among {', '.join(sorted(known))}."
            raise ValueError(f"{where} setting {shown(name)}; {hint}")


def _from_json_value(name: str, value: Any) -> Any:
    if isinstance(value, dict) and set(value) == {"tensor"}:
        return torch.tensor(value["tensor"], dtype=torch.float32)
    if isinstance(value, list):
        return tuple(_from_json_value(name, item) for item in value)
    load = {"adapter": _load_adapter, "controlnet": _load_controlnet}.get(name)
    return load(value) if load is not None and isinstance(value, str) else value


def _load_adapter(place: str) -> Any:
    from localctl.adapter_files import find_adapter

    return find_adapter(place).load()


def _load_controlnet(place: str) -> Any:
    from diffusers import ControlNetModel

    try:
        return ControlNetModel.from_pretrained(place, use_safetensors=True).eval()
    except Exception as error:  # a missing file or another shape may raise any error
        raise ValueError(
            f"The ControlNet {place} cannot be loaded ({first_line(error)}); check its folder or hub id."
        ) from error
