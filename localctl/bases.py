"""The known bases, their names, and checks of a base's files before it is loaded: errors name the file that is missing,
truncated or damaged. This module loads neither models nor torch."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from safetensors import SafetensorError, safe_open

from localctl.base_specs import BASES as BASES
from localctl.base_specs import MICRO_WEIGHTS as MICRO_WEIGHTS
from localctl.base_specs import PIPELINES as PIPELINES
from localctl.base_specs import TRANSFORMER_PIPELINES as TRANSFORMER_PIPELINES
from localctl.base_specs import BaseSpec as BaseSpec
from localctl.files import first_line, read_object
from localctl.one_file import text_width
from localctl.records import record
from localctl.schedulers import MOST_STEPS as MOST_STEPS
from localctl.schedulers import SCHEDULER_OPTIONS as SCHEDULER_OPTIONS
from localctl.schedulers import SCHEDULERS as SCHEDULERS
from localctl.schedulers import SIGMAS as SIGMAS
from localctl.schedulers import SchedulerName as SchedulerName
from localctl.sizes import shown

OWN_DEFAULTS = "localctl.json"  # of a base, in its folder
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")  # OWNER/NAME
DtypeName = Literal["float32", "float16", "bfloat16"]
DTYPE_NAMES: tuple[str, ...] = get_args(DtypeName)

_WITH_WEIGHTS = ("unet", "transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")
# Each part needs one of these files. Without them, transformers would silently make an empty tokenizer.
_NEEDED = {
    **dict.fromkeys(_WITH_WEIGHTS, ("config.json",)),
    "tokenizer": ("tokenizer.json", "vocab.json", "spiece.model"),
    "tokenizer_2": ("tokenizer.json", "vocab.json"),
    "tokenizer_3": ("tokenizer.json", "spiece.model"),
    "scheduler": ("scheduler_config.json",),
}
# Of layers; known bases: <= 64.
_COUNTS = (
    *("layers_per_block", "transformer_layers_per_block", "num_hidden_layers"),
    *("num_layers", "num_single_layers", "n_layers", "n_refiner_layers"),
)
_MOST_LAYERS, _MOST_LEVELS = 256, 16


@record("base")
@dataclass(kw_only=True)
class BaseConfig:
    """Settings of the base.

    name: micro, sd15, sd21, sdxl, pixart, sd3, flux, flux2, qwen_image, z_image, a diffusers folder, or an id on the
        Hugging Face hub.
    vae: hub id or folder of another VAE; null = the base's own (for SDXL in float16, one that does not overflow).
    revision: branch, tag or commit of the hub repository; null = its main branch.
    variant: variant of the weight files, such as fp16.
    dtype: float32, float16 or bfloat16.
    local_files_only: never use the network.
    """

    name: str = "micro"
    vae: str | None = None
    revision: str | None = None
    variant: str | None = None
    dtype: DtypeName = "float32"
    local_files_only: bool = False


def resolve_base(name: str, one_file: bool = False) -> BaseSpec:
    """Find a base by name, folder or hub id, without loading it or using the network.

    one_file: whether it may be one file of weights. ValueError for an unknown name, a folder that is not there, or one
    without a diffusers pipeline.
    """
    spec = BASES.get(name)
    path = Path(spec.id_or_path if spec else name).expanduser()
    if path.is_dir():
        if not (path / "model_index.json").is_file():
            raise ValueError(f"The base folder {path} has no model_index.json; give a saved diffusers pipeline.")
        return spec or BaseSpec(name, str(path.resolve()), **_own_defaults(path))
    if path.is_file():
        return _in_one_file(name, path, one_file)
    if spec is BASES["micro"]:
        raise ValueError(
            f"The weights of the base 'micro' are not in {path}; build them with `python -m research.micro_base` "
            "or choose another base."
        )
    if spec is not None:
        return spec
    if is_hub_id(name):
        return BaseSpec(name, name)
    raise ValueError(
        f"There is no base {name!r}; choose one of {', '.join(BASES)}, a diffusers folder, or a hub id (owner/name)."
    )


def _in_one_file(name: str, path: Path, wanted: bool) -> BaseSpec:
    """Return a base in one file. Its configs are in the folder with its name without the ending, else its family's."""
    width, folder = text_width(path), path.with_suffix("")
    if not wanted:
        raise ValueError(
            f"The base {path} is one file, from which images can be generated; for anything else, save it as a folder: "
            "localctl.load_pipeline(FILE).save_pretrained(FOLDER)."
        )
    if (folder / "model_index.json").is_file():
        return BaseSpec(name, str(folder.resolve()), file=str(path.resolve()), **_own_defaults(folder))
    family = {768: "sd15", 1024: "sd21", 2048: "sdxl"}.get(width)
    if family is None:
        raise ValueError(f"The base {path} reads text of width {width}, as no known base; put its configs in {folder}.")
    return replace(BASES[family], name=name, file=str(path.resolve()))


