"""What the frozen U-Net is told beside the noisy latents: the texts, and for SDXL the pooled texts and sizes, too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor


@dataclass(frozen=True)
class TextStates:
    """states (B, tokens, width); pooled (B, width) of SDXL's second encoder, None for other bases."""

    states: Tensor
    pooled: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        return self.states.nbytes + (0 if self.pooled is None else self.pooled.nbytes)

    @classmethod
    def join(cls, parts: Sequence[TextStates]) -> TextStates:
        """Several texts as one batch."""
        pooled = [part.pooled for part in parts if part.pooled is not None]
        assert len(pooled) in (0, len(parts))
        return cls(torch.cat([part.states for part in parts]), torch.cat(pooled) if pooled else None)


def is_xl(pipe: DiffusionPipeline) -> bool:
    """Whether the U-Net of ``pipe`` takes pooled texts and sizes, as SDXL's does."""
    return pipe.unet.config.addition_embed_type == "text_time"


@torch.no_grad()
def encode_text(pipe: DiffusionPipeline, caption: str) -> TextStates:
    """One caption as the pipeline itself encodes prompts.

    An empty one becomes what the pipeline guides away from when it is given no negative prompt: for SDXL that is zeros
    (``force_zeros_for_empty_prompt``), not the encoding of the empty text.
    """
    if not is_xl(pipe):
        return TextStates(pipe.encode_prompt(caption, pipe.unet.device, 1, do_classifier_free_guidance=False)[0])
    empty = not caption
    states, no_states, pooled, no_pooled = pipe.encode_prompt(
        caption, device=pipe.unet.device, num_images_per_prompt=1, do_classifier_free_guidance=empty
    )
    return TextStates(no_states, no_pooled) if empty else TextStates(states, pooled)


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


def unet_arguments(texts: TextStates, ids: Tensor | None) -> dict[str, Any]:
    """Keyword arguments of the U-Net for ``texts`` and, for SDXL, ``ids`` (B,6) of :func:`time_ids`."""
    arguments: dict[str, Any] = {"encoder_hidden_states": texts.states}
    if texts.pooled is not None:
        assert ids is not None
        # Sizes stay float32 also in half precision, where not every number of pixels exists.
        arguments["added_cond_kwargs"] = {"text_embeds": texts.pooled, "time_ids": ids.to(texts.states.device)}
    return arguments
