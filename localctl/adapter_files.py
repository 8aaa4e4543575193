"""Find and load adapters from folders, single files and the hub; they are found by their config alone, then loaded.

The tensors in a single file may have diffusers' names, or those of the T2I-Adapter authors' files (full, XL, light).
"""

from __future__ import annotations

import inspect
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import T2IAdapter
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HFValidationError
from safetensors.torch import load_file
from torch import Tensor

from localctl.adapter import ADAPTERS, SHAPE, LocalAdapter, check_shape
from localctl.bases import HUB_ID, check_weights, pickled_only, same_base
from localctl.conditions import ConditionConfig
from localctl.files import first_line, read_json
from localctl.masks import MASK_RESIZE
from localctl.sizes import shown

CONFIG = "config.json"
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")
_PREFIXES = ("module.", "model.", "adapter.")  # added by DataParallel, by wrappers and by diffusers
_FACTORS = (8, 16, 4, 32)  # factors of pixel unshuffling; with 1 or 3 channels their products are all different
_WEIGHTS = "diffusion_pytorch_model"
_INSIDE = ("", "adapter", "t2iadapter")  # subfolders with an adapter: its own folder, or one of a run or checkpoint
_WAY_OUT = "give the folder of an adapter or training run, a hub id (owner/name), or a file of weights"


class _Missing(FileNotFoundError):
    """There is no adapter in a folder."""


@dataclass(frozen=True)
class SavedAdapter:
    """The location of an adapter, and its config, which names its class.

    name: as the user gave it. place: a folder, a file of weights or a hub id, to be recorded. variant: of the weights'
    file, such as fp16, if there is no file without a variant. local_files_only: do not use the network.
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

    def load(self) -> LocalAdapter:
        """Load the adapter in float32 and eval mode; a plain ``T2IAdapter`` is wrapped.

        Raises:
            ValueError: the weights are missing, truncated, of another shape, not finite or only pickled.
        """
        place = Path(self.place)
        if place.is_file():
            try:
                adapter = T2IAdapter.from_config(dict(self.config))
                adapter.load_state_dict(read_weights(place)[1])
            except Exception as error:  # a truncated file or another shape may raise any error
                raise ValueError(
                    f"The weights of the adapter {self.name} cannot be read ({first_line(error)}); fetch or save it "
                    "again."
                ) from error
            return LocalAdapter.from_t2iadapter(adapter.float()).eval()
        try:
            return self._from_pretrained(self.variant)
        except ValueError as error:
            if self.variant or place.exists() or not isinstance(error.__cause__, OSError):
                raise
            return self._from_pretrained("fp16")  # some repositories have no other weights

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
        for name, weights in found.named_parameters():
            if not bool(torch.isfinite(weights).all()):
                raise ValueError(f"The weights of the adapter in {place} hold NaN or infinity ({name}); save it again.")
        return found if isinstance(found, LocalAdapter) else LocalAdapter.from_t2iadapter(found)


def load_adapter(name: str | Path, local_files_only: bool = False) -> LocalAdapter:
    """Find and load an adapter; arguments and ValueErrors as for :func:`find_adapter` and :meth:`SavedAdapter.load`."""
    return find_adapter(name, local_files_only).load()


def find_adapter(name: str | Path, local_files_only: bool = False) -> SavedAdapter:
    """Find an adapter by its config alone, or, for weights without a config, by their shapes.

    Args:
        name: its folder, the folder of a training run or checkpoint, a file of weights, or a hub id.
        local_files_only: do not use the network.

    Raises:
        ValueError: there is no adapter, it has another class, or its config is invalid.
    """
    name = str(name)
    try:
        path = Path(name).expanduser()
        if path.is_file():
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
    raise _Missing(f"no {CONFIG} in it{hint}")


def _from_file(name: str, path: Path, local_files_only: bool) -> SavedAdapter:
    """Find an adapter by a file: with a config next to it as in a folder, else by the shapes of its weights."""
    config_file = path.parent / CONFIG
    if path.name == CONFIG or (config_file.is_file() and path.name.startswith(_WEIGHTS)):
        variant = re.fullmatch(rf"{_WEIGHTS}\.([\w-]+)\.\w+", path.name)
        chosen = variant[1] if variant else _variant(path.parent) if path.name == CONFIG else None
        return SavedAdapter(name, str(path.parent.resolve()), _read_config(name, config_file), chosen, local_files_only)
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"{name} is not a file of weights ({', '.join(SUFFIXES)}); {_WAY_OUT}.")
    config = check_config({"_class_name": T2IAdapter.__name__, **read_weights(path)[0]}, name)
    return SavedAdapter(name, str(path.resolve()), config)


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
        check_shape(**shape)
        for name, types, what in (
            ("condition", dict, "an object with named fields"),
            ("base", str, "the name, id or folder of a base"),
            ("mask_resize", str, f"one of {', '.join(MASK_RESIZE)}"),
            ("mask_features", bool, "true or false"),
            ("mask_condition", bool, "true or false"),
            ("dim_condition", bool, "true or false"),
            ("level_weights", (list, tuple), "a list of numbers"),
        ):
            value = config.get(name)
            if not (value is None or isinstance(value, types)):
                raise ValueError(f"{name} must be {what}, not {shown(value)}.")
        if config.get("condition"):
            ConditionConfig(**config["condition"])
    except (ValueError, TypeError) as error:
        raise ValueError(f"The config.json of the adapter {place} cannot be used: {first_line(error)}.") from error
    return config


def read_weights(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read the options of the ``T2IAdapter`` in a file, and its state dict; only tensors are unpickled.

    ValueError when the file cannot be read or is not a T2I-Adapter's.
    """
    try:
        if path.suffix.lower() == ".safetensors":
            content: Any = load_file(path)
        else:
            # The user named this file; weights_only allows tensors and plain containers in it, but no code.
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"The weights of the adapter {path} cannot be read: the file is damaged, or holds objects other than "
            "tensors, which are not unpickled; fetch it again, or save its state_dict() as .safetensors."
        ) from error
    except Exception as error:  # each kind of truncated file raises its own error
        raise ValueError(
            f"The weights of the adapter {path} cannot be read ({first_line(error)}); fetch or save it again."
        ) from error
    content = content.get("state_dict", content) if isinstance(content, Mapping) else {}
    state = _without_prefixes({str(name): value for name, value in content.items() if isinstance(value, Tensor)})
    try:
        state = _as_diffusers(state)
        options = _options(state)
    except (KeyError, IndexError, StopIteration, ZeroDivisionError):
        first = next(iter(state), None)
        reason = f"its first weight is called {first!r}" if first else "it holds no weights"
        raise ValueError(f"{path} is not a T2I-Adapter ({reason}); give the weights of one, or its folder.") from None
    return options, {f"adapter.{name}": value for name, value in state.items()}


