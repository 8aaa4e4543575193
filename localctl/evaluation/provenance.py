"""The provenance that a result must record before it may be compared with another, and the files it is kept in."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from localctl import files

REQUIRED = ("metrics", "n_real", "n_fake", "image_format", "image_size", "mask_protocol", "seeds", "versions")
FEATURES = ("extractor", "weights_sha256", "preprocessing", "feature_dtype")  # where features are compared
LIBRARIES = (
    "localctl",
    "torch",
    "diffusers",
    "transformers",
    "torchmetrics",
    "numpy",
    "scipy",
    "opencv-python-headless",
)


def versions() -> dict[str, str]:
    """List the versions of libraries that a figure may depend on, as far as they are installed."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def check_provenance(name: str, content: Mapping[str, Any], needed: tuple[str, ...] = REQUIRED + FEATURES) -> None:
    """Raise ValueError, naming the missing keys, unless ``content["provenance"]`` has all of ``needed``."""
    found = content.get("provenance")
    missing = [key for key in needed if not isinstance(found, Mapping) or found.get(key) in (None, "", {}, [])]
    if missing:
        raise ValueError(f"The result {name} does not record its {', '.join(missing)}; make it again.")


def write_json(path: Path, content: Any) -> None:
    """Write ``content`` as JSON, whole or not at all."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False, sort_keys=True) + "\n")


def write_json_once(path: Path, content: Any) -> bool:
    """Write ``path`` unless it exists, also when other processes try at the same time; tell whether it was written."""
    if path.exists():
        return False
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    write_json(temporary, content)
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links
        if path.exists():
            return False
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return True


def write_text(path: Path, text: str) -> None:
    """Write ``text`` as :func:`write_bytes` does; a lone surrogate is escaped as in JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(path, text)


def write_bytes(path: Path, content: bytes) -> None:
    """Write ``path`` whole or not at all, and create its folder where needed. OSError that names the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_bytes(path, content)


def read_json(path: Path, what: str) -> dict[str, Any]:
    """Read the JSON object in ``path``. ValueError when the file does not exist or holds no JSON object."""
    return files.read_object(path, f"The {what}", "make it again")
