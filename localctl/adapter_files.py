"""Find and load adapters from folders, single files and the hub; they are found by their config alone, then loaded.

The tensors in a single file may have diffusers' names, or those of the T2I-Adapter authors' files, see
``adapter_weights``. A safetensors file may hold configs in its metadata, and then also several adapters by name.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import T2IAdapter
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HFValidationError

from localctl.adapter import (
    ADAPTERS,
    OPTIONS,
    SHAPE,
    TOKEN_WIDTH,
    LocalAdapter,
    cast,
    check_latents,
    check_margin,
    check_shape,
)
from localctl.adapter_weights import (
    SUFFIXES,
    common_dtype,
    embedded_configs,
    file_and_part,
    read_weights,
    saved_dtype,
)
from localctl.bases import HUB_ID, check_weights, pickled_only, same_base
from localctl.conditions import ConditionConfig
from localctl.files import first_line, read_json
from localctl.masks import MASK_RESIZE
from localctl.sizes import shown

CONFIG = "config.json"
_WEIGHTS = "diffusion_pytorch_model"
_INSIDE = ("", "adapter", "t2iadapter")  # subfolders with an adapter: its own folder, or one of a run or checkpoint
_WAY_OUT = "give the folder of an adapter or training run, a hub id (owner/name), or a file of weights"


class _Missing(FileNotFoundError):
    """There is no adapter in a folder."""


@dataclass(frozen=True)
class SavedAdapter:
    """The location of an adapter, and its config, which names its class.

    name: as the user gave it. place: a folder, a file of weights, FILE/NAME for one of several in a file, or a hub id,
    to be recorded. variant: of the weights' file, such as fp16, if there is no file without a variant.
    local_files_only: do not use the network.
    """

    name: str
    place: str
    config: Mapping[str, Any]
    variant: str | None = None
    local_files_only: bool = False

    @property
    def local(self) -> bool:
        """Whether it is a :class:`LocalAdapter`, not a plain T2IAdapter."""
        return self.config.get("_class_name") == LocalAdapter.__name__

    @property
    def base(self) -> str | None:
        """The base it was trained on, if its config names one."""
        return self.config.get("base")

    @property
    def condition(self) -> ConditionConfig | None:
        """The kind of condition it was trained with, if its config names one; checked when the adapter was found."""
        options = self.config.get("condition")
        return ConditionConfig(**options) if options else None

    @property
    def unconditional_scale(self) -> float:
        """The factor of its features beside the negative prompt that images are generated with by default."""
        return float(self.config.get("unconditional_scale", 1)) if self.local else 1.0

    def used_on(self, base: str) -> str | None:
        """Return a warning if ``base`` is not the base it was trained on, else None."""
        if self.base is None or same_base(self.base, base):
            return None
        return f"The adapter {self.name} was trained on {self.base} and is used on {base}, which has the same shape."

    def check_channels(self, condition: ConditionConfig) -> None:
        """Raise a ValueError if the adapter takes conditions of another number of channels."""
        channels = self.config.get("in_channels", 3)  # T2IAdapter's default
        if channels != condition.channels:
            raise ValueError(
                f"The adapter {self.name} takes conditions of {channels} channels, but "
                f"condition={condition.kind} has {condition.channels}; choose the condition it was trained with, or "
                "set condition.channels."
            )

    def load(self, dtype: torch.dtype | None = torch.float32) -> LocalAdapter:
        """Load the adapter in eval mode; a plain ``T2IAdapter`` is wrapped. ``dtype``: of the weights; None: as saved.

        Raises:
            ValueError: the weights are missing, truncated, of another shape, not finite or only pickled.
        """
        place = Path(self.place)
        file, part = file_and_part(place)
        if file.is_file():
            return self._from_weights(file, part, dtype)
        if dtype is None:
            dtype = saved_dtype(weights_file(place, self.variant))
        try:
            return cast(self._from_pretrained(self.variant), dtype)
        except ValueError as error:
            if self.variant or place.exists() or not isinstance(error.__cause__, OSError):
                raise
            return cast(self._from_pretrained("fp16"), dtype)  # some repositories have no other weights

    def _from_weights(self, file: Path, part: str, dtype: torch.dtype | None) -> LocalAdapter:
        try:
            adapter = T2IAdapter.from_config({name: self.config[name] for name in SHAPE if name in self.config})
            state = read_weights(file, part)[1]
            adapter.load_state_dict(state)
        except Exception as error:  # a truncated file or another shape may raise any error
            raise ValueError(
                f"The weights of the adapter {self.name} cannot be read ({first_line(error)}); fetch or save it again."
            ) from error
        options = {name: value for name, value in self.config.items() if name in OPTIONS} if self.local else {}
        local = LocalAdapter.from_t2iadapter(adapter, **options).eval()
        self._check_finite(local)
        return cast(local, dtype or common_dtype({value.dtype for value in state.values()}))

    def _check_finite(self, adapter: torch.nn.Module) -> None:
        for name, weights in adapter.named_parameters():
            if not bool(torch.isfinite(weights).all()):
                raise ValueError(
                    f"The weights of the adapter in {self.place} hold NaN or infinity ({name}); save it again."
                )

    def _from_pretrained(self, variant: str | None) -> LocalAdapter:
        place, folder = self.place, Path(self.place)
        if pickled_only(folder):
            convert = f"T2IAdapter.from_pretrained({place!r}, use_safetensors=False).save_pretrained({place!r})"
            raise ValueError(
                f"The adapter in {place} has only .bin weights, which are pickles and are not loaded; convert them: "
                f"diffusers.{convert}."
            )
        options = {"variant": variant, "dtype": torch.float32, "local_files_only": self.local_files_only}
        try:
            if folder.is_dir():
                check_weights(folder)
            found, report = ADAPTERS[str(self.config["_class_name"])].from_pretrained(
                place, use_safetensors=True, output_loading_info=True, **options
            )
        except Exception as error:  # a missing or truncated file or another shape may raise any error
            reason = f"the weights of the adapter there cannot be read ({first_line(error)})"
            raise ValueError(f"The adapter in {place} cannot be loaded: {reason}; save it again.") from error
        for what, names in report.items():
            if names and what in ("missing_keys", "mismatched_keys", "unexpected_keys"):
                tensors = f"{len(names)} {what.replace('_keys', '')} tensors"
                raise ValueError(
                    f"The weights of the adapter in {place} do not fit its config ({tensors}, such as "
                    f"{shown(sorted(map(str, names))[0])}); save it again."
                )
        self._check_finite(found)
        return found if isinstance(found, LocalAdapter) else LocalAdapter.from_t2iadapter(found)


def load_adapter(name: str | Path, local_files_only: bool = False) -> LocalAdapter:
    """Find and load an adapter; arguments and ValueErrors as for :func:`find_adapter` and :meth:`SavedAdapter.load`."""
    return find_adapter(name, local_files_only).load()


def find_adapter(name: str | Path, local_files_only: bool = False) -> SavedAdapter:
    """Find an adapter by its config alone, or, for weights without a config, by their shapes.

    Args:
        name: its folder, the folder of a training run or checkpoint, a file of weights, or a hub id; FOLDER/NAME or
            FILE/NAME for one of several, see :func:`list_adapters`.
        local_files_only: do not use the network.

    Raises:
        ValueError: there is no adapter, it has another class, or its config is invalid.
    """
    name = str(name)
    try:
        path = _with_suffix(Path(name).expanduser())
        if path.is_file() or path.parent.is_file():
            return _from_file(name, path, local_files_only)
        if path.exists() or name.startswith(("/", ".", "~")) or not HUB_ID.match(name):  # a folder, not a hub id
            return _from_folder(name, path, local_files_only)
        repository, inside = "/".join(name.split("/")[:2]), "/".join(name.split("/")[2:])
        if inside:
            file = hf_hub_download(repository, inside, local_files_only=local_files_only)
            return _from_file(name, Path(file), local_files_only)
        config = Path(hf_hub_download(name, CONFIG, local_files_only=local_files_only))
    except (OSError, HFValidationError, RuntimeError) as error:  # from the hub; RuntimeError: "~" without a home
        from_hub = not isinstance(error, (_Missing, RuntimeError))
        prefix = "no such folder or file; as a hub id: " if from_hub else ""
        raise ValueError(f"There is no adapter {name!r} ({prefix}{first_line(error)}); {_WAY_OUT}.") from error
    return SavedAdapter(name, name, _read_config(name, config), None, local_files_only)


def list_adapters(place: str | Path) -> list[str]:
    """Return the names of the adapters in a folder or in one file, sorted: ``find_adapter(f"{place}/{name}")`` finds
    each. Empty for a folder without adapters, or with one of its own, and for a file with a single adapter.

    ValueError if there is no such folder or file, or the file is not of weights.
    """
    path = Path(place).expanduser()
    if path.is_file():
        return sorted(name for name in embedded_configs(path) if name)
    if not path.is_dir():
        raise ValueError(f"There is no folder or file {path} with adapters; check the path.")
    if (path / CONFIG).is_file():
        return []
    folders = [item.parent for inside in _INSIDE for item in path.glob(f"*/{inside}/{CONFIG}")]
    found = {folder.relative_to(path).parts[0] for folder in folders if is_adapter(folder / CONFIG)}
    files = [item for item in path.iterdir() if item.is_file() and item.suffix.lower() in SUFFIXES]
    return sorted(found | {item.stem for item in files})


def is_adapter(config: Path) -> bool:
    """Return whether a ``config.json`` is an adapter's."""
    content = read_json(config, "The config")
    return isinstance(content, dict) and content.get("_class_name") in ADAPTERS


