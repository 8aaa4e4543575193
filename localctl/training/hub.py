"""Publishing a finished run on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, get_token

from localctl.files import first_line
from localctl.training.settings import TrainSettings


def check_hub(settings: TrainSettings) -> None:
    """ValueError, before hours are spent, where a push is wanted that nobody has leave to make."""
    if settings.push_to_hub and not (settings.hub_token or get_token()):
        raise ValueError("push_to_hub needs a token; run `hf auth login`, set HF_TOKEN or give --hub_token.")


def push(folder: Path, settings: TrainSettings, files: list[str], api: Any = None) -> str:
    """Upload what ``files`` (patterns) match in ``folder``; checkpoints and logs stay at home. Returns the repository's
    name: ``hub_model_id``, or that of the folder.

    Raises:
        OSError: the hub cannot be reached or refuses; the run's folder is whole.
    """
    api = api or HfApi(token=settings.hub_token)
    name = settings.hub_model_id or folder.resolve().name
    try:
        name = api.create_repo(repo_id=name, exist_ok=True).repo_id
        api.upload_folder(
            repo_id=name, folder_path=str(folder), allow_patterns=files, commit_message="Trained with localctl"
        )
    except OSError as error:  # everything that goes wrong between here and there is one
        reason = first_line(error)
        raise OSError(
            f"The adapter is safe in {folder}, but could not be pushed to {name} ({reason}); push it later with "
            f"`hf upload {name} {folder}`."
        ) from error
    return name
