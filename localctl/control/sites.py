"""The attention layers of a U-Net as places to control: where each is, its scores, the wrapper round its processor.

Letters of shapes: R rows of the batch, n of them with the prompt, H heads, Q queries (cells of the picture), K keys
(tokens or cells), d width of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

if TYPE_CHECKING:
    from localctl.control.base import BoundControl, CallContext

    User = tuple[BoundControl, CallContext]


@dataclass(frozen=True)
class Site:
    """One attention layer: its ``name`` in the U-Net, whether it looks at the text (``cross``) or at the picture
    itself, and the (h, w) of its cells."""

    name: str
    cross: bool
    size: tuple[int, int]

    @property
    def cells(self) -> int:
        return self.size[0] * self.size[1]


def level_sizes(unet: nn.Module, latent_size: tuple[int, int]) -> list[tuple[int, int]]:
    """(h, w) within each down block of a ``UNet2DConditionModel`` and, last, its middle block: ceil halving."""
    sizes = [latent_size]
    for block in unet.down_blocks:
        height, width = sizes[-1]
        shrinks = getattr(block, "downsamplers", None) is not None
        sizes.append(((height + 1) // 2, (width + 1) // 2) if shrinks else (height, width))
    return sizes


def attention_sites(unet: nn.Module, latent_size: tuple[int, int]) -> list[tuple[Site, Attention]]:
    """All attention layers of the U-Net's transformers, in the order they run, for latents of this (h, w)."""
    sizes = level_sizes(unet, latent_size)
    down, middle = sizes[:-1], sizes[-1]
    parts = [
        (f"down_blocks.{i}", block, size) for i, (block, size) in enumerate(zip(unet.down_blocks, down, strict=True))
    ]
    parts.append(("mid_block", unet.mid_block, middle))
    parts += [
        (f"up_blocks.{i}", block, size) for i, (block, size) in enumerate(zip(unet.up_blocks, down[::-1], strict=True))
    ]
    return [
        (Site(f"{prefix}.{name}", module.is_cross_attention, size), module)
        for prefix, block, size in parts
        if block is not None
        for name, module in block.named_modules()
        if isinstance(module, Attention) and name.rpartition(".")[2] in ("attn1", "attn2")
    ]


_VIEWING = tuple(
    f"diffusers.models.attention_processor.{name}"
    for name in ("AttnProcessor2_0", "FusedAttnProcessor2_0", "IPAdapterAttnProcessor2_0")
)


class Moments(NamedTuple):
    """Of the vectors of each row and head: their mean (r,H,1,d), the sum of the products of their deviations from it
    (r,H,d,d), and how many they are."""

    mean: Tensor
    spread: Tensor
    number: int


