"""Frozen layers that keep less for the gradients: torch's convolution keeps its input, which only the gradient of its
own weights needs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class FrozenConv2d(nn.Conv2d):
    """A convolution with the same results and gradients, which does not keep its input while its weights are frozen."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        trained = weight.requires_grad or (bias is not None and bias.requires_grad)
        if (
            trained
            or input.device.type != "cpu"
            or not (torch.is_grad_enabled() and input.requires_grad)
            or self.padding_mode != "zeros"
            or isinstance(self.padding, str)
            or torch.is_autocast_enabled("cpu")
            or torch.compiler.is_compiling()  # the compiler finds by itself what need not be kept
        ):
            return super()._conv_forward(input, weight, bias)
        return _Convolution.apply(input, weight, bias, (self.stride, self.padding, self.dilation), self.groups)


class _Convolution(torch.autograd.Function):
    """A convolution that is differentiated with respect to its input alone, of which it needs the shape."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Any, groups: int) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.shape, ctx.geometry, ctx.groups = input.shape, geometry, groups
        is_last = input.is_contiguous(memory_format=torch.channels_last)
        ctx.memory_format = torch.channels_last if is_last else torch.contiguous_format
        return torch.nn.functional.conv2d(input, weight, bias, *geometry, groups)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        (weight,), [gradient] = ctx.saved_tensors, outer
        blank = torch.empty(ctx.shape, dtype=gradient.dtype, device=gradient.device, memory_format=ctx.memory_format)
        options = (None, *ctx.geometry, False, (0, 0), ctx.groups, (True, False, False))
        found, _, _ = torch.ops.aten.convolution_backward(gradient, blank, weight, *options)
        return found, None, None, None, None


def keep_less(module: nn.Module) -> None:
    """Turn the convolutions of ``module``, exactly those of torch's own class, into :class:`FrozenConv2d`."""
    for part in module.modules():
        if type(part) is nn.Conv2d:
            part.__class__ = FrozenConv2d
