"""Publishing a finished run on the Hugging Face hub."""

from __future__ import annotations

import shutil
from pathlib import Path, PureWindowsPath
from typing import Any

import yaml
from huggingface_hub import HfApi, get_token

from localctl.files import first_line, read_json, remove, write_json, write_text
from localctl.training.settings import TrainSettings

UPLOAD = "hub"  # folder with what is uploaded, as others may read it; it stays where the upload failed


def check_hub(settings: TrainSettings) -> None:
    """ValueError, before hours are spent, where a push is wanted that nobody has leave to make."""
    if settings.push_to_hub and not (settings.hub_token or get_token()):
        raise ValueError("push_to_hub needs a token; run `hf auth login`, set HF_TOKEN or give --hub_token.")


def push(folder: Path, settings: TrainSettings, files: list[str], api: Any = None) -> str:
    """Upload what ``files`` (patterns) match in ``folder``, without this machine's paths; checkpoints and logs stay at
    home. A new repository is private unless ``hub_private_repo`` is false. Returns the repository's name:
    ``hub_model_id``, or that of the folder.

    Raises:
        OSError: the hub cannot be reached or refuses; the run's folder is whole.
    """
    api = api or HfApi(token=settings.hub_token)
    name = settings.hub_model_id or folder.resolve().name
    try:
        upload = prepare_upload(folder, files)
        name = api.create_repo(repo_id=name, exist_ok=True, private=settings.hub_private_repo).repo_id
        api.upload_folder(
            repo_id=name, folder_path=str(upload), allow_patterns=files, commit_message="Trained with localctl"
        )
    except OSError as error:  # everything that goes wrong between here and there is one
        private = " --private" if settings.hub_private_repo else ""
        raise OSError(
            f"The adapter is safe in {folder}, but could not be pushed to {name} ({first_line(error)}); push it later "
            f"with `hf upload {name} {folder / UPLOAD} .{private}`."
        ) from error
    remove(upload)
    return name


def prepare_upload(folder: Path, files: list[str]) -> Path:
    """``folder/hub``: copies of what ``files`` match, the settings in them without paths of this machine."""
    upload = folder / UPLOAD
    remove(upload)
    upload.mkdir(parents=True)
    for path in sorted({found for pattern in files for found in folder.glob(pattern) if found.is_file()}):
        target = upload / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".json":
            write_json(target, without_paths(read_json(path, "The file")), indent=2, sort_keys=True)
        elif path.suffix == ".yaml":
            values = without_paths(yaml.safe_load(path.read_text(encoding="utf-8")))
            write_text(target, yaml.safe_dump(values, sort_keys=False, allow_unicode=True))
        else:
            shutil.copyfile(path, target)
    return upload


def without_paths(value: Any) -> Any:
    """Plain values in which of every path into this machine only the last part is left."""
    if isinstance(value, dict):
        return {name: without_paths(item) for name, item in value.items()}
    if isinstance(value, list):
        return [without_paths(item) for item in value]
    if isinstance(value, str) and is_local(value) and ("/" in value or "\\" in value):
        return PureWindowsPath(value).name or value  # which knows both kinds of slashes
    return value


def is_local(place: str) -> bool:
    """Whether ``place`` is a path of this machine: absolute, of the home folder, or there."""
    try:
        return (
            place.startswith(("/", "~", "./", "../"))
            or PureWindowsPath(place).is_absolute()
            or ("\n" not in place and Path(place).exists())
        )
    except (OSError, ValueError):  # far too long, or with a NUL
        return False
