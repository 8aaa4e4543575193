"""Adapters to and from the forms that other programs read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from localctl.adapter import OPTIONS, LocalAdapter, cast
from localctl.adapter_files import CONFIG, SavedAdapter, find_adapter, is_adapter
from localctl.adapter_weights import as_metadata, as_published, file_and_part, is_name
from localctl.bases import BASES
from localctl.conditions import ConditionConfig
from localctl.files import first_line, remove, replace_folder, share_weights, write_bytes
from localctl.messages import nearest

FOLDERS = ("local", "diffusers")  # formats that are folders
ADAPTER_FORMATS = (*FOLDERS, "tencentarc", "comfyui", "webui", "bundle")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# The adapters that ComfyUI and sd-webui-controlnet build: the type -> factor of pixel unshuffling, blocks.
_BUILT = {"full_adapter": (8, 2), "full_adapter_xl": (16, 2), "light_adapter": (8, 4)}
_MASK_NOTES = {
    "comfyui": "ComfyUI: put the file into models/controlnet and load it with 'Load Advanced ControlNet Model'; give "
    "the mask to 'mask_optional' of 'Apply Advanced ControlNet' (ComfyUI-Advanced-ControlNet), white = controlled. "
    "ComfyUI's own node has no mask: the whole image follows.",
    "webui": "Web UI: put the file into models/ControlNet, choose it with the preprocessor 'none' and your condition, "
    "and upload the mask as 'Effective Region Mask', white = controlled.",
}


@dataclass(frozen=True)
class Converted:
    """What a conversion has written. path: a folder or file. notes: what the user must know, one sentence each."""

    path: Path
    notes: tuple[str, ...] = ()


def convert_adapter(
    place: str | Path,
    output: str | Path,
    format: str = "local",
    *,
    dtype: str | None = None,
    local_files_only: bool = False,
    **options: Any,
) -> Converted:
    """Convert an adapter from any form that :func:`localctl.find_adapter` reads.

    Args:
        place: a folder, a file of weights, one of several adapters (FOLDER/NAME, FILE/NAME), or a hub id.
        output: the folder to write for the formats ``local`` and ``diffusers``, else the file. A ``.pth`` file is
            pickled, as the authors' files are; any other is safetensors, which keeps the mask settings in its metadata.
        format: ``local``: LocalAdapter; ``diffusers``: T2IAdapter; ``tencentarc``: the T2I-Adapter authors' names;
            ``comfyui``, ``webui``: the same, checked to be of a shape that these programs build.
        dtype: of the weights, fp32, fp16 or bf16; None: as they are.
        local_files_only: do not use the network.
        options: what a LocalAdapter has beyond a T2IAdapter (``mask_resize``, ``condition``, ``base``, ...); they
            replace those of the adapter.

    Raises:
        ValueError: an unknown format, dtype or option; as for ``find_adapter`` and loading; a shape that the other
            program does not build.
    """
    output = Path(output)
    if format == "bundle":
        if options:
            raise ValueError(f"The format bundle keeps the options of its adapters; leave {min(options)} out.")
        places = {file_and_part(Path(place))[0].stem: place}
        return bundle_adapters(places, output, dtype=dtype, local_files_only=local_files_only)
    _check_choices(format, dtype)
    if format in FOLDERS:
        _check_replaceable(output)
    saved = find_adapter(place, local_files_only)
    if format == "local":
        options = {**_as_published(saved), **options}
    adapter, notes = _loaded(saved, dtype, options)
    if format in FOLDERS:
        write = adapter.save_pretrained if format == "local" else adapter.save_t2iadapter
        _write_folder(output, write)
        told = _unknown(saved, adapter)
        if format == "diffusers":
            told = (*_lost(adapter), *_not_held(adapter, "A diffusers folder", "choose the format local"))
        return Converted(output, (*notes, *told))
    if format in _MASK_NOTES:
        _check_built(saved, adapter)
        notes += (_MASK_NOTES[format], *_lost(adapter))
    state = as_published(adapter.adapter.state_dict(), adapter.config["num_res_blocks"])
    if output.suffix.lower() in (".pth", ".pt", ".ckpt", ".bin"):
        _write_pickle(output, state)
        notes += (*(() if format in _MASK_NOTES else _lost(adapter)), *_unpickled(adapter, output.suffix.lower()))
    else:
        _write_safetensors(output, state, {"": _config(adapter)})
    return Converted(output, notes)


def bundle_adapters(
    places: Mapping[str, str | Path], output: str | Path, *, dtype: str | None = None, local_files_only: bool = False
) -> Converted:
    """Write several adapters into one safetensors file: ``find_adapter(f"{output}/{name}")`` finds each.

    ``places``: name -> as for :func:`convert_adapter`. ValueError for a name that is not of letters, digits, ``_`` and
    ``-``, and as for :func:`convert_adapter`.
    """
    _check_choices("bundle", dtype)
    state: dict[str, Tensor] = {}
    configs, notes = {}, []
    for name, place in places.items():
        if not is_name(name):
            raise ValueError(f"The name {name!r} of an adapter must be of letters, digits, _ and -; rename it.")
        adapter, told = _loaded(find_adapter(place, local_files_only), dtype, {})
        configs[name] = _config(adapter)
        state |= {f"{name}.{key}": value for key, value in adapter.adapter.state_dict().items()}
        notes += [f"{name}: {note}" for note in told]
    _write_safetensors(Path(output), state, configs)
    return Converted(Path(output), tuple(notes))


def _check_choices(format: str, dtype: str | None) -> None:
    if format not in ADAPTER_FORMATS:
        raise ValueError(f"Unknown format {format!r} of an adapter; {nearest(format, ADAPTER_FORMATS)}")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"Unknown dtype {dtype!r}; choose one of {', '.join(DTYPES)}.")


def _loaded(saved: SavedAdapter, dtype: str | None, options: Mapping[str, Any]) -> tuple[LocalAdapter, tuple[str, ...]]:
    """Load the adapter in the dtype that it has, or in ``dtype``, with its options replaced by ``options``."""
    unknown = sorted(set(options) - set(OPTIONS))
    if unknown:
        raise ValueError(f"A LocalAdapter has no option {unknown[0]!r}; {nearest(unknown[0], OPTIONS)}")
    if options.get("condition"):
        saved.check_channels(ConditionConfig(**options["condition"]))
    adapter = saved.load(dtype=None)
    if options:
        kept = {name: adapter.config[name] for name in OPTIONS}
        adapter = LocalAdapter.from_t2iadapter(adapter.adapter, **{**kept, **options}).eval()
    kind = adapter.dtype
    if dtype is None or DTYPES[dtype] == kind:
        return adapter, ()
    name = next(name for name, value in DTYPES.items() if value == kind)
    adapter = cast(adapter, DTYPES[dtype])
    if not all(bool(torch.isfinite(value).all()) for value in adapter.parameters()):
        raise ValueError(f"The weights of {saved.name} overflow in {dtype}; keep {name}.")
    return adapter, (f"The weights are converted from {name} to {dtype}.",)


def _config(adapter: LocalAdapter) -> dict[str, Any]:
    """Return the config for the metadata, without a path of this machine."""
    config = {name: value for name, value in adapter.config.items() if not name.startswith("_")}
    base = config["base"]
    if base and base not in BASES and (Path(base).is_absolute() or Path(base).expanduser().exists()):
        config["base"] = Path(base).name
    return {"_class_name": LocalAdapter.__name__, **config}


def _as_published(saved: SavedAdapter) -> dict[str, Any]:
    """Return the mask settings of a file that the published training of local control has written: a pickled state dict
    of a T2IAdapter, ``.pt``. It resizes masks by nearest neighbours."""
    return {"mask_resize": "nearest"} if not saved.local and Path(saved.place).suffix.lower() == ".pt" else {}


def _unknown(saved: SavedAdapter, adapter: LocalAdapter) -> tuple[str, ...]:
    """Return what a file of weights alone does not say."""
    if saved.local:
        return ()
    resize = adapter.config["mask_resize"]
    published = _as_published(saved).get("mask_resize") == resize
    notes: tuple[str, ...] = (f"mask_resize is {resize}{', as published' if published else ''}.",)
    if adapter.config["condition"] is None:
        notes += ("The file does not name its kind of condition; record it with --condition.",)
    return notes


def _check_built(saved: SavedAdapter, adapter: LocalAdapter) -> None:
    """Raise a ValueError unless ComfyUI and sd-webui-controlnet build an adapter of this shape: they infer little from
    a file, and take the rest as fixed."""
    config = adapter.config
    first, kind = config["channels"][0], config["adapter_type"]
    widths = [320, 640, 1280] if kind == "light_adapter" else [first, first * 2, first * 4, first * 4]
    unshuffled = config["in_channels"] * config["downscale_factor"] ** 2
    read_as_xl = unshuffled in (256, 768) and kind != "light_adapter"
    found = (config["downscale_factor"], config["num_res_blocks"])
    if found != _BUILT[kind] or list(config["channels"]) != widths or read_as_xl != (kind == "full_adapter_xl"):
        raise ValueError(
            f"ComfyUI and the web UI cannot load {saved.name}: of a {kind} they build channels {widths}, (factor, "
            f"blocks) {_BUILT[kind]}, and this has {list(config['channels'])}, {found}, for conditions of "
            f"{config['in_channels']} channels; use the format diffusers or tencentarc."
        )


def _lost(adapter: LocalAdapter) -> tuple[str, ...]:
    """Return a sentence for each setting of the mask that plain T2I-Adapters do not have."""
    config, notes = adapter.config, []
    if config["mask_condition"]:
        notes.append("It was trained with conditions that are black outside the mask: blank yours there, too.")
    if not config["mask_features"]:
        notes.append("It is a baseline whose features are not masked: use it without a mask.")
    if config["mask_margin"]:
        notes.append(f"It is made for a mask grown by {config['mask_margin']} pixels: grow yours where you use it.")
    if config["level_weights"] is not None and set(config["level_weights"]) != {1}:
        weights = ", ".join(f"{weight:g}" for weight in config["level_weights"])
        notes.append(
            f"It weighs its levels by {weights} (finest first), which the file cannot hold: set them where you use it "
            "(in ComfyUI: 'T2IAdapter Custom Weights')."
        )
    if config["unconditional_scale"] != 1:
        notes.append(
            f"It is made for {config['unconditional_scale']:g} times its features beside the negative prompt: set that "
            "where you use it, or control will be weaker."
        )
    return tuple(notes)


def _unpickled(adapter: LocalAdapter, suffix: str) -> tuple[str, ...]:
    """Return a sentence for what a pickled file, of weights alone, does not hold and reading it does not assume."""
    return _not_held(adapter, f"A {suffix} file", "write .safetensors", "nearest" if suffix == ".pt" else "area")


def _not_held(adapter: LocalAdapter, what: str, instead: str, assumed: str = "area") -> tuple[str, ...]:
    """Return a sentence for the settings that ``what`` does not hold. assumed: the ``mask_resize`` that reading it
    takes."""
    config = _config(adapter)
    resize, condition = config["mask_resize"], config["condition"]
    found = {"condition": condition and condition["kind"], "base": config["base"]}
    if resize != assumed:
        found["mask_resize"] = resize
    lost = [f"{name}={value}" for name, value in found.items() if value]
    if not lost:
        return ()
    return (f"{what} does not hold {', '.join(lost)}: give them when you import it, or {instead}.",)


def _check_replaceable(output: Path) -> None:
    """Raise a ValueError if the folder to write holds anything but an adapter, which would be lost."""
    if not output.name:
        raise ValueError(f"The folder {output} cannot be replaced by an adapter; name a new folder.")
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    alone = output.is_dir() and {CONFIG} == {p.name for p in output.iterdir() if p.suffix != ".safetensors"}
    if not (alone and is_adapter(output / CONFIG)):
        raise ValueError(f"{output} holds other things than an adapter, which would be lost; name a new folder.")


def _write_folder(output: Path, write: Callable[[Path], Any]) -> None:
    temporary = output.with_name(f".{output.name}.tmp")
    try:
        remove(temporary)
        temporary.mkdir(parents=True)
        write(temporary)
        share_weights(temporary)
        replace_folder(temporary, output)
    except OSError:
        raise
    except Exception as error:  # safetensors raises its own exception for a full disk
        raise OSError(f"{output} could not be written: {first_line(error)}") from error
    finally:
        remove(temporary)


def _write_safetensors(output: Path, state: Mapping[str, Tensor], configs: Mapping[str, Mapping[str, Any]]) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(output, save({name: value.contiguous() for name, value in state.items()}, as_metadata(configs)))


def _write_pickle(output: Path, state: Mapping[str, Tensor]) -> None:
    content = BytesIO()
    torch.save(dict(state), content)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(output, content.getvalue())
