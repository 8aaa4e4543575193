"""The wrapper of an attention processor that applies the controls of a layer."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from localctl.control.attention import Heads, Scores, project_text
from localctl.control.base import BoundControl, CallContext, Factors, Mixture
from localctl.control.compatible import MaskCheck
from localctl.control.compiled import handle_of, operator
from localctl.control.steered import mix_in, steer
from localctl.denoisers.base import AttentionLayer

User = tuple[BoundControl, CallContext]
_IMAGE_MASKS = "ip_adapter_masks"  # the keyword argument of an IP-Adapter's processor
_VIEWING = tuple(
    f"diffusers.models.attention_processor.{name}"
    for name in ("AttnProcessor2_0", "FusedAttnProcessor2_0", "IPAdapterAttnProcessor2_0")
)


class SteeredProcessor(nn.Module):
    """Wraps an attention processor during calls of the denoiser and applies the controls.

    In place of diffusers' default processor it computes attention itself, with projections that the controls share.
    Any other processor is called with the sum of the controls' biases as attention mask. Without a bias the layer is
    left unchanged. A Module, so that weights in the wrapped processor still move with the denoiser.
    """

    def __init__(self, inner: Any, attn: Attention, layer: AttentionLayer) -> None:
        super().__init__()
        kind = type(inner).__name__
        if "XFormers" in kind:
            raise ValueError(
                f"{kind} takes no attention bias; call pipe.disable_xformers_memory_efficient_attention() first."
            )
        self.inner = inner
        self.place = (attn, layer)  # in a tuple: not a submodule, since it contains this module
        self.users: list[User] = []
        self.twins: Tensor | None = None  # of joint attention: the rows that further rows belong to, (P,) int64
        self.check: MaskCheck | None = None  # called after a masked call
        self._texts: tuple[Tensor, Tensor, Tensor] | None = None  # of the last mixture, and their keys and values
        own_keywords = _keywords(_function(inner)) - _keywords(SteeredProcessor.__call__)
        # diffusers passes only the keyword arguments (such as ip_adapter_masks) that the signature names. Torch 2.11
        # cannot compile the signature of an attribute of the instance, so there is one only where it is needed.
        if own_keywords:
            self.__dict__["__call__"] = inner.__call__
        # The operator passes on neither keyword arguments nor weights.
        self.is_compilable = not own_keywords and not isinstance(inner, nn.Module)
        if "torch._dynamo" in sys.modules:  # else nothing is compiled
            self.handle, self.operator = handle_of(self), operator()

    def users_at(self, layer: AttentionLayer) -> list[User]:
        """Return the controls of this layer, or of a half of it; the list may be changed."""
        return self.users

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | tuple[Any, ...] | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        if torch.compiler.is_compiling():
            return self.operator(hidden_states, encoder_hidden_states, attention_mask, self.handle)
        if temb is not None:
            kwargs["temb"] = temb
        return self._run(attn, hidden_states, encoder_hidden_states, attention_mask, **kwargs)

    def run_compiled(self, hidden_states: Tensor, text: Tensor | None, mask: Tensor | None) -> Tensor:
        """Run within a graph, for the operator."""
        return self._run(self.place[0], hidden_states, text, mask).contiguous()

    def _run(
        self,
        attn: Attention,
        hidden_states: Tensor,
        source: Tensor | tuple[Any, ...] | None,
        attention_mask: Tensor | None,
        **kwargs: Any,
    ) -> Tensor:
        if not self.users:
            return self.inner(attn, hidden_states, source, attention_mask, **kwargs)
        layer = self.place[1]
        # With an IP-Adapter, the context is (text, images).
        text = source[0] if isinstance(source, tuple) else source
        if hidden_states.shape[1] != layer.cells:
            raise ValueError(
                f"The attention layer {layer.name} received {hidden_states.shape[1]} cells in place of "
                f"{layer.cells}, so controls cannot locate regions; remove what merges or splits cells (ToMe or "
                "HyperTile, for example)."
            )
        for user, context in self.users if layer.cross else ():
            masks = user.image_masks(context, layer)
            if masks is not None:
                kwargs[_IMAGE_MASKS] = masks
        own = not kwargs and attention_mask is None and not isinstance(source, tuple)
        heads = Heads.of(attn, self.inner, hidden_states, text) if own else None
        scores = Scores(attn, hidden_states, text, attention_mask, self.users[0][1].guided_rows, heads)
        if heads is not None:
            return self._own(heads, scores)
        parts = self._parts(scores)
        if layer.cross or len(parts) == 1:
            # An IP-Adapter's masks cover all queries, so the processor gets all at once; the bias is computed in parts.
            bias = _joined([self._bias(scores, part) for part in parts])
            mask = self._mask(scores, bias, slice(None))
            with _one_mask_for_all_heads(attn, self.inner, mask, len(hidden_states)):
                output = self.inner(attn, hidden_states, source, mask, **kwargs)
            if bias is not None and self.check is not None and self.check.is_due(self.inner):
                self.check(attn, self.inner, scores, bias, output)
            return self._mixed(attn, hidden_states, source, output, **kwargs)
        return self._in_parts(scores, parts, **kwargs)

    def _parts(self, scores: Scores) -> list[slice]:
        cells = self.place[1].cells
        chunk = min(user.max_queries(self.place[1], scores) for user, _ in self.users)
        return [slice(first, first + chunk) for first in range(0, cells, chunk)]

    def _own(self, heads: Heads, scores: Scores) -> Tensor:
        """Return the layer's output (R, Q, C) from its own projections."""
        attn, layer = self.place
        giver, factors = self._factors(scores)
        parts = [slice(0, layer.cells)] if giver is not None else self._parts(scores)
        if layer.cross and len(parts) > 1:  # the mask of a text is small
            joined = _joined([self._bias(scores, part) for part in parts])
            core, bias = steer(heads, scores.guided, [slice(0, layer.cells)], lambda part: joined, None)
        else:
            core, bias = steer(heads, scores.guided, parts, lambda part: self._bias(scores, part, giver), factors)
        whole = bias is not None and bias.shape[2] == layer.cells
        if whole and self.check is not None and self.check.is_due(self.inner):
            self.check(attn, self.inner, scores, bias, heads.output(core, scores.hidden_states))
        by_hand = any(has_hook(user, "mix_attention") for user, _ in self.users)
        for user, context in self.users if layer.cross and not by_hand else ():
            mixture = user.mixture(context, layer)
            if mixture is not None:
                core = mix_in(heads, core, mixture, *self._project(attn, mixture))
        output = heads.output(core, scores.hidden_states)
        return self._mixed(attn, scores.hidden_states, scores.source, output) if by_hand else output

    def _factors(self, scores: Scores) -> tuple[BoundControl | None, Factors | None]:
        """Return the one control that modulates this layer by factors, and these; or None and None."""
        givers = [(user, context) for user, context in self.users if has_hook(user, "attention_factors")]
        # Those that read attention get a bias for all pairs.
        if self.place[1].cross or len(givers) != 1 or any(has_hook(user, "read_attention") for user, _ in self.users):
            return None, None
        user, context = givers[0]
        factors = user.attention_factors(context, self.place[1], scores)
        return (None, None) if factors is None else (user, factors)

    def _project(self, attn: Attention, mixture: Mixture) -> tuple[Tensor, Tensor]:
        """Return keys and values (pairs, H, K, d) of the texts, cached as long as these stay the same tensor."""
        if torch.is_grad_enabled():
            return project_text(attn, mixture.texts)
        if self._texts is None or self._texts[0] is not mixture.texts:
            self._texts = (mixture.texts, *project_text(attn, mixture.texts))
        return self._texts[1:]

    def _in_parts(self, scores: Scores, parts: Sequence[slice], **kwargs: Any) -> Tensor:
        """Run self-attention one part of the queries at a time, so that no mask for all of them is held in memory."""
        attn, hidden_states = scores.attn, scores.hidden_states
        if getattr(attn, "fused_projections", False):
            raise ValueError(
                "Projections are fused, so large self-attention cannot be run in parts; "
                "call pipe.unfuse_qkv_projections() first."
            )
        first = self._bias(scores, parts[0])
        if first is None:  # no bias in any part of this layer
            return self.inner(attn, hidden_states, None, scores.mask, **kwargs)
        outputs = []
        for index, part in enumerate(parts):
            mask = self._mask(scores, self._bias(scores, part) if index else first, part)
            with _one_mask_for_all_heads(attn, self.inner, mask, len(hidden_states)):
                outputs.append(self.inner(attn, hidden_states[:, part], hidden_states, mask, **kwargs))
        return torch.cat(outputs, dim=1)

    def _mixed(self, attn: Attention, hidden_states: Tensor, source: Any, output: Tensor, **kwargs: Any) -> Tensor:
        """Return the output after the controls that mix in other texts."""

        def attend(text: Tensor, rows: Sequence[int] | Tensor, mask: Tensor | None = None) -> Tensor:
            chosen = rows if isinstance(rows, Tensor) else list(rows)
            context = (text, [part[chosen] for part in source[1]]) if isinstance(source, tuple) else text
            given = _of_rows(kwargs, chosen, len(hidden_states))
            return self.inner(attn, hidden_states[chosen], context, mask, **given)

        layer = self.place[1]
        for user, context in self.users if layer.cross else ():
            mixture = user.mixture(context, layer)
            if mixture is not None:
                local = attend(mixture.texts, mixture.rows, mixture.mask)  # (pairs,Q,C)
                change = mixture.share.to(output.dtype) * (local - output[mixture.bases])
                output = output.index_add(0, mixture.rows, change)
            mixed = user.mix_attention(context, layer, output, attend)
            output = output if mixed is None else mixed
        return output

    def _bias(self, scores: Scores, queries: slice, without: BoundControl | None = None) -> Tensor | None:
        """Return the sum of the controls' biases (n, 1 or H, q, K), or None; then let controls read the attention.

        ``without``: a control that modulates the scores in another form.
        """
        total: Tensor | None = None
        layer = self.place[1]
        for user, context in self.users:
            bias = None if user is without else user.attention_bias(context, layer, scores, queries)
            if bias is not None:
                total = bias if total is None else total + bias
        for user, context in self.users:
            user.read_attention(context, layer, scores, queries, total)
        return total

    def _mask(self, scores: Scores, bias: Tensor | None, queries: slice) -> Tensor | None:
        """Return the attention mask for the wrapped processor: (R*H, q, K), or (R, q, K), which it repeats per head."""
        mask = scores.mask
        if mask is not None and mask.shape[1] > 1:
            mask = mask[:, queries]
        if bias is None:
            return mask
        rows, heads = scores.hidden_states.shape[0], bias.shape[1]
        # Processors that compute attention by hand do so in float32 on some bases, and need a mask of that dtype.
        upcast = scores.attn.upcast_attention and "2_0" not in type(self.inner).__name__
        full = torch.zeros(
            rows, *bias.shape[1:], device=bias.device, dtype=torch.float32 if upcast else scores.query.dtype
        )
        if full.dtype != torch.float32:  # at a large noise level half precision would overflow, and inf - inf is NaN
            most = torch.finfo(full.dtype).max / 2
            bias = bias.clamp(-most, most)
        full[scores.guided] = bias.to(full.dtype)
        full = full.flatten(0, 1)  # (R*H,q,K)
        if mask is None:
            return full
        return full + (mask if mask.shape[0] == full.shape[0] else mask.repeat_interleave(heads, dim=0))