def _own_defaults(folder: Path) -> dict[str, Any]:
    """Return the defaults that a base states in its folder. ValueError for others than a guidance scale."""
    path = folder / OWN_DEFAULTS
    if not path.is_file():
        return {}
    stated = read_object(path, "The file", "correct it")
    scale: Any = stated.get("guidance_scale")
    is_scale = type(scale) in (int, float) and 0 <= scale <= sys.float_info.max  # exact, also for huge numbers
    if set(stated) != {"guidance_scale"} or not is_scale:
        raise ValueError(
            f'The file {path} says {shown(stated)}; a base states its guidance scale, {{"guidance_scale": 2.0}}.'
        )
    return {"guidance_scale": float(scale)}


def is_hub_id(name: str) -> bool:
    """Return whether ``name`` has the form OWNER/NAME of an id on the Hugging Face hub."""
    return HUB_ID.fullmatch(name) is not None


def same_base(first: str, second: str) -> bool:
    """Return whether two names mean the same base; unknown names are compared as texts."""
    return _place(first) == _place(second)


def lasting_name(name: str) -> str:
    """Return ``name`` in a form to save: the absolute path of a folder or file; any other name unchanged."""
    path = Path(name).expanduser()
    return str(path.resolve()) if name not in BASES and path.exists() else name


def _place(name: str) -> str:
    return BASES[name].id_or_path if name in BASES else lasting_name(name)


def read_json(spec: BaseSpec, name: str, where: dict[str, Any]) -> dict[str, Any]:
    """Read the JSON file ``name`` of a base, from its folder or from the hub.

    Args:
        where: ``revision`` and ``local_files_only`` for the hub.

    Raises:
        OSError: the file does not exist, or cannot be fetched.
        ValueError: it is no JSON object.
    """
    path = Path(spec.id_or_path, name)
    if not path.is_file():
        from huggingface_hub import hf_hub_download  # slow to import

        path = Path(hf_hub_download(spec.id_or_path, name, **where))
    return read_object(path, "The file", "fetch or save the base again")


def read_index(spec: BaseSpec, where: dict[str, Any]) -> dict[str, Any]:
    """Read the ``model_index.json`` of a base; ValueError if its pipeline is not supported."""
    index = read_json(spec, "model_index.json", where)
    kind = str(index.get("_class_name"))[:80]
    supported = PIPELINES + TRANSFORMER_PIPELINES
    if kind not in supported:
        way = " (these repaint, too: --init_image and --inpaint_mask)" if "Inpaint" in kind else ""
        raise ValueError(f"The base {spec.name!r} is a {kind}; supported are {', '.join(supported)}{way}.")
    return index


def has_part(index: Mapping[str, Any], name: str) -> bool:
    """Return whether a base has a part, by its ``model_index.json`` or the config of its pipeline."""
    return index.get(name) not in (None, [None, None], (None, None))


def defaults_of(name: str, where: dict[str, Any]) -> BaseSpec | None:
    """Return the defaults of a base: its own if it is known by name, else those of its kind of pipeline, by its
    ``model_index.json``, under those that its folder states; None if that is not here, or the base cannot be found.

    where: ``revision`` and ``local_files_only`` for the hub.
    """
    if name in BASES:
        return BASES[name]
    try:
        spec = resolve_base(name)
        kind = read_index(spec, where)["_class_name"]
    except (OSError, ValueError):  # loading the base will say why
        return None
    if like := next((one for one in BASES.values() if kind in one.pipelines), None):
        usual = {"guidance_scale": like.guidance_scale if like.usual_scale is None else like.usual_scale}
        own = usual | _own_defaults(Path(spec.id_or_path))
        spec = replace(like, name=name, id_or_path=spec.id_or_path, **own)
    known = known_base(name)
    return spec if known is None else replace(spec, guidance_scale=known.guidance_scale)


def known_base(name: str) -> BaseSpec | None:
    """Return a known base by its name, folder or hub id; None for any other."""
    return next((spec for known, spec in BASES.items() if name and same_base(known, name)), None)


