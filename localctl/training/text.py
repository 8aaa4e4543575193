"""What the frozen U-Net is told beside the noisy latents: the texts, and for SDXL the pooled texts and sizes, too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from localctl.pipelines import PromptEmbeds, encode_prompts
from localctl.pipelines import is_xl as is_xl


def encode_text(pipe: DiffusionPipeline, caption: str) -> PromptEmbeds:
    """Encode one caption; an empty one becomes what the pipeline guides away from without a negative prompt."""
    embeds, negative = encode_prompts(pipe, caption, guided=is_xl(pipe) and not caption)
    return negative or embeds


def time_ids(sizes: Sequence[tuple[int, int, int, int] | None], size: tuple[int, int]) -> Tensor:
    """SDXL's six numbers per image, (B,6) float32: original height and width, the crop's top and left, and the
    height and width that are generated.

    Args:
        sizes: the first four for each image; None where unknown, which counts as uncropped at that size, like
            the pipeline's own default.
        size: (height, width) of the batch in pixels.
    """
    known = [(*size, 0, 0) if four is None else four for four in sizes]
    return torch.tensor([[*four, *size] for four in known], dtype=torch.float32)


def unet_arguments(texts: PromptEmbeds, ids: Tensor | None) -> dict[str, Any]:
    """Keyword arguments of the U-Net for ``texts`` and, for SDXL, ``ids`` (B,6) of :func:`time_ids`."""
    arguments: dict[str, Any] = {"encoder_hidden_states": texts.states}
    if texts.pooled is not None:
        assert ids is not None
        # Sizes stay float32 also in half precision, where not every number of pixels exists.
        arguments["added_cond_kwargs"] = {"text_embeds": texts.pooled, "time_ids": ids.to(texts.states.device)}
    return arguments
