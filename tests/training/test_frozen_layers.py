"""Frozen convolutions have the results and gradients of torch's own, and keep less for them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from localctl.training.frozen_layers import FrozenConv2d, keep_less

LAYERS: list[dict[str, Any]] = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 3, "padding": 1, "stride": 2, "bias": False},
    {"kernel_size": 1},
    {"kernel_size": 3, "padding": 2, "dilation": 2, "groups": 2},
    {"kernel_size": 3, "padding": "same"},
    {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
]


def results(layer: nn.Module, inputs: Tensor) -> tuple[Tensor, ...]:
    leaf = inputs.detach().requires_grad_()
    output = layer(leaf)
    (gradient,) = torch.autograd.grad(output.square().sum(), leaf)
    return output.detach(), gradient


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("options", LAYERS)
def test_results_and_gradients_are_those_of_torch(options: dict[str, Any], memory_format: torch.memory_format) -> None:
    torch.manual_seed(0)
    plain = nn.Conv2d(8, 16, **options).requires_grad_(False).to(memory_format=memory_format)
    frozen = copy.deepcopy(plain)
    keep_less(frozen)
    inputs = torch.randn(3, 8, 10, 12).to(memory_format=memory_format)
    assert type(frozen) is FrozenConv2d and frozen.state_dict().keys() == plain.state_dict().keys()
    assert all(torch.equal(*pair) for pair in zip(results(plain, inputs), results(frozen, inputs), strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_autocast_and_checkpointing_change_nothing(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(4, 4, 3), nn.SiLU(), nn.Conv2d(4, 4, 1)).requires_grad_(False).to(dtype)
    frozen = copy.deepcopy(plain)
    keep_less(frozen)
    inputs = torch.randn(2, 4, 8, 8, dtype=dtype)
    assert all(torch.equal(*pair) for pair in zip(results(plain, inputs), results(frozen, inputs), strict=True))

    class Again(nn.Module):
        def __init__(self, layers: nn.Module) -> None:
            super().__init__()
            self.layers = layers

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float64):
                return torch.utils.checkpoint.checkpoint(self.layers, x, use_reentrant=False)

    pairs = zip(results(Again(plain), inputs), results(Again(frozen), inputs), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)


def kept(layer: nn.Module) -> int:
    """Return the bytes that are kept between the passes, besides weights."""
    found: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if not any(tensor is parameter for parameter in layer.parameters()):
            found[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(torch.randn(2, 8, 16, 16, requires_grad=True) * 2)
    return sum(found.values())


def test_the_input_of_a_frozen_convolution_is_not_kept() -> None:
    layer = nn.Conv2d(8, 8, 3, padding=1).requires_grad_(False)
    assert kept(layer) == 2 * 8 * 16 * 16 * 4  # the input
    keep_less(layer)
    assert kept(layer) == 0


def test_weights_that_are_trained_after_all_get_their_gradients() -> None:
    torch.manual_seed(0)
    plain, layer = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)
    layer.load_state_dict(plain.state_dict())
    keep_less(layer)
    inputs = torch.randn(2, 4, 8, 8)
    for one in (plain, layer):
        one(inputs).square().sum().backward()
    assert torch.equal(layer.weight.grad, plain.weight.grad) and torch.equal(layer.bias.grad, plain.bias.grad)


def test_layers_of_other_classes_stay() -> None:
    class Own(nn.Conv2d):
        pass

    own = Own(4, 4, 3)
    keep_less(nn.Sequential(own))
    assert type(own) is Own
