"""T2I-Adapters in a single file: which adapter the weights are, under the names of diffusers or as published
(TencentARC's full, XL and light adapters)."""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from localctl.files import first_line

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")
_PREFIXES = ("module.", "model.", "adapter.")  # of DataParallel, of wrappers, and of diffusers
_FACTORS = (8, 16, 4, 32)  # pixels unshuffled; with 1 or 3 channels no product is met twice


def read_weights(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The options of the ``T2IAdapter`` in a file, and its state dict. Nothing but tensors is unpickled.

    ValueError when the file cannot be read or holds something else.
    """
    try:
        if path.suffix.lower() == ".safetensors":
            content: Any = load_file(path)
        else:
            # A file that the user named; weights_only lets it hold tensors and plain containers, never code.
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"The weights of the adapter {path} cannot be read: the file is damaged, or holds more than tensors, and "
            "nothing else is unpickled; fetch it again, or save its state_dict() as .safetensors."
        ) from error
    except Exception as error:  # cut files each raise their own kind
        raise ValueError(
            f"The weights of the adapter {path} cannot be read ({first_line(error)}); fetch or save it again."
        ) from error
    content = content.get("state_dict", content) if isinstance(content, Mapping) else {}
    state = _bare({str(name): value for name, value in content.items() if isinstance(value, Tensor)})
    try:
        state = _as_diffusers(state)
        options = _options(state)
    except (KeyError, IndexError, StopIteration, ZeroDivisionError):
        first = next(iter(state), None)
        named = f"its first weight is called {first!r}" if first else "it holds no weights"
        raise ValueError(f"{path} is no T2I-Adapter ({named}); give the weights of one, or its folder.") from None
    return options, {f"adapter.{name}": value for name, value in state.items()}


def _bare(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without what all names begin with. ValueError for a local adapter, whose config alone tells of its masks."""
    seen: list[str] = []
    while prefix := next((p for p in _PREFIXES if state and all(name.startswith(p) for name in state)), None):
        state = {name.removeprefix(prefix): value for name, value in state.items()}
        seen.append(prefix)
    if seen.count("adapter.") > 1:
        raise ValueError(
            "The weights are of a LocalAdapter, whose config.json says how it uses masks; give its folder."
        )
    return state


def _as_diffusers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Under the names of diffusers. Published full adapters number their blocks through all levels: a level begins
    where the width changes, and all have as many."""
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
    """Of ``T2IAdapter``, from the shapes. KeyError or StopIteration for weights of something else."""
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
