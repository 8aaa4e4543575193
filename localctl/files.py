"""Read and write the small files of a run: JSON from any source is validated, and files are written atomically."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from localctl.sizes import shown


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message without the full stop, or its class name if the message is
    empty."""
    return str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__


def parse_json(text: str | bytes) -> Any:
    """Parse JSON, with or without a byte order mark.

    ValueError for invalid JSON, bytes that are not UTF-8, numbers with too many digits, or nesting too deep for Python.
    """
    try:
        return json.loads(text.decode("utf-8-sig") if isinstance(text, bytes) else text.removeprefix("\ufeff"))
    except RecursionError:
        raise ValueError("nested too deep") from None


def read_json(path: Path, what: str, missing: str = "", damaged: str = "") -> Any:
    """Read the JSON in ``path``.

    ValueError in one sentence that begins with ``what``: if the file cannot be read, it ends with the advice
    ``missing``; if it is not JSON, with ``damaged``.
    """
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
    """Write ``content`` as JSON, followed by ``end``, atomically; ``options``: of ``json.dumps``."""
    write_text(path, json.dumps(content, **options) + end)


def json_lines(records: Iterable[Any], **options: Any) -> str:
    """Format each record as one line of JSON; ``options``: of ``json.dumps``."""
    return "".join(json.dumps(record, **options) + "\n" for record in records)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8 atomically, see :func:`write_bytes`."""
    write_bytes(path, text.encode("utf-8", errors="backslashreplace"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write ``content`` atomically, see :func:`writing`."""
    with writing(path) as file:
        file.write(content)


@contextmanager
def writing(path: Path) -> Iterator[BinaryIO]:
    """Context with a new file that becomes ``path`` at its end. A link at ``path`` is replaced, never followed.

    OSError naming the file when the disk is full or the folder is not writable. After any error, also of another file
    in the context, nothing is left and an old file is unchanged."""
    temporary = path.with_name(f".{path.name[:100]}.{uuid.uuid4().hex}")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError) and error.filename in (None, str(temporary)):
            raise not_written(path, error) from error
        raise


def not_written(path: Path, error: OSError, why: str = "") -> OSError:
    """Make the error for a file that could not be written; its ``strerror`` is the reason alone, without the path."""
    reason = why or error.strerror or first_line(error)
    found = OSError(f"{path} could not be written: {reason}")
    found.strerror = reason
    return found


def open_to_append(path: Path) -> int:
    """Return a descriptor that appends to ``path``, which is created if missing. OSError naming the file if it cannot
    be written to, or is a link, which could lead anywhere."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
    try:
        return os.open(path, flags, 0o666)
    except OSError as error:
        raise not_written(path, error, "it is a link" if path.is_symlink() else "") from error


def append(descriptor: int, content: bytes, path: Path) -> None:
    """Append ``content`` to ``path``, open as ``descriptor``, and sync it to disk: all of it or nothing.

    OSError naming the file if it cannot be written to; the file then stays unchanged."""
    size = os.fstat(descriptor).st_size
    try:
        written = os.write(descriptor, content)
        while written < len(content):
            written += os.write(descriptor, content[written:])
        os.fsync(descriptor)
    except OSError as error:
        os.ftruncate(descriptor, size)
        raise not_written(path, error) from error


def remove(path: Path) -> None:
    """Remove a file, a folder with its content, or a link but not its target; do nothing if ``path`` does not exist."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def set_aside(folder: Path, patterns: Sequence[str]) -> Path | None:
    """Move the files in ``folder`` that match one of the glob ``patterns`` to a new subfolder of it, ``earlier_1`` or
    the next number that is free. Return the subfolder, or None if there are no such files. Links stay, and so does what
    lies behind one. OSError naming a file that cannot be moved."""
    real = folder.resolve()
    matching = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    found = sorted(path for path in matching if path.resolve() == real / path.relative_to(folder))
    if not found:
        return None
    aside = _new_subfolder(folder)
    for path in found:
        target = aside / path.relative_to(folder)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            path.rename(target)
        except OSError as error:
            failed = f"{path} is of an earlier run and cannot be moved to {target} ({error.strerror})"
            raise OSError(f"{failed}; choose another output folder.") from error
    return aside


def _new_subfolder(folder: Path) -> Path:
    """Create and return the first ``earlier_N`` that no other process has. OSError naming the folder if that fails."""
    number = 1
    while True:
        path = folder / f"earlier_{number}"
        try:
            path.mkdir()
            return path
        except FileExistsError:
            number += 1
        except OSError as error:
            raise OSError(f"{path} cannot be created ({error.strerror}); choose another output folder.") from error


def replace_folder(source: Path, target: Path) -> None:
    """Rename ``source`` to ``target``; an old target is moved aside first, as rename does not replace full folders."""
    old = target.with_name(f".{target.name}.old")
    remove(old)
    if target.exists() or target.is_symlink():
        target.rename(old)
    source.rename(target)
    remove(old)


def sha256(source: Path | bytes | str) -> str:
    """Return the SHA-256 of a file, bytes, or a text as UTF-8, in hex."""
    if not isinstance(source, Path):
        return hashlib.sha256(source.encode() if isinstance(source, str) else source).hexdigest()
    with source.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_json(content: Any) -> str:
    """Return the SHA-256 of ``content`` as JSON with sorted keys: independent of the order of dictionaries."""
    return sha256(json.dumps(content, sort_keys=True))


def sha256_of_folder(folder: str | Path) -> str:
    """Return the SHA-256 of the weights in a model folder or file, or of FILE/NAME, one of several models in a file;
    return a hub id unchanged."""
    place = Path(folder)
    if place.is_file():
        return sha256(place)
    if place.parent.is_file():
        return sha256(f"{sha256(place.parent)}/{place.name}")
    weights = sorted(place.glob("*.safetensors")) or sorted(place.glob("*.bin"))
    return sha256("".join(map(sha256, weights))) if weights else str(folder)


def share_weights(folder: Path) -> None:
    """Give weights in ``folder`` the permissions of the config.json beside them, which follow the user's umask:
    safetensors makes its files readable by their owner only."""
    for path in folder.rglob("*.safetensors"):
        path.chmod(stat.S_IMODE((path.parent / "config.json").stat().st_mode))


def sha256_of_files(paths: Sequence[Path], root: Path) -> str:
    """Hash the paths (relative to ``root``) and contents of files."""
    digest = hashlib.sha256()
    for path in paths:
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root).as_posix()}:{len(content)}:".encode() + content)
    return digest.hexdigest()
