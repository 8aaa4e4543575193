"""Families whose guidance is two calls of the module, and how such calls are told apart."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import nn

from localctl.denoisers.transformer import Transformer


class TwoCalls(Transformer):
    """Guidance by two calls of the module, one after the other: that of the prompt, then, if there is guidance, that of
    the negative prompt. Most pipelines name each by the module's ``cache_context``. With distilled guidance, there is
    the first alone. The negative prompt is encoded by a second call of ``encode_prompt``."""

    guides_in_one_call = False
    negative = "uncond"  # the name of the call of the negative prompt

    def __init__(self, module: nn.Module, pipe: Any = None) -> None:
        super().__init__(module, pipe)
        self._call = ""  # the name of the running call of the module
        self._encoded: int | None = None  # calls of encode_prompt in a call of the pipeline; None outside and in steps
        self._two = False  # whether there is guidance
        self._calls = 0  # of the module, in that of the pipeline

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Context in which calls are told apart, by wrappers of ``cache_context`` and of ``check_inputs``, with which a
        call of the pipeline begins, on these instances."""

        def name(call: str, *args: Any, **kwargs: Any) -> None:
            self._call = call

        def begin(*args: Any, **kwargs: Any) -> None:
            self._encoded = 0

        with noted(self.module, "cache_context", name), noted(self.pipe, "check_inputs", begin):
            yield

    def begins_call(self) -> bool:
        if self._encoded is not None:
            self._encoded += 1
        if self._encoded == 2:
            return False
        self._call, self._calls, self._two = "", 0, False
        return True

    def conditional(self, rows: int, images: int) -> tuple[bool, ...]:
        """Return True for all rows of a call with the prompt, False for those with the negative prompt."""
        if rows != images:
            raise self.wrong_rows(rows, images)
        if self._encoded is not None:  # the first step: texts are encoded before it
            self._two, self._encoded = self._encoded == 2, None
        self._calls += 1
        second = self._two and self._calls % 2 == 0  # of two calls without names
        return (not (self._call == self.negative if self._call else second),) * rows

    def has_negative(self, conditional: Sequence[bool]) -> bool:
        """Return whether the running call of the pipeline has a negative prompt."""
        return self._two


@contextmanager
def replaced(instance: Any, name: str, wrapper: Callable[..., Any]) -> Iterator[None]:
    """Let ``wrapper`` stand for a method, on this instance only."""
    own = vars(instance).get(name)
    setattr(instance, name, functools.wraps(getattr(instance, name))(wrapper))
    try:
        yield
    finally:
        if own is None:
            delattr(instance, name)
        else:
            setattr(instance, name, own)


def noted(instance: Any, name: str, note: Callable[..., None]) -> AbstractContextManager[None]:
    """Call ``note`` with the arguments of each call of a method, on this instance only."""
    method = getattr(instance, name)

    def noting(*args: Any, **kwargs: Any) -> Any:
        note(*args, **kwargs)
        return method(*args, **kwargs)

    return replaced(instance, name, noting)
