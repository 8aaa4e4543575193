"""Checkpoints: folders ``checkpoint-{step}`` that are either whole or absent.

A checkpoint is written under a temporary name, its files are flushed to the disk, the manifest with their hashes is
written last, and the folder is renamed into place; older checkpoints are removed only after that. The next process
removes the half-written folders of a process that was killed (``sweep``).
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from localctl.files import first_line, read_json, remove, replace_folder, sha256, sha256_of_json, share_weights

try:
    import resource
except ImportError:  # it exists on Unix only
    resource = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)
MANIFEST = "manifest.json"
LATEST = "latest"


class CheckpointError(OSError):
    """A checkpoint could not be written; the earlier ones are unchanged."""


def list_checkpoints(folder: Path) -> dict[int, Path]:
    """Return the committed checkpoints in ``folder`` by step, oldest first; empty if the folder does not exist."""
    found = {}
    for path in folder.glob("checkpoint-*") if folder.is_dir() else ():
        match = re.fullmatch(r"checkpoint-(\d+)", path.name)
        if match and path.is_dir():
            found[int(match[1])] = path
    return dict(sorted(found.items()))


def save_checkpoint(
    folder: Path, step: int, write: Callable[[Path], None], *, keep: int | None = None, info: Mapping[str, Any]
) -> Path:
    """Write ``checkpoint-{step}`` as a whole or not at all.

    Args:
        write: writes the files into the folder that it is given.
        keep: how many checkpoints may stay, at least 2 (None = all). The oldest are removed first, once the new one is
            in place; of a symbolic link, the link alone. One that cannot be removed is logged.
        info: is stored in the manifest unchanged.

    Raises:
        ValueError: ``keep`` is below 2; a single checkpoint may turn out damaged.
        CheckpointError: the checkpoint could not be written. Earlier ones are unchanged, and no partial files remain.
    """
    if keep is not None and keep < 2:
        raise ValueError(f"At least 2 checkpoints must be kept, not {keep}: the newest may turn out damaged.")
    final, temporary = folder / f"checkpoint-{step}", folder / f".checkpoint-{step}.tmp"
    try:
        remove(temporary)
        temporary.mkdir(parents=True)
        write(temporary)
        _seal(temporary, step, info)
        replace_folder(temporary, final)
        _flush(folder)
    except Exception as error:  # torch and safetensors each raise their own exception for a full disk
        reason = f"{why_not_written(error)}{free_space_clause(folder)}"
        earlier = "earlier checkpoints are unchanged" if list_checkpoints(folder) else "there is no earlier checkpoint"
        raise CheckpointError(
            f"{final.name} could not be saved in {folder} ({reason}); {earlier}: free some space and continue with "
            "--resume_from_checkpoint latest."
        ) from error
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
    if keep is not None:
        for path in list(list_checkpoints(folder).values())[:-keep]:
            try:
                remove(path)
            except OSError as error:
                logger.info(f"The old {path} could not be removed ({error.strerror or first_line(error)}).")
    return final


def write_folders(place: Path, writers: Mapping[str, Callable[[Path], Any]]) -> None:
    """Write the folder ``place/NAME`` for every name, with its writer: all of them, or none and the old ones stay.

    Raises:
        OSError: a folder could not be written; the message names the place and the free space there.
    """
    temporary = place / f".{next(iter(writers))}.tmp"
    try:
        remove(temporary)
        for name, write in writers.items():
            (temporary / name).mkdir(parents=True)
            write(temporary / name)
        share_weights(temporary)
        for name in writers:
            replace_folder(temporary / name, place / name)
    except Exception as error:  # safetensors raises its own exception for a full disk
        names = " and ".join(writers)
        raise OSError(
            f"{names} could not be written to {place} ({why_not_written(error)}{free_space_clause(place)})"
        ) from error
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)


def sweep_folders(place: Path, names: Iterable[str]) -> None:
    """Remove what a process left that was killed while writing ``names``; restore an old folder that had not been
    replaced yet."""
    for name in names:
        old, new = place / f".{name}.old", place / name
        if old.exists() and not new.exists():
            old.rename(new)
        remove(old)
        remove(place / f".{name}.tmp")


def why_not_written(error: BaseException) -> str:
    """Return why a file of weights could not be written, as a clause; torch's own message does not mention a full
    disk."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    text = first_line(error)
    return "the disk is full, or the file too large for it" if "inline_container" in text else text


def check_writable(folder: Path) -> None:
    """Raise ValueError if ``folder`` cannot be created or written to."""
    nearest = _nearest(folder)
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise ValueError(f"Nothing can be written to {folder}, because of {nearest}; choose another --output_dir.")


