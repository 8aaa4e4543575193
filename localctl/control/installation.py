"""Which controls stand in front of which attention layer, and putting the very same processors back after a call."""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from diffusers.models.attention_processor import Attention

from localctl.control.mask_check import MaskCheck
from localctl.control.sites import Site, SteeredProcessor

if TYPE_CHECKING:
    from localctl.control.base import BoundControl, CallContext

    User = tuple[BoundControl, CallContext]


class _Uncompiled:
    """What is compiled runs as it is written while anybody wants it. torch has one stance for the whole process, so it
    is counted who wants it, in whatever order and thread they come and go; the last one puts the stance back."""

    def __init__(self) -> None:
        self._lock, self._users = threading.Lock(), 0
        self._stance: Any = None

    def enter(self) -> None:
        """One more."""
        with self._lock:
            if not self._users:
                self._stance = torch.compiler.set_stance("force_eager")
                self._stance.__enter__()
            self._users += 1

    def leave(self) -> None:
        """One less."""
        with self._lock:
            self._users -= 1
            if not self._users:
                self._stance.__exit__(None, None, None)


_UNCOMPILED = _Uncompiled()


def users_of(attn: Attention) -> list[User]:
    """Who steers this layer at the moment."""
    current = _holder(attn)["processor"]
    return list(current.users) if isinstance(current, SteeredProcessor) else []


def _holder(attn: Attention) -> Any:
    """Where the layer keeps its processor: one with weights is a submodule, any other a plain attribute. Writing there
    in place keeps the order."""
    return attn._modules if "processor" in attn._modules else vars(attn)


class Installation:
    """The processors that are wrapped for one call of the U-Net, to be put back after it.

    While any is, what ``torch.compile`` has compiled runs as it is written: a graph would be made for these very
    wrappers, and again for those of each step. ``check`` looks at their outputs.
    """

    def __init__(self, check: MaskCheck | None = None) -> None:
        self.check = check
        self._originals: list[tuple[dict[str, Any], Any]] = []
        self._uncompiled = False

    def add(self, attn: Attention, site: Site, user: BoundControl, context: CallContext) -> None:
        """Let ``user`` steer this layer; users of one layer share one wrapper, the outer ``attach`` first."""
        holder = _holder(attn)
        current = holder["processor"]
        if not isinstance(current, SteeredProcessor):
            self._keep(holder, current)
            current = holder["processor"] = SteeredProcessor(current, site)
            current.check = self.check
        current.users.append((user, context))

    def replace(self, attn: Attention, site: Site, users: Sequence[User]) -> None:
        """Let ``users`` alone steer this layer, in place of those that do now."""
        holder = _holder(attn)
        current = holder["processor"]
        inner = current.inner if isinstance(current, SteeredProcessor) else current
        if users:
            wrapper = SteeredProcessor(inner, site)
            wrapper.users.extend(users)
        if users or inner is not current:
            self._keep(holder, current)
            holder["processor"] = wrapper if users else inner

    def _keep(self, holder: dict[str, Any], processor: Any) -> None:
        if not self._originals and "torch._dynamo" in sys.modules:  # else nothing is compiled
            _UNCOMPILED.enter()
            self._uncompiled = True
        self._originals.append((holder, processor))

    def undo(self) -> None:
        """Put the very same processors back; a second time does nothing."""
        while self._originals:
            holder, original = self._originals.pop()
            holder["processor"] = original
        if self._uncompiled:
            self._uncompiled = False
            _UNCOMPILED.leave()
