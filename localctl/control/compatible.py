"""What keeps a control from acting on a U-Net, found and said before it does: caches and lost gradients."""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from localctl.control.inner_forward import without_gradients
from localctl.files import first_line

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Of all that diffusers hooks on to a model, what leaves the values of its layers as they are.
_HARMLESS = ("diffusers.hooks.layerwise_casting", "diffusers.hooks.group_offloading", "diffusers.hooks.hooks")


def check_unskipped(unet: nn.Module) -> None:
    """ValueError if something on the U-Net leaves out layers or reuses what they gave in another step.

    Found are diffusers' hooks (FirstBlockCache, FasterCache, PyramidAttentionBroadcast and their kind) and what puts a
    ``forward`` of its own before the U-Net's blocks (DeepCache, T-GATE).
    """
    for name, module in unet.named_modules():
        registry = vars(module).get("_diffusers_hook")
        for hook in registry.hooks.values() if registry is not None else ():
            kind = type(hook)
            if kind.__module__.startswith("diffusers.") and kind.__module__ not in _HARMLESS:
                raise ValueError(
                    f"The U-Net has a {kind.__name__} ({name or 'on the whole'}), which skips layers or repeats what "
                    "they gave in another step, so controls would not act there; load the pipeline without it."
                )
        if _is_place(module, name) and _has_foreign_forward(module):
            raise ValueError(
                f"The U-Net's {name or 'whole'} has a forward of its own (of DeepCache or ToMe, for example), which "
                "may skip what controls act on; take it off first."
            )


def _is_place(module: nn.Module, name: str) -> bool:
    """Whether this is the U-Net, one of its blocks, or of their transformers down to the attention."""
    block = re.fullmatch(r"((down|up)_blocks\.\d+|mid_block)?", name) is not None
    return block or isinstance(module, Attention) or _is_transformer(module)


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


def check_gradients(unet: nn.Module, who: str) -> None:
    """ValueError if gradients do not pass through the U-Net's layers: their weights are kept in 8 bits, converted for
    each call, made in inference mode, or quantised. Of all that is not plain, one layer of each kind is tried."""
    tried = set()
    with torch.inference_mode(False), torch.enable_grad(), without_gradients(unet):
        for module, point in _layers(unet):
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
                    f"{who} needs gradients through the U-Net, which its weights do not let pass "
                    f"({type(module).__name__}: {reason}); load it in float32, float16 or bfloat16 and without "
                    "casting or inference mode, or use a control without gradients, such as RegionBias."
                )


def _layers(unet: nn.Module) -> Iterator[tuple[nn.Module, Tensor]]:
    """Each layer that has weights of its own, with the smallest input it takes."""
    dtype = unet.dtype
    for module in unet.modules():
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
    """Why no gradient comes back through this layer; None if it does."""
    try:
        output = module(point.requires_grad_())
        (gradient,) = torch.autograd.grad(output.float().sum(), point)
    # RuntimeError: PyTorch's own, of an output without a graph or of a dtype that it cannot compute with (and so
    # NotImplementedError, which is one). TypeError, ValueError: of a quantiser's layer that does not take this input.
    except (RuntimeError, TypeError, ValueError) as error:
        return first_line(error)
    return None if gradient.isfinite().all() else "the gradient is not finite"
