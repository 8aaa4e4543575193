"""Adapters from anywhere, one way for every program: found by their config alone, then loaded."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import T2IAdapter
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HFValidationError

from localctl.adapter import LocalAdapter, check_config, load_adapter
from localctl.adapter_weights import SUFFIXES, read_weights
from localctl.bases import HUB_ID, same_base
from localctl.conditions import ConditionConfig
from localctl.files import first_line, read_json

CONFIG = "config.json"
_WEIGHTS = "diffusion_pytorch_model"
_INSIDE = ("", "adapter", "t2iadapter")  # where an adapter lies in its own folder, a run's or a checkpoint's
_WAY_OUT = "give the folder of an adapter or training run, a hub id (owner/name), or a file of weights"


class _Missing(FileNotFoundError):
    """A folder without an adapter."""


@dataclass(frozen=True)
class SavedAdapter:
    """Where an adapter lies, and its config, which says its class.

    name: as it was asked for. place: a folder, a file of weights or a hub id, to be written down. variant: of the
    weights' file, such as fp16, where there is no other.
    """

    name: str
    place: str
    config: Mapping[str, Any]
    variant: str | None = None
    local_files_only: bool = False

    @property
    def local(self) -> bool:
        """One of ours, not a plain T2IAdapter."""
        return self.config.get("_class_name") == LocalAdapter.__name__

    @property
    def base(self) -> str | None:
        """The base it was trained on, as far as it says."""
        return self.config.get("base")

    @property
    def condition(self) -> ConditionConfig | None:
        """What it was trained on, as far as it says; checked when the adapter was found."""
        said = self.config.get("condition")
        return ConditionConfig(**said) if said else None

    def used_on(self, base: str) -> str | None:
        """A sentence where that is not the base it was trained on."""
        if self.base is None or same_base(self.base, base):
            return None
        return f"The adapter {self.name} was trained on {self.base}, used on {base} of the same shape."

    def load(self) -> LocalAdapter:
        """The adapter, float32, in eval mode. ValueError when its weights cannot be read."""
        if not Path(self.place).is_file():
            return self._from_pretrained()
        try:
            adapter = T2IAdapter.from_config(dict(self.config))
            adapter.load_state_dict(read_weights(Path(self.place))[1])
        except Exception as error:  # cut files and foreign shapes each raise their own kind
            raise ValueError(
                f"The weights of the adapter {self.name} cannot be read ({first_line(error)}); fetch or save it again."
            ) from error
        return LocalAdapter.from_t2iadapter(adapter.float()).eval()

    def _from_pretrained(self) -> LocalAdapter:
        kind = str(self.config["_class_name"])
        options = {"dtype": torch.float32, "local_files_only": self.local_files_only}
        try:
            return load_adapter(self.place, kind, variant=self.variant, **options)
        except ValueError as error:
            if self.variant or Path(self.place).exists() or not isinstance(error.__cause__, OSError):
                raise
            return load_adapter(self.place, kind, variant="fp16", **options)  # all that some publish


def find_adapter(name: str | Path, local_files_only: bool = False) -> SavedAdapter:
    """An adapter by its folder, that of a training run or checkpoint, a file of weights, or a hub id; by its config
    alone, or from the shapes of weights that have none.

    ValueError when there is none, or it is of another class.
    """
    name = str(name)
    try:
        path = Path(name).expanduser()
        if path.is_file():
            return _from_file(name, path, local_files_only)
        if path.exists() or name.startswith(("/", ".", "~")) or not HUB_ID.match(name):  # a folder, no hub id
            return _from_folder(name, path, local_files_only)
        repository, inside = "/".join(name.split("/")[:2]), "/".join(name.split("/")[2:])
        if inside:
            file = hf_hub_download(repository, inside, local_files_only=local_files_only)
            return _from_file(name, Path(file), local_files_only)
        config = Path(hf_hub_download(name, CONFIG, local_files_only=local_files_only))
    except (OSError, HFValidationError, RuntimeError) as error:  # of the hub; of a "~" without a home
        of_hub = not isinstance(error, (_Missing, RuntimeError))
        asked = "no such folder or file; as a hub id: " if of_hub else ""
        raise ValueError(f"There is no adapter {name!r} ({asked}{first_line(error)}); {_WAY_OUT}.") from error
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
        raise _Missing(f"no {CONFIG} in it but {len(weights)} files of weights, of which one is to be given: {several}")
    checkpoints = sorted(path.glob("checkpoint-*/adapter"), key=lambda folder: folder.stat().st_mtime)
    hint = f"; its newest checkpoint is {checkpoints[-1].parent}" if checkpoints else ""
    raise _Missing(f"no {CONFIG} in it{hint}")


def _from_file(name: str, path: Path, local_files_only: bool) -> SavedAdapter:
    """Weights with their config beside them are those of a folder; others are read for their shapes."""
    beside = path.parent / CONFIG
    if path.name == CONFIG or (beside.is_file() and path.name.startswith(_WEIGHTS)):
        variant = re.fullmatch(rf"{_WEIGHTS}\.([\w-]+)\.\w+", path.name)
        chosen = variant[1] if variant else _variant(path.parent) if path.name == CONFIG else None
        return SavedAdapter(name, str(path.parent.resolve()), _read_config(name, beside), chosen, local_files_only)
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"{name} is a file but no weights ({', '.join(SUFFIXES)}); {_WAY_OUT}.")
    config = check_config({"_class_name": T2IAdapter.__name__, **read_weights(path)[0]}, name)
    return SavedAdapter(name, str(path.resolve()), config)


def _variant(folder: Path) -> str | None:
    """The variant of the weights in a folder that has no plain ones; fp16 before others."""
    if any(folder.glob(f"{_WEIGHTS}.safetensors")) or any(folder.glob(f"{_WEIGHTS}.bin")):
        return None
    found = [re.fullmatch(rf"{_WEIGHTS}\.([\w-]+)\.(safetensors|bin)", file.name) for file in folder.iterdir()]
    variants = sorted(match[1] for match in found if match)
    return "fp16" if "fp16" in variants else next(iter(variants), None)


def _read_config(name: str, path: Path) -> dict[str, Any]:
    return check_config(read_json(path, f"Of the adapter {name} the settings"), name)
