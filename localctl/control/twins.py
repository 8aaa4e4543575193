"""Other texts in joint attention: a further row of the batch for each, whose text goes through all blocks.

In a joint layer a text's hidden states come from all blocks before it, so an embedding alone cannot be attended to
there. A twin is a row with the same latents and another text. In each joint layer, what its image's cells attend to is
mixed into the row that it belongs to, and its own image then gets the result of that row. So both rows have the same
image all the way, and the twin's text sees what the row's own text sees.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from localctl.control.attention import padded
from localctl.control.joint import JointProcessor
from localctl.denoisers.base import Arguments, AttentionLayer, Denoiser


def with_twins(
    denoiser: Denoiser, arguments: Arguments, layers: Sequence[tuple[AttentionLayer, Any]], rows: int
) -> Arguments:
    """Return the arguments of a call of so many ``rows`` with a twin for each text that controls mix in, and tell the
    joint layers of them. The module's output has as many rows more."""
    processors = list(_processors(layers))
    mixtures = next((found for one in processors if (found := one.mixtures())), None)
    if mixtures is None:
        return arguments
    twins = torch.cat([mixture.rows for mixture in mixtures])
    texts, hidden = padded([mixture.texts for mixture in mixtures], [mixture.mask for mixture in mixtures])
    for processor in processors:
        processor.twins = twins
    chosen = [*range(rows), *twins.tolist()]
    return denoiser.join_texts(select_rows(arguments, chosen, rows, denoiser.not_per_row), texts, hidden)


def select_rows(arguments: Arguments, rows: list[int], count: int, but: Sequence[str]) -> Arguments:
    """Return the arguments of a call with copies of some of its ``count`` rows, except in those named ``but``."""
    args, kwargs = arguments
    chosen = {name: value if name in but else _select(value, rows, count) for name, value in kwargs.items()}
    return _select(args, rows, count), chosen


def _processors(layers: Sequence[tuple[AttentionLayer, Any]]) -> Iterator[JointProcessor]:
    return (attn.processor for _, attn in layers if isinstance(attn.processor, JointProcessor))


def without_twins(output: Any, rows: int) -> Any:
    """Return what the module returned, for its first ``rows`` only; unchanged if there are no more."""
    first = output if isinstance(output, Tensor) else output[0]
    if len(first) <= rows:
        return output
    if isinstance(output, Tensor):
        return first[:rows]
    return (first[:rows], *output[1:]) if isinstance(output, tuple) else type(output)(first[:rows])


def _select(value: Any, rows: list[int], count: int) -> Any:
    """Copy the ``rows`` of all tensors of ``count`` rows within ``value``."""
    if isinstance(value, Tensor):
        if not value.ndim or value.shape[0] != count:
            return value
        # Indices would be moved to the device for each tensor.
        adjacent = rows == list(range(rows[0], rows[-1] + 1))
        return value[rows[0] : rows[-1] + 1].clone() if adjacent else value[rows]
    if isinstance(value, (list, tuple)):
        return type(value)(_select(item, rows, count) for item in value)
    if isinstance(value, Mapping):
        return {name: _select(item, rows, count) for name, item in value.items()}
    return value