def _nearest(folder: Path) -> Path:
    """Return ``folder``, or its nearest parent that exists."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


def free_space(folder: Path) -> tuple[float, float]:
    """Return how many bytes may be written to ``folder``, in all and to one file (``ulimit -f``); inf where unknown."""
    try:
        usage = shutil.disk_usage(_nearest(folder))
        free = float(usage.free) if usage.total else math.inf
    except OSError:
        free = math.inf
    limit = -1 if resource is None else resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    return free, math.inf if limit < 0 else float(limit)


def free_space_clause(folder: Path) -> str:
    """Return :func:`free_space` as a clause: ``, 3.1 MB free there``."""
    free, largest = free_space(folder)
    text = "" if free == math.inf else f", {free / 1e6:.1f} MB free there"
    return text + ("" if largest == math.inf else f", files of at most {largest / 1e6:.1f} MB allowed (ulimit -f)")


def _seal(folder: Path, step: int, info: Mapping[str, Any]) -> None:
    """Flush the files to the disk, then write the manifest that lists them."""
    entries = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        _flush(path)
        entries[path.relative_to(folder).as_posix()] = {"sha256": sha256(path), "size": path.stat().st_size}
    for inner in sorted(path for path in folder.rglob("*") if path.is_dir()):
        _flush(inner)
    manifest = folder / MANIFEST
    body = {"step": step, "files": entries, "info": dict(info)}
    manifest.write_text(json.dumps({**body, "sha256": sha256_of_json(body)}, indent=1))
    _flush(manifest)
    _flush(folder)


def sweep(folder: Path) -> None:
    """Remove the half-written checkpoints of a process that was killed while saving; restore one that was being
    replaced by another of the same step."""
    left = (".checkpoint-*.old", ".checkpoint-*.tmp")
    sweep_folders(folder, {path.stem[1:] for pattern in left for path in folder.glob(pattern)})


def read_manifest(path: Path) -> dict[str, Any]:
    """Return the manifest of a checkpoint without checking its files. ValueError if the manifest is damaged."""
    try:
        manifest = read_json(path / MANIFEST, "manifest")
        files = [(entry["sha256"], entry["size"]) for entry in manifest["files"].values()]
        if int(manifest["step"]) < 0 or not isinstance(manifest["info"], dict) or not files:
            raise ValueError("not a manifest")
        if manifest.pop("sha256") != sha256_of_json(manifest):
            raise ValueError("changed since it was written")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"The checkpoint {path} has no readable {MANIFEST}; use another one.") from None
    return manifest


def verify_checkpoint(path: Path) -> dict[str, Any]:
    """Check all files of a checkpoint and return its manifest. ValueError naming the first file that is damaged."""
    manifest = read_manifest(path)
    for name, entry in manifest["files"].items():
        file = path / name
        if not file.is_file() or file.stat().st_size != entry["size"] or sha256(file) != entry["sha256"]:
            raise ValueError(f"The checkpoint {path} is damaged: {name} is not what was saved; use another one.")
    return manifest


def find_checkpoint(folder: Path, request: str | None) -> Path | None:
    """Return the verified checkpoint to continue from; None for a fresh start.

    ``request`` is None, a path, or ``latest``: the newest undamaged one in ``folder``. Damaged ones are logged and
    skipped; that there is none at all is logged, too.

    Raises:
        ValueError: the path holds no undamaged checkpoint, or ``latest`` finds damaged ones only.
    """
    if request is None:
        return None
    if request != LATEST:
        path = Path(request).expanduser()
        if not path.is_dir():
            raise ValueError(f"There is no checkpoint {request}; give the path of a checkpoint folder, or 'latest'.")
        verify_checkpoint(path)
        return path
    candidates = list(reversed(list_checkpoints(folder).values()))
    for path in candidates:
        try:
            verify_checkpoint(path)
        except ValueError as damage:
            if not path.exists():  # removed meanwhile, as old ones are: there are newer ones
                return find_checkpoint(folder, request)
            logger.info(str(damage))
        else:
            return path
    if candidates:
        raise ValueError(f"All {len(candidates)} checkpoints in {folder} are damaged; start afresh in another folder.")
    logger.info(f"No checkpoint in {folder} yet: starting from the beginning.")
    return None


def lies_in(checkpoint: Path, folder: Path) -> bool:
    """Return whether ``checkpoint`` lies in ``folder``, itself or as a symbolic link."""
    places = (checkpoint.resolve().parent, checkpoint.absolute().parent.resolve())
    return folder.resolve() in places


def set_aside_later(folder: Path, step: int) -> None:
    """Rename checkpoints after ``step`` to ``abandoned-...``: the run continues from ``step`` and will differ."""
    for later, path in list_checkpoints(folder).items():
        if later > step:
            aside = folder / f"abandoned-{path.name}"
            remove(aside)
            path.rename(aside)
            logger.info(f"{path.name} is after step {step} and was renamed to {aside.name}.")


def _flush(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
