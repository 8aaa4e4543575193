"""Wrappers of attention processors during a call of the denoiser, and further runs of the denoiser within a call."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from localctl.control.attention import Scores
from localctl.control.base import BoundControl, CallContext, EndOfRun
from localctl.control.compatible import MaskCheck, without_gradients
from localctl.denoisers.base import Arguments, AttentionLayer, Denoiser

User = tuple[BoundControl, CallContext]
_VIEWING = tuple(
    f"diffusers.models.attention_processor.{name}"
    for name in ("AttnProcessor2_0", "FusedAttnProcessor2_0", "IPAdapterAttnProcessor2_0")
)


class SteeredProcessor(nn.Module):
    """Wraps an attention processor for one call of the denoiser and applies the controls.

    It calls the wrapped processor, whatever its class, with the sum of the controls' biases as attention mask. Without
    a bias the call is passed on unchanged. A Module, so that weights in the wrapped processor still move with the
    denoiser.
    """

    def __init__(self, inner: Any, layer: AttentionLayer) -> None:
        super().__init__()
        kind = type(inner).__name__
        if "XFormers" in kind:
            raise ValueError(
                f"{kind} takes no attention bias; call pipe.disable_xformers_memory_efficient_attention() first."
            )
        self.inner = inner
        self.layer = layer
        self.users: list[User] = []
        self.check: Callable[[Attention, Any, Scores, Tensor, Tensor], None] | None = None  # called after a masked call
        # diffusers passes only the keyword arguments (such as ip_adapter_masks) that this signature names.
        self.__dict__["__call__"] = inner.__call__

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | tuple[Any, ...] | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        # With an IP-Adapter, the context is (text, images).
        text = encoder_hidden_states[0] if isinstance(encoder_hidden_states, tuple) else encoder_hidden_states
        if hidden_states.shape[1] != self.layer.cells:
            raise ValueError(
                f"The attention layer {self.layer.name} received {hidden_states.shape[1]} cells in place of "
                f"{self.layer.cells}, so controls cannot locate regions; remove what merges or splits cells (ToMe or "
                "HyperTile, for example)."
            )
        context = self.users[0][1]
        scores = Scores(attn, hidden_states, text, attention_mask, context.guided_rows)
        chunk = min(user.max_queries(self.layer, scores) for user, _ in self.users)
        parts = [slice(first, first + chunk) for first in range(0, hidden_states.shape[1], chunk)]
        if self.layer.cross or len(parts) == 1:
            # An IP-Adapter's masks cover all queries, so the processor gets all at once; the bias is computed in parts.
            bias = _joined([self._bias(scores, part) for part in parts])
            mask = self._mask(attn, scores, bias, slice(None))
            with _one_mask_for_all_heads(attn, self.inner, mask, len(hidden_states)):
                output = self.inner(attn, hidden_states, encoder_hidden_states, mask, **kwargs)
            if bias is not None and self.check is not None:
                self.check(attn, self.inner, scores, mask, output)
            return self._mixed(attn, hidden_states, encoder_hidden_states, output, **kwargs)
        return self._in_parts(attn, scores, parts, **kwargs)

    def _in_parts(self, attn: Attention, scores: Scores, parts: Sequence[slice], **kwargs: Any) -> Tensor:
        """Run self-attention one part of the queries at a time, so that no mask for all of them is held in memory."""
        hidden_states = scores.hidden_states
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
            mask = self._mask(attn, scores, self._bias(scores, part) if index else first, part)
            with _one_mask_for_all_heads(attn, self.inner, mask, len(hidden_states)):
                outputs.append(self.inner(attn, hidden_states[:, part], hidden_states, mask, **kwargs))
        return torch.cat(outputs, dim=1)

    def _mixed(self, attn: Attention, hidden_states: Tensor, source: Any, output: Tensor, **kwargs: Any) -> Tensor:
        """Return the output after the controls that mix in other texts."""

        def attend(text: Tensor, rows: Sequence[int]) -> Tensor:
            chosen = list(rows)
            context = (text, [part[chosen] for part in source[1]]) if isinstance(source, tuple) else text
            return self.inner(attn, hidden_states[chosen], context, **kwargs)

        for user, context in self.users if self.layer.cross else ():
            mixed = user.mix_attention(context, self.layer, output, attend)
            output = output if mixed is None else mixed
        return output

    def _bias(self, scores: Scores, queries: slice) -> Tensor | None:
        """Return the sum of the controls' biases (n, 1 or H, q, K), or None; then let controls read the attention."""
        total: Tensor | None = None
        for user, context in self.users:
            bias = user.attention_bias(context, self.layer, scores, queries)
            if bias is not None:
                total = bias if total is None else total + bias
        for user, context in self.users:
            user.read_attention(context, self.layer, scores, queries, total)
        return total

    def _mask(self, attn: Attention, scores: Scores, bias: Tensor | None, queries: slice) -> Tensor | None:
        """Return the attention mask for the wrapped processor: (R*H, q, K), or (R, q, K), which it repeats per head."""
        mask = scores.mask
        if mask is not None and mask.shape[1] > 1:
            mask = mask[:, queries]
        if bias is None:
            return mask
        rows, heads = scores.hidden_states.shape[0], bias.shape[1]
        # Processors that compute attention by hand do so in float32 on some bases, and need a mask of that dtype.
        upcast = attn.upcast_attention and "2_0" not in type(self.inner).__name__
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