def _from_folder(name: str, path: Path, local_files_only: bool) -> SavedAdapter:
    for folder in (path / inside for inside in _INSIDE):
        if (folder / CONFIG).is_file():
            config = _read_config(name, folder / CONFIG)
            return SavedAdapter(name, str(folder.resolve()), config, _variant(folder), local_files_only)
    if not path.is_dir():
        raise _Missing("no such folder or file")
    weights = [file for file in path.iterdir() if file.suffix.lower() in SUFFIXES and file.is_file()]
    if len(weights) == 1:
        return _from_file(name, weights[0], local_files_only)
    if weights:
        several = ", ".join(sorted(file.name for file in weights)[:3])
        raise _Missing(f"no {CONFIG} in it but {len(weights)} files of weights, of which one must be given: {several}")
    checkpoints = sorted(path.glob("checkpoint-*/adapter"), key=lambda folder: folder.stat().st_mtime)
    hint = f"; its newest checkpoint is {checkpoints[-1].parent}" if checkpoints else ""
    if not checkpoints and (names := list_adapters(path)):
        hint = f"; it holds {len(names)} adapters, of which one must be given: {path / names[0]}"
    raise _Missing(f"no {CONFIG} in it{hint}")


def _from_file(name: str, path: Path, local_files_only: bool) -> SavedAdapter:
    """Find an adapter by a file: with a config next to it as in a folder, else by the shapes of its weights."""
    config_file = path.parent / CONFIG
    if path.name == CONFIG or (config_file.is_file() and path.name.startswith(_WEIGHTS)):
        variant = re.fullmatch(rf"{_WEIGHTS}\.([\w-]+)\.\w+", path.name)
        chosen = variant[1] if variant else _variant(path.parent) if path.name == CONFIG else None
        return SavedAdapter(name, str(path.parent.resolve()), _read_config(name, config_file), chosen, local_files_only)
    file, part = file_and_part(path)
    if file.suffix.lower() not in SUFFIXES:
        raise ValueError(f"{name} is not a file of weights ({', '.join(SUFFIXES)}); {_WAY_OUT}.")
    configs = embedded_configs(file)
    named = [name for name in configs if name]
    if named and part not in named:
        places = ", ".join(f"{file}/{name}" for name in named)
        raise ValueError(f"{file} holds {len(named)} adapters; give one of {places}.")
    if part and not named:
        raise ValueError(f"{file} holds one adapter, none with the name {part!r}; give {file}.")
    options = read_weights(file, part)[0]
    config = configs.get(part) or {"_class_name": T2IAdapter.__name__, **options}
    if any(config.get(key, value) != value for key, value in options.items() if key != "channels"):
        raise ValueError(f"The weights in {name} do not fit the config in the file; save it again.")
    return SavedAdapter(name, str(path.resolve()), check_config(config, name))


