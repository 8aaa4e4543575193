"""Steering of the attention layers during a call of the denoiser, and further runs of the denoiser within a call."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from localctl.control.base import BoundControl, CallContext, EndOfRun
from localctl.control.compatible import MaskCheck, without_gradients
from localctl.control.compiled import EAGER_MODE
from localctl.control.joint import JointProcessor
from localctl.control.processor import SteeredProcessor
from localctl.control.twins import select_rows, with_twins, without_twins
from localctl.denoisers.base import Arguments, AttentionLayer, Denoiser

User = tuple[BoundControl, CallContext]


def users_of(attn: Any, layer: AttentionLayer) -> list[User]:
    """Return the controls that steer this layer, or half of a layer, at the moment, with their contexts."""
    current = _holder(attn)["processor"]
    return list(current.users_at(layer)) if isinstance(current, SteeredProcessor) else []


def _steered(inner: Any, attn: Any, layer: AttentionLayer) -> SteeredProcessor:
    return SteeredProcessor(inner, attn, layer) if layer.joint is None else JointProcessor(inner, attn, layer)


def _holder(attn: Any) -> Any:
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
        self._wrappers: dict[Any, SteeredProcessor] = {}
        self._originals: list[tuple[dict[str, Any], Any]] = []
        self._entered = False

    def add(
        self, attn: Any, layer: AttentionLayer, half: AttentionLayer, user: BoundControl, context: CallContext
    ) -> None:
        """Let ``user`` steer a half of this layer; all controls of a layer share one wrapper, the outer ``attach``
        first."""
        holder = _holder(attn)
        current = holder["processor"]
        if not isinstance(current, SteeredProcessor):
            current = self._wrap(holder, attn, layer)
            current.check = self.check
        current.users_at(half).append((user, context))

    def complete(self, layers: Sequence[tuple[AttentionLayer, Any]]) -> None:
        """If any of the layers is steered, wrap the others as well, without controls.

        Compiled blocks then have one graph more per shape, whichever of their layers are steered.
        """
        for layer, attn in layers if self._originals and not self._entered else ():
            holder = _holder(attn)
            if not isinstance(holder["processor"], SteeredProcessor):
                self._wrap(holder, attn, layer)

    def replace(self, attn: Any, users: Mapping[AttentionLayer, Sequence[User]]) -> None:
        """Let only ``users`` steer a layer, by its halves if it is joint, in place of its present controls."""
        holder = _holder(attn)
        current = holder["processor"]
        inner = current.inner if isinstance(current, SteeredProcessor) else current
        steers = any(users.values())
        if steers:
            wrapper = _steered(inner, attn, next(iter(users)))
            for layer, some in users.items():
                wrapper.users_at(layer).extend(some)
        if steers or inner is not current:
            is_compilable = not isinstance(current, nn.Module) and (not steers or wrapper.is_compilable)
            self._remember(holder, current, is_compilable)
            holder["processor"] = wrapper if steers else inner

    def _wrap(self, holder: dict[str, Any], attn: Any, layer: AttentionLayer) -> SteeredProcessor:
        inner = holder["processor"]
        kept = self._wrappers.get(attn)
        if kept is None or kept.inner is not inner or kept.place[1].halves != layer.halves:
            kept = self._wrappers[attn] = _steered(inner, attn, layer)
        for half in layer.halves:
            kept.users_at(half).clear()
        kept.twins = None
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


def has_settings(denoiser: Denoiser, arguments: Arguments) -> bool:
    """Return whether a call has settings for processors, such as the masks of an IP-Adapter, which are no arguments of
    the graphs' operator."""
    given = (arguments[1].get(name) for name in denoiser.not_per_row)
    return any(isinstance(value, dict) and bool(value) for value in given)


@dataclass
class InnerForward:
    """One call of the denoiser, ready to be run again on the prompt rows of some of its images (see ``RunDenoiser``).

    ``arguments`` are the call's, after all changes except those of the latents. ``controls`` steer it, together with
    those that an outer ``attach`` has already put on its layers.
    """

    denoiser: Denoiser
    layers: Sequence[tuple[AttentionLayer, Any]]
    controls: Sequence[BoundControl]
    context: CallContext
    arguments: Arguments

    @contextmanager
    def __call__(self, latents: Tensor, images: Sequence[int], reader: BoundControl) -> Iterator[None]:
        # Nothing can be differentiated in inference mode; tensors made in it are copied by select_rows.
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            without_gradients(self.denoiser.module),
            self._ready(images, latents, reader) as (args, kwargs),
        ):
            with suppress(EndOfRun):
                # Without the hooks, which serve the pipeline's calls.
                self.denoiser.module.forward(*args, **kwargs)
            yield

    def output(self) -> Tensor:
        """Run the prompt rows of all images once more, as they are in ``arguments``, and return the model output."""
        images = range(len(self.context.guided_layouts))
        with self._ready(images) as (args, kwargs):
            return without_twins(self.denoiser.module.forward(*args, **kwargs), len(images))[0]

    @contextmanager
    def _ready(
        self, images: Sequence[int], latents: Tensor | None = None, reader: BoundControl | None = None
    ) -> Iterator[Arguments]:
        """Steer the layers for the prompt rows of these images, and yield a copy of the arguments for them."""
        first, count = self.context.guided_rows.start, len(self.context.conditional)
        rows = [first + image for image in images]
        arguments = select_rows(self.arguments, rows, count, self.denoiser.not_per_row)
        arguments = self.denoiser.write(arguments, latents=latents)
        installation = Installation()
        installation.eager = has_settings(self.denoiser, arguments)
        try:
            self._steer(installation, images, reader)
            arguments = with_twins(self.denoiser, arguments, self.layers, len(rows))
            with self.denoiser.running(arguments) as ready:
                yield ready
        finally:
            installation.undo()

    def _steer(self, installation: Installation, images: Sequence[int], reader: BoundControl | None) -> None:
        context = self.context.only(images)
        own = [(control, context) for control in self.controls]
        for layer, attn in self.layers:
            chosen = {}
            for half in layer.halves:
                users = [(user, at.only(images)) for user, at in users_of(attn, half)] + own
                users = [(user, at) for user, at in users if not user.is_reader and user.attends(at, half)]
                if reader is not None and reader.attends(context, half):
                    users.append((reader, context))
                chosen[half] = users
            installation.replace(attn, chosen)
