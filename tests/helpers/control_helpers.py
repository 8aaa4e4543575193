"""A single attention layer under control, without a pipeline around it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from diffusers.models.attention_processor import Attention
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from tolerances import rounding
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from localctl.control.base import CallContext, Control
from localctl.control.wrapping import Installation
from localctl.denoisers.base import AttentionLayer
from localctl.layout import Layout

GOLDENS = Path(__file__).parents[1] / "goldens"


def golden(name: str) -> dict[str, Tensor]:
    with np.load(GOLDENS / f"{name}.npz", allow_pickle=False) as arrays:
        return {key: torch.from_numpy(np.array(arrays[key])) for key in arrays}


def word_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word, whatever the word, between a start and an end token."""
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", model_max_length=77)


def layer(arrays: dict[str, Tensor], prefix: str = "w.") -> Attention:
    """An attention layer with the weights of a golden."""
    weights = {name[len(prefix) :]: value for name, value in arrays.items() if name.startswith(prefix)}
    width, text_width = weights["to_q.weight"].shape[0], weights["to_k.weight"].shape[1]
    heads = int(arrays["heads"])
    attn = Attention(
        query_dim=width,
        cross_attention_dim=None if text_width == width else text_width,
        heads=heads,
        dim_head=width // heads,
    )
    attn.load_state_dict(weights)
    return attn.eval().requires_grad_(False)


def context(**changes: Any) -> CallContext:
    """One picture with guidance, in the first of ten steps."""
    values = {
        "step": 0,
        "num_steps": 10,
        "timestep": 981.0,
        "layout_of_row": (0, 0),
        "conditional": (False, True),
        "latent_size": (8, 8),
        "image_size": (64, 64),
        "device": torch.device("cpu"),
        "dtype": torch.float32,
        "sigma": 5.0,
    }
    return CallContext(**{**values, **changes})


def bare_pipe() -> Any:
    """As much of a pipeline as binding a region method needs."""
    return SimpleNamespace(
        unet=torch.nn.Identity(),
        tokenizer=word_tokenizer(),
        scheduler=SimpleNamespace(config=SimpleNamespace(num_train_timesteps=1000)),
    )


# A layer's output goes through a projection (32 terms), the scores of a head (16), the softmax and the sum over 64
# cells, and the last projection; vector units add at least 8 terms side by side.
LAYER_TERMS = (32 + 16 + 2 * 64 + 32) // 8


def assert_close(found: Tensor, expected: Tensor, terms: int = LAYER_TERMS) -> None:
    """Equal but for the rounding of so many operations in a row; by default those of one attention layer."""
    torch.testing.assert_close(found, expected, rtol=0, atol=rounding(terms) * float(expected.abs().max()))


def steered(
    control: Control | list[Control],
    layout: Layout | list[Layout],
    attn: Attention,
    inputs: tuple[Tensor, ...],
    size: tuple[int, int] = (8, 8),
    where: CallContext | None = None,
) -> Tensor:
    """The output of the layer for (hidden_states, [text]) under the controls."""
    controls = control if isinstance(control, list) else [control]
    layouts = layout if isinstance(layout, list) else [layout]
    where = where or context()
    layer = AttentionLayer("attn", len(inputs) > 1, size)
    installation = Installation()
    try:
        for item in controls:
            bound = item.bind(bare_pipe(), layouts)
            if bound.attends(where, layer):
                installation.add(attn, layer, layer, bound, where)
        return attn(*inputs)
    finally:
        installation.undo()
