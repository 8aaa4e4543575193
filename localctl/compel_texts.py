"""Texts with weights, and texts that are longer than the text encoder reads at once: encoded by compel."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from localctl.prompt_embeds import PromptEmbeds
from localctl.prompt_syntax import WeightedText

TEXTS = ("prompt", "prompt_2", "negative_prompt", "negative_prompt_2")  # that encode_prompt takes


def has_compel() -> bool:
    """Return whether compel is installed."""
    return importlib.util.find_spec("compel") is not None


def tokenizers_of(pipe: Any) -> list[Any]:
    """Return the tokenizers of a pipeline, one for each text encoder."""
    found = [getattr(pipe, name, None) for name in ("tokenizer", "tokenizer_2")]
    return [tokenizer for tokenizer in found if tokenizer is not None]


def fragments_of(pipe: Any, tokenizer: Any, text: WeightedText) -> list[str]:
    """Return the stretches of equal weight as the pipeline converts them, with learned words of several vectors."""
    convert = getattr(pipe, "maybe_convert_prompt", None)
    parts = [text.text[first:last] for first, last in text.spans]
    added = getattr(tokenizer, "added_tokens_encoder", {})
    if convert is None or not any(f"{token}_1" in added for token in added):
        return parts  # converting would warn of long texts
    return [convert(part, tokenizer) for part in parts]


def is_long(tokenizer: Any, fragments: Sequence[str]) -> bool:
    """Return whether a text, given in fragments, has more tokens than a text encoder reads at once."""
    ids = tokenizer(list(fragments), truncation=False, verbose=False).input_ids  # each with a start and an end
    return 2 + sum(len(tokens) - 2 for tokens in ids) > tokenizer.model_max_length


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


def encoded_length(tokenizer: Any, fragments: Sequence[str]) -> int:
    """Return the number K of tokens that a text is encoded to."""
    if not is_long(tokenizer, fragments):
        return tokenizer.model_max_length
    return len(_tokens(_provider(tokenizer, _Encoder.none()), fragments))


def encoded(pipe: Any, arguments: Mapping[str, Any], texts: Mapping[str, Sequence[WeightedText]]) -> dict[str, Any]:
    """Return the embeddings of these texts as arguments of ``encode_prompt``, in place of the texts."""
    count = len(texts["prompt"])
    replaced: dict[str, Any] = {name: None for name in TEXTS if name in arguments}
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
    names, device = ("", "_2")[: len(tokenizers_of(pipe))], arguments.get("device") or pipe._execution_device
    states: list[list[Tensor]] = [[] for _ in columns]
    pooled: list[Tensor | None] = [None] * len(columns)
    longest = max(
        encoded_length(tokenizer, fragments_of(pipe, tokenizer, text))
        for index, tokenizer in enumerate(tokenizers_of(pipe))
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
                parts = [fragments_of(pipe, tokenizer, text) for text in column[index]]
                pairs = zip(parts, column[index], strict=True)
                states[place].append(torch.cat([_states(provider, *pair, longest) for pair in pairs]))
                if name == "_2":
                    pooled[place] = _pooled(tokenizer, encoder, parts)
    return [PromptEmbeds(torch.cat(own, dim=-1), pool) for own, pool in zip(states, pooled, strict=True)]


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
