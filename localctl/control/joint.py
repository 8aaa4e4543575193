"""Joint attention under controls: one layer whose queries and keys are the image's cells and the text's tokens.

Controls see two halves of it, image to text and image to image, each as any other attention layer. Their biases meet in
one bias, so attention from image to image is never cut but by a control of that half.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from localctl.control.attention import Scores, attend
from localctl.control.base import Mixture
from localctl.control.processor import SteeredProcessor, User, has_hook
from localctl.denoisers.base import AttentionLayer
from localctl.denoisers.joint import Joint, StockAttention

_MOST = 256 * 2**20  # bytes of float32 scores that controls read at once


class JointScores(Scores):
    """The scores of one half of a joint layer; ``probabilities`` are those among all keys of both halves."""

    def __init__(
        self, query: Tensor, key: Tensor, guided: slice, places: tuple[slice, slice], image: bool, mask: Tensor | None
    ) -> None:
        """``query``, ``key``: (R, H, S, d). ``places``: of image and text. ``mask``: (R, 1, 1, S) or None."""
        self.guided, self.heads = guided, None
        self._all, self.places, self.total = (query, key), places, query.shape[2]
        self._own = places[0] if image else places[1]
        self._whole_mask = mask
        self.mask = None if mask is None else mask[:, 0, :, self._own]  # (R,1,K)
        self.image_bias: Tensor | None = None  # of the part of the queries that is read

    @property
    def keys(self) -> int:
        return self._own.stop - self._own.start

    @property
    def batch(self) -> int:
        return self._all[0].shape[0]

    @property
    def number(self) -> int:
        return self._all[0].shape[1]

    @property
    def scale(self) -> float:
        return self._all[0].shape[-1] ** -0.5

    def _query(self, rows: slice) -> Tensor:
        return self._all[0][rows, :, self.places[0]]

    def _key(self, rows: slice) -> Tensor:
        return self._all[1][rows, :, self._own]

    def probabilities(self, queries: slice, bias: Tensor | None) -> Tensor:
        query, key = self.query[:, :, queries].float(), self._all[1][self.guided].float()
        scores = query @ (key * self.scale).mT  # (n,H,q,S)
        if self._whole_mask is not None:
            scores = scores + self._whole_mask[self.guided].float()
        image, text = self.places
        own, other = (bias, self.image_bias) if self._own is text else (self.image_bias, bias)
        scores = _with(scores, text, own)
        return _with(scores, image, other).softmax(dim=-1)[..., self._own]


def _with(scores: Tensor, place: slice, bias: Tensor | None) -> Tensor:
    """Return ``scores`` (..., S) plus a bias at ``place``, in a new tensor for gradients' sake."""
    if bias is None:
        return scores
    before, after = scores[..., : place.start], scores[..., place.stop :]
    return torch.cat([before, scores[..., place] + bias, after], dim=-1)


