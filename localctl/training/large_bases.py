"""Frozen transformers of many billion parameters: quantised weights, and weights that wait in the host's memory."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from localctl.denoisers import bare_denoiser
from localctl.denoisers.transformer import Transformer
from localctl.settings import Quantization

BYTES: dict[Quantization, float] = {  # of a weight, with its scales
    "bitsandbytes_8bit": 1.0,
    "bitsandbytes_4bit": 0.57,
    "torchao_int8": 1.0,
}


def check_package(quantization: Quantization) -> None:
    """Raise a ValueError if the package that quantises is not installed."""
    package = quantization.partition("_")[0]
    if find_spec(package) is None:
        raise ValueError(
            f"quantization={quantization} needs the package {package}, which is not installed; run pip install "
            f'"localctl[{package}]", or leave it out.'
        )


def quantized(quantization: Quantization, dtype: torch.dtype, device: torch.device) -> Any:
    """Return diffusers' description of a pipeline whose transformer is quantised as it is loaded.

    dtype: of everything that is not quantised, in which the products are computed. ValueError for a dtype or a device
    on which this kind does not work.
    """
    if quantization == "torchao_int8" and dtype != torch.bfloat16:
        raise ValueError(
            f"quantization={quantization} computes in bfloat16, not in {str(dtype).removeprefix('torch.')}; set "
            "base.dtype=bfloat16 or mixed_precision=bf16."
        )
    if quantization != "torchao_int8" and device.type == "cpu":
        raise ValueError(f"quantization={quantization} needs a GPU; use torchao_int8 on a CPU, or leave it out.")
    from diffusers import BitsAndBytesConfig, PipelineQuantizationConfig, TorchAoConfig

    own: Any
    if quantization == "torchao_int8":
        from torchao.quantization import Int8WeightOnlyConfig

        own = TorchAoConfig(Int8WeightOnlyConfig())
    elif quantization == "bitsandbytes_8bit":
        own = BitsAndBytesConfig(load_in_8bit=True)
    else:
        own = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    return PipelineQuantizationConfig(quant_mapping={"transformer": own})


def is_absent(part: nn.Module) -> bool:
    """Return whether only the shapes of a part are there, as of encoders whose work is cached."""
    return any(parameter.is_meta for parameter in part.parameters())


def offload(pipe: Any, device: torch.device) -> None:
    """Move all parts but the transformer to ``device``; a block of that is there only while it is computed (diffusers'
    group offloading).

    With gradient checkpointing, a block is computed again for its gradients, and what is kept for them refers to its
    weights where they are then. Of the few weights outside of the blocks, gradients need those of linear layers alone,
    which are kept as views, and so stay.
    """
    for part in pipe.components.values():
        if isinstance(part, nn.Module) and part is not pipe.transformer and not is_absent(part):
            part.to(device)
    options = {"onload_device": device, "offload_device": torch.device("cpu")}
    pipe.transformer.enable_group_offload(**options, offload_type="block_level", num_blocks_per_group=1)
    resident: list[Any] = []

    def leave(block: Any, _arguments: Any) -> None:
        # Checkpointing stops a block that is computed again early, before the hook after it, which would offload it.
        while resident:
            resident.pop()._diffusers_hook.get_hook("group_offloading").group.offload_()
        resident.append(block)

    denoiser = bare_denoiser(pipe.transformer)
    assert isinstance(denoiser, Transformer)
    for _, block in denoiser.blocks:
        block.register_forward_pre_hook(leave)
