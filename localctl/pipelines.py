"""Load the base, the frozen text-to-image pipeline; set its scheduler; encode prompts. The names and files of bases are
in ``bases``."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from torch import nn

from localctl.bases import (
    DTYPE_NAMES,
    MOST_STEPS,
    PIPELINES,
    SCHEDULER_OPTIONS,
    SCHEDULERS,
    BaseConfig,
    BaseSpec,
    check_folder,
    check_weights,
    not_loaded,
    read_index,
    read_json,
    resolve_base,
    vae_not_loaded,
)
from localctl.devices import send
from localctl.diffusion import is_flow
from localctl.messages import no_progress_bars
from localctl.prompt_embeds import PromptEmbeds as PromptEmbeds
from localctl.prompt_syntax import WeightedText
from localctl.prompt_weights import Text, reads_weights, weighting
from localctl.schedulers import FLOW_SCHEDULERS, scheduler_class

_SOLVER = ("algorithm_type", "solver_order", "solver_type")
DTYPES = {name: getattr(torch, name) for name in DTYPE_NAMES}


@torch.no_grad()
def encode_prompts(
    pipe: Any,
    prompts: Text | Sequence[Text],
    negative_prompt: str | None = None,
    *,
    guided: bool = False,
    call: Mapping[str, Any] | None = None,
) -> tuple[PromptEmbeds, PromptEmbeds | None]:
    """Encode prompts as the pipeline itself does.

    Args:
        prompts: one prompt, or a list of B. Weights act where the pipeline reads them
            (:func:`localctl.prompt_weights.weighted_prompts`).
        negative_prompt: None = the pipeline's default: for SDXL zeros (``force_zeros_for_empty_prompt``), not the
            encoding of the empty text.
        guided: encode the negative prompt, too.
        call: the arguments of ``encode_prompt`` in a running call of the pipeline, from which device, ``clip_skip`` and
            ``lora_scale`` are used. Controls then ignore these prompts, as they are not those of the call.

    Returns:
        The embeddings of the prompts (B rows), and with ``guided`` those of the negative prompt, else None.
    """
    if call is None:
        encode, options = pipe.encode_prompt, {"device": pipe.unet.device}
    else:  # the method of the class, as that of the instance is wrapped
        encode = partial(type(pipe).encode_prompt, pipe)
        encode = weighting(pipe, encode) if reads_weights(pipe) else encode
        options = {name: call[name] for name in ("device", "clip_skip", "lora_scale") if name in call}
    if not reads_weights(pipe):
        several = [prompts] if isinstance(prompts, Text) else prompts
        prompts = [text.text if isinstance(text, WeightedText) else text for text in several]
    states, negative, *pooled = encode(
        prompts, num_images_per_prompt=1, do_classifier_free_guidance=guided, negative_prompt=negative_prompt, **options
    )
    return PromptEmbeds(states, *pooled[:1]), PromptEmbeds(negative, *pooled[1:]) if guided else None


@torch.no_grad()
def encode_captions(pipe: Any, captions: Sequence[str]) -> PromptEmbeds:
    """Encode captions as :func:`encode_prompts` does, bit for bit, but in one call of each text encoder and without
    waiting for the device. The ends of captions that are too long are cut off silently."""
    names = ("", "_2") if is_xl(pipe) else ("",)
    states, pooled = [], None
    for name in names:
        tokenizer, encoder = getattr(pipe, f"tokenizer{name}"), getattr(pipe, f"text_encoder{name}")
        length = tokenizer.model_max_length
        tokens = tokenizer(
            list(captions), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        )
        mask = getattr(encoder.config, "use_attention_mask", False) and not is_xl(pipe)
        with torch.autocast(encoder.device.type, enabled=False):  # on a GPU, it would return float32
            found = encoder(
                send(tokens.input_ids, encoder.device),
                attention_mask=send(tokens.attention_mask, encoder.device) if mask else None,
                output_hidden_states=is_xl(pipe),
            )
        states.append(found.hidden_states[-2] if is_xl(pipe) else found[0])
        pooled = found[0] if is_xl(pipe) else None  # of the last text encoder
    return PromptEmbeds(torch.cat(states, dim=-1) if is_xl(pipe) else states[0], pooled)


def is_xl(pipe: DiffusionPipeline) -> bool:
    """Return whether the U-Net of ``pipe`` takes pooled prompt embeddings and sizes, as SDXL's does."""
    return pipe.unet.config.addition_embed_type == "text_time"


