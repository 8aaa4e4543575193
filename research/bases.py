"""What the studies know of a base: how it is sampled, and the hash of its weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from localctl.architectures import read_shape
from localctl.denoisers.abilities import Abilities
from localctl.files import sha256, sha256_of_folder
from localctl.pipelines import BaseConfig
from localctl.sampling_settings import Sampling


def sha256_of_base(base: Path) -> str:
    """Return the hash of the weights that images depend on: denoiser, text encoders and VAE."""
    transformer = (base / "transformer").is_dir()
    parts = ["transformer", "text_encoder", "text_encoder_2", "vae"] if transformer else ["unet", "text_encoder", "vae"]
    return sha256("".join(sha256_of_folder(base / part) for part in parts))


def suits(base: str) -> Sampling:
    """Return scheduler, guidance scale and text length for a base: DDIM, of flow matching its own.

    A micro base without T5 was trained with any number of its zeros, which cost time only (``flow.ZEROS``).
    """
    config = BaseConfig(name=base)
    known = Abilities(config, read_shape(config))
    short = 0 if known.shape.index.get("text_encoder_3") == [None, None] else None
    return replace(known.sampling, scheduler="euler" if known.is_flow else "ddim", max_sequence_length=short)
