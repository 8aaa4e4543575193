"""What a base is, in a few values and short texts: of everything that training reads, whoever stores it where.

Configs by name, and of each part's weights a digest. Keys that a library adds to a config, names that it gives to
weights, and the number of threads do not count.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from localctl.files import sha256

# Of these parts training reads no more than:
_SCHEDULER = (
    "prediction_type num_train_timesteps beta_start beta_end beta_schedule trained_betas rescale_betas_zero_snr"
)
_TEXT_ENCODER = (
    "hidden_act hidden_size intermediate_size num_hidden_layers num_attention_heads layer_norm_eps eos_token_id "
    "max_position_embeddings projection_dim"
)
_READ = {
    "pipeline": ("force_zeros_for_empty_prompt",),
    "scheduler": tuple(_SCHEDULER.split()),
    "text_encoder": tuple(_TEXT_ENCODER.split()),
    "text_encoder_2": tuple(_TEXT_ENCODER.split()),
}
_NOT_READ = ("sample_size", "force_upcast")  # of the others: the size that images have by default, and a hint on dtype
_UNUSED = ("safety_checker", "feature_extractor", "image_encoder")
_ENDS, _SPREAD = 16, 64  # values
_PROBE = "A photo of 2 red circles, the cat's blue-green hat; and (no. 17) somewhere else!"


def fingerprints(parts: Mapping[str, Any]) -> dict[str, Any]:
    """Name -> value or sha256. ``parts``: the components of a pipeline by name, and itself as ``pipeline``.

    A value of a config is called ``part.key``.
    """
    result: dict[str, Any] = {}
    for name, part in sorted(parts.items()):
        if part is None or name in _UNUSED:
            continue
        config = _config(name, part)
        result |= {f"{name}.{key}": config[key] for key in sorted(config)}
        if hasattr(part, "get_vocab"):
            result[name] = tokenizer_digest(part)
        if isinstance(part, nn.Module):
            result[f"weights of {name}"] = weights_digest(part)
    return result


def _config(name: str, part: Any) -> dict[str, Any]:
    """The values of ``part``'s config that training depends on, as JSON brings them back."""
    config = getattr(part, "config", None)
    if config is None:
        return {}
    values = dict(config) if isinstance(config, Mapping) else config.to_dict()
    read = _READ.get(name)
    if read is None:
        read = tuple(key for key in values if not key.startswith("_") and key not in _NOT_READ)
    return json.loads(json.dumps({key: values[key] for key in read if key in values}, default=str))


def tokenizer_digest(tokenizer: Any) -> str:
    """Of its vocabulary, the length of its texts, and how it takes a sentence apart."""
    words = sorted(tokenizer.get_vocab().items())
    content = [words, tokenizer(_PROBE).input_ids, tokenizer.pad_token_id, str(tokenizer.model_max_length)]
    return sha256(json.dumps(content))


def weights_digest(part: nn.Module) -> str:
    """Of all parameters in their order: shape, the exact sum of all bits as whole numbers, which sees a change of any
    one value, and values at both ends and between, which see exchanged places."""
    digest = hashlib.sha256()
    for parameter in part.parameters():
        flat = parameter.detach().flatten()
        digest.update(f"{tuple(parameter.shape)} {_sum_of_bits(flat)} ".encode())
        seen = [flat[:_ENDS], flat[:: max(1, flat.numel() // _SPREAD)], flat[-_ENDS:]]
        digest.update(as_bytes(torch.cat(seen).float()))
    return digest.hexdigest()


def _sum_of_bits(flat: Tensor) -> int:
    """Of all bytes, eight at a time, modulo 2**64: the same in any order, so on any number of threads. Bytes that are
    left over belong to the last values."""
    values = 8 // flat.element_size()
    whole = flat[: flat.numel() // values * values]
    if whole.storage_offset() % values:  # not at a place where a number of eight bytes may be
        whole = whole.clone()
    return int(whole.view(torch.int64).sum())


def as_bytes(tensor: Tensor) -> bytes:
    """The bytes of a tensor's values."""
    return tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