def load_pipeline(
    base: str | BaseConfig = "micro",
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    **options: Any,
) -> DiffusionPipeline:
    """Load a base as a stock pipeline, frozen and in eval mode, without safety checker.

    Args:
        base: a name for :func:`resolve_base`, or a config; also one ``.safetensors`` file of the whole base.
        dtype: overrides the config's.
        options: passed on to ``from_pretrained``.

    Returns:
        A ``StableDiffusionPipeline`` or ``StableDiffusionXLPipeline``, or one of ``TRANSFORMER_PIPELINES``.

    Raises:
        ValueError: the base does not exist, cannot be fetched or loaded, or has an unsupported pipeline.
    """
    config = base if isinstance(base, BaseConfig) else BaseConfig(name=base)
    spec = resolve_base(config.name, one_file=True)
    dtype = dtype or DTYPES[config.dtype]
    where = {"revision": config.revision, "local_files_only": config.local_files_only}
    choose_pil_processors()
    try:
        index = read_index(spec, where)
        vae = config.vae or (spec.fp16_vae if dtype == torch.float16 else None)
        check_folder(config, index, frozenset(options) | ({"vae"} if vae else set()))
        if "safety_checker" in index:
            # Load neither the checker nor its image processor, and suppress the warning about it.
            options = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False, **options}
        if vae and "vae" not in options:
            options["vae"] = load_vae(vae, dtype, config.local_files_only)
    except OSError as error:  # missing files, unknown ids, or no network
        raise not_loaded(config, error) from error
    try:
        with no_progress_bars():  # the hub still shows its own for downloads
            if spec.file is not None:
                pipe = _from_one_file(spec, str(index["_class_name"]), dtype, {**where, **options})
            else:
                absent = {name: None for name, part in index.items() if part == [None, None]}  # such as SD3's T5
                pipe = DiffusionPipeline.from_pretrained(
                    spec.id_or_path,
                    dtype=dtype,
                    variant=config.variant,
                    use_safetensors=True,
                    **where,
                    **absent | options,
                )
    except Exception as error:  # damaged files and foreign shapes each raise their own kind
        raise not_loaded(config, error) from error
    for component in pipe.components.values():
        if isinstance(component, nn.Module):
            freeze(component)
    return pipe.to(device)


def _from_one_file(spec: BaseSpec, kind: str, dtype: torch.dtype, options: Mapping[str, Any]) -> DiffusionPipeline:
    """Load a base from one file of weights in the layout of the original code, with the configs of ``spec``."""
    from diffusers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it warns of the dtype of each part
    try:
        return getattr(diffusers, kind).from_single_file(spec.file, config=spec.id_or_path, dtype=dtype, **options)
    finally:
        logging.set_verbosity(verbosity)


def load_vae(name: str, dtype: torch.dtype, local_files_only: bool = False) -> AutoencoderKL:
    """Load a VAE by hub id or folder (of the VAE, or of a pipeline with one). ValueError if it cannot be loaded."""
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
    """Convert the VAE of ``pipe`` to float32 permanently, as SDXL's overflows in half precision.

    The pipeline passes pixels and latents in its own dtype, so encoder and decoder cast their inputs.
    """
    nn.Module.to(pipe.vae, torch.float32)  # ModelMixin.to would warn

    def cast(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0].float(), *args[1:])

    for part in (pipe.vae.encoder, pipe.vae.post_quant_conv or pipe.vae.decoder):
        part.register_forward_pre_hook(cast)


def freeze(module: nn.Module) -> nn.Module:
    """Set eval mode and turn off gradients of the weights; gradients still pass through the module."""
    return module.eval().requires_grad_(False)


