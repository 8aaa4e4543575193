"""The base: the frozen text-to-image pipeline that everything here steers or trains on, loaded; its schedulers; and the
one prompt encoder. Names and files of bases: ``bases``."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from torch import Tensor, nn

from localctl.bases import BASES as BASES
from localctl.bases import (
    DTYPE_NAMES,
    SCHEDULERS,
    BaseConfig,
    check_folder,
    check_weights,
    not_loaded,
    read_index,
    read_json,
    resolve_base,
    vae_not_loaded,
)
from localctl.bases import MICRO_WEIGHTS as MICRO_WEIGHTS
from localctl.bases import BaseSpec as BaseSpec
from localctl.bases import lasting_name as lasting_name
from localctl.bases import own_side as own_side
from localctl.bases import same_base as same_base
from localctl.quiet import no_progress_bars

DTYPES = {name: getattr(torch, name) for name in DTYPE_NAMES}


@dataclass(frozen=True)
class PromptEmbeds:
    """Prompts as the denoiser takes them. states: (B, K, C) of the text encoder, or of both of SDXL; pooled: (B, P) of
    SDXL's second one, None for other bases."""

    states: Tensor
    pooled: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        return self.states.nbytes + (0 if self.pooled is None else self.pooled.nbytes)

    @classmethod
    def join(cls, parts: Sequence[PromptEmbeds]) -> PromptEmbeds:
        """Join several as one batch."""
        pooled = [part.pooled for part in parts if part.pooled is not None]
        assert len(pooled) in (0, len(parts))
        return cls(torch.cat([part.states for part in parts]), torch.cat(pooled) if pooled else None)


@torch.no_grad()
def encode_prompts(
    pipe: Any,
    prompts: str | list[str],
    negative_prompt: str | None = None,
    *,
    guided: bool = False,
    call: Mapping[str, Any] | None = None,
) -> tuple[PromptEmbeds, PromptEmbeds | None]:
    """Encode prompts as the pipeline itself does.

    Args:
        prompts: one, or a list of B.
        negative_prompt: None = what the pipeline guides away from by default: for SDXL zeros
            (``force_zeros_for_empty_prompt``), not the encoding of the empty text.
        guided: encode the negative prompt, too.
        call: the arguments of ``encode_prompt`` in a running call of the pipeline, of which device, ``clip_skip`` and
            ``lora_scale`` are taken over. These prompts are then none of the call's own, so controls do not see them.

    Returns:
        The prompts (B rows), and with ``guided`` the negative prompt.
    """
    if call is None:
        encode, options = pipe.encode_prompt, {"device": pipe.unet.device}
    else:  # by the class's own method: on the instance it is wrapped
        encode = partial(type(pipe).encode_prompt, pipe)
        options = {name: call[name] for name in ("device", "clip_skip", "lora_scale") if name in call}
    states, negative, *pooled = encode(
        prompts,
        num_images_per_prompt=1,
        do_classifier_free_guidance=guided,
        negative_prompt=negative_prompt,
        **options,
    )
    return PromptEmbeds(states, *pooled[:1]), PromptEmbeds(negative, *pooled[1:]) if guided else None


def is_xl(pipe: DiffusionPipeline) -> bool:
    """Tell whether the U-Net of ``pipe`` takes pooled prompt embeddings and sizes, as SDXL's does."""
    return pipe.unet.config.addition_embed_type == "text_time"


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
            # Neither the checker nor the image processor that only it needs is loaded, and nothing nags about it.
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


def load_vae(name: str, dtype: torch.dtype, local_files_only: bool = False) -> AutoencoderKL:
    """Load a VAE by hub id or folder (of the VAE, or of a pipeline that has one). ValueError when it is not there."""
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


def full_precision_vae(pipe: DiffusionPipeline) -> None:
    """Put the VAE of ``pipe`` into float32 for good. SDXL's own overflows in half precision.

    The pipeline hands it latents in its own dtype, so the VAE's two ends cast what they are given.
    """
    nn.Module.to(pipe.vae, torch.float32)  # diffusers' own warns of modules to keep in float32, even of none

    def cast(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0].float(), *args[1:])

    for part in (pipe.vae.encoder, pipe.vae.post_quant_conv or pipe.vae.decoder):
        part.register_forward_pre_hook(cast)


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
    """Give ``pipe`` the scheduler of this name for a while, as :func:`set_scheduler` does; None: the one it has."""
    before = pipe.scheduler
    if name is not None:
        set_scheduler(pipe, name)
    try:
        yield
    finally:
        pipe.scheduler = before


def knows_karras(kind: str) -> bool:
    """Tell whether diffusers' scheduler of this class can space its steps as Karras does."""
    found = getattr(diffusers, kind, None)
    return found is not None and "use_karras_sigmas" in inspect.signature(found.__init__).parameters


def check_karras(base: BaseConfig, scheduler: str | None) -> None:
    """Raise a ValueError for a scheduler without Karras' spacing, by its name or None for the base's own."""
    if scheduler is not None:
        kind = SCHEDULERS[scheduler]
    else:
        try:
            where = {"revision": base.revision, "local_files_only": base.local_files_only}
            kind = read_json(resolve_base(base.name), "scheduler/scheduler_config.json", where).get("_class_name", "")
        except OSError:
            return  # the base itself will be missed in a moment
    if not knows_karras(kind):
        known = ", ".join(name for name, one in sorted(SCHEDULERS.items()) if knows_karras(one))
        raise ValueError(f"{kind or 'The scheduler'} has no Karras sigmas; give a --scheduler of these: {known}.")


def choose_pil_processors() -> None:
    """Settle on transformers' PIL image processors where torchvision is not installed.

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