class Scores:
    """The scores of one site in one call, computed when asked for and no more of them than asked for.

    scores = scale * q k^T, in float32, from the global prompt as the U-Net was given it, before any bias. ``mask`` is
    the attention mask that the U-Net itself set, which is rare: (R, 1 or Q, K), or None.
    """

    def __init__(
        self, attn: Attention, hidden_states: Tensor, text: Tensor | None, mask: Tensor | None, guided: slice
    ) -> None:
        self.attn = attn
        self.hidden_states = hidden_states  # (R,Q,C)
        self.source = hidden_states if text is None else text  # (R,K,C')
        self.mask = mask
        self.guided = guided

    @property
    def rows(self) -> int:
        """n, the number of rows that carry the prompt."""
        return self.guided.stop - self.guided.start

    @property
    def keys(self) -> int:
        return self.source.shape[1]

    @cached_property
    def query(self) -> Tensor:
        """(n, H, Q, d), as projected, for the rows that carry the prompt."""
        return self._query(self.guided)

    @cached_property
    def key(self) -> Tensor:
        """(n, H, K, d), as projected, for the rows that carry the prompt."""
        return self._key(self.guided)

    def _query(self, rows: slice) -> Tensor:
        query = self._heads(self.attn.to_q(self.hidden_states[rows]))
        return query if self.attn.norm_q is None else self.attn.norm_q(query)

    def _key(self, rows: slice) -> Tensor:
        source = self.source[rows]
        if self.attn.norm_cross and self.source is not self.hidden_states:
            source = self.attn.norm_encoder_hidden_states(source)
        key = self._heads(self.attn.to_k(source))
        return key if self.attn.norm_k is None else self.attn.norm_k(key)

    def _heads(self, tensor: Tensor) -> Tensor:
        return tensor.unflatten(-1, (self.attn.heads, -1)).transpose(1, 2)

    @cached_property
    def _guided(self) -> tuple[Tensor, Tensor]:
        return self.query, self.key.float().transpose(-1, -2) * self.attn.scale

    def block(self, queries: slice) -> Tensor:
        """(n, H, q, K) float32: the scores of these queries, for the rows that carry the prompt; yours to change."""
        query, key = self._guided
        return query[:, :, queries].float() @ key

    @cached_property
    def std(self) -> Tensor:
        """(n,): the unbiased standard deviation of each prompt row's scores, over heads and entries, without a mask.

        With q = mean(q) + q', k = mean(k) + k', each head's scores are the sum of four parts that are orthogonal over
        the entries, so that the sum of their squares needs the moments of q and k alone, and nothing cancels.
        """
        squares, means, count = self._moments(_moments(self.query), self.key_moments)
        spread = count * (means - means.mean(dim=1, keepdim=True)) ** 2  # (n,H)
        return ((squares + spread).sum(dim=1) / (count * means.shape[1] - 1)).sqrt()

    @cached_property
    def global_std(self) -> Tensor:
        """(): one standard deviation over all rows, heads and entries, as published; of the masked scores if masked."""
        query, key = self._query(slice(None)), self._key(slice(None))
        if self.mask is not None:
            scores = query.float() @ (key.float() * self.attn.scale).transpose(-1, -2)  # (R,H,Q,K)
            return (scores + self.mask.float().reshape(self.mask.shape[0], -1, *self.mask.shape[-2:])).std()
        squares, means, count = self._moments(_moments(query), _moments(key))
        spread = count * (means - means.mean()) ** 2
        return ((squares + spread).sum() / (count * means.numel() - 1)).sqrt()

    @cached_property
    def key_moments(self) -> Moments:
        """The moments of :attr:`key`. They may be set by somebody who has them from another call with the same text."""
        return _moments(self.key)

    def _moments(self, query: Moments, key: Moments) -> tuple[Tensor, Tensor, int]:
        """Per row and head: squared deviations from the head's mean, summed (r,H); the mean (r,H); entries per head."""
        q, k = query.mean, key.mean  # (r,H,1,d)
        of_queries = (k @ query.spread @ k.transpose(-1, -2))[..., 0, 0] * key.number
        of_keys = (q @ key.spread @ q.transpose(-1, -2))[..., 0, 0] * query.number
        squares = of_queries + of_keys + (query.spread * key.spread).sum(dim=(2, 3))
        scale = self.attn.scale
        return squares * scale**2, (q * k).sum(dim=(2, 3)) * scale, query.number * key.number


def _moments(vectors: Tensor) -> Moments:
    """Of vectors (r,H,count,d)."""
    vectors = vectors.float()
    mean = vectors.mean(dim=2, keepdim=True)
    away = vectors - mean  # the sum of squares about zero would cancel
    return Moments(mean, away.transpose(-1, -2) @ away, vectors.shape[2])


