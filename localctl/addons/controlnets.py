"""Find ControlNets (arXiv 2302.05543) by their config alone, then load them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers import ControlNetModel

from localctl.architectures import BaseShape
from localctl.bases import HUB_ID, check_weights
from localctl.conditions import ConditionConfig
from localctl.files import first_line, read_json
from localctl.messages import is_out_of_memory

_WAY_OUT = "give the folder or hub id (owner/name) of a ControlNet that diffusers saved"


@dataclass(frozen=True)
class SavedControlNet:
    """A ControlNet that was found. ``place``: a folder or hub id, to be recorded."""

    name: str
    place: str
    config: Mapping[str, Any]
    local_files_only: bool = False
    condition: ConditionConfig | None = None  # its config does not say

    def check(self, shape: BaseShape) -> None:
        """Raise a ValueError if it was made for a base of another kind, or cannot be masked."""
        if self.config.get("global_pool_conditions"):
            raise ValueError(
                f"The ControlNet {self.name} pools its residuals over the image, so they cannot be masked; use another "
                "one."
            )
        for name in ("cross_attention_dim", "block_out_channels"):
            own, base = self.config.get(name), shape.parts["unet"].get(name)
            if own is not None and base is not None and own != base:
                raise ValueError(
                    f"The ControlNet {self.name} has {name} {own} but the base has {base}; use a ControlNet made for "
                    "this base."
                )

    def load(self) -> ControlNetModel:
        """Load it in float32 and eval mode. ValueError when weights are missing, damaged or pickled only."""
        try:
            if Path(self.place).is_dir():
                check_weights(Path(self.place))
            net = ControlNetModel.from_pretrained(
                self.place, use_safetensors=True, local_files_only=self.local_files_only
            )
        except Exception as error:  # a missing file or another shape may raise any error
            if is_out_of_memory(error):  # another copy would not help
                raise
            raise ValueError(
                f"The ControlNet {self.name} cannot be loaded ({first_line(error)}); fetch or save it again."
            ) from error
        return net.eval().requires_grad_(False)


def find_controlnet(name: str | Path, local_files_only: bool = False) -> SavedControlNet:
    """Find a ControlNet by its config: in a folder, or by its hub id. ValueError when there is none."""
    name = str(name)
    folder = Path(name).expanduser()
    try:
        if folder.exists() or not HUB_ID.fullmatch(name):
            path, place = folder / "config.json", str(folder.resolve())
            if not path.is_file():
                raise ValueError("no config.json in it" if folder.is_dir() else "no such folder")
        else:
            from huggingface_hub import hf_hub_download  # slow to import

            path, place = Path(hf_hub_download(name, "config.json", local_files_only=local_files_only)), name
        config = read_json(path, "The config")
        kind = config.get("_class_name") if isinstance(config, dict) else None
        if kind != ControlNetModel.__name__:
            raise ValueError(f"it is a {kind}, not a ControlNetModel")
    except (OSError, ValueError) as error:
        raise ValueError(f"There is no ControlNet {name!r} ({first_line(error)}); {_WAY_OUT}.") from error
    return SavedControlNet(name, place, {"conditioning_channels": 3, **config}, local_files_only)