class _EagerMode:
    """Makes compiled code run eagerly while it has users.

    torch has one compiler stance per process, so users are counted, over all threads and in any order; the last one to
    leave restores the stance.
    """

    def __init__(self) -> None:
        self._lock, self._users = threading.Lock(), 0
        self._stance: Any = None

    def enter(self) -> None:
        """Count one more user; the first one switches to eager mode."""
        with self._lock:
            if not self._users:
                self._stance = torch.compiler.set_stance("force_eager")
                self._stance.__enter__()
            self._users += 1

    def leave(self) -> None:
        """Count one user less; the last one restores the stance."""
        with self._lock:
            self._users -= 1
            if not self._users:
                self._stance.__exit__(None, None, None)


_EAGER_MODE = _EagerMode()


def users_of(attn: Attention) -> list[User]:
    """Return the controls that steer this layer at the moment, with their contexts."""
    current = _holder(attn)["processor"]
    return list(current.users) if isinstance(current, SteeredProcessor) else []


def _holder(attn: Attention) -> Any:
    """Return the dict that holds the layer's processor: a processor with weights is a submodule, any other a plain
    attribute. Assigning in place keeps the order of submodules."""
    return attn._modules if "processor" in attn._modules else vars(attn)


class Installation:
    """The processors that are wrapped for one call of the denoiser, and restored after it.

    While any is wrapped, code compiled by ``torch.compile`` runs eagerly: else a graph would be compiled for these
    wrappers, and again for those of each step. ``check`` is called with their outputs.
    """

    def __init__(self, check: MaskCheck | None = None) -> None:
        self.check = check
        self._originals: list[tuple[dict[str, Any], Any]] = []
        self._eager = False

    def add(self, attn: Attention, layer: AttentionLayer, user: BoundControl, context: CallContext) -> None:
        """Let ``user`` steer this layer; the controls of a layer share one wrapper, the outer ``attach`` first."""
        holder = _holder(attn)
        current = holder["processor"]
        if not isinstance(current, SteeredProcessor):
            self._remember(holder, current)
            current = holder["processor"] = SteeredProcessor(current, layer)
            current.check = self.check
        current.users.append((user, context))

    def replace(self, attn: Attention, layer: AttentionLayer, users: Sequence[User]) -> None:
        """Let only ``users`` steer this layer, in place of its present controls."""
        holder = _holder(attn)
        current = holder["processor"]
        inner = current.inner if isinstance(current, SteeredProcessor) else current
        if users:
            wrapper = SteeredProcessor(inner, layer)
            wrapper.users.extend(users)
        if users or inner is not current:
            self._remember(holder, current)
            holder["processor"] = wrapper if users else inner

    def _remember(self, holder: dict[str, Any], processor: Any) -> None:
        if not self._originals and "torch._dynamo" in sys.modules:  # else nothing is compiled
            _EAGER_MODE.enter()
            self._eager = True
        self._originals.append((holder, processor))

    def undo(self) -> None:
        """Restore the original processors; a second call does nothing."""
        while self._originals:
            holder, original = self._originals.pop()
            holder["processor"] = original
        if self._eager:
            self._eager = False
            _EAGER_MODE.leave()


@dataclass
class InnerForward:
    """One call of the denoiser, ready to be run again on the prompt rows of some of its images (see ``RunDenoiser``).

    ``arguments`` are the call's, after all changes except those of the latents. ``controls`` steer it, together with
    those that an outer ``attach`` has already put on its layers.
    """

    denoiser: Denoiser
    layers: Sequence[tuple[AttentionLayer, Attention]]
    controls: Sequence[BoundControl]
    context: CallContext
    arguments: Arguments

    @contextmanager
    def __call__(self, latents: Tensor, images: Sequence[int], reader: BoundControl) -> Iterator[None]:
        first, count = self.context.guided_rows.start, len(self.context.conditional)
        rows = [first + image for image in images]
        installation = Installation()
        # Nothing can be differentiated in inference mode; tensors made in it are copied by _select.
        with torch.inference_mode(False), torch.enable_grad(), without_gradients(self.denoiser.module):
            args = _select(self.arguments[0], rows, count)
            kwargs = {
                name: value if name in self.denoiser.not_per_row else _select(value, rows, count)
                for name, value in self.arguments[1].items()
            }
            args, kwargs = self.denoiser.write((args, kwargs), latents=latents)
            try:
                self._steer(installation, images, reader)
                with suppress(EndOfRun):
                    self.denoiser.module.forward(*args, **kwargs)  # without the hooks, which serve the pipeline's calls
                yield
            finally:
                installation.undo()

    def _steer(self, installation: Installation, images: Sequence[int], reader: BoundControl) -> None:
        context = self.context.only(images)
        own = [(control, context) for control in self.controls]
        for layer, attn in self.layers:
            users = [(user, at.only(images)) for user, at in users_of(attn)] + own
            users = [(user, at) for user, at in users if not user.is_reader and user.attends(at, layer)]
            if reader.attends(context, layer):
                users.append((reader, context))
            installation.replace(attn, layer, users)


def _select(value: Any, rows: list[int], count: int) -> Any:
    """Copy the ``rows`` of all tensors of ``count`` rows within ``value``."""
    if isinstance(value, Tensor):
        return value[rows] if value.ndim and value.shape[0] == count else value
    if isinstance(value, (list, tuple)):
        return type(value)(_select(item, rows, count) for item in value)
    if isinstance(value, Mapping):
        return {name: _select(item, rows, count) for name, item in value.items()}
    return value
