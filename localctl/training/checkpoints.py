"""Checkpoints: folders ``checkpoint-{step}`` that are either whole or absent.

A checkpoint is written under another name, its files reach the disk, the manifest with their hashes comes last, then
the folder is renamed into place; only after that are older ones removed. What a killed process left half done is
cleared away by the next one (``sweep``).
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
except ImportError:  # of Unix
    resource = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)
MANIFEST = "manifest.json"
LATEST = "latest"


class CheckpointError(OSError):
    """A checkpoint could not be written; those before it are as they were."""


def list_checkpoints(folder: Path) -> dict[int, Path]:
    """Step -> folder of every committed checkpoint in ``folder``, oldest first; none where there is no folder."""
    found = {}
    for path in folder.glob("checkpoint-*") if folder.is_dir() else ():
        match = re.fullmatch(r"checkpoint-(\d+)", path.name)
        if match and path.is_dir():
            found[int(match[1])] = path
    return dict(sorted(found.items()))


def save_checkpoint(
    folder: Path,
    step: int,
    write: Callable[[Path], None],
    *,
    keep: int | None = None,
    info: Mapping[str, Any],
) -> Path:
    """Commit ``checkpoint-{step}``: ``write`` puts the files into the folder it is given.

    ``info`` goes into the manifest as it is. ``keep``: how many checkpoints may stay, at least 2 (None = all); the
    oldest go first and only after the new one is in place. Of one that is a link, the link goes; what cannot be removed
    is said.

    Raises:
        ValueError: ``keep`` below 2; one checkpoint alone is lost when its successor turns out damaged.
        CheckpointError: it could not be written. The earlier ones are as they were, and nothing else is left.
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
    except Exception as error:  # of a full disk, torch and safetensors each tell in an exception of their own
        reason = f"{why_not_written(error)}{room_left(folder)}"
        earlier = "the checkpoints before it are as they were" if list_checkpoints(folder) else "there is none before"
        raise CheckpointError(
            f"{final.name} could not be saved in {folder} ({reason}); {earlier}: make room and go on with "
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
    """Write ``place/NAME`` for every name, by its writer: all of them whole, or none and those before stay.

    Raises:
        OSError: the disk took no more; the message names the folder and what room there is.
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
    except Exception as error:  # of a full disk, safetensors tells in an exception of its own
        names = " and ".join(writers)
        raise OSError(
            f"{names} could not be written to {place} ({why_not_written(error)}{room_left(place)})"
        ) from error
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)


def sweep_folders(place: Path, names: Iterable[str]) -> None:
    """Clear away what a process that was killed while writing ``names`` left; an old folder that had no successor yet
    comes back."""
    for name in names:
        old, new = place / f".{name}.old", place / name
        if old.exists() and not new.exists():
            old.rename(new)
        remove(old)
        remove(place / f".{name}.tmp")


def why_not_written(error: BaseException) -> str:
    """Why a file of weights could not be written, as the part of a sentence: of a full disk, torch and safetensors
    each tell in words of their own, and torch's say nothing of it."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    text = first_line(error)
    return "the disk is full, or the file too large for it" if "inline_container" in text else text


def check_writable(folder: Path) -> None:
    """ValueError when ``folder`` is not there and cannot be made, or cannot be written to."""
    nearest = _nearest(folder)
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise ValueError(f"Nothing can be written to {folder}, because of {nearest}; choose another --output_dir.")


def _nearest(folder: Path) -> Path:
    """``folder``, or what is there of the way to it."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


def room(folder: Path) -> tuple[float, float]:
    """Bytes that may be written to ``folder``, in all and to one file (``ulimit -f``), as far as the system says."""
    try:
        usage = shutil.disk_usage(_nearest(folder))
        free = float(usage.free) if usage.total else math.inf
    except OSError:
        free = math.inf
    limit = -1 if resource is None else resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    return free, math.inf if limit < 0 else float(limit)


def room_left(folder: Path) -> str:
    """:func:`room` as the part of a sentence: ``, 3.1 MB free there``."""
    free, largest = room(folder)
    text = "" if free == math.inf else f", {free / 1e6:.1f} MB free there"
    return text + ("" if largest == math.inf else f", files of at most {largest / 1e6:.1f} MB allowed (ulimit -f)")


def _seal(folder: Path, step: int, info: Mapping[str, Any]) -> None:
    """Bring the files to the disk and then write the manifest that names them all."""
    entries = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        _flush(path)
        entries[path.relative_to(folder).as_posix()] = {"sha256": sha256(path), "size": path.stat().st_size}
    for inner in sorted(path for path in folder.rglob("*") if path.is_dir()):
        _flush(inner)
    manifest = folder / MANIFEST
    body = {"step": step, "files": entries, "info": dict(info)}
    manifest.write_text(json.dumps({**body, "sha256": _body_sha256(body)}, indent=1))
    _flush(manifest)
    _flush(folder)


def sweep(folder: Path) -> None:
    """Clear away what a process that was killed while saving left in ``folder``: half-written checkpoints go; one
    that was being replaced by another of the same step comes back."""
    left = (".checkpoint-*.old", ".checkpoint-*.tmp")
    sweep_folders(folder, {path.stem[1:] for pattern in left for path in folder.glob(pattern)})


def read_manifest(path: Path) -> dict[str, Any]:
    """Return the manifest of a checkpoint, ValueError where it is not as it was written; the files are not looked
    at."""
    try:
        manifest = read_json(path / MANIFEST, "manifest")
        files = [(entry["sha256"], entry["size"]) for entry in manifest["files"].values()]
        if int(manifest["step"]) < 0 or not isinstance(manifest["info"], dict) or not files:
            raise ValueError("not one of ours")
        if manifest.pop("sha256") != _body_sha256(manifest):
            raise ValueError("not as it was written")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"The checkpoint {path} has no readable {MANIFEST}; use another one.") from None
    return manifest


def verify_checkpoint(path: Path) -> dict[str, Any]:
    """Return the manifest of a checkpoint whose files are all what was written; ValueError naming the first that is
    not."""
    manifest = read_manifest(path)
    for name, entry in manifest["files"].items():
        file = path / name
        if not file.is_file() or file.stat().st_size != entry["size"] or sha256(file) != entry["sha256"]:
            raise ValueError(f"The checkpoint {path} is damaged: {name} is not what was saved; use another one.")
    return manifest


def find_checkpoint(folder: Path, request: str | None) -> Path | None:
    """Return the checkpoint to continue from, verified; None for a fresh start.

    ``request`` is None, a path, or ``latest``: the newest sound one in ``folder``. Damaged ones are named and passed
    over; that there is none at all is said, too.

    Raises:
        ValueError: a path without a sound checkpoint, or ``latest`` where every checkpoint is damaged.
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
            if not path.exists():  # removed between two looks, as old ones are: there are newer ones
                return find_checkpoint(folder, request)
            logger.info(str(damage))
        else:
            return path
    if candidates:
        raise ValueError(f"All {len(candidates)} checkpoints in {folder} are damaged; start afresh in another folder.")
    logger.info(f"No checkpoint in {folder} yet: starting from the beginning.")
    return None


def lies_in(checkpoint: Path, folder: Path) -> bool:
    """Whether ``checkpoint`` is one of ``folder``: itself, or as a link there."""
    places = (checkpoint.resolve().parent, checkpoint.absolute().parent.resolve())
    return folder.resolve() in places


def set_aside_later(folder: Path, step: int) -> None:
    """Rename checkpoints beyond ``step`` to ``abandoned-...``: the run goes on from ``step`` and will differ."""
    for later, path in list_checkpoints(folder).items():
        if later > step:
            aside = folder / f"abandoned-{path.name}"
            remove(aside)
            path.rename(aside)
            logger.info(f"{path.name} lies beyond step {step} and is now {aside.name}.")


def _flush(path: Path) -> None:
    """Bring a file or a folder's entries to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _body_sha256(body: Mapping[str, Any]) -> str:
    return sha256_of_json(body)
