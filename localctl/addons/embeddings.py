"""Learned words (textual inversion): a word of the prompt stands for vectors that were trained on a few images."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from localctl.addons.files import SavedWeights, find_weights
from localctl.architectures import BaseShape
from localctl.files import first_line

KIND = "learned word"
_ENCODERS = {"clip_l": "text_encoder", "clip_g": "text_encoder_2"}  # of SDXL, by the names in its files
_UNNAMED = "emb_params"  # in files of the webui, whose word is the file's name
_NAMED = re.compile(r"([^/\\=]*)=(.*)", re.DOTALL)  # a folder may have = in its name


@dataclass(frozen=True)
class SavedEmbedding:
    """A learned word that was found."""

    word: str
    weights: SavedWeights

    @property
    def place(self) -> str:
        """WORD=FILE, from which it is found again."""
        return f"{self.word}={self.weights.path}"

    def tensors(self) -> dict[str, str]:
        """Return the name in the file of the vectors for each text encoder."""
        if set(self.weights.shapes) == set(_ENCODERS):
            return {encoder: name for name, encoder in _ENCODERS.items()}
        return {"text_encoder": next(iter(self.weights.shapes))}

    def check(self, shape: BaseShape, texts: Iterable[str]) -> None:
        """Raise a ValueError if it does not fit the base's text encoders, or none of the ``texts`` has the word."""
        parts = {name for name in shape.parts if name.startswith("text_encoder")}
        tensors = self.tensors()
        if parts != set(tensors):
            raise ValueError(
                f"The learned word {self.word!r} is for {len(tensors)} text encoder{'s'[: len(tensors) - 1]} but the "
                f"base has {len(parts)}; choose one that was made for this kind of base."
            )
        for part, name in tensors.items():
            width, own = self.weights.shapes[name][-1], shape.parts[part].get("hidden_size")
            if width != own:
                raise ValueError(
                    f"The learned word {self.word!r} has vectors of width {width} but the base's text has {own}; "
                    "choose one that was made for this kind of base."
                )
        if not any(self.word in text for text in texts):
            raise ValueError(f"The learned word {self.word!r} is in none of the prompts; write it where it is meant.")


def find_embedding(place: str | Path, local_files_only: bool = False) -> SavedEmbedding:
    """Find a learned word, in the format of diffusers or the webui, for one text encoder or SDXL's two.

    Args:
        place: FILE.safetensors, a folder with one, OWNER/NAME/FILE on the hub, or WORD=PLACE; without a word, it is
            the one in the file, else the file's name.
        local_files_only: do not use the network.

    Raises:
        ValueError: there is no such file, it is something else, or the word has spaces.
    """
    named = _NAMED.fullmatch(str(place))
    word, rest = named.groups() if named else ("", str(place))
    weights = find_weights(rest, KIND, local_files_only)
    names = set(weights.shapes)
    vectors = all(len(shape) in (1, 2) for shape in weights.shapes.values())
    if not vectors or not (len(names) == 1 or names == set(_ENCODERS)):
        raise ValueError(
            f"{rest} is not a learned word (it holds {len(names)} tensors); give one vector or several under one name, "
            "or clip_l and clip_g for SDXL."
        )
    only = next(iter(names)) if len(names) == 1 else _UNNAMED
    word = word if named else weights.path.stem if only == _UNNAMED else only
    if not word or re.search(r"\s", word):
        raise ValueError(f"A learned word has no spaces, unlike {word!r}; name it: WORD=FILE.")
    return SavedEmbedding(word, weights)


@contextmanager
def with_embeddings(pipe: Any, embeddings: Sequence[SavedEmbedding | str | Path]) -> Iterator[None]:
    """Teach the tokenizers and text encoders of ``pipe`` learned words for a while; the word may be a region's phrase.

    ValueError for a word that the tokenizer has already, vectors of another width, or as for :func:`find_embedding`.
    """
    found = [item if isinstance(item, SavedEmbedding) else find_embedding(item) for item in embeddings]
    parts = [name for name in _ENCODERS.values() if found and getattr(pipe, name, None) is not None]
    before = {}
    for name in parts:
        encoder, tokenizer = getattr(pipe, name), name.replace("text_encoder", "tokenizer")
        known = getattr(pipe, tokenizer)
        before[name] = (encoder.get_input_embeddings(), encoder.config.vocab_size, known)
        setattr(pipe, tokenizer, copy.deepcopy(known))
    try:
        for item in found:
            _load(pipe, item)
        yield
    finally:
        for name, (vectors, size, tokenizer) in before.items():
            encoder = getattr(pipe, name)
            encoder.set_input_embeddings(vectors)
            encoder.config.vocab_size = size
            setattr(pipe, name.replace("text_encoder", "tokenizer"), tokenizer)


def _load(pipe: Any, item: SavedEmbedding) -> None:
    state = load_file(item.weights.path)
    for part, name in item.tensors().items():
        try:
            pipe.load_textual_inversion(
                state[name],
                token=item.word,
                tokenizer=getattr(pipe, part.replace("text_encoder", "tokenizer")),
                text_encoder=getattr(pipe, part),
            )
            getattr(pipe, part).requires_grad_(False)
        except (ValueError, AttributeError) as error:
            raise ValueError(
                f"The learned word {item.word!r} cannot be loaded ({first_line(error)}); name it WORD=FILE, or choose "
                "one that was made for this kind of base."
            ) from error
