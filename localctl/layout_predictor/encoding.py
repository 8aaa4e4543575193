"""Encode prompts as numbers: each word as a set of hashed pieces.

The pieces are the word itself and its character trigrams, each hashed into one of a fixed number of buckets. There is
no vocabulary: an unknown noun has pieces like any other word, and shares some with words of similar spelling.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from localctl.layout_predictor.chunker import split_words

PIECES = 12  # per word; further pieces of long words are left out
OUTSIDE = -1


@dataclass(frozen=True)
class Encoded:
    """B prompts of up to L words with up to N objects each.

    pieces: (B, L, P) int64 buckets, 0 = none. owner: (B, L) int64, index of the object whose phrase contains the word,
    or -1. words: (B, L) bool, whether there is a word. objects: (B, N) bool, whether there is an object.
    """

    pieces: Tensor
    owner: Tensor
    words: Tensor
    objects: Tensor

    def to(self, device: torch.device | str) -> Encoded:
        """Return the same prompts on ``device``."""
        return Encoded(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))

    def without(self, hidden: Tensor, nameless: Tensor) -> Encoded:
        """Remove the pieces of some words: ``hidden`` ones (B, L or more) bool outside objects, and the names of all
        objects of the ``nameless`` prompts (B,) bool."""
        outside = self.owner < 0
        removed = (hidden[:, : self.owner.shape[1]] & outside) | (nameless[:, None] & ~outside)
        return replace(self, pieces=self.pieces.masked_fill(removed[..., None], 0))


def pieces_of(word: str, buckets: int) -> list[int]:
    """Return up to 12 buckets in 1 ... ``buckets`` - 1: of the word, then of its trigrams; equal on all machines."""
    framed = f"<{word}>"
    grams = [framed[i : i + 3] for i in range(len(framed) - 2)] if len(word) > 1 else []
    return [1 + zlib.crc32(piece.encode()) % (buckets - 1) for piece in [framed, *grams]][:PIECES]


def encode(prompts: Sequence[str], spans: Sequence[Sequence[tuple[int, int]]], buckets: int, max_words: int) -> Encoded:
    """Encode prompts; ``spans``: the [first, last) characters of the objects of each.

    Raises:
        ValueError: more than ``max_words`` words.
    """
    rows = [split_words(prompt) for prompt in prompts]
    length = max(1, *(len(row) for row in rows))
    if length > max_words:
        raise ValueError(f"The prompt has {length} words, more than {max_words}; shorten it.")
    pieces = np.zeros((len(rows), length, PIECES), np.int64)
    owner = np.full((len(rows), length), OUTSIDE, np.int64)
    words = np.zeros((len(rows), length), bool)
    objects = np.zeros((len(rows), max(1, *(len(row) for row in spans))), bool)
    for i, (row, own) in enumerate(zip(rows, spans, strict=True)):
        words[i, : len(row)] = True
        objects[i, : len(own)] = True
        for j, word in enumerate(row):
            found = pieces_of(word.text, buckets)
            pieces[i, j, : len(found)] = found
            for k, (first, last) in enumerate(own):
                if word.start < last and first < word.end:
                    owner[i, j] = k
    return Encoded(*(torch.from_numpy(array) for array in (pieces, owner, words, objects)))
