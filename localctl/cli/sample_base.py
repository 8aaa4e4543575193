"""What flags of ``sample.py`` ask of the base beside its name, looked up before it is loaded."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import diffusers

from localctl.architectures import BaseShape
from localctl.bases import is_hub_id
from localctl.pipelines import SCHEDULERS, BaseConfig, BaseSpec, read_json, resolve_base, vae_not_loaded

_KARRAS = "use_karras_sigmas"


def knows_karras(kind: str) -> bool:
    """Whether diffusers' scheduler of this class can space its steps as Karras does."""
    found = getattr(diffusers, kind, None)
    return found is not None and _KARRAS in inspect.signature(found.__init__).parameters


def check_karras(base: BaseConfig, scheduler: str | None) -> None:
    """ValueError for a scheduler, by its name in ``SCHEDULERS`` or None for the base's own, without Karras' spacing."""
    if scheduler is not None:
        kind = SCHEDULERS[scheduler]
    else:
        try:
            where = {"revision": base.revision, "local_files_only": base.local_files_only}
            kind = read_json(resolve_base(base.name), "scheduler/scheduler_config.json", where).get("_class_name", "")
        except OSError:
            return  # the base itself will be missed in a moment
    if not knows_karras(kind):
        known = ", ".join(name for name, one in sorted(SCHEDULERS.items()) if knows_karras(one))
        raise ValueError(f"{kind or 'The scheduler'} has no Karras sigmas; give a --scheduler of these: {known}.")


def check_vae(base: BaseConfig, shape: BaseShape) -> None:
    """ValueError when the VAE asked for is not there, or its latents have another shape than the base's own."""
    if base.vae is None:
        return
    config = _vae_config(base.vae, base.local_files_only)
    own = shape.parts["vae"]
    known = [item for item in (config, own) if "latent_channels" in item and "block_out_channels" in item]
    if len({(item["latent_channels"], len(item["block_out_channels"])) for item in known}) > 1:
        raise ValueError(f"The VAE {base.vae!r} makes other latents than the base's own; give one of its family.")


def _vae_config(name: str, local_files_only: bool) -> dict[str, Any]:
    path = Path(name).expanduser()
    if path.is_file():
        raise ValueError(f"The VAE {name} is a file; give a diffusers folder with an AutoencoderKL, or a hub id.")
    inside = "vae/config.json" if (path / "model_index.json").is_file() else "config.json"
    try:
        if not (path / inside).is_file() and (path.exists() or not is_hub_id(name)):
            raise FileNotFoundError(f"no {inside} in it" if path.exists() else "no such folder")
        config = read_json(
            BaseSpec(name, str(path) if path.exists() else name), inside, {"local_files_only": local_files_only}
        )
    except (OSError, ValueError) as error:
        raise vae_not_loaded(name, error) from error
    if config.get("_class_name", "AutoencoderKL") != "AutoencoderKL":
        raise ValueError(f"The VAE {name!r} is a {config['_class_name']}; give an AutoencoderKL.")
    return config
