"""What a training step costs, counted on the meta device: FLOPs and bytes of real shapes, without weights.

Counting: a multiplication with its addition is 2 FLOPs; matrix products and convolutions count, nothing else does.
Backward is what the frozen U-Net needs: gradients of activations, from the first block that the adapter reaches, none
of weights. Attention is the fused kind, which never keeps its scores.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from localctl.adapter import LocalAdapter
from localctl.architectures import BaseShape
from localctl.diffusion import latent_size

TOKENS = 77


@dataclass(frozen=True)
class Cost:
    """Of one sample. flops: of the training step without the VAE's encoder, and of that. activations, vae_bytes: the
    most that is alive at once in either, beside weights and their gradients."""

    flops: float
    vae_flops: float
    activations: int
    vae_bytes: int


def count_step(
    shape: BaseShape, options: dict[str, Any], size: tuple[int, int], dtype: torch.dtype, checkpointing: bool = False
) -> Cost:
    """The cost of one sample of ``size`` (height, width) pixels with the frozen parts in ``dtype``.

    options: of ``LocalAdapter``. The VAE counts in float32 for SDXL, as it runs.
    """
    unet = shape.build("unet", dtype)
    unet.enable_gradient_checkpointing() if checkpointing else unet.disable_gradient_checkpointing()
    with torch.device("meta"):
        adapter = LocalAdapter(**options)
    nn.Module.to(adapter, dtype)
    for parameter in adapter.parameters():  # gradients of weights are counted by who asks, as they are kept
        parameter.register_post_accumulate_grad_hook(_drop_gradient)
    flops, activations = _count(lambda: _unet_step(unet, adapter, shape, size, dtype))
    vae = shape.build("vae", torch.float32 if shape.xl else dtype)
    assert isinstance(vae, AutoencoderKL)
    vae_flops, vae_bytes = _count(lambda: _encode(vae, size))
    return Cost(flops, vae_flops, activations, vae_bytes)


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def _unet_step(
    unet: nn.Module, adapter: LocalAdapter, shape: BaseShape, size: tuple[int, int], dtype: torch.dtype
) -> None:
    config = shape.parts["unet"]

    def empty(*sides: int) -> Tensor:
        return torch.empty(1, *sides, device="meta", dtype=dtype)

    arguments: dict[str, Any] = {"encoder_hidden_states": empty(TOKENS, config["cross_attention_dim"])}
    if shape.xl:
        width = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        arguments["added_cond_kwargs"] = {"text_embeds": empty(width), "time_ids": empty(6)}
    noisy = empty(unet.config.in_channels, *latent_size(*size, shape.vae_scale_factor))
    features = adapter(empty(adapter.channels_of_condition + 1, *size))
    step = torch.empty(1, device="meta", dtype=torch.long)
    output = unet(noisy, step, **arguments, down_intrablock_additional_residuals=features).sample
    output.float().square().mean().backward()


@torch.no_grad()
def _encode(vae: AutoencoderKL, size: tuple[int, int]) -> None:
    vae.encode(torch.empty(1, 3, *size, device="meta", dtype=vae.dtype))


def _count(run: Callable[[], None]) -> tuple[float, int]:
    """FLOPs of ``run`` and the most bytes that it had alive at once."""
    with OperationWatch() as watch, _fused_attention(watch):
        run()
    return float(watch.flops), watch.peak


class OperationWatch(TorchDispatchMode):
    """Sees every operation: counts its FLOPs by torch's own table, and the bytes of what it makes until that is freed.

    (torch's FlopCounterMode does the counting, too, but follows every module as well, which takes longer.)
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.now = self.peak = 0
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=result)
        if not func.is_view:  # which are no new memory, and mostly of weights
            for tensor in result if isinstance(result, (tuple, list)) else (result,):
                if isinstance(tensor, Tensor):
                    self._keep(tensor.untyped_storage())
        return result

    def add_products(self, query: Tensor, key: Tensor, products: int) -> None:
        """Count ``products`` matrix products of the size of query times key."""
        self.flops += products * 2 * math.prod(query.shape) * key.shape[-2]

    def _keep(self, storage: Any) -> None:
        if storage not in self._seen:
            self._seen.add(storage)
            size = storage.nbytes()
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.now -= size


@contextmanager
def _fused_attention(watch: OperationWatch) -> Iterator[None]:
    """Attention on the meta device by a stand-in that keeps what a fused kernel keeps: the device's own would make and
    keep the scores. (Not a function mode: those are off in backward, where checkpoints compute again.)"""
    real = F.scaled_dot_product_attention

    def attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Tensor:
        if query.device.type != "meta":
            return real(query, key, value, *args, **options)
        return _Attention.apply(query, key, value, watch)

    F.scaled_dot_product_attention = attention  # type: ignore[assignment]
    try:
        yield
    finally:
        F.scaled_dot_product_attention = real  # type: ignore[assignment]


class _Attention(torch.autograd.Function):
    """Fused attention without its numbers. Backward: the products for the gradients that are wanted; those that a
    kernel repeats to save memory do not count."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, watch: OperationWatch) -> Tensor:
        watch.add_products(query, key, 2)
        result = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, result)
        ctx.watch = watch
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        query, key, value, _ = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:3]
        through_scores = wanted[0] or wanted[1]
        ctx.watch.add_products(query, key, int(through_scores) + sum(wanted))
        made = [torch.empty_like(t) if want else None for t, want in zip((query, key, value), wanted, strict=True)]
        return (*made, None)
