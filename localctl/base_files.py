"""The files of a base, looked at before anything is loaded: what is missing, cut off or damaged is named."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from localctl.files import first_line, read_json
from localctl.sizes import shown

# What every part must have one of. Of tokenizers transformers makes an empty one where nothing is found.
_NEEDED = {
    "unet": ("config.json",),
    "vae": ("config.json",),
    "text_encoder": ("config.json",),
    "text_encoder_2": ("config.json",),
    "tokenizer": ("tokenizer.json", "vocab.json"),
    "tokenizer_2": ("tokenizer.json", "vocab.json"),
    "scheduler": ("scheduler_config.json",),
}
_WITH_WEIGHTS = ("unet", "vae", "text_encoder", "text_encoder_2")
_COUNTS = ("layers_per_block", "transformer_layers_per_block", "num_hidden_layers")  # of layers; the most known is 32
_MOST_LAYERS, _MOST_LEVELS = 256, 16


def check_files(folder: Path, index: Mapping[str, Any], replaced: frozenset[str] = frozenset()) -> None:
    """ValueError in a clause naming the file, unless the parts that ``index`` (the ``model_index.json``) lists are in
    ``folder`` and whole: JSON is read, of safetensors the header alone. ``replaced``: parts that are not taken."""
    for name, needed in _NEEDED.items():
        listed = index.get(name)
        if name in replaced or name not in index or listed in (None, [None, None]):
            continue
        if not (isinstance(listed, list) and len(listed) == 2 and all(isinstance(item, str) for item in listed)):
            raise ValueError(f"model_index.json says {shown(listed)} of {name}, not [library, class]")
        part = folder / name
        if not part.is_dir():
            raise ValueError(f"there is no folder {name}")
        if not any((part / file).is_file() for file in needed):
            raise ValueError(f"there is no {' or '.join(f'{name}/{file}' for file in needed)}")
        for path in sorted(part.glob("*.json")):
            _check_json(path)
        if name in _WITH_WEIGHTS:
            check_weights(part)


def pickled_only(folder: Path) -> bool:
    """Whether a folder has weights as pickles (``.bin``) and none as safetensors."""
    return any(folder.glob("*.bin")) and not any(folder.glob("*.safetensors"))


def _check_json(path: Path) -> None:
    content = read_json(path, "the file")
    if not isinstance(content, dict):
        raise ValueError(f"the file {path} holds {shown(content)}, not an object with named fields")
    levels = content.get("block_out_channels")
    if isinstance(levels, list) and len(levels) > _MOST_LEVELS:
        raise ValueError(f"block_out_channels in {path} has {len(levels)} entries, more than {_MOST_LEVELS}")
    for name in _COUNTS:
        for count in _numbers(content.get(name)):
            if count > _MOST_LAYERS:
                raise ValueError(f"{name} in {path} is {shown(count)}, more than {_MOST_LAYERS}")


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, (int, float)):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _numbers(item)


def check_weights(part: Path) -> None:
    """ValueError in a clause unless a folder has safetensors and all of them are whole, as far as their headers say."""
    files = sorted(part.glob("*.safetensors"))
    if not files and pickled_only(part):
        raise ValueError(
            f"{part.name} has only .bin weights, which are pickles and not read; convert it: "
            "diffusers.DiffusionPipeline.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)"
        )
    if not files:
        raise ValueError(f"there are no weights (*.safetensors) in {part.name}")
    for path in files:
        try:
            with safe_open(path, "pt"):
                pass  # the header names all tensors, and the length of the file must be theirs
        except (OSError, SafetensorError) as error:
            raise ValueError(f"the file {path} is damaged or cut off: {first_line(error)}") from error
