"""Steering of the attention layers during a call of the denoiser, and further runs of the denoiser within a call."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from localctl.control.base import BoundControl, CallContext, EndOfRun
from localctl.control.compatible import MaskCheck, without_gradients
from localctl.control.compiled import EAGER_MODE
from localctl.control.processor import SteeredProcessor
from localctl.denoisers.base import Arguments, AttentionLayer, Denoiser

User = tuple[BoundControl, CallContext]


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

    A layer's wrapper is kept for the next call. ``check`` is called with the outputs of masked calls.

    Code compiled by ``torch.compile`` runs eagerly meanwhile where the operator of the wrappers does not suffice: for
    gradients, for processors with weights (an IP-Adapter's) or with keyword arguments of their own, or if ``eager`` is
    set.
    """

    def __init__(self, check: MaskCheck | None = None) -> None:
        self.check = check
        self.eager = False
        self._wrappers: dict[Attention, SteeredProcessor] = {}
        self._originals: list[tuple[dict[str, Any], Any]] = []
        self._entered = False

    def add(self, attn: Attention, layer: AttentionLayer, user: BoundControl, context: CallContext) -> None:
        """Let ``user`` steer this layer; the controls of a layer share one wrapper, the outer ``attach`` first."""
        holder = _holder(attn)
        current = holder["processor"]
        if not isinstance(current, SteeredProcessor):
            current = self._wrap(holder, attn, layer)
            current.check = self.check
        current.users.append((user, context))

    def complete(self, layers: Sequence[tuple[AttentionLayer, Attention]]) -> None:
        """If any of the layers is steered, wrap the others as well, without controls.

        Compiled blocks then have one graph more per shape, whichever of their layers are steered.
        """
        for layer, attn in layers if self._originals and not self._entered else ():
            holder = _holder(attn)
            if not isinstance(holder["processor"], SteeredProcessor):
                self._wrap(holder, attn, layer)

    def replace(self, attn: Attention, layer: AttentionLayer, users: Sequence[User]) -> None:
        """Let only ``users`` steer this layer, in place of its present controls."""
        holder = _holder(attn)
        current = holder["processor"]
        inner = current.inner if isinstance(current, SteeredProcessor) else current
        if users:
            wrapper = SteeredProcessor(inner, attn, layer)
            wrapper.users.extend(users)
        if users or inner is not current:
            is_compilable = not isinstance(current, nn.Module) and (not users or wrapper.is_compilable)
            self._remember(holder, current, is_compilable)
            holder["processor"] = wrapper if users else inner

    def _wrap(self, holder: dict[str, Any], attn: Attention, layer: AttentionLayer) -> SteeredProcessor:
        inner = holder["processor"]
        kept = self._wrappers.get(attn)
        if kept is None or kept.inner is not inner or kept.place[1] != layer:
            kept = self._wrappers[attn] = SteeredProcessor(inner, attn, layer)
        kept.users.clear()
        self._remember(holder, inner, kept.is_compilable)
        holder["processor"] = kept
        return kept

    def _remember(self, holder: dict[str, Any], processor: Any, is_compilable: bool) -> None:
        eager = self.eager or torch.is_grad_enabled() or not is_compilable
        if eager and not self._entered and "torch._dynamo" in sys.modules:  # else nothing is compiled
            EAGER_MODE.enter()
            self._entered = True
        self._originals.append((holder, processor))

    def undo(self) -> None:
        """Restore the original processors; a second call does nothing."""
        while self._originals:
            holder, original = self._originals.pop()
            holder["processor"] = original
        if self._entered:
            self._entered = False
            EAGER_MODE.leave()


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
        installation = Installation()
        # Nothing can be differentiated in inference mode; tensors made in it are copied by _select.
        with torch.inference_mode(False), torch.enable_grad(), without_gradients(self.denoiser.module):
            args, kwargs = self.denoiser.write(self._arguments(images), latents=latents)
            try:
                self._steer(installation, images, reader)
                with suppress(EndOfRun):
                    self.denoiser.module.forward(*args, **kwargs)  # without the hooks, which serve the pipeline's calls
                yield
            finally:
                installation.undo()

    def output(self) -> Tensor:
        """Run the prompt rows of all images once more, as they are in ``arguments``, and return the model output."""
        images = range(len(self.context.guided_layouts))
        args, kwargs = self._arguments(images)
        installation = Installation()
        installation.eager = any(kwargs.get(name) for name in self.denoiser.not_per_row)
        try:
            self._steer(installation, images)
            return self.denoiser.module.forward(*args, **kwargs)[0]
        finally:
            installation.undo()

    def _arguments(self, images: Sequence[int]) -> Arguments:
        """Return a copy of the call's arguments for the prompt rows of these images."""
        first, count = self.context.guided_rows.start, len(self.context.conditional)
        rows = [first + image for image in images]
        kwargs = {
            name: value if name in self.denoiser.not_per_row else _select(value, rows, count)
            for name, value in self.arguments[1].items()
        }
        return _select(self.arguments[0], rows, count), kwargs

    def _steer(self, installation: Installation, images: Sequence[int], reader: BoundControl | None = None) -> None:
        context = self.context.only(images)
        own = [(control, context) for control in self.controls]
        for layer, attn in self.layers:
            users = [(user, at.only(images)) for user, at in users_of(attn)] + own
            users = [(user, at) for user, at in users if not user.is_reader and user.attends(at, layer)]
            if reader is not None and reader.attends(context, layer):
                users.append((reader, context))
            installation.replace(attn, layer, users)


def _select(value: Any, rows: list[int], count: int) -> Any:
    """Copy the ``rows`` of all tensors of ``count`` rows within ``value``."""
    if isinstance(value, Tensor):
        if not value.ndim or value.shape[0] != count:
            return value
        # Indices would be moved to the device for each tensor.
        adjacent = rows == list(range(rows[0], rows[-1] + 1))
        return value[rows[0] : rows[-1] + 1].clone() if adjacent else value[rows]
    if isinstance(value, (list, tuple)):
        return type(value)(_select(item, rows, count) for item in value)
    if isinstance(value, Mapping):
        return {name: _select(item, rows, count) for name, item in value.items()}
    return value
