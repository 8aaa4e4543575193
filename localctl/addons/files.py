"""Find the weights of an addon and read their shapes, without loading them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError, safe_open

from localctl.bases import HUB_ID
from localctl.files import first_line

Shape = tuple[int, ...]


@dataclass(frozen=True)
class SavedWeights:
    """A file of weights that was found, and the shapes in its header.

    name: as the user gave it, for messages. path: absolute.
    """

    name: str
    path: Path
    shapes: Mapping[str, Shape]

    def shape_of(self, *parts: str) -> Shape | None:
        """Return the shape of the first tensor with all these parts in its name, if there is one."""
        return next((shape for name, shape in self.shapes.items() if all(part in name for part in parts)), None)


def find_weights(name: str | Path, kind: str, local_files_only: bool = False) -> SavedWeights:
    """Find the weights of an addon and read their header.

    Args:
        name: a .safetensors file, a folder with one such file, or OWNER/NAME/FILE on the hub.
        kind: what it is, for messages: "LoRA".
        local_files_only: do not use the network.

    Raises:
        ValueError: there is no such file, it is a pickle, or it is damaged.
    """
    name = str(name)
    path = Path(name).expanduser()
    if path.is_dir():
        path = _in_folder(path, kind)
    elif not path.is_file():
        path = _from_hub(name, kind, local_files_only)
    _check_kind(path, name, kind)
    try:
        with safe_open(path, "pt") as file:
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ValueError(f"The {kind} {path} is damaged or cut off ({first_line(error)}); fetch it again.") from error
    return SavedWeights(name, path.resolve(), shapes)


def _check_kind(path: Path, name: str, kind: str) -> None:
    if path.suffix.lower() != ".safetensors":
        raise ValueError(
            f"The {kind} {name} is a {path.suffix or 'nameless'} file, and such files can run code when they are read; "
            "give its .safetensors."
        )


def _in_folder(folder: Path, kind: str) -> Path:
    """Return the only .safetensors file of a folder. ValueError unless there is one."""
    files = sorted(folder.glob("*.safetensors"))
    if len(files) == 1:
        return files[0]
    others = [file for file in folder.iterdir() if file.suffix.lower() in (".bin", ".pt", ".pth", ".ckpt")]
    if not files and len(others) == 1:
        return others[0]  # refused by its kind
    found = f"{len(files)} .safetensors files, {', '.join(file.name for file in files[:3])}" if files else "no weights"
    raise ValueError(f"The folder {folder} has {found}; give the file of the {kind}.")


def _from_hub(name: str, kind: str, local_files_only: bool) -> Path:
    repository, inside = "/".join(name.split("/")[:2]), "/".join(name.split("/")[2:])
    missing = f"There is no {kind} {name!r}"
    if name.startswith(("/", ".", "~")) or not inside or not HUB_ID.fullmatch(repository):
        raise ValueError(f"{missing}; give a .safetensors file, a folder with one, or OWNER/NAME/FILE on the hub.")
    _check_kind(Path(inside), name, kind)  # before the download
    try:
        return Path(hf_hub_download(repository, inside, local_files_only=local_files_only))
    except (OSError, HFValidationError) as error:
        raise ValueError(f"{missing} (no such file; as a file of the hub: {first_line(error)}); check it.") from error
