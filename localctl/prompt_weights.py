"""Weights in prompts, and prompts that are longer than the text encoder reads at once: encoded by compel."""

from __future__ import annotations

import functools
import importlib.util
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from localctl.prompt_embeds import PromptEmbeds
from localctl.prompt_syntax import WeightedText, read_weights, refuse_foreign
from localctl.sizes import shown

Text = str | WeightedText
_NAMES = ("prompt", "prompt_2", "negative_prompt", "negative_prompt_2")  # of the texts that encode_prompt takes


def has_compel() -> bool:
    """Return whether compel is installed."""
    return importlib.util.find_spec("compel") is not None


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


def token_places(tokenizer: Any, fragments: Sequence[str]) -> list[int]:
    """Return the positions of the tokens of a text, given in fragments, in what compel returns for it.

    The text is split into parts as long as the text encoder reads at once, each with a start and an end token.
    """
    tokens = _tokens(_provider(tokenizer, _Encoder.none()), fragments)
    length, places = tokenizer.model_max_length, list[int]()
    for start in range(0, len(tokens), length):
        end = tokens.index(tokenizer.eos_token_id, start)
        places += range(start + 1, end)
    return places


def length_of_call(pipe: Any, call: Mapping[str, Any]) -> int:
    """Return K of the prompt embeddings in a running call of ``pipe`` with these arguments of ``encode_prompt``."""
    if call.get("prompt") is None:
        return call["prompt_embeds"].shape[1]
    texts = [check_prompt(text) for name in _NAMES for text in _as_list(call.get(name))]
    return max(
        _length(tokenizer, _fragments(pipe, tokenizer, text)) for tokenizer in _tokenizers(pipe) for text in texts
    )