def _with_suffix(path: Path) -> Path:
    """Return ``path``, or the file of weights of that name in its folder if there is one and no such folder."""
    files = () if path.exists() else (path.with_name(path.name + suffix) for suffix in SUFFIXES if path.name)
    return next((file for file in files if file.is_file()), path)


def weights_file(folder: Path, variant: str | None) -> Path:
    """Return the path of the weights in a folder of diffusers."""
    return folder / f"{_WEIGHTS}.{variant + '.' if variant else ''}safetensors"


def _variant(folder: Path) -> str | None:
    """Return the variant of the weights in a folder, fp16 before others; None if there are weights without one."""
    if any(folder.glob(f"{_WEIGHTS}.safetensors")) or any(folder.glob(f"{_WEIGHTS}.bin")):
        return None
    found = [re.fullmatch(rf"{_WEIGHTS}\.([\w-]+)\.(safetensors|bin)", file.name) for file in folder.iterdir()]
    variants = sorted(match[1] for match in found if match)
    return "fp16" if "fp16" in variants else next(iter(variants), None)


def _read_config(name: str, path: Path) -> dict[str, Any]:
    return check_config(read_json(path, f"Of the adapter {name} the settings"), name)


def check_config(config: Any, place: str) -> dict[str, Any]:
    """Return ``config``, the content of an adapter's ``config.json``, after checking it; nothing is built.

    It may be that of a LocalAdapter or a plain T2IAdapter. ValueError, which names ``place``, if it is invalid.
    """
    kind = config.get("_class_name") if isinstance(config, dict) else None
    if not isinstance(kind, str) or kind not in ADAPTERS:
        raise ValueError(f"The config.json in {place} names the class {shown(kind)}; give a {' or '.join(ADAPTERS)}.")
    default = {name: value.default for name, value in inspect.signature(ADAPTERS[kind].__init__).parameters.items()}
    shape = {name: config.get(name, default[name]) for name in SHAPE}
    try:
        check_shape(**shape, token_width=config.get("token_width", TOKEN_WIDTH))
        latents = config.get("latent_channels", 0), config.get("latent_factor", 8)
        check_latents(*latents, shape["downscale_factor"], shape["adapter_type"])
        check_margin(config.get("mask_margin", 0))
        for name, types, what in (
            ("condition", dict, "an object with named fields"),
            ("base", str, "the name, id or folder of a base"),
            ("mask_resize", str, f"one of {', '.join(MASK_RESIZE)}"),
            ("mask_features", bool, "true or false"),
            ("mask_condition", bool, "true or false"),
            ("dim_condition", bool, "true or false"),
            ("level_weights", (list, tuple), "a list of numbers"),
            ("unconditional_scale", (int, float), "a number"),
        ):
            value = config.get(name)
            if not (value is None or isinstance(value, types)):
                raise ValueError(f"{name} must be {what}, not {shown(value)}.")
        if config.get("condition"):
            ConditionConfig(**config["condition"])
    except (ValueError, TypeError) as error:
        raise ValueError(f"The config.json of the adapter {place} cannot be used: {first_line(error)}.") from error
    return config