def _without_prefixes(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Remove the prefixes that all names share. ValueError for a LocalAdapter, which needs its config."""
    removed: list[str] = []
    while prefix := next((p for p in _PREFIXES if state and all(name.startswith(p) for name in state)), None):
        state = {name.removeprefix(prefix): value for name, value in state.items()}
        removed.append(prefix)
    if removed.count("adapter.") > 1:
        raise ValueError(
            "These weights are a LocalAdapter's, whose config.json defines how it uses masks; give its folder."
        )
    return state


def _as_diffusers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename published weights to diffusers' names.

    Published full adapters number their blocks across all levels: a level begins where the width changes, and all
    levels have the same number of blocks.
    """
    if any(".resnets." in name for name in state):
        return state
    if "conv_in.weight" not in state:  # a light adapter
        return {re.sub(r"^(body\.\d+)\.body\.", r"\1.resnets.", name): value for name, value in state.items()}
    widens = [k for k in range(1, len(state)) if f"body.{k}.in_conv.weight" in state]
    per_level = widens[0]
    renamed = {}
    for name, value in state.items():
        _, number, rest = name.split(".", 2) if name.startswith("body.") else ("", "", "")
        if number:
            level, block = divmod(int(number), per_level)
            name = f"body.{level}.{rest}" if rest.startswith("in_conv.") else f"body.{level}.resnets.{block}.{rest}"
        renamed[name] = value
    return renamed


def _options(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Infer the options of ``T2IAdapter`` from shapes. KeyError or StopIteration for weights of another model."""
    levels = len({name.split(".")[1] for name in state if name.startswith("body.")})
    light = "body.0.out_conv.weight" in state
    if light:
        channels = [state[f"body.{i}.out_conv.weight"].shape[0] for i in range(levels - 1)]
        unshuffled = state["body.0.in_conv.weight"].shape[1]
    else:
        channels = [state[f"body.{i}.resnets.0.block1.weight"].shape[0] for i in range(levels)]
        unshuffled = state["conv_in.weight"].shape[1]
    factor, colours = next((f, c) for f in _FACTORS for c in (1, 3) if c * f * f == unshuffled)
    return {
        "in_channels": colours,
        "channels": channels,
        "num_res_blocks": len({name for name in state if re.match(r"body\.0\.resnets\.\d+\.block1\.weight", name)}),
        "downscale_factor": factor,
        "adapter_type": "light_adapter" if light else "full_adapter_xl" if factor == 16 else "full_adapter",
    }