def _of_rows(kwargs: dict[str, Any], rows: Any, count: int) -> dict[str, Any]:
    """Return the keyword arguments of a processor for some of the ``count`` rows: masks of images may differ by row."""
    masks = kwargs.get(_IMAGE_MASKS)
    if not isinstance(masks, list) or not any(mask is not None and len(mask) == count > 1 for mask in masks):
        return kwargs
    return {**kwargs, _IMAGE_MASKS: [mask if mask is None or len(mask) != count else mask[rows] for mask in masks]}


def _function(processor: Any) -> Any:
    call = processor.__call__
    return getattr(call, "__func__", call)


@functools.lru_cache
def _keywords(call: Any) -> set[str]:
    """Return the names of a callable's parameters, without those of ``*args`` and ``**kwargs``."""
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return {name for name, found in inspect.signature(call).parameters.items() if found.kind not in variable}


@contextmanager
def _one_mask_for_all_heads(attn: Attention, processor: Any, mask: Tensor | None, rows: int) -> Iterator[None]:
    """Keep diffusers from copying a mask (R,q,K) for every head if the processor works with a view.

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
    """Return the biases of all parts of the queries as one tensor, or None."""
    given = [part for part in parts if part is not None]
    assert len(given) in (0, len(parts)), "a control returns a bias for all queries of a layer or for none"
    return (torch.cat(given, dim=2) if len(given) > 1 else given[0]) if given else None


def has_hook(user: BoundControl, hook: str) -> bool:
    """Return whether a control has this hook, rather than the one of the base class, which does nothing."""
    return getattr(type(user), hook) is not getattr(BoundControl, hook)
