"""Tensors as bytes of a row, and back, without loss."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from localctl.prompt_embeds import PromptEmbeds

_BYTE = "byte"  # values k / 255, stored as k


def pack(tensors: Mapping[str, Tensor | None], squeeze: bool = False) -> tuple[dict[str, Any], bytes]:
    """Return a description as JSON and the bytes of ``tensors``, None where there is none.

    squeeze: compress, and store values that are whole parts of 255 in a byte each, as of most conditions and masks.
    """
    about: dict[str, Any] = {}
    parts = []
    for name, tensor in tensors.items():
        if tensor is None:
            about[name] = None
            continue
        values, kind = tensor.detach().cpu().contiguous(), str(tensor.dtype).removeprefix("torch.")
        if squeeze and torch.equal((whole := (values * 255).round().to(torch.uint8)) / 255, values):
            values, kind = whole, _BYTE
        content = values.view(torch.uint8).numpy().tobytes() if values.numel() else b""
        parts.append(zlib.compress(content, 1) if squeeze else content)
        about[name] = {"shape": list(tensor.shape), "kind": kind, "bytes": len(parts[-1])}
    return {"squeezed": squeeze, "tensors": about}, b"".join(parts)


def unpack(about: Mapping[str, Any], payload: Any) -> dict[str, Tensor | None]:
    """Return the tensors that :func:`pack` described as ``about``."""
    tensors: dict[str, Tensor | None] = {}
    view, start = memoryview(payload), 0
    for name, item in about["tensors"].items():
        if item is None:
            tensors[name] = None
            continue
        part = view[start : start + item["bytes"]]
        start += item["bytes"]
        content = bytearray(zlib.decompress(part) if about["squeezed"] else part)  # torch needs memory of its own
        dtype = torch.uint8 if item["kind"] == _BYTE else getattr(torch, item["kind"])
        tensor = torch.frombuffer(content, dtype=dtype).reshape(item["shape"])
        tensors[name] = tensor / 255 if item["kind"] == _BYTE else tensor
    return tensors


def pack_text(text: PromptEmbeds) -> tuple[dict[str, Any], bytes]:
    """Return the description and bytes of the embeddings of one caption."""
    about, payload = pack({"states": text.states, "pooled": text.pooled})
    return (about if text.lengths is None else {**about, "lengths": list(text.lengths)}), payload


def unpack_text(about: Mapping[str, Any], payload: Any) -> PromptEmbeds:
    """Return the embeddings that :func:`pack_text` described."""
    found = unpack(about, payload)
    assert found["states"] is not None
    lengths = about.get("lengths")
    return PromptEmbeds(found["states"], found["pooled"], None if lengths is None else tuple(lengths))
