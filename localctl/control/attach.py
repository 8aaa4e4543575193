"""``attach``: put controls on a stock diffusers pipeline for a while, without copying or subclassing it."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from diffusers import DiffusionPipeline

from localctl.control.attachment import Attachment as Attachment
from localctl.control.base import Control
from localctl.control.compiled import MORE_GRAPHS
from localctl.control.methods import skipping_layers, uncompiled, wrapped
from localctl.denoisers import SUPPORTED, denoiser_of
from localctl.denoisers.base import Denoiser
from localctl.layout import Layout, as_layouts, texts_of
from localctl.prompt_weights import refuse_weights, weighted_prompts

Layouts = Layout | str | Sequence[Layout | str]


@contextmanager
def attach(
    pipe: DiffusionPipeline,
    layout: Layouts,
    controls: Control | Sequence[Control],
    *,
    prompt_weighting: bool | None = None,
) -> Iterator[Attachment]:
    """Steer the calls of ``pipe`` with ``controls``; the pipeline is restored at the end, also after an exception.

    Only calls of ``pipe`` itself are steered: another pipeline, or a loop of your own, that uses the same denoiser runs
    as if nothing were attached. Nested ``attach`` on one pipeline adds up.

    Args:
        pipe: a pipeline of Stable Diffusion 1.x, 2.x or XL (anything with ``unet``, ``scheduler`` and
            ``encode_prompt``), or of a transformer that :mod:`localctl.denoisers` knows.
        layout: a layout, a prompt, or a list of either. ``pipe`` must then be called with exactly the prompts of the
            layouts, in their order (or, for one layout, its prompt any number of times). Prompt embeddings passed in
            place of prompts are not checked.
        controls: one control or several; their contributions to the denoiser are summed.
        prompt_weighting: whether weights such as ``(word:1.3)`` act and prompts of any length are used
            (:func:`localctl.prompt_weights.weighted_prompts`). False: marks are text, long prompts are cut. None: as
            for an outer ``attach``, else True; transformers know no weights.

    Raises:
        ValueError: at once, if the controls do not fit the layouts, an object is not a control, another thread has
            attached to the denoiser, the scheduler would lose a control's shift of the latents, or something in the
            denoiser would keep a control from acting (a cache, weights without gradients). When ``pipe`` is called, if
            prompt or size differ from the layout's, a condition does not fit the image or the denoiser, or the call
            comes from another thread.
    """
    denoiser = denoiser_of(pipe)
    missing = [name for name in ("scheduler", "encode_prompt") if getattr(pipe, name, None) is None]
    if missing:
        raise ValueError(f"{type(pipe).__name__} has no {missing[0]}; attach to a pipeline of {SUPPORTED}.")
    controls = list(controls) if isinstance(controls, Iterable) else [controls]
    for control in controls:
        if not isinstance(control, Control):
            way_out = getattr(control, "not_attached", "give objects such as LocalAdapterControl(...)")
            raise ValueError(f"{control!r} is not a control; {way_out}.")
    with (
        _refusing(pipe, denoiser, prompt_weighting),
        weighted_prompts(pipe, _weighting(pipe, denoiser, prompt_weighting, as_layouts(layout))),
        _attached(Attachment(pipe, as_layouts(layout), controls)) as attachment,
    ):
        yield attachment


def _weighting(
    pipe: DiffusionPipeline, denoiser: Denoiser, wanted: bool | None, layouts: Sequence[Layout]
) -> bool | None:
    """Return whether weights in prompts are to be read, None for as an outer ``attach`` does.

    ValueError for weights that the base cannot encode.
    """
    if denoiser.weighs_prompts or hasattr(pipe.encode_prompt, "reads_weights"):
        return wanted
    if wanted is not False:
        refuse_weights(denoiser.name, texts_of(layouts), wanted)
    return False


def _refusing(pipe: DiffusionPipeline, denoiser: Denoiser, wanted: bool | None) -> AbstractContextManager[None]:
    """Context in which weights in the texts of a call, a negative prompt among them, are refused where they would be
    read as text."""
    if denoiser.weighs_prompts or wanted is False or hasattr(pipe.encode_prompt, "reads_weights"):
        return nullcontext()

    def check(arguments: Mapping[str, Any]) -> None:
        given = [value for name, value in arguments.items() if "prompt" in name and isinstance(value, (str, list))]
        texts = [text for value in given for text in ([value] if isinstance(value, str) else value)]
        refuse_weights(denoiser.name, (text for text in texts if isinstance(text, str)))

    return wrapped(pipe, "encode_prompt", before=check)


@contextmanager
def _attached(attachment: Attachment) -> Iterator[Attachment]:
    """Let the calls of the attachment's pipeline be steered."""
    pipe, module = attachment.pipe, attachment.denoiser.module
    hooks = [
        module.register_forward_pre_hook(attachment.before_denoiser, with_kwargs=True),
        module.register_forward_hook(attachment.after_denoiser, always_call=True),
    ]
    try:
        # After registering the hook, so that of two threads attaching at the same moment at least one sees the other.
        _check_thread(attachment.denoiser)
        with (
            wrapped(
                pipe,
                "encode_prompt",
                before=attachment.begin_call,
                within=lambda arguments: skipping_layers(pipe, arguments.get("clip_skip")),
            ),
            wrapped(pipe, "progress_bar", before=attachment.begin_steps),  # called right before the first step
            # Every pipeline calls this last, on success; after an error the next call starts afresh.
            wrapped(pipe, "maybe_free_model_hooks", before=attachment.end_call),
            attachment.denoiser.watched(),
            uncompiled(module),
            MORE_GRAPHS.used(),
        ):
            yield attachment
    finally:
        attachment.restore()
        for hook in hooks:
            hook.remove()


def _check_thread(denoiser: Denoiser) -> None:
    """Raise a ValueError if another thread has attached to this denoiser."""
    owners = [getattr(hook, "__self__", None) for hook in denoiser.module._forward_pre_hooks.values()]
    if any(isinstance(owner, Attachment) and owner.thread != threading.get_ident() for owner in owners):
        raise ValueError(
            f"Another thread has attached controls to this {denoiser.name}; wait until it has finished, or load a "
            "pipeline per thread."
        )
