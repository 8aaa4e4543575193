"""What a checkpoint records of its run, and whether another run may continue from it.

A base is identified by all that training reads of it, wherever it is stored: config values by name, and a digest of the
weights of each part. Keys that a library adds to a config, its names of weights and the number of threads do not
matter.
"""

from __future__ import annotations

import hashlib
import json
import logging
import platform
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from localctl.data.fingerprint import COUNT, NAMES
from localctl.data.sample import Source
from localctl.distributed import union
from localctl.files import sha256, sha256_of_json
from localctl.redaction import MASKED, flat, recorded
from localctl.training.earlier import EARLIER
from localctl.training.large_bases import is_absent
from localctl.training.schedule import FIRST_LOCAL, section
from localctl.training.settings import TrainSettings

logger = logging.getLogger(__name__)
# Setting, or section of settings -> why it may change when a run is resumed. All others may not.
FREE = {
    "output_dir": "where, not what",
    "overwrite_output_dir": "where, not what",
    "resume_from_checkpoint": "where, not what",
    "force_resume": "allows other settings to change",
    "base.name": "the same weights may lie elsewhere; the weights themselves are compared",
    "base.revision": "as base.name",
    "base.variant": "as base.name",
    "base.local_files_only": "how the same weights are fetched",
    "base.vae": "as base.name",
    "adapter_model_name_or_path": "the weights before the first step; what it says of masks is compared",
    "adapter.unconditional_scale": "how images are generated; training does not use it",
    "max_train_steps": "to train longer; learning rates that fall to the end follow the new length",
    "num_train_epochs": "as max_train_steps",
    "early_stopping": "when to stop",
    "logging_steps": "what is recorded",
    "report_to": "what is recorded",
    "wandb": "what is recorded",
    "validation": "held-out images, which training never sees",
    "validation_steps": "when they are generated",
    "checkpointing_steps": "when checkpoints are written",
    "checkpoints_total_limit": "how many of them stay",
    "max_nonfinite_steps": "when to give up",
    "dataloader_num_workers": "samples and noise do not depend on the worker",
    "data.keep_latents": "the same latents, computed again",
    "data.encodings_dir": "the same encodings, computed before; a number of variants is compared as data",
    "data.cache_dir": "where copies of the same files lie",
    "data.path": "the same files may lie elsewhere; their fingerprint is compared",
    "data.max_bad_fraction": "when to give up",
    "gradient_checkpointing": "the same activations, computed again",
    "offload_base": "the same weights, which wait elsewhere",
    "compile": "changes no more than the last bits of a sum",
    "dry_run": "trains nothing",
    "push_to_hub": "where the result goes",
    "hub_model_id": "where the result goes",
    "hub_token": "where the result goes",
    "hub_private_repo": "where the result goes",
    "cpu_threads": "changes no more than the last bits of a sum",
}
VERSIONS = ("torch", "diffusers", "transformers", "accelerate", "numpy")
CONSTANT = ("constant", "constant_with_warmup")
_LOOKED_AT = 8  # samples of a dataset

# The only config values that training reads of these parts:
_SCHEDULER = (
    "prediction_type num_train_timesteps beta_start beta_end beta_schedule trained_betas rescale_betas_zero_snr "
    "shift use_dynamic_shifting base_shift max_shift base_image_seq_len max_image_seq_len time_shift_type"
)
_TEXT_ENCODER = (
    "hidden_act hidden_size intermediate_size num_hidden_layers num_attention_heads layer_norm_eps eos_token_id "
    "max_position_embeddings projection_dim "
    "d_ff d_kv d_model num_heads num_layers feed_forward_proj layer_norm_epsilon relative_attention_num_buckets"
)
_READ = {
    "pipeline": ("force_zeros_for_empty_prompt",),
    "scheduler": tuple(_SCHEDULER.split()),
    "text_encoder": tuple(_TEXT_ENCODER.split()),
    "text_encoder_2": tuple(_TEXT_ENCODER.split()),
    "text_encoder_3": tuple(_TEXT_ENCODER.split()),
}
_NOT_READ = ("sample_size", "force_upcast")  # of other parts: the default image size and a hint on the dtype
_UNUSED = ("safety_checker", "feature_extractor", "image_encoder")
# Free ones that are the same in all processes of a job.
_ALIKE = ("output_dir", "max_train_steps", "num_train_epochs", "base.name", "adapter_model_name_or_path")
_ENDS, _SPREAD = 16, 64  # values
_PROBE = "A photo of 2 red circles, the cat's blue-green hat; and (no. 17) somewhere else!"