def own_side(name: str) -> int | None:
    """Return the native image side in pixels of a base on this disk; None if its configs are not here."""
    try:
        spec, here = resolve_base(name), {"local_files_only": True}
        part = "transformer" if read_index(spec, here)["_class_name"] in TRANSFORMER_PIPELINES else "unet"
        side = read_json(spec, f"{part}/config.json", here).get("sample_size")
        if side is None:  # of FLUX, Qwen-Image and Z-Image
            return 1024
        return int(side) * 2 ** (len(read_json(spec, "vae/config.json", here)["block_out_channels"]) - 1)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def not_loaded(config: BaseConfig, error: Exception) -> ValueError:
    """Make the error for a base that cannot be loaded."""
    place, reason = resolve_base(config.name, one_file=True).id_or_path, first_line(error)
    way_out = "check name and network, or give a local diffusers folder"
    if Path(place).is_dir():
        way_out = "fetch or save the base again"
    return ValueError(f"The base {config.name!r} could not be loaded from {place!r} ({reason}); {way_out}.")


def check_folder(config: BaseConfig, index: dict[str, Any], replaced: frozenset[str] = frozenset()) -> None:
    """Raise a ValueError that names the file if a file in the base's folder is missing or damaged; ignores hub ids."""
    spec = resolve_base(config.name, one_file=True)
    folder = Path(spec.id_or_path)
    if folder.is_dir() and spec.file is None:
        try:
            check_files(folder, index, replaced)
        except ValueError as error:
            raise not_loaded(config, error) from error


def vae_not_loaded(name: str, error: Exception) -> ValueError:
    """Make the error for a VAE that cannot be loaded."""
    reason = first_line(error)
    return ValueError(
        f"The VAE {name!r} could not be loaded ({reason}); give a folder with an AutoencoderKL or a hub id."
    )


def check_vae(base: BaseConfig, own: Mapping[str, Any]) -> None:
    """Raise a ValueError if ``base.vae`` cannot be found, or its latents differ in shape from those of ``own``, the
    config of the base's own VAE."""
    if base.vae is None:
        return
    config = _vae_config(base.vae, base.local_files_only)
    known = [item for item in (config, own) if "latent_channels" in item and "block_out_channels" in item]
    if len({(item["latent_channels"], len(item["block_out_channels"])) for item in known}) > 1:
        raise ValueError(f"The VAE {base.vae!r} makes latents of another shape than the base's; choose another one.")


def _vae_config(name: str, local_files_only: bool) -> dict[str, Any]:
    path = Path(name).expanduser()
    if path.is_file():
        raise ValueError(f"The VAE {name} is a file; give a diffusers folder with an AutoencoderKL, or a hub id.")
    inside = "vae/config.json" if (path / "model_index.json").is_file() else "config.json"
    try:
        if not (path / inside).is_file() and (path.exists() or not is_hub_id(name)):
            raise FileNotFoundError(f"no {inside} in it" if path.exists() else "no such folder")
        config = read_json(
            BaseSpec(name, str(path) if path.exists() else name), inside, {"local_files_only": local_files_only}
        )
    except (OSError, ValueError) as error:
        raise vae_not_loaded(name, error) from error
    if config.get("_class_name", "AutoencoderKL") != "AutoencoderKL":
        raise ValueError(f"The VAE {name!r} is a {config['_class_name']}; give an AutoencoderKL.")
    return config


def check_files(folder: Path, index: Mapping[str, Any], replaced: frozenset[str] = frozenset()) -> None:
    """Raise a ValueError, a clause that names the file, unless ``folder`` holds all parts of a base undamaged.

    Reads all JSON files, and the headers of safetensors. index: the ``model_index.json``. replaced: parts that the
    caller replaces, which are not checked.
    """
    for name, needed in _NEEDED.items():
        listed = index.get(name)
        if name in replaced or not has_part(index, name):
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
    """Return whether a folder has weights as pickles (``.bin``) and none as safetensors."""
    return any(folder.glob("*.bin")) and not any(folder.glob("*.safetensors"))


def _check_json(path: Path) -> None:
    content = read_object(path, "the file", damaged="")
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
    """Raise a ValueError, a clause, unless a folder has safetensors and all of them are complete according to their
    headers."""
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
                pass  # safetensors compares the size of the file with the tensors in its header
        except (OSError, SafetensorError) as error:
            raise ValueError(f"the file {path} is damaged or cut off: {first_line(error)}") from error
