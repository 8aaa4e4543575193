"""Reading and writing the small files of a run: JSON that may be anybody's, texts that appear whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import uuid
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from localctl.sizes import shown


def first_line(error: BaseException) -> str:
    """Return what an exception says, as part of a sentence: its first line, without the full stop; its kind if it
    says nothing."""
    return str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__


def parse_json(text: str | bytes) -> Any:
    """Read JSON as ``json.loads`` does, a byte order mark allowed. ValueError for everything that is none, JSON nested
    too deep for Python, numbers with too many digits and bytes that are not UTF-8 included."""
    try:
        return json.loads(text.decode("utf-8-sig") if isinstance(text, bytes) else text.removeprefix("\ufeff"))
    except RecursionError:
        raise ValueError("nested too deep") from None


def read_json(path: Path, what: str, missing: str = "", damaged: str = "") -> Any:
    """Read the JSON in ``path``. ValueError in one sentence that begins with ``what``, if the file cannot be read or is
    no JSON; it ends with what to do then, ``missing`` or ``damaged``."""
    try:
        return parse_json(path.read_bytes())
    except OSError as error:
        why = error.strerror or first_line(error)
        raise ValueError(f"{what} {path} cannot be read ({why}){missing and f'; {missing}'}.") from error
    except ValueError as error:
        why = first_line(error)
        raise ValueError(f"{what} {path} is not valid JSON ({why}){damaged and f'; {damaged}'}.") from error


def read_object(path: Path, what: str, damaged: str = "repair it") -> dict[str, Any]:
    """Read the JSON object in ``path``; arguments and errors as for :func:`read_json`."""
    content = read_json(path, what, damaged and "check the path", damaged)
    if not isinstance(content, dict):
        end = damaged and f"; {damaged}"
        raise ValueError(f"{what} {path} holds {shown(content)}, not an object with named fields{end}.")
    return content


def write_json(path: Path, content: Any, end: str = "\n", **options: Any) -> None:
    """Write ``content`` as JSON with ``end`` after it, as :func:`write_bytes` does; ``options``: of ``json.dumps``."""
    write_text(path, json.dumps(content, **options) + end)


def json_lines(records: Iterable[Any], **options: Any) -> str:
    """Format each record as one line of JSON; ``options``: of ``json.dumps``."""
    return "".join(json.dumps(record, **options) + "\n" for record in records)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8, as :func:`write_bytes` does."""
    write_bytes(path, text.encode("utf-8", errors="backslashreplace"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write ``content`` whole or not at all. A link at ``path`` is replaced, never followed.

    OSError that names the file when the disk is full or the folder cannot be written to; what was there stays."""
    temporary = path.with_name(f".{path.name[:100]}.{uuid.uuid4().hex}")
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise OSError(f"{path} could not be written: {error.strerror or first_line(error)}") from error


def open_to_append(path: Path) -> int:
    """Open a descriptor that writes to the end of ``path``, made if it is not there. OSError for a link, which could
    lead anywhere, and for whatever else cannot be written to, named."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
    try:
        return os.open(path, flags, 0o666)
    except OSError as error:
        why = "it is a link" if path.is_symlink() else error.strerror
        raise OSError(f"{path} could not be written: {why}") from error


def append(descriptor: int, content: bytes, path: Path) -> None:
    """Write ``content`` to the end of ``path``, open as ``descriptor``, and bring it to the disk: whole or not at all.

    OSError naming the file; what was there stays."""
    size = os.fstat(descriptor).st_size
    try:
        written = os.write(descriptor, content)
        while written < len(content):
            written += os.write(descriptor, content[written:])
        os.fsync(descriptor)
    except OSError as error:
        os.ftruncate(descriptor, size)
        raise OSError(f"{path} could not be written: {error.strerror}") from error


def remove(path: Path) -> None:
    """Remove a file, a folder with all that is in it, or a link without what it leads to; nothing if there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def replace_folder(source: Path, target: Path) -> None:
    """Rename ``source`` to ``target``; an old target is moved out of the way first, as rename refuses full folders."""
    old = target.with_name(f".{target.name}.old")
    remove(old)
    if target.exists() or target.is_symlink():
        target.rename(old)
    source.rename(target)
    remove(old)


def sha256(source: Path | bytes | str) -> str:
    """Hash a file, bytes, or a text as UTF-8; in hex."""
    if not isinstance(source, Path):
        return hashlib.sha256(source.encode() if isinstance(source, str) else source).hexdigest()
    with source.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_json(content: Any) -> str:
    """Hash ``content`` as JSON with sorted keys, so that the order of dictionaries does not count."""
    return sha256(json.dumps(content, sort_keys=True))


def sha256_of_folder(folder: str | Path) -> str:
    """Hash all weights in a model folder, by name, or a single file of weights; a hub id, which is neither, stays."""
    place = Path(folder)
    if place.is_file():
        return sha256(place)
    weights = sorted(place.glob("*.safetensors")) or sorted(place.glob("*.bin"))
    return sha256("".join(map(sha256, weights))) if weights else str(folder)


def share_weights(folder: Path) -> None:
    """Give weights in ``folder`` the access rights of the configuration beside them, which follow the user's umask:
    safetensors makes its files readable by their owner alone."""
    for path in folder.rglob("*.safetensors"):
        path.chmod(stat.S_IMODE((path.parent / "config.json").stat().st_mode))
