"""Checks that find what would keep a control from acting: caches, lost gradients, processors that ignore an attention
mask, adapters of another base."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from diffusers import T2IAdapter
from diffusers.models.attention_processor import Attention, AttnProcessor
from torch import Tensor, nn

from localctl.adapter import SHAPE, TOKENS, LocalAdapter, check_level_weights
from localctl.adapter_files import SavedAdapter
from localctl.architectures import BaseShape
from localctl.control.attention import Scores
from localctl.denoisers import bare_denoiser
from localctl.denoisers.base import Denoiser
from localctl.diffusion import latent_channels, latent_size
from localctl.files import first_line

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# The hooks of diffusers that leave the outputs of layers unchanged.
_HARMLESS = ("diffusers.hooks.layerwise_casting", "diffusers.hooks.group_offloading", "diffusers.hooks.hooks")


def check_no_skipping(denoiser: Denoiser) -> None:
    """Raise a ValueError if something skips layers of the denoiser or reuses their outputs of another step.

    Detected are diffusers' hooks (FirstBlockCache, FasterCache, PyramidAttentionBroadcast and the like) and libraries
    that replace the ``forward`` of the denoiser's blocks (DeepCache, T-GATE).
    """
    for name, module in denoiser.module.named_modules():
        registry = vars(module).get("_diffusers_hook")
        for hook in registry.hooks.values() if registry is not None else ():
            kind = type(hook)
            if kind.__module__.startswith("diffusers.") and kind.__module__ not in _HARMLESS:
                raise ValueError(
                    f"The {denoiser.name} has a {kind.__name__} (on {name or 'the whole'}), which skips layers or "
                    "reuses their outputs of another step, so controls would not act there; load the pipeline without "
                    "it."
                )
        if (denoiser.is_block(module, name) or _is_transformer(module)) and _has_foreign_forward(module):
            raise ValueError(
                f"The forward of {name or 'the whole'} in the {denoiser.name} was replaced (by DeepCache or ToMe, for "
                "example), which may skip what controls act on; remove that first."
            )


def _is_transformer(module: nn.Module) -> bool:
    return any("Transformer" in kind.__name__ for kind in type(module).__mro__)


def _has_foreign_forward(module: nn.Module) -> bool:
    if _is_transformer(module) and not type(module).forward.__module__.startswith("diffusers."):  # ToMe swaps the class
        return True
    own = vars(module)
    forward = own.get("forward")
    known = ("_hf_hook", "_diffusers_hook", "_original_forward")  # of accelerate and diffusers
    return (
        forward is not None
        and not any(name in own for name in known)
        and not hasattr(forward, "_torchdynamo_orig_callable")  # torch.compile
    )


def check_gradients(denoiser: Denoiser, what: str) -> None:
    """Raise a ValueError if gradients do not pass through the denoiser's layers.

    Their weights may be stored in 8 bits, cast for each call, made in inference mode, or quantised. One layer of each
    unusual kind is tried. ``what``: the control that needs gradients, the subject of the sentence.
    """
    tried = set()
    with torch.inference_mode(False), torch.enable_grad(), without_gradients(denoiser.module):
        for module, point in _layers(denoiser.module):
            weight = getattr(module, "weight", None)
            inference = isinstance(weight, Tensor) and weight.is_inference()
            hooked = "_diffusers_hook" in vars(module)
            kind = (type(module), type(weight), getattr(weight, "dtype", None), inference, hooked)
            plain = type(weight) is nn.Parameter and kind[2] in _FLOATS and not (inference or hooked)
            if kind in tried or (plain and type(module).__module__.startswith("torch.nn.")):
                continue
            tried.add(kind)
            reason = "made within torch.inference_mode" if inference else _failure(module, point)
            if reason is not None:
                raise ValueError(
                    f"{what} needs gradients through the {denoiser.name}, which its weights do not let pass "
                    f"({type(module).__name__}: {reason}); load it in float32, float16 or bfloat16 and without "
                    "casting or inference mode, or use a control without gradients, such as RegionBias."
                )


@contextmanager
def without_gradients(module: nn.Module) -> Iterator[None]:
    """Turn off gradients of the module's own weights, which would keep more of the forward pass in memory."""
    wanted = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)


def _layers(network: nn.Module) -> Iterator[tuple[nn.Module, Tensor]]:
    """Yield each layer that has weights of its own, with the smallest input it takes."""
    dtype = network.dtype
    for module in network.modules():
        weight = vars(module).get("_parameters", {}).get("weight")
        device = weight.device if isinstance(weight, Tensor) and weight.device.type != "meta" else "cpu"
        place = {"dtype": dtype, "device": device}
        if isinstance(getattr(module, "in_features", None), int):
            yield module, torch.zeros(1, module.in_features, **place)
        elif isinstance(module, nn.Conv2d):
            yield module, torch.zeros(1, module.in_channels, *module.kernel_size, **place)
        elif isinstance(module, (nn.GroupNorm, nn.LayerNorm)) and weight is not None:
            shape = (
                (1, module.num_channels, 2, 2) if isinstance(module, nn.GroupNorm) else (1, *module.normalized_shape)
            )
            yield module, torch.zeros(shape, **place)


def _failure(module: nn.Module, point: Tensor) -> str | None:
    """Return why no gradient passes through this layer; None if one does."""
    try:
        output = module(point.requires_grad_())
        (gradient,) = torch.autograd.grad(output.float().sum(), point)
    # RuntimeError (and its subclass NotImplementedError): from PyTorch, for an output without a graph or a dtype that
    # it cannot compute with. TypeError, ValueError: from a quantiser's layer that does not take this input.
    except (RuntimeError, TypeError, ValueError) as error:
        return first_line(error)
    return None if gradient.isfinite().all() else "the gradient is not finite"