def set_scheduler(pipe: DiffusionPipeline, name: str) -> None:
    """Set the scheduler of ``pipe`` by its name in ``SCHEDULERS``; the noise schedule stays. ValueError if unknown, or
    if the base samples by flow matching and the scheduler does not."""
    chosen, config = scheduler_class(name, type(pipe).__name__, is_flow(pipe.scheduler)), dict(pipe.scheduler.config)
    if is_flow(pipe.scheduler):
        pipe.scheduler = getattr(diffusers, chosen).from_config(config)
        return
    # Use the values of Stable Diffusion's configs if the present scheduler lacks these settings: by default the samples
    # are clipped to [-1, 1], which latents exceed, and PNDM starts with twelve Runge-Kutta calls.
    for setting, value in {"clip_sample": False, "skip_prk_steps": True}.items():
        config.setdefault(setting, value)
    if type(pipe.scheduler).__name__ != chosen:  # each class has solvers of its own
        config = {key: value for key, value in config.items() if key not in _SOLVER}
    kind = getattr(diffusers, chosen)
    if name in MOST_STEPS:  # these classes warn of settings of others
        config = {key: value for key, value in config.items() if key in inspect.signature(kind.__init__).parameters}
    pipe.scheduler = kind.from_config(config, **SCHEDULER_OPTIONS.get(name, {}))


@contextmanager
def with_scheduler(pipe: DiffusionPipeline, name: str | None) -> Iterator[None]:
    """Context in which ``pipe`` has the scheduler ``name``, see :func:`set_scheduler`; None = its present one."""
    before = pipe.scheduler
    if name is not None:
        set_scheduler(pipe, name)
    try:
        yield
    finally:
        pipe.scheduler = before


def knows_sigmas(kind: str, spacing: str) -> bool:
    """Return whether the diffusers scheduler class ``kind`` supports this spacing of its sigmas, one of ``SIGMAS``."""
    found = getattr(diffusers, kind, None)
    return found is not None and f"use_{spacing}_sigmas" in inspect.signature(found.__init__).parameters


def scheduler_of(base: BaseConfig, scheduler: str | None, pipeline: str) -> str | None:
    """Return the name of the class of ``scheduler`` (None = the base's own) on a base, without loading it; None if the
    files of the base are not here.

    ``pipeline``: the name of its class. ValueError for a scheduler that is not for this base.
    """
    if scheduler is not None and pipeline in PIPELINES:
        return SCHEDULERS[scheduler]
    try:
        where = {"revision": base.revision, "local_files_only": base.local_files_only}
        spec = resolve_base(base.name, one_file=True)
        own = str(read_json(spec, "scheduler/scheduler_config.json", where).get("_class_name", ""))
    except OSError:
        return None  # loading the base will report this
    return own if scheduler is None else scheduler_class(scheduler, pipeline, "FlowMatch" in own)


def check_sigmas(kind: str | None, spacing: str) -> None:
    """Raise a ValueError unless the scheduler class ``kind``, if it is known, supports this spacing of its sigmas."""
    if kind is not None and not knows_sigmas(kind, spacing):
        raise no_sigmas(kind, spacing)


def no_sigmas(kind: str, spacing: str) -> ValueError:
    """Make the error for a scheduler class without this spacing."""
    every = FLOW_SCHEDULERS if "FlowMatch" in kind else SCHEDULERS
    known = ", ".join(name for name, one in sorted(every.items()) if knows_sigmas(one, spacing))
    named = spacing.capitalize() if spacing == "karras" else spacing
    return ValueError(f"{kind or 'The scheduler'} has no {named} sigmas; choose a --scheduler of these: {known}.")


def choose_pil_processors() -> None:
    """Make transformers use its PIL image processors if torchvision is not installed.

    diffusers imports some by the names of their torchvision versions; transformers then falls back to the PIL versions
    with a warning at every start. Choosing these explicitly avoids the warning; the result is the same.
    """
    if importlib.util.find_spec("torchvision") is not None:
        return
    # Not imported at the top, as diffusers replaces the module object while it is imported.
    transformers = importlib.import_module("transformers")
    for name in ("CLIPImageProcessor", "SiglipImageProcessor", "Siglip2ImageProcessor"):
        if name not in vars(transformers) and hasattr(transformers, f"{name}Pil"):
            setattr(transformers, name, getattr(transformers, f"{name}Pil"))