def is_free(key: str) -> bool:
    """Return whether the setting ``key`` (dotted) may change when a run is resumed."""
    parts = key.split(".")
    return any(".".join(parts[:n]) in FREE for n in range(1, len(parts) + 1))


def describe(
    settings: TrainSettings, source: Source, base: Mapping[str, Any], *, world_size: int, precision: str
) -> dict[str, Any]:
    """Return what the manifest of a checkpoint records of its run, without secrets.

    ``base``: the pipeline's components by name, and the pipeline itself as ``pipeline``. The keys are: settings;
    config_sha256, of the settings that may not change; data and base, fingerprints by name; base_first_values, the
    fingerprint of earlier versions; world_size, the number of processes; precision, of the frozen parts; versions, of
    the libraries.
    """
    return {
        "settings": recorded(settings),
        "config_sha256": config_hash(settings),
        "data": data_fingerprint(source),
        "base": fingerprints(base),
        "base_first_values": weights_fingerprint(base),
        "world_size": world_size,
        "precision": precision,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in VERSIONS}},
    }


def config_hash(settings: TrainSettings) -> str:
    """Return the sha256 of the settings that may not change, including those masked in records."""
    fixed = {key: value for key, value in flat(asdict(settings)).items() if not is_free(key)}
    return sha256_of_json(fixed)


def check_alike(settings: TrainSettings) -> None:
    """Raise ValueError on all processes of this job if their settings differ, but for where data lies."""
    values = flat(asdict(settings))
    found = union({sha256_of_json([config_hash(settings), *map(values.get, _ALIKE)])})
    if len(found) > 1:
        raise ValueError(
            "The processes of this job have different settings; give all of them the same, or set WORLD_SIZE=1 for "
            "trainings of their own."
        )


