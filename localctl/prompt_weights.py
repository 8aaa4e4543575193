"""Pipelines that read weights in prompts, and prompts that are longer than the text encoder reads at once."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from localctl.compel_texts import TEXTS, encoded, encoded_length, fragments_of, has_compel, is_long, tokenizers_of
from localctl.prompt_syntax import WeightedText, read_weights, refuse_foreign
from localctl.sizes import shown

Text = str | WeightedText


def check_prompt(prompt: Text) -> WeightedText:
    """Read the weights of a prompt; one that is read already is returned as it is.

    ValueError for syntax of other tools, weights out of range, or weights without compel.
    """
    if isinstance(prompt, WeightedText):
        return prompt
    text = read_weights(prompt)
    refuse_foreign(prompt, text)
    if text.is_weighted and not has_compel():
        raise ValueError(
            f"The prompt {shown(prompt)} has weights, which compel encodes; pip install 'localctl[compel]', or read "
            "them as text with prompt_weighting=false."
        )
    return text


def refuse_weights(denoiser: str, texts: Iterable[str | None], wanted: bool | None = None) -> None:
    """Raise a ValueError for weights in texts of a base that cannot encode them, or if they are ``wanted`` there.

    ``denoiser``: what the base has, for the sentence.
    """
    weighted = next((text for text in texts if text and read_weights(text).is_weighted), None)
    if weighted is not None or wanted:
        subject = "prompt_weighting=True" if weighted is None else f"The prompt {shown(weighted)} has weights, which"
        raise ValueError(
            f"{subject} acts on Stable Diffusion 1.x, 2.x and XL only, not on a {denoiser}; give "
            "prompt_weighting=False to read marks as text."
        )


def reads_weights(pipe: Any) -> bool:
    """Return whether ``pipe`` reads the weights in its prompts at the moment (:func:`weighted_prompts`)."""
    return bool(_state(pipe))


def _state(pipe: Any) -> bool | None:
    """Return whether ``pipe`` reads weights; None outside of :func:`weighted_prompts`."""
    return getattr(getattr(pipe, "encode_prompt", None), "reads_weights", None)


@contextmanager
def weighted_prompts(pipe: Any, wanted: bool | None = None) -> Iterator[None]:
    """Context in which ``pipe`` reads the weights in its prompts, and prompts of any length.

    Texts without weights that fit into the text encoder are encoded as ever, bit for bit. Weights are those of
    :func:`localctl.prompt_syntax.read_weights`.

    Args:
        pipe: any Stable Diffusion 1.x, 2.x or XL pipeline with ``encode_prompt``.
        wanted: False: read marks as text, and cut long prompts; None: as in an outer such context, else True.

    Raises:
        ValueError: unlike an outer such context; when ``pipe`` is called, as for :func:`check_prompt`.
    """
    state = _state(pipe)
    if state is not None:
        if wanted not in (None, state):
            raise ValueError(
                f"The pipeline {'reads' if state else 'does not read'} the weights in its prompts already; give "
                "prompt_weighting to the outer attach."
            )
        yield
        return
    own = vars(pipe).get("encode_prompt")
    pipe.encode_prompt = weighting(pipe, pipe.encode_prompt, wanted is not False)
    try:
        yield
    finally:
        if own is None:
            del pipe.encode_prompt
        else:
            pipe.encode_prompt = own


def weighting(pipe: Any, encode: Callable[..., Any], wanted: bool = True) -> Callable[..., Any]:
    """Return ``encode``, an ``encode_prompt`` of ``pipe``, such that it reads weights and prompts of any length; with
    ``wanted`` False, such that it is known not to."""
    signature = inspect.signature(encode)

    @functools.wraps(encode)
    def encode_weighted(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        bound.arguments.update(_changed(pipe, bound.arguments) if wanted else {})
        return encode(*bound.args, **bound.kwargs)

    encode_weighted.reads_weights = wanted  # type: ignore[attr-defined]
    return encode_weighted


def length_of_call(pipe: Any, call: Mapping[str, Any]) -> int:
    """Return K of the prompt embeddings in a running call of ``pipe`` with these arguments of ``encode_prompt``."""
    if call.get("prompt") is None:
        return call["prompt_embeds"].shape[1]
    texts = [check_prompt(text) for name in TEXTS for text in _as_list(call.get(name))]
    tokenizers = tokenizers_of(pipe)
    if not has_compel():
        return max(tokenizer.model_max_length for tokenizer in tokenizers)
    return max(encoded_length(one, fragments_of(pipe, one, text)) for one in tokenizers for text in texts)


def _changed(pipe: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of ``encode_prompt`` to replace; none if the pipeline itself encodes its texts right."""
    given = {name: _as_list(arguments.get(name)) for name in TEXTS}
    texts = {name: [check_prompt(text) for text in several] for name, several in given.items()}
    read = [text for several in texts.values() for text in several]
    if arguments.get("prompt") is None:
        if any(text.is_weighted for text in read):
            raise ValueError(
                "Weights in a negative prompt need a prompt that is text, too; with prompt_embeds, give "
                "negative_prompt_embeds."
            )
    elif any(text.is_weighted for text in read) or any(_is_long(pipe, text) for text in read):
        if has_compel():
            return encoded(pipe, arguments, texts)
        long = next(text for text in read if _is_long(pipe, text))
        warnings.warn(
            f"The end of the prompt {shown(long.text)} is cut off, as the text encoder reads "
            f"{pipe.tokenizer.model_max_length} tokens at once; pip install 'localctl[compel]' to use all of it.",
            stacklevel=4,
        )
    plain = {name: [text.text for text in several] for name, several in texts.items() if several}
    return {name: own[0] if isinstance(arguments[name], Text) else own for name, own in plain.items()}


def _as_list(value: Text | Sequence[Text] | None) -> list[Text]:
    if value is None:
        return []
    return [value] if isinstance(value, Text) else list(value)


def _is_long(pipe: Any, text: WeightedText) -> bool:
    """Return whether a text has more tokens than a text encoder reads at once."""
    for tokenizer in tokenizers_of(pipe):
        if len(text.text.encode()) <= tokenizer.model_max_length - 2 and "<" not in text.text:
            continue  # a token has at least one byte; learned words may be of several vectors
        if is_long(tokenizer, fragments_of(pipe, tokenizer, text)):
            return True
    return False