def _changed(pipe: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of ``encode_prompt`` to replace; none if the pipeline itself encodes its texts right."""
    given = {name: _as_list(arguments.get(name)) for name in _NAMES}
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
            return _encoded(pipe, arguments, texts)
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


def _tokenizers(pipe: Any) -> list[Any]:
    found = [getattr(pipe, name, None) for name in ("tokenizer", "tokenizer_2")]
    return [tokenizer for tokenizer in found if tokenizer is not None]


def _is_long(pipe: Any, text: WeightedText) -> bool:
    """Return whether a text has more tokens than a text encoder reads at once."""
    for tokenizer in _tokenizers(pipe):
        if len(text.text.encode()) <= tokenizer.model_max_length - 2 and "<" not in text.text:
            continue  # a token has at least one byte; learned words may be of several vectors
        fragments = _fragments(pipe, tokenizer, text)
        if 2 + sum(map(len, _ids(tokenizer, fragments))) > tokenizer.model_max_length:
            return True
    return False


def _fragments(pipe: Any, tokenizer: Any, text: WeightedText) -> list[str]:
    """Return the stretches of equal weight as the pipeline converts them, with learned words of several vectors."""
    convert = getattr(pipe, "maybe_convert_prompt", None)
    parts = [text.text[first:last] for first, last in text.spans]
    added = getattr(tokenizer, "added_tokens_encoder", {})
    if convert is None or not any(f"{token}_1" in added for token in added):
        return parts  # converting would warn of long texts
    return [convert(part, tokenizer) for part in parts]


def _ids(tokenizer: Any, fragments: Sequence[str]) -> list[list[int]]:
    """Return the tokens of each fragment, without start and end."""
    return [ids[1:-1] for ids in tokenizer(list(fragments), truncation=False, verbose=False).input_ids]


# Encoding by compel


@dataclass(frozen=True)
class _Encoder:
    """A text encoder as compel calls it; its last hidden state is the one that the pipeline reads."""

    module: Any
    device: Any
    dtype: torch.dtype
    xl: bool = False
    clip_skip: int | None = None

    @classmethod
    def none(cls) -> _Encoder:
        """Return an encoder for what needs no encoding."""
        return cls(None, "cpu", torch.float32)

    def __call__(self, tokens: Tensor, mask: Tensor | None = None, **_: Any) -> Any:
        if mask is not None and bool(mask.all()):
            mask = None  # as the pipeline calls it, which may round otherwise
        found = self.module(tokens, attention_mask=mask, output_hidden_states=True)
        if self.xl:
            return SimpleNamespace(last_hidden_state=found.hidden_states[-2 - (self.clip_skip or 0)], pooled=found[0])
        if self.clip_skip is None:
            return SimpleNamespace(last_hidden_state=found[0])
        states = found.hidden_states[-1 - self.clip_skip]
        norm = getattr(self.module, "text_model", self.module).final_layer_norm
        return SimpleNamespace(last_hidden_state=norm(states))


class _Quiet:
    """A tokenizer that does not warn of long texts."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __call__(self, texts: Sequence[str], **options: Any) -> Any:
        return self._tokenizer(texts, verbose=False, **options)


def _provider(tokenizer: Any, encoder: _Encoder, padding: int = 1) -> Any:
    from compel.embeddings_provider import EmbeddingsProvider, SplitLongTextMode

    return EmbeddingsProvider(
        _Quiet(tokenizer),
        encoder,
        truncate=False,
        padding_attention_mask_value=padding,
        split_long_text_mode=SplitLongTextMode.SENTENCES,
        device=encoder.device,
    )


def _tokens(provider: Any, fragments: Sequence[str]) -> list[int]:
    tokens, _, _ = provider.get_token_ids_and_expand_weights(list(fragments), [1.0] * len(fragments), "cpu")
    return tokens.tolist()


def _length(tokenizer: Any, fragments: Sequence[str]) -> int:
    """Return the number K of tokens that a text is encoded to."""
    if 2 + sum(map(len, _ids(tokenizer, fragments))) <= tokenizer.model_max_length or not has_compel():
        return tokenizer.model_max_length
    return len(_tokens(_provider(tokenizer, _Encoder.none()), fragments))


def _encoded(pipe: Any, arguments: Mapping[str, Any], texts: Mapping[str, Sequence[WeightedText]]) -> dict[str, Any]:
    """Return the embeddings of these texts as arguments of ``encode_prompt``, in place of the texts."""
    count = len(texts["prompt"])
    replaced: dict[str, Any] = {name: None for name in _NAMES if name in arguments}
    columns = [_filled(texts["prompt"], texts["prompt_2"], count)]
    zeros = arguments.get("negative_prompt") is None and getattr(pipe.config, "force_zeros_for_empty_prompt", False)
    own = arguments.get("negative_prompt_embeds")
    if arguments["do_classifier_free_guidance"] and own is None:
        negative = texts["negative_prompt"] or [WeightedText.plain("")]
        columns.append(_filled(negative, texts["negative_prompt_2"], count))
    embeds = _encode(pipe, arguments, columns)
    length = embeds[0].states.shape[1]
    if own is not None and own.shape[1] != length:
        raise ValueError(
            f"The negative_prompt_embeds have {own.shape[1]} tokens and the prompt has {length}; give a "
            "negative_prompt as text."
        )
    for name, found in zip(("", "negative_"), embeds, strict=False):
        blank = name and zeros
        replaced[f"{name}prompt_embeds"] = torch.zeros_like(found.states) if blank else found.states
        if found.pooled is not None:
            pooled = torch.zeros_like(found.pooled) if blank else found.pooled
            replaced[f"{name}pooled_prompt_embeds"] = pooled
    return replaced


def _filled(
    first: Sequence[WeightedText], second: Sequence[WeightedText], count: int
) -> tuple[list[WeightedText], list[WeightedText]]:
    """Return ``count`` texts for the first and for the second text encoder."""
    several = [list(texts) * count if len(texts) == 1 else list(texts) for texts in (first, second or first)]
    if any(len(texts) != count for texts in several):
        raise ValueError(f"There are {max(map(len, several))} negative prompts for {count} prompts; give one for each.")
    return several[0], several[1]


def _encode(
    pipe: Any, arguments: Mapping[str, Any], columns: Sequence[tuple[list[WeightedText], list[WeightedText]]]
) -> list[PromptEmbeds]:
    """Encode each column, texts for both text encoders, to prompt embeddings of one length."""
    names, device = ("", "_2")[: len(_tokenizers(pipe))], arguments.get("device") or pipe._execution_device
    states: list[list[Tensor]] = [[] for _ in columns]
    pooled: list[Tensor | None] = [None] * len(columns)
    longest = max(
        _length(tokenizer, _fragments(pipe, tokenizer, text))
        for index, tokenizer in enumerate(_tokenizers(pipe))
        for column in columns
        for text in column[index]
    )
    for index, name in enumerate(names):
        tokenizer, module = getattr(pipe, f"tokenizer{name}"), getattr(pipe, f"text_encoder{name}")
        padding = 0 if len(names) == 1 and getattr(module.config, "use_attention_mask", False) else 1
        with torch.no_grad(), _scaled(pipe, module, arguments.get("lora_scale")):
            for place, column in enumerate(columns):
                skip = None if place else arguments.get("clip_skip")  # not for the negative prompt, in the pipelines
                encoder = _Encoder(module, device, module.dtype, len(names) == 2, skip)
                provider = _provider(tokenizer, encoder, padding)
                found = [_states(provider, _fragments(pipe, tokenizer, text), text, longest) for text in column[index]]
                states[place].append(torch.cat(found))
                if name == "_2":
                    pooled[place] = _pooled(tokenizer, encoder, [_fragments(pipe, tokenizer, t) for t in column[index]])
    return [PromptEmbeds(torch.cat(parts, dim=-1), pool) for parts, pool in zip(states, pooled, strict=True)]


def _states(provider: Any, fragments: Sequence[str], text: WeightedText, length: int) -> Tensor:
    """Encode one text to (1, length, C); the rest is filled up with encodings of the empty text."""
    weights = [text.weights[first] if last > first else 1.0 for first, last in text.spans]
    # A stretch of blanks has no token, which compel does not expect.
    some = [pair for pair in zip(fragments, weights, strict=True) if pair[0].strip()] or [("", 1.0)]
    words, weights = [list(column) for column in zip(*some, strict=True)]
    states = provider.get_embeddings_for_weighted_prompt_fragments([words], [weights], device=provider.device)
    while states.shape[1] < length:
        states = torch.cat([states, provider.empty_z.to(states)], dim=1)
    return states


def _pooled(tokenizer: Any, encoder: _Encoder, texts: Sequence[Sequence[str]]) -> Tensor:
    """Return the pooled embeddings (n, P) of texts, given in fragments: of the tokens that are read at once, without
    weights."""
    length = tokenizer.model_max_length
    tokens = tokenizer(
        [" ".join(parts) for parts in texts],
        padding="max_length", max_length=length, truncation=True, return_tensors="pt",
    )  # fmt: skip
    return encoder(tokens.input_ids.to(encoder.device)).pooled


@contextmanager
def _scaled(pipe: Any, module: Any, scale: float | None) -> Iterator[None]:
    """Scale the LoRA layers of a text encoder for a while, as the pipeline does."""
    if scale is None:
        yield
        return
    from diffusers.utils import scale_lora_layers, unscale_lora_layers

    pipe._lora_scale = scale
    scale_lora_layers(module, scale)
    try:
        yield
    finally:
        unscale_lora_layers(module, scale)
