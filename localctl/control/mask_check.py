"""Does an attention processor use the mask that it is given? Controls act through it."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor
from torch import Tensor

from localctl.control.attention import Scores


class MaskCheck:
    """Looks at the first output of each kind of processor that can tell. ValueError for one that ignores its mask."""

    def __init__(self) -> None:
        self._known: set[type] = set()

    def __call__(self, attn: Attention, processor: Any, scores: Scores, mask: Tensor, output: Tensor) -> None:
        if type(processor) in self._known:
            return
        used = uses_mask(attn, scores, mask, output)
        if used is False:
            raise ValueError(
                f"The attention processor {type(processor).__name__} ignores the attention mask, which is how controls "
                "act, or what computes its attention does (SageAttention, for example); call "
                "pipe.unet.set_default_attn_processor() or take that off first."
            )
        if used:
            self._known.add(type(processor))


@torch.no_grad()
def uses_mask(attn: Attention, scores: Scores, mask: Tensor, output: Tensor) -> bool | None:
    """Whether ``output`` (R, Q, C) of a layer shows the effect of ``mask`` (R or R*H, Q, K); None where it is too small
    to be told.

    A few queries of one row are attended to again, with and without the mask, as plainly as diffusers can.
    """
    if scores.mask is not None:
        return None
    row = scores.guided.start
    own = mask.unflatten(0, (len(output), -1))[row]  # (1 or H,Q,K)
    spread = (own.amax(dim=-1) - own.amin(dim=-1)).amax(dim=0)  # (Q,)
    queries = spread.topk(min(8, len(spread))).indices
    hidden, source = scores.hidden_states[row, queries][None], scores.source[row : row + 1]
    own = own[:, queries].to(torch.float32 if attn.upcast_attention else hidden.dtype)
    plain = AttnProcessor()
    without = plain(attn, hidden, source).float()
    away = (plain(attn, hidden, source, own).float() - without).abs().max()
    if not bool(away > 64 * torch.finfo(output.dtype).eps * without.abs().max()):
        return None
    return bool((output[row, queries][None].float() - without).abs().max() > away / 8)
