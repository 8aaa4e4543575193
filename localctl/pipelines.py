"""The base: the frozen text-to-image pipeline that everything here steers or trains on."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from huggingface_hub import hf_hub_download
from torch import nn

from localctl.base_files import check_files, check_weights
from localctl.bases import BASES as BASES
from localctl.bases import DTYPE_NAMES, PIPELINES, SCHEDULERS, BaseConfig, BaseSpec, resolve_base
from localctl.bases import MICRO_WEIGHTS as MICRO_WEIGHTS
from localctl.bases import lasting_name as lasting_name
from localctl.bases import same_base as same_base
from localctl.files import first_line, parse_json
from localctl.quiet import no_progress_bars
from localctl.sizes import shown

DTYPES = {name: getattr(torch, name) for name in DTYPE_NAMES}


def own_side(name: str) -> int | None:
    """The side in pixels of the images that a base on this disk was made for; None = not known without asking."""
    try:
        spec, here = resolve_base(name), {"local_files_only": True}
        unet = read_json(spec, "unet/config.json", here)
        vae = read_json(spec, "vae/config.json", here)
        return int(unet["sample_size"]) * 2 ** (len(vae["block_out_channels"]) - 1)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def load_pipeline(
    base: str | BaseConfig = "micro",
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    **options: Any,
) -> DiffusionPipeline:
    """Load a base as a stock pipeline, frozen and in eval mode, without safety checker.

    Args:
        base: a name for :func:`resolve_base`, or a config.
        dtype: overrides the config's.
        options: passed on to ``from_pretrained``.

    Returns:
        A ``StableDiffusionPipeline`` or ``StableDiffusionXLPipeline``.

    Raises:
        ValueError: the base is not there, cannot be fetched, or is of another kind.
    """
    config = base if isinstance(base, BaseConfig) else BaseConfig(name=base)
    spec = resolve_base(config.name)
    dtype = dtype or DTYPES[config.dtype]
    where = {"revision": config.revision, "local_files_only": config.local_files_only}
    choose_pil_processors()
    try:
        index = read_index(spec, where)
        vae = config.vae or (spec.fp16_vae if dtype == torch.float16 else None)
        check_folder(config, index, frozenset(options) | ({"vae"} if vae else set()))
        if "safety_checker" in index:
            # Neither the checker nor the picture processor that only it needs is loaded, and nothing nags about it.
            options = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False, **options}
        if vae and "vae" not in options:
            options["vae"] = load_vae(vae, dtype, config.local_files_only)
    except OSError as error:  # missing files, unknown ids and a missing network all arrive as this
        raise not_loaded(config, error) from error
    try:
        with no_progress_bars():  # those of downloads are the hub's own, and stay
            pipe = DiffusionPipeline.from_pretrained(
                spec.id_or_path, dtype=dtype, variant=config.variant, use_safetensors=True, **where, **options
            )
    except Exception as error:  # damaged files and foreign shapes each raise their own kind
        raise not_loaded(config, error) from error
    for component in pipe.components.values():
        if isinstance(component, nn.Module):
            freeze(component)
    return pipe.to(device)


def not_loaded(config: BaseConfig, error: Exception) -> ValueError:
    """What to tell somebody whose base cannot be read."""
    place, reason = resolve_base(config.name).id_or_path, first_line(error)
    way_out = "check name and network, or give a local diffusers folder"
    if Path(place).is_dir():
        way_out = "fetch or save the base again"
    return ValueError(f"The base {config.name!r} could not be loaded from {place!r} ({reason}); {way_out}.")


def check_folder(config: BaseConfig, index: dict[str, Any], replaced: frozenset[str] = frozenset()) -> None:
    """ValueError that names the file when a base is a folder and something in it is missing or damaged."""
    folder = Path(resolve_base(config.name).id_or_path)
    if folder.is_dir():
        try:
            check_files(folder, index, replaced)
        except ValueError as error:
            raise not_loaded(config, error) from error


def load_vae(name: str, dtype: torch.dtype, local_files_only: bool = False) -> AutoencoderKL:
    """A VAE by hub id or folder (of the VAE, or of a pipeline that has one). ValueError when it is not there."""
    place = Path(name).expanduser()
    inside = "vae" if (place / "model_index.json").is_file() else None
    folder = place / (inside or "")
    try:
        if folder.is_dir():
            check_weights(folder)
        return AutoencoderKL.from_pretrained(
            str(place) if place.is_dir() else name,
            subfolder=inside,
            dtype=dtype,
            local_files_only=local_files_only,
            use_safetensors=True,
        )
    except Exception as error:  # damaged files and foreign shapes each raise their own kind
        raise vae_not_loaded(name, error) from error


def vae_not_loaded(name: str, error: Exception) -> ValueError:
    """What to tell somebody whose VAE cannot be read."""
    reason = first_line(error)
    return ValueError(
        f"The VAE {name!r} could not be loaded ({reason}); give a folder with an AutoencoderKL or a hub id."
    )


def full_precision_vae(pipe: DiffusionPipeline) -> None:
    """Put the VAE of ``pipe`` into float32 for good. SDXL's own overflows in half precision.

    The pipeline hands it latents in its own dtype, so the VAE's two ends cast what they are given.
    """
    nn.Module.to(pipe.vae, torch.float32)  # diffusers' own warns of modules to keep in float32, even of none

    def cast(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0].float(), *args[1:])

    for part in (pipe.vae.encoder, pipe.vae.post_quant_conv or pipe.vae.decoder):
        part.register_forward_pre_hook(cast)


def read_json(spec: BaseSpec, name: str, where: dict[str, Any]) -> dict[str, Any]:
    """File ``name`` of a base; OSError when it is not there, ValueError when it is no JSON object."""
    path = Path(spec.id_or_path, name)
    if not path.is_file():
        path = Path(hf_hub_download(spec.id_or_path, name, **where))
    try:
        content = parse_json(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({first_line(error)}); fetch or save the base again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {shown(content)}, not an object with named fields; fetch the base again.")
    return content


def read_index(spec: BaseSpec, where: dict[str, Any]) -> dict[str, Any]:
    """What the pipeline consists of; ValueError if it is of a kind we do not know."""
    index = read_json(spec, "model_index.json", where)
    kind = str(index.get("_class_name"))[:80]
    if kind not in PIPELINES:
        raise ValueError(f"The base {spec.name!r} is a {kind}; supported are {' and '.join(PIPELINES)}.")
    return index


def freeze(module: nn.Module) -> nn.Module:
    """Eval mode and no gradients for the module's own weights; gradients still pass through it."""
    return module.eval().requires_grad_(False)