class JointProcessor(SteeredProcessor):
    """Wraps the processor of a joint layer during calls of the denoiser; its family computes the projections."""

    def __init__(self, inner: Any, attn: Any, layer: AttentionLayer) -> None:
        super().__init__(inner, attn, layer)
        self.is_compilable = False
        self.image_users: list[User] = []
        self.text_layer, self.image_layer = replace(layer, cross=True), replace(layer, cross=False)

    def users_at(self, layer: AttentionLayer) -> list[User]:
        return self.users if layer.cross else self.image_users

    def __call__(self, attn: Any, *args: Any, **kwargs: Any) -> Any:
        if not self.users and not self.image_users:
            return self.inner(attn, *args, **kwargs)
        return self.joint.run(self.inner, self.attend, attn, *args, **kwargs)

    @property
    def joint(self) -> Joint:
        joint = self.text_layer.joint
        assert joint is not None
        return joint

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, stock: StockAttention) -> Tensor:
        """Return what attention gives under the controls, (R, H, S, d).

        Args:
            query, key, value: (R, H, S, d), as attended. mask: a bias (R, 1, 1, S) of the denoiser's own, or None.
            stock: the processor's own attention, called for the rows and layers that no control changes.
        """
        if self.twins is None:
            return self._steer(query, key, value, mask, stock)
        first = len(query) - len(self.twins)
        rows, others = slice(0, first), slice(first, None)
        masks = (None, None) if mask is None else (mask[rows], mask[others])
        core = self._steer(query[rows], key[rows], value[rows], masks[0], stock).clone()
        local = stock(query[others], key[others], value[others], masks[1]).clone()
        cells, _ = self._places(query.shape[2])
        core[:, :, cells] = self._with_twins(core[:, :, cells], local[:, :, cells])
        local[:, :, cells] = core[self.twins.to(core.device)][:, :, cells]
        return torch.cat([core, local])

    def mixtures(self) -> list[Mixture]:
        """Return the texts that the controls mix in, in their order."""
        found = (user.mixture(context, self.text_layer) for user, context in self.users if self.place[1].cross)
        return [mixture for mixture in found if mixture is not None]

    def _with_twins(self, image: Tensor, local: Tensor) -> Tensor:
        """Return what the image's cells get, (R, H, Q, d), with that of the twins (P, H, Q, d) mixed in."""
        first = 0
        for mixture in self.mixtures():
            own = local[first : first + len(mixture.rows)]
            change = mixture.share[:, None].to(image.dtype) * (own - image[mixture.bases])
            image = image.index_add(0, mixture.rows, change)
            first += len(mixture.rows)
        return image

    def _steer(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, stock: StockAttention) -> Tensor:
        places = self._places(query.shape[2])
        guided = (self.users or self.image_users)[0][1].guided_rows
        halves = [JointScores(query, key, guided, places, image, mask) for image in (False, True)]
        own = None if mask is None else mask[guided]
        rows = query[guided], key[guided], value[guided]
        image = self._image(*rows, own, *halves)
        bias = self._token_bias(halves[0].keys)
        if image is None and bias is None:
            return stock(query, key, value, mask)
        cells, tokens = places
        core = torch.empty_like(rows[0])
        core[:, :, cells] = attend(rows[0][:, :, cells], *rows[1:], own) if image is None else image
        joined = _joined([(bias, tokens)], query.shape[2], own)
        core[:, :, tokens] = attend(rows[0][:, :, tokens], *rows[1:], joined)
        filled = slice(cells.stop, tokens.start)  # entries that fill the image's part up
        core[:, :, filled] = attend(rows[0][:, :, filled], *rows[1:], own)
        before, after = slice(0, guided.start), slice(guided.stop, len(query))
        unsteered = [
            stock(query[others], key[others], value[others], None if mask is None else mask[others])
            if others.start < others.stop
            else query[others]
            for others in (before, after)
        ]
        return torch.cat([unsteered[0], core, unsteered[1]]) if len(core) < len(query) else core

    def _places(self, total: int) -> tuple[slice, slice]:
        """Return the places of image and text in a sequence of ``total`` entries."""
        layer = self.text_layer
        if total < layer.cells:
            raise ValueError(
                f"The attention layer {layer.name} received {total} tokens, fewer than the {layer.cells} of the image, "
                "so controls cannot locate regions; remove what merges or splits tokens."
            )
        return self.joint.places(layer.cells, total)

    def _image(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        text: JointScores,
        image: JointScores,
    ) -> Tensor | None:
        """Return what the image's cells get in the rows with the prompt, (n, H, Q, d); None if no bias changes it."""
        cells, tokens = text.places
        cores = []
        for part in self._parts_of(text, image):
            image_bias = _sum(self.image_users, self.image_layer, image, part)
            text_bias = _sum(self.users, self.text_layer, text, part)
            text.image_bias = image_bias
            for user, context in self.users:
                user.read_attention(context, self.text_layer, text, part, text_bias)
            bias = _joined([(text_bias, tokens), (image_bias, cells)], query.shape[2], mask)
            if text_bias is not None or image_bias is not None:
                cores.append(attend(query[:, :, cells][:, :, part], key, value, bias))
        return torch.cat(cores, dim=2) if cores else None

    def _parts_of(self, text: JointScores, image: JointScores) -> Sequence[slice]:
        """Return parts of the queries, as small as controls ask for, and as keeps what is read within bounds."""
        cells = self.text_layer.cells
        wanted = [user.max_queries(self.text_layer, text) for user, _ in self.users]
        wanted += [user.max_queries(self.image_layer, image) for user, _ in self.image_users]
        if any(has_hook(user, "read_attention") for user, _ in self.users):
            wanted.append(max(1, _MOST // (4 * max(1, text.rows) * text.number * text.total)))
        chunk = min(cells, *wanted)
        return [slice(first, min(first + chunk, cells)) for first in range(0, cells, chunk)]

    def _token_bias(self, keys: int) -> Tensor | None:
        total: Tensor | None = None
        for user, context in self.users:
            bias = user.token_bias(context, self.text_layer, keys)
            if bias is not None:
                total = bias if total is None else total + bias
        return total


def _sum(users: Sequence[User], layer: AttentionLayer, scores: JointScores, queries: slice) -> Tensor | None:
    """Return the sum of the controls' biases (n, 1 or H, q, K) on one half of the layer, or None."""
    total: Tensor | None = None
    for user, context in users:
        bias = user.attention_bias(context, layer, scores, queries)
        if bias is not None:
            total = bias if total is None else total + bias
    return total


def _joined(parts: Sequence[tuple[Tensor | None, slice]], total: int, mask: Tensor | None) -> Tensor | None:
    """Return biases (n, 1 or H, q, K), each at its place among all keys, as one with ``mask`` (n, 1, 1, total)."""
    given = [(bias, place) for bias, place in parts if bias is not None]
    if not given:
        return mask
    first = given[0][0]
    most = max(bias.shape[1] for bias, _ in given)
    joined = first.new_zeros(first.shape[0], most, first.shape[2], total)
    for bias, place in given:
        joined[..., place] += bias
    return joined if mask is None else joined + mask
