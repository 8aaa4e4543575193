"""The adapter of a training run, planned from configs alone: new, or from a published T2IAdapter or LocalAdapter.

A misfit is found before slow work.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from localctl.adapter import CHOSEN, TOKEN_WIDTH, TOKENS, LocalAdapter
from localctl.adapter_files import SavedAdapter, find_adapter
from localctl.architectures import BaseShape, read_shape
from localctl.bases import lasting_name
from localctl.control.compatible import check_fit
from localctl.denoisers import bare_denoiser
from localctl.denoisers.abilities import Abilities
from localctl.denoisers.transformer import Transformer
from localctl.diffusion import latent_channels
from localctl.seeding import key_seed
from localctl.settings import ConditionConfig, ConditionSpace
from localctl.training.large_bases import check_package
from localctl.training.settings import MASKING, AdapterConfig, TrainSettings

logger = logging.getLogger(__name__)
# Of adapters that continue another one, with the defaults of LocalAdapter.
OF_SETTINGS = {"mask_resize": "area", **MASKING, "mask_margin": 0, "unconditional_scale": 1.0}
TOKEN_LEVELS = 8  # blocks of a transformer that get a residual


@dataclass(frozen=True)
class AdapterPlan:
    """The configuration of the adapter, checked against the base. options: of ``LocalAdapter``. saved: the source of
    its weights; None = initialize them from the seed."""

    options: dict[str, Any]
    saved: SavedAdapter | None = None

    def make(self, seed: int) -> LocalAdapter:
        """Return the adapter, float32 and trainable, without using the global random state."""
        if self.saved is not None:
            with torch.device("meta"):  # only the shapes: the weights are replaced below
                adapter = LocalAdapter(**self.options)
            adapter.adapter = self.saved.load().adapter
            return adapter.requires_grad_(True)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(key_seed(seed, "adapter"))
            return LocalAdapter(**self.options)


def plan_adapter(settings: TrainSettings, shape: BaseShape | None = None) -> AdapterPlan:
    """Plan the adapter of a run from configs alone. ValueError if settings, saved adapter and base do not fit.

    shape: of the base; None = read it from the base's configs.
    """
    saved = _find(settings)
    if saved is not None:
        _check_saved(settings, saved)
    wanted = asdict(_masked(settings, saved))
    shape = shape or read_shape(settings.base)
    check_base_settings(settings, shape)
    fallback = saved.config if saved else _defaults(wanted["adapter_type"], shape)
    options: dict[str, Any] = {name: fallback[name] if wanted[name] is None else wanted[name] for name in CHOSEN}
    options["channels"] = list(options["channels"])
    options |= {name: wanted[name] for name in OF_SETTINGS if wanted[name] is not None}
    if options["adapter_type"] == TOKENS:
        own = saved.config.get("token_width", TOKEN_WIDTH) if saved else TOKEN_WIDTH
        options["token_width"] = wanted["token_width"] or own
        options |= _latents(wanted["condition_space"], saved, shape)
    weights = wanted["level_weights"] or (saved.config.get("level_weights") if saved else None)
    options["level_weights"] = weights and list(weights)
    options["in_channels"] = settings.condition.channels
    way_out = "choose adapter=auto, which takes type, channels and downscale factor from the base"
    check_fit(options, shape, f"the adapter {saved.place} belongs to another kind of base" if saved else way_out)
    options |= {"condition": settings.condition.recorded(), "base": lasting_name(settings.base.name)}
    return AdapterPlan(options, saved)


def continued(settings: TrainSettings) -> TrainSettings:
    """Return the settings with what they leave open of an adapter's masks and guidance as the adapter to continue from
    has it. Log what they change of that adapter. ValueError if there is no such adapter."""
    saved = _find(settings)
    if saved is None:
        return settings
    settings = replace(settings, adapter=_masked(settings, saved))
    settings.proportion_full_masks = settings.full_masks(settings.base_defaults)
    levels = saved.config.get("level_weights")
    before = _of(saved) | {"level_weights": levels and tuple(levels)} if saved.local else {}
    was = {f"adapter.{name}": value for name, value in before.items()}
    now = {f"adapter.{name}": value for name, value in asdict(settings.adapter).items()}
    if saved.condition is not None:
        alike = saved.condition.kind == settings.condition.kind  # else its options say nothing
        was |= _condition(saved.condition, alike)
        now |= _condition(settings.condition, alike)
    for name, value in was.items():
        if now.get(name) not in (None, value):
            logger.info(f"{name}={_text(now[name])} from here on; the adapter {saved.name} has {_text(value)}.")
    if note := saved.used_on(settings.base.name):
        logger.info(note)
    return settings


def _condition(condition: ConditionConfig, with_options: bool) -> dict[str, Any]:
    options = {f"condition.{name}": value for name, value in asdict(condition).items() if name != "kind"}
    return {"condition": condition.kind} | (options if with_options else {})


def _text(value: Any) -> str:
    """Return a value as it is written in settings."""
    return value if isinstance(value, str) else json.dumps(value)


def _find(settings: TrainSettings) -> SavedAdapter | None:
    name = settings.adapter_model_name_or_path
    return None if name is None else find_adapter(name, settings.base.local_files_only)


def _masked(settings: TrainSettings, saved: SavedAdapter | None) -> AdapterConfig:
    """Return the settings of the adapter, with those of ``OF_SETTINGS`` that are open as the saved one has them. A
    plain T2IAdapter has none, and gets those of a new adapter."""
    if saved is None:
        return settings.adapter
    if saved.local:
        own = _of(saved)
        if settings.adapter.mask_condition is False:
            own["dim_condition"] = False  # of no use without it
        if settings.adapter.mask_features is False:
            own["mask_margin"] = 0  # of no use without it
        return settings.adapter.filled(**own)
    return settings.adapter.of_new(settings.base_defaults)


def _of(saved: SavedAdapter) -> dict[str, Any]:
    """Return ``OF_SETTINGS`` of a LocalAdapter; of an earlier version, some may be missing from its config."""
    own = {name: saved.config.get(name) for name in OF_SETTINGS}
    return {name: OF_SETTINGS[name] if value is None else value for name, value in own.items()}


def _latents(space: ConditionSpace | None, saved: SavedAdapter | None, shape: BaseShape) -> dict[str, int]:
    """Return the options of a token adapter that say how it gets the condition."""
    own = saved.config.get("latent_channels", 0) if saved else 0
    if saved and space is not None and (space == "latents") is not bool(own):
        raise ValueError(
            f"adapter.condition_space is {space} but the adapter {saved.name} takes "
            f"{'latents' if own else 'pixels'}; leave it out to use its own."
        )
    if not own and space != "latents":
        return {}
    found = {"latent_channels": latent_channels(shape.build("vae")), "latent_factor": shape.vae_scale_factor}
    if saved and own and own != found["latent_channels"]:
        raise ValueError(
            f"The adapter {saved.name} takes latents of {own} channels, but the base's VAE makes "
            f"{found['latent_channels']}; use it on a base with the VAE that it was trained with."
        )
    return found


def check_base_settings(settings: TrainSettings, shape: BaseShape) -> None:
    """Raise a ValueError for settings that would have no effect on a base of this shape."""
    denoiser = bare_denoiser(shape.build(shape.denoiser))
    transformer = isinstance(denoiser, Transformer)
    distilled = bool(getattr(denoiser.module.config, "guidance_embeds", False))
    for name, value, acts, which in (
        ("flow_shift", settings.flow_shift, denoiser.by_flow, "bases of flow matching"),
        ("distilled_guidance", settings.distilled_guidance, distilled, "bases that take it, such as FLUX.1 dev"),
        ("max_sequence_length", settings.max_sequence_length, transformer, "transformers"),
        ("adapter.token_width", settings.adapter.token_width, transformer, "transformers"),
        ("adapter.condition_space", settings.adapter.condition_space, transformer, "transformers"),
        ("quantization", settings.quantization, transformer, "transformers"),
        ("offload_base", settings.offload_base or None, transformer, "transformers"),
    ):
        if value is not None and not acts:
            raise ValueError(f"{name}={value} is for {which}, and {settings.base.name} is none of these; leave it out.")
    known = Abilities(settings.base, shape)
    known.check_text_length(settings.max_sequence_length, "")
    if settings.validation_steps:
        known.scheduler(settings.validation.scheduler)
        _check_guidance("validation", settings.validation.guidance_scale, settings, known)
        if settings.validation.control_guidance_scale is not None:
            known.check_own_guidance()
    if settings.early_stopping.every and settings.early_stopping.metric:
        known.scheduler(settings.early_stopping.scheduler)
        _check_guidance("early_stopping", settings.early_stopping.guidance_scale, settings, known)
    if settings.quantization is not None:
        check_package(settings.quantization)
    if settings.compile and transformer:
        raise ValueError(
            "compile=true compiles the blocks of a U-Net, while residuals are added between those of a transformer by "
            "hooks; leave compile out."
        )
    kind = settings.adapter.adapter_type
    if kind is not None and (kind == TOKENS) is not transformer:
        raise ValueError(
            f"adapter.adapter_type={kind} does not fit {settings.base.name}, which has a {denoiser.name}; leave it "
            f"out, or choose {TOKENS if transformer else 'full_adapter, full_adapter_xl or light_adapter'}."
        )


def _check_guidance(part: str, scale: float | None, settings: TrainSettings, base: Abilities) -> None:
    """Raise a ValueError for a guidance scale that the base would ignore, other than the one that null stands for."""
    ignored = base.guidance.scale is None and base.guidance.true_cfg_scale is None
    if ignored and scale not in (None, settings.base_defaults.guidance_scale):
        raise ValueError(
            f"{part}.guidance_scale={scale:g} has no effect: the base {settings.base.name} has no guidance that it "
            "could set; leave it out."
        )


def _defaults(adapter_type: str | None, shape: BaseShape) -> dict[str, Any]:
    """Return what fits the base: one feature per level for SD, two on the finest level that attends for SDXL, one for
    each of 8 blocks of a transformer, at even distances."""
    denoiser = bare_denoiser(shape.build(shape.denoiser))
    if isinstance(denoiser, Transformer):
        side = shape.vae_scale_factor * denoiser.patch
        (width, *_), *more = denoiser.residual_shapes((denoiser.patch,) * 2)
        levels = min(TOKEN_LEVELS, 1 + len(more))
        return {"adapter_type": TOKENS, "channels": (width,) * levels, "num_res_blocks": 1, "downscale_factor": side}
    kind = adapter_type or ("full_adapter_xl" if shape.xl else "full_adapter")
    channels = tuple(shape.parts["unet"]["block_out_channels"])
    if kind == "full_adapter_xl":
        channels = (*channels, channels[-1])
    elif kind == "light_adapter":  # it repeats its last level itself
        channels = channels[:-1]
    factor = shape.vae_scale_factor * (2 if shape.xl else 1)
    return {"adapter_type": kind, "channels": channels, "num_res_blocks": 2, "downscale_factor": factor}


def _check_saved(settings: TrainSettings, saved: SavedAdapter) -> None:
    """Raise ValueError if the settings ask for another shape than the saved adapter has."""
    saved.check_channels(settings.condition)
    name = saved.name
    for key in (*CHOSEN, "token_width"):
        wanted, actual = getattr(settings.adapter, key), saved.config.get(key)
        actual = tuple(actual) if isinstance(actual, list) else actual
        if wanted is not None and wanted != actual:
            raise ValueError(
                f"adapter.{key} is {wanted} but the adapter {name} has {actual}; set adapter.{key}=null to use "
                "its own value."
            )