class MaskCheck:
    """Checks the first conclusive output of each kind of processor; ValueError for one that ignores its mask."""

    def __init__(self, denoiser: Denoiser) -> None:
        self._denoiser = denoiser
        self._asked: Counter[type] = Counter()
        self._known: set[type] = set()

    def is_due(self, processor: Any) -> bool:
        """Count a masked call and return whether to check it: ever more rarely while no output is conclusive, as in
        half precision, since each check waits for the GPU."""
        kind = type(processor)
        self._asked[kind] += 1
        return kind not in self._known and self._asked[kind].bit_count() == 1

    def __call__(self, attn: Attention, processor: Any, scores: Scores, bias: Tensor, output: Tensor) -> None:
        used = uses_mask(attn, scores, bias, output)
        if used is False:
            raise ValueError(
                f"The attention processor {type(processor).__name__} ignores the attention mask through which controls "
                "act, itself or in the backend that it uses (SageAttention, for example); call "
                f"pipe.{self._denoiser.attribute}.set_default_attn_processor() or remove that backend first."
            )
        if used:
            self._known.add(type(processor))


@torch.no_grad()
def uses_mask(attn: Attention, scores: Scores, bias: Tensor, output: Tensor) -> bool | None:
    """Return whether ``output`` (R, Q, C) of a layer shows the effect of ``bias`` (n, 1 or H, Q, K).

    None if the effect is too small to tell. Attention is computed again for a few queries of one row, with and without
    the bias as mask, by diffusers' plainest processor.
    """
    if scores.mask is not None and scores.mask.shape[1] != 1:
        return None
    row = scores.guided.start
    given = None if scores.mask is None else scores.mask[row : row + 1]  # (1,1,K), of padding
    own = bias[0]  # (1 or H,Q,K)
    spread = (own.amax(dim=-1) - own.amin(dim=-1)).amax(dim=0)  # (Q,)
    queries = spread.topk(min(8, len(spread))).indices
    hidden, source = scores.hidden_states[row, queries][None], scores.source[row : row + 1]
    own = own[:, queries].to(torch.float32 if attn.upcast_attention else hidden.dtype)
    plain = AttnProcessor()
    if given is not None:
        given = given.to(own.dtype).expand(-1, own.shape[1], -1)
        own = own + given
    without = plain(attn, hidden, source, given).float()
    away = (plain(attn, hidden, source, own).float() - without).abs().max()
    if not bool(away > 64 * torch.finfo(output.dtype).eps * without.abs().max()):
        return None
    return bool((output[row, queries][None].float() - without).abs().max() > away / 8)


def check_fit(options: Mapping[str, Any], shape: BaseShape, way_out: str) -> None:
    """Raise a ValueError unless an adapter of these options makes the features that the base's denoiser takes.

    Only shapes are computed. ``options``: by name, of which ``SHAPE`` and ``level_weights`` are read; a missing one has
    its default. ``way_out``: the end of the error sentence.
    """
    factor = shape.vae_scale_factor
    side = 64 * factor
    tokens = options.get("adapter_type") == TOKENS
    names = (*SHAPE, "token_width", "latent_channels", "latent_factor") if tokens else SHAPE
    known = {name: options[name] for name in names if name in options}
    made: list[tuple[int, ...]] | None = None
    # RuntimeError: levels that do not fit each other, as full_adapter_xl widens on its second and third only. The other
    # errors: configs written by hand, or latents of another VAE.
    kinds = (RuntimeError, TypeError, IndexError, ZeroDivisionError, ValueError)
    with suppress(*kinds), torch.device("meta"):
        kind: Any = LocalAdapter if tokens else T2IAdapter
        adapter, x = kind(**known), torch.zeros(1, known.get("in_channels", 3), side, side)
        if tokens:
            channels = latent_channels(shape.build("vae"))
            x = adapter.inputs(x, x[:, :1], lambda _: torch.zeros(1, channels, *latent_size(side, side, factor)))
        made = [tuple(feature.shape[1:]) for feature in adapter(x)]
    denoiser = bare_denoiser(shape.build(shape.denoiser))
    taken = denoiser.residual_shapes(latent_size(side, side, factor))
    if made is None or made != taken[: len(made)]:
        raise ValueError(
            f"For {side}x{side} pixels the adapter would make features of shapes "
            f"{made or 'that do not fit each other'} but the base's {denoiser.name} takes {_brief(taken)}; {way_out}."
        )
    check_level_weights(options.get("level_weights"), len(made))


def _brief(shapes: list[tuple[int, ...]]) -> str:
    """Return shapes as a sentence shows them; those of a transformer's many blocks are all alike."""
    alike = len(shapes) > 1 and len(set(shapes)) == 1
    return f"{shapes[0]} after any of its {len(shapes)} blocks" if alike else str(shapes)


def check_base(adapter: SavedAdapter, base: str, shape: BaseShape) -> str | None:
    """Return a warning if the adapter was trained on another base than ``base``, else None.

    ValueError for an adapter that does not fit the ``shape`` of the base.
    """
    trained = f", which was trained on the base {adapter.base}," if adapter.base else ""
    check_fit(adapter.config, shape, f"the adapter {adapter.name}{trained} does not fit {base}")
    return adapter.used_on(base)