def set_scheduler(pipe: DiffusionPipeline, name: str) -> None:
    """Give ``pipe`` the scheduler of this name (see ``SCHEDULERS``) with the noise schedule of its present one."""
    if name not in SCHEDULERS:
        raise ValueError(f"Unknown scheduler {name!r}; choose one of {', '.join(SCHEDULERS)}.")
    config = dict(pipe.scheduler.config)
    # What Stable Diffusion's own configs say, where the present scheduler does not know these settings: the defaults
    # clip to [-1, 1], which latents leave, and start PNDM with twelve Runge-Kutta calls.
    for setting, value in {"clip_sample": False, "skip_prk_steps": True}.items():
        config.setdefault(setting, value)
    pipe.scheduler = getattr(diffusers, SCHEDULERS[name]).from_config(config)


@contextmanager
def with_scheduler(pipe: DiffusionPipeline, name: str | None) -> Iterator[None]:
    """``pipe`` with the scheduler of this name for a while, as :func:`set_scheduler`; None: the one it has."""
    before = pipe.scheduler
    if name is not None:
        set_scheduler(pipe, name)
    try:
        yield
    finally:
        pipe.scheduler = before


def choose_pil_processors() -> None:
    """Settle on transformers' PIL picture processors where torchvision is not installed.

    diffusers' pipelines import two processors by their torchvision names; transformers then falls back to the PIL
    ones and says so on every start. Naming the PIL ones first is the choice it asks for, with the same result.
    """
    if importlib.util.find_spec("torchvision") is not None:
        return
    # Not imported at the top: diffusers' first imports exchange the module object.
    transformers = importlib.import_module("transformers")
    for name in ("CLIPImageProcessor", "SiglipImageProcessor"):
        if name not in vars(transformers) and hasattr(transformers, f"{name}Pil"):
            setattr(transformers, name, getattr(transformers, f"{name}Pil"))