class SteeredProcessor(nn.Module):
    """Stands in front of an attention processor for one call of the U-Net and adds what the controls ask for.

    It calls the processor it wraps, whatever that is, with the sum of the controls' biases as attention mask. Without a
    bias it passes the call on untouched. A Module, so that weights in the wrapped processor still move with the U-Net.
    """

    def __init__(self, inner: Any, site: Site) -> None:
        super().__init__()
        kind = type(inner).__name__
        if "XFormers" in kind:
            raise ValueError(
                f"{kind} takes no attention bias; call pipe.disable_xformers_memory_efficient_attention() first."
            )
        self.inner = inner
        self.site = site
        self.users: list[User] = []
        self.check: Callable[[Attention, Any, Scores, Tensor, Tensor], None] | None = None  # of the output under a mask
        # diffusers hands on only those keyword arguments (such as ip_adapter_masks) that this signature names.
        self.__dict__["__call__"] = inner.__call__

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | tuple[Any, ...] | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        # With an IP-Adapter, the context is (text, pictures).
        text = encoder_hidden_states[0] if isinstance(encoder_hidden_states, tuple) else encoder_hidden_states
        if hidden_states.shape[1] != self.site.cells:
            raise ValueError(
                f"The attention layer {self.site.name} was given {hidden_states.shape[1]} cells in place of "
                f"{self.site.cells}, so controls cannot tell places; take off what merges or splits them (ToMe or "
                "HyperTile, for example)."
            )
        context = self.users[0][1]
        scores = Scores(attn, hidden_states, text, attention_mask, context.guided_rows)
        chunk = min(user.max_queries(self.site, scores) for user, _ in self.users)
        parts = [slice(first, first + chunk) for first in range(0, hidden_states.shape[1], chunk)]
        if self.site.cross or len(parts) == 1:
            # Masks of an IP-Adapter belong to all queries, so those stay together; the scores need not.
            bias = _joined([self._bias(scores, part) for part in parts])
            mask = self._mask(attn, scores, bias, slice(None))
            with _one_mask_for_all_heads(attn, self.inner, mask, len(hidden_states)):
                output = self.inner(attn, hidden_states, encoder_hidden_states, mask, **kwargs)
            if bias is not None and self.check is not None:
                self.check(attn, self.inner, scores, mask, output)
            return self._mixed(attn, hidden_states, encoder_hidden_states, output, **kwargs)
        return self._in_parts(attn, scores, parts, **kwargs)

    def _in_parts(self, attn: Attention, scores: Scores, parts: Sequence[slice], **kwargs: Any) -> Tensor:
        """Self-attention with one call per part of the queries, so that no mask for all of them is ever held."""
        hidden_states = scores.hidden_states
        if getattr(attn, "fused_projections", False):
            raise ValueError(
                "Projections are fused, which keeps large self-attention from being cut; "
                "call pipe.unfuse_qkv_projections() first."
            )
        first = self._bias(scores, parts[0])
        if first is None:  # the controls agree: nothing here
            return self.inner(attn, hidden_states, None, scores.mask, **kwargs)
        outputs = []
        for index, part in enumerate(parts):
            mask = self._mask(attn, scores, self._bias(scores, part) if index else first, part)
            with _one_mask_for_all_heads(attn, self.inner, mask, len(hidden_states)):
                outputs.append(self.inner(attn, hidden_states[:, part], hidden_states, mask, **kwargs))
        return torch.cat(outputs, dim=1)

    def _mixed(self, attn: Attention, hidden_states: Tensor, source: Any, output: Tensor, **kwargs: Any) -> Tensor:
        """The output after the controls that mix in other texts."""

        def attend(text: Tensor, rows: Sequence[int]) -> Tensor:
            chosen = list(rows)
            pictures = [part[chosen] for part in source[1]] if isinstance(source, tuple) else None
            return self.inner(attn, hidden_states[chosen], text if pictures is None else (text, pictures), **kwargs)

        for user, context in self.users if self.site.cross else ():
            mixed = user.mix_attention(context, self.site, output, attend)
            output = output if mixed is None else mixed
        return output

    def _bias(self, scores: Scores, queries: slice) -> Tensor | None:
        """(n, 1 or H, q, K): the sum over the controls; None for nothing. Those that read see the sum."""
        total: Tensor | None = None
        for user, context in self.users:
            bias = user.attention_bias(context, self.site, scores, queries)
            if bias is not None:
                total = bias if total is None else total + bias
        for user, context in self.users:
            user.read_attention(context, self.site, scores, queries, total)
        return total

    def _mask(self, attn: Attention, scores: Scores, bias: Tensor | None, queries: slice) -> Tensor | None:
        """The attention mask (R*H, q, K) or (R, q, K) for the wrapped processor, which repeats the latter per head."""
        mask = scores.mask
        if mask is not None and mask.shape[1] > 1:
            mask = mask[:, queries]
        if bias is None:
            return mask
        rows, heads = scores.hidden_states.shape[0], bias.shape[1]
        # Processors that attend by hand do so in float32 on some bases, and want the mask alike.
        upcast = attn.upcast_attention and "2_0" not in type(self.inner).__name__
        full = torch.zeros(
            rows, *bias.shape[1:], device=bias.device, dtype=torch.float32 if upcast else scores.query.dtype
        )
        if full.dtype != torch.float32:  # a large noise level can leave half precision, and inf - inf is not a number
            most = torch.finfo(full.dtype).max / 2
            bias = bias.clamp(-most, most)
        full[scores.guided] = bias.to(full.dtype)
        full = full.flatten(0, 1)  # (R*H,q,K)
        if mask is None:
            return full
        return full + (mask if mask.shape[0] == full.shape[0] else mask.repeat_interleave(heads, dim=0))


@contextmanager
def _one_mask_for_all_heads(attn: Attention, processor: Any, mask: Tensor | None, rows: int) -> Iterator[None]:
    """Keep diffusers from copying a mask (R,q,K) for every head where the processor can do with a view.

    ``Attention.prepare_attention_mask`` repeats it to (R*H,q,K), which these processors then view as (R,H,q,K).
    """
    kind = f"{type(processor).__module__}.{type(processor).__name__}"
    if mask is None or mask.shape[0] != rows or kind not in _VIEWING:
        yield
        return
    own = vars(attn).get("prepare_attention_mask")
    attn.prepare_attention_mask = lambda given, *args, **kwargs: given[:, None].expand(-1, attn.heads, -1, -1)
    try:
        yield
    finally:
        del attn.prepare_attention_mask
        if own is not None:
            attn.prepare_attention_mask = own


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    """The biases of all parts of the queries as one."""
    given = [part for part in parts if part is not None]
    assert len(given) in (0, len(parts)), "a control has a bias for all queries of a site or for none"
    return (torch.cat(given, dim=2) if len(given) > 1 else given[0]) if given else None