def data_fingerprint(source: Source) -> dict[str, Any]:
    """Return the dataset's ``fingerprints``; without any, one of its length and of a few samples spread over it."""
    own = getattr(source, "fingerprints", None)
    if own is not None:
        return dict(own)
    digest, count = hashlib.sha256(str(len(source)).encode()), len(source)
    for index in sorted({i * (count - 1) // (_LOOKED_AT - 1) for i in range(_LOOKED_AT)}):
        try:
            example = source[index]
        except ValueError:  # a bad row; the training reports it
            digest.update(b"unusable")
            continue
        digest.update(json.dumps([example.key, example.caption]).encode())
        for tensor in (example.pixels, example.condition):
            digest.update(as_bytes(tensor))
    return {"samples in the data": digest.hexdigest()}


def weights_fingerprint(parts: Mapping[str, Any]) -> str:
    """Return the sha256 of names, shapes and first values of all parameters, as earlier versions recorded it."""
    digest = hashlib.sha256()
    present = (name for name, part in parts.items() if isinstance(part, nn.Module) and not is_absent(part))
    for part in sorted(present):
        for name, parameter in parts[part].named_parameters():
            digest.update(f"{part}.{name}{tuple(parameter.shape)}".encode())
            digest.update(as_bytes(_plain(parameter).flatten()[:16].float()))
    return digest.hexdigest()


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return a line ``name: old -> new`` for everything that differs between two descriptions but must not.

    Settings are compared by :func:`setting_changes`; masked values by the hash of all settings, if both descriptions
    have the same ones.
    """
    old, new = flat(section(before, "settings")), flat(now["settings"])
    lines = setting_changes(old, new)
    masked = any(_masked(*pair) for pair in _compared(old, new).values())
    comparable = old.keys() == new.keys()
    if not lines and masked and comparable and before.get("config_sha256") != now["config_sha256"]:
        lines.append("a setting with a masked value")
    for name, meaning in (("world_size", "processes"), ("precision", "precision")):
        if before.get(name) != now[name]:
            lines.append(f"{meaning}: {before.get(name)} -> {now[name]}")
    if is_old(before):
        unchanged = before["data"] in now["data"].values(), before["base"] == now["base_first_values"]
        names = ("samples in the data", "weights of the base")
        return lines + [f"{name}: others than before" for name, same in zip(names, unchanged, strict=True) if not same]
    for name in ("data", "base"):
        known = before.get(name)
        lines += _content_changes(known, now[name]) if isinstance(known, Mapping) else [f"{name}: {known} -> known"]
    return lines


def setting_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return a line ``name: old -> new`` for every setting that differs between two records but must not. A setting
    that is missing in ``before`` had its default; masked values are skipped."""
    old, new = flat(before), flat(now)
    pairs = {key: pair for key, pair in _compared(old, new).items() if not is_free(key) and not _masked(*pair)}
    lines = [f"{key}: {was} -> {value}" for key, (was, value) in pairs.items() if was != value]
    return lines + [f"{key}: {value} -> gone" for key, value in old.items() if key not in new and not is_free(key)]


def _compared(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Map each setting of ``new`` to its value in ``old`` (or its default) and in ``new``."""
    defaults = flat(recorded(TrainSettings())) | EARLIER
    return {key: (old.get(key, defaults.get(key)), value) for key, value in new.items()}


def _masked(was: Any, value: Any) -> bool:
    return MASKED in (was, value) and None not in (was, value)


def is_old(before: Mapping[str, Any]) -> bool:
    """Return whether a checkpoint has only the fingerprints of earlier versions: names of samples, first values of
    weights."""
    return isinstance(before.get("data"), str) and isinstance(before.get("base"), str)


def _content_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return the lines of one kind of fingerprints. Those missing in ``before`` are not compared: a newer version of a
    library or of localctl may take more of them."""
    gone = [name for name in before if name not in now and "." not in name]
    lines = [f"{name}: {_short(before[name])} -> gone" for name in gone]
    changed = [name for name, value in now.items() if name in before and before[name] != value]
    if {COUNT, NAMES}.intersection(changed):  # then rows cannot be compared one by one
        changed = [name for name in changed if name in (COUNT, NAMES)]
    return lines + [f"{name}: {_short(before[name])} -> {_short(now[name])}" for name in changed]


def _short(value: Any) -> str:
    """Return the beginning of a digest or of a long value; other values whole."""
    text = str(value)
    if isinstance(value, str) and len(text) == 64:
        return text[:12]
    return text if len(text) <= 60 else f"{text[:57]}..."


def check_unchanged(before: Mapping[str, Any], now: Mapping[str, Any], *, force: bool) -> None:
    """Raise ValueError listing what changed since the checkpoint; with ``force``, log the changes instead.

    Other versions of libraries, and a new length that changes the learning rate, are logged and never an error.
    """
    versions = section(before, "versions")
    pairs = [(name, versions.get(name), new) for name, new in now["versions"].items()]
    updated = [f"{name} {old} -> {new}" for name, old, new in pairs if old != new]
    if updated:
        logger.info(
            "Library versions differ from the checkpoint's, so numbers may differ in the last digits: "
            f"{', '.join(updated)}."
        )
    length = [section(before, "settings").get("max_train_steps"), now["settings"]["max_train_steps"]]
    if length[0] != length[1] and now["settings"]["lr_scheduler"] not in CONSTANT:
        logger.info(
            f"max_train_steps {length[0]} -> {length[1]}: the learning rate follows the new length from here on."
        )
    start = now["settings"]["loss"]["start"]
    if length[0] != length[1] and start and section(section(before, "settings"), "loss").get("start") == start:
        logger.info(
            f"max_train_steps {length[0]} -> {length[1]}: the local term begins after step {now[FIRST_LOCAL]}, "
            "as before."
        )
    lines = changes(before, now)
    if is_old(before):
        logger.info(
            "The checkpoint is of a version that did not record captions, files and the base's config; only the names "
            "of the examples and the first values of the base's weights could be compared."
        )
    if lines and not force:
        raise ValueError(
            "These changed since the checkpoint, so the rest of the run would differ from its beginning; undo them, "
            "or pass --force_resume to continue all the same:\n  " + "\n  ".join(lines)
        )
    for line in lines:
        logger.info(f"changed since the checkpoint, accepted by --force_resume: {line}")


def fingerprints(parts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config values (as ``part.key``) and digests of a pipeline by name. ``parts``: its components by name,
    and the pipeline itself as ``pipeline``.
    """
    result: dict[str, Any] = {}
    for name, part in sorted(parts.items()):
        if part is None or name in _UNUSED:
            continue
        config = _config(name, part)
        result |= {f"{name}.{key}": config[key] for key in sorted(config)}
        if hasattr(part, "get_vocab"):
            result[name] = tokenizer_digest(part)
        if isinstance(part, nn.Module) and not is_absent(part):
            result[f"weights of {name}"] = weights_digest(part)
    return result


def _config(name: str, part: Any) -> dict[str, Any]:
    """Return the values of ``part``'s config that training depends on, as JSON restores them."""
    config = getattr(part, "config", None)
    if config is None:
        return {}
    values = dict(config) if isinstance(config, Mapping) else config.to_dict()
    read = _READ.get(name)
    if read is None:
        read = tuple(key for key in values if not key.startswith("_") and key not in _NOT_READ)
    return json.loads(json.dumps({key: values[key] for key in read if key in values}, default=str))


def tokenizer_digest(tokenizer: Any) -> str:
    """Return the sha256 of its vocabulary, its maximal length, and its tokens of a sentence."""
    words = sorted(tokenizer.get_vocab().items())
    content = [words, tokenizer(_PROBE).input_ids, tokenizer.pad_token_id, str(tokenizer.model_max_length)]
    return sha256(json.dumps(content))


def weights_digest(part: nn.Module) -> str:
    """Return the sha256 over all parameters in order: the shape; the exact sum of all values' bits as integers, which
    any changed value changes; and values from both ends and between, which exchanged values change."""
    digest = hashlib.sha256()
    for parameter in part.parameters():
        flat = _plain(parameter).flatten()
        digest.update(f"{tuple(parameter.shape)} {_sum_of_bits(flat)} ".encode())
        seen = [flat[:_ENDS], flat[:: max(1, flat.numel() // _SPREAD)], flat[-_ENDS:]]
        digest.update(as_bytes(torch.cat(seen).float()))
    return digest.hexdigest()


def _plain(parameter: Tensor) -> Tensor:
    """Return the values of a parameter; of one that torchao has quantised, those that its bits stand for."""
    values = parameter.detach()
    return values if type(values) in (Tensor, nn.Parameter) or values.dtype == torch.uint8 else values.dequantize()


def _sum_of_bits(flat: Tensor) -> int:
    """Return the sum of all bytes as 64-bit integers modulo 2**64: the same in any order, so on any number of threads.
    Values beyond the last full integer are left out."""
    values = 8 // flat.element_size()
    whole = flat[: flat.numel() // values * values]
    if whole.storage_offset() % values:  # not aligned for 64-bit integers
        whole = whole.clone()
    return int(whole.view(torch.int64).sum())


def as_bytes(tensor: Tensor) -> bytes:
    """Return the bytes of a tensor's values."""
    return tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
