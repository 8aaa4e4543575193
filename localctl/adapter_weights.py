"""Files of weights of T2I-Adapters, with diffusers' names or those of the T2I-Adapter authors' files (full, XL, light),
which ComfyUI and sd-webui-controlnet read, too; and configs in the metadata of such files.

Sources: ``Adapter/models/adapters.py`` (branch main) and ``ldm/modules/encoders/adapter.py`` (branch SD) of
TencentARC/T2I-Adapter; ``load_t2i_adapter`` in ``comfy/controlnet.py`` of Comfy-Org/ComfyUI.
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from localctl.files import first_line, parse_json
from localctl.sizes import shown

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")
METADATA = "localctl_adapters"  # in a safetensors file: JSON, name -> config; the name is "" if there is one adapter
_PREFIXES = ("module.", "model.", "adapter.")  # added by DataParallel, by wrappers and by diffusers
_FACTORS = (8, 16, 4, 32)  # factors of pixel unshuffling; with 1 or 3 channels their products are all different
# A part of a weight's name -> what a file with such a weight is, and the way out.
_OTHERS = {
    "style_embedding": "a style adapter, which adds words to the prompt and has no features for a mask; use an "
    "IP-Adapter",
    "spatial_feat_mapping": "a fuser of CoAdapters, which mixes several adapters; import the CoAdapters themselves, "
    "whose features are summed here",
    "input_hint_block.": "a ControlNet; use it as a ControlNet",
    "controlnet_cond_embedding.": "a ControlNet; use it as a ControlNet",
    "lllite": "a ControlNet-LLLite, which changes attention layers and has no features",
    "ip_adapter": "an IP-Adapter; use it as an IP-Adapter",
    "lora_": "a LoRA; use it as a LoRA",
    "down_opt.op.": "a T2I-Adapter that halves by convolutions, which diffusers' T2IAdapter does not have",
    ".skep.": "a T2I-Adapter with convolutions around its blocks, which diffusers' T2IAdapter does not have",
}


def as_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights in a file to diffusers' names, without the prefix ``adapter.``.

    Published full adapters number their blocks across all levels: a level begins where the width changes, and all
    levels have the same number of blocks.

    Raises:
        ValueError: the weights are a LocalAdapter's, which needs its config, or another kind of model's.
        StopIteration: there are not even two levels.
    """
    found = _without_prefixes(dict(state))
    other = next((kind for part, kind in _OTHERS.items() if any(part in name for name in found)), None)
    if other is not None:
        raise ValueError(f"is {other}.")
    if any(".resnets." in name for name in found):
        return found
    if "conv_in.weight" not in found:  # a light adapter
        return {re.sub(r"^(body\.\d+)\.body\.", r"\1.resnets.", name): value for name, value in found.items()}
    per_level = next(k for k in range(1, len(found)) if f"body.{k}.in_conv.weight" in found)
    renamed = {}
    for name, value in found.items():
        _, number, rest = name.split(".", 2) if name.startswith("body.") else ("", "", "")
        if number:
            level, block = divmod(int(number), per_level)
            name = f"body.{level}.{rest}" if rest.startswith("in_conv.") else f"body.{level}.resnets.{block}.{rest}"
        renamed[name] = value
    return renamed


def as_published(state: Mapping[str, Tensor], blocks: int) -> dict[str, Tensor]:
    """Rename weights of a ``T2IAdapter`` with ``blocks`` blocks per level to the names in the authors' files."""
    light = "adapter.conv_in.weight" not in state
    renamed = {}
    for name, value in state.items():
        name = name.removeprefix("adapter.")
        found = re.fullmatch(r"body\.(\d+)\.(?:resnets\.(\d+)\.)?(.+)", name)
        if light:
            name = name.replace(".resnets.", ".body.")
        elif found:
            name = f"body.{int(found[1]) * blocks + int(found[2] or 0)}.{found[3]}"
        renamed[name] = value
    return renamed


