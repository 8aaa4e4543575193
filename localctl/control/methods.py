"""Context managers that wrap or patch methods of one pipeline for a while."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import nn

from localctl.denoisers.two_calls import replaced

Arguments = Mapping[str, Any]


@contextmanager
def wrapped(
    instance: Any,
    name: str,
    before: Callable[[Arguments], None],
    within: Callable[[Arguments], AbstractContextManager[None]] = lambda arguments: nullcontext(),
) -> Iterator[None]:
    """Call ``before`` with the bound arguments ahead of each call of the method ``name``, on this instance only.

    Both calls run inside the context manager that ``within`` returns for the arguments.
    """
    method = getattr(instance, name)
    signature = inspect.signature(method)

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        with within(bound.arguments):
            before(bound.arguments)
            return method(*args, **kwargs)

    with replaced(instance, name, wrapper):
        yield


@contextmanager
def uncompiled(module: nn.Module) -> Iterator[None]:
    """Run ``module`` itself, with its hooks, in place of the graph that ``module.compile()`` made; submodules keep
    theirs."""
    own = vars(module).get("_compiled_call_impl")
    if own is None:
        yield
        return
    module._compiled_call_impl = None
    try:
        yield
    finally:
        module._compiled_call_impl = own


@contextmanager
def skipping_layers(pipe: Any, clip_skip: int | None) -> Iterator[None]:
    """Make the text encoders work with ``clip_skip`` in ``encode_prompt``.

    diffusers reads a CLIP's last norm from ``text_encoder.text_model``, an attribute that transformers 5 no longer has:
    inside this context it refers to the text encoder itself. ValueError for a number of layers that an encoder does not
    have.
    """
    if clip_skip is None:
        yield
        return
    encoders = [getattr(pipe, name, None) for name in ("text_encoder", "text_encoder_2")]
    found = [encoder for encoder in encoders if encoder is not None]
    xl = getattr(pipe, "text_encoder_2", None) is not None  # uses the last layer but one even without a skip
    most = min((encoder.config.num_hidden_layers for encoder in found), default=0) - xl
    if not isinstance(clip_skip, int) or not 0 <= clip_skip <= most:
        raise ValueError(f"clip_skip is a whole number from 0 to {most} with this base, not {clip_skip!r}.")
    bare = [encoder for encoder in found if hasattr(encoder, "final_layer_norm") and not hasattr(encoder, "text_model")]
    for encoder in bare:
        vars(encoder)["text_model"] = encoder  # not as a submodule, which would contain itself
    try:
        yield
    finally:
        for encoder in bare:
            del vars(encoder)["text_model"]