def options_of(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Infer the options of ``T2IAdapter`` from the shapes of weights with diffusers' names.

    KeyError, IndexError, StopIteration or ZeroDivisionError for weights of another model.
    """
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


def _without_prefixes(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Remove the prefixes that all names share. ValueError for a LocalAdapter, which needs its config."""
    removed: list[str] = []
    while prefix := next((p for p in _PREFIXES if state and all(name.startswith(p) for name in state)), None):
        state = {name.removeprefix(prefix): value for name, value in state.items()}
        removed.append(prefix)
    if removed.count("adapter.") > 1:
        raise ValueError("is a LocalAdapter's, whose config.json defines how it uses masks; give its folder.")
    return state


def read_weights(path: Path, part: str = "") -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read the options of the ``T2IAdapter`` in a file, and its state dict; only tensors are unpickled.

    ``part``: the name of one of several adapters in the file. ValueError when the file cannot be read, is not a
    T2I-Adapter's, or holds weights that are not floating-point numbers.
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
    for key in ("state_dict", "adapter"):  # as trainers wrap them
        content = content.get(key, content) if isinstance(content, Mapping) else {}
    state = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    if part:
        state = {name.removeprefix(f"{part}."): value for name, value in state.items() if name.startswith(f"{part}.")}
    for name, value in state.items():
        if not value.is_floating_point():
            kind = str(value.dtype).removeprefix("torch.")
            raise ValueError(f"{path} holds weights of {kind} ({name}); save it in fp16, bf16 or fp32.")
    try:
        state = as_diffusers(state)
        options = options_of(state)
    except (KeyError, IndexError, StopIteration, ZeroDivisionError):
        first = next(iter(state), None)
        reason = f"its first weight is called {first!r}" if first else "it holds no weights"
        raise ValueError(f"{path} is not a T2I-Adapter ({reason}); give the weights of one, or its folder.") from None
    except ValueError as error:
        raise ValueError(f"{path} {error}") from None
    return options, {f"adapter.{name}": value for name, value in state.items()}


def embedded_configs(path: Path) -> dict[str, dict[str, Any]]:
    """Return the configs in the metadata of a file of weights, by name; empty if it has none.

    ValueError for a damaged file or configs of another form.
    """
    if path.suffix.lower() != ".safetensors":
        return {}
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get(METADATA)
        configs = {} if text is None else parse_json(text)
        if not isinstance(configs, dict) or not all(isinstance(item, dict) for item in configs.values()):
            raise ValueError(f"{METADATA} must be an object with a config for each name")
        bad = next((name for name in configs if name and not is_name(name)), None)
        if bad is not None:  # a name becomes a part of a path
            raise ValueError(f"the name {shown(bad)} of an adapter must be of letters, digits, _ and -")
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(
            f"The weights of the adapter {path} cannot be read ({first_line(error)}); fetch or save it again."
        ) from error
    return configs


def is_name(name: str) -> bool:
    """Return whether one of several adapters in a file may have this name: of letters, digits, ``_`` and ``-``."""
    return name.replace("_", "").replace("-", "").isalnum()


def as_metadata(configs: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Return the metadata of a safetensors file with these adapters, by name."""
    return {"format": "pt", METADATA: json.dumps(configs, sort_keys=True)}


def file_and_part(path: Path) -> tuple[Path, str]:
    """Split FILE/NAME; the name is empty for any other path."""
    return (path.parent, path.name) if path.parent.is_file() else (path, "")


def saved_dtype(path: Path) -> torch.dtype:
    """Return the half-precision dtype of the weights in a safetensors file; float32 if they have another, or several,
    or there is no such file."""
    if not path.is_file():
        return torch.float32
    with safe_open(path, "pt") as file:
        names = file.keys()
        return common_dtype({file.get_slice(name)[:0].dtype for name in names})


def common_dtype(dtypes: set[torch.dtype]) -> torch.dtype:
    """Return the dtype that weights are kept in: fp16 or bf16 if all of them are, else float32."""
    half = dtypes & {torch.float16, torch.bfloat16}
    return half.pop() if len(dtypes) == 1 and half else torch.float32
