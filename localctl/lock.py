"""One run at a time in a folder: a file that names who writes there, on any disk that several machines may share.

On the machine that the file names, its process tells: where that is gone, ``kill -9`` included, the folder is free at
once. From another machine (or container) no process can be seen, so the owner renews the file every ``BEAT`` seconds:
one that is not renewed for ``PATIENCE`` seconds belongs to nobody. No clock is compared and no lock of the file system
is needed. An owner that slept longer than that finds another's name in the file, and ends without writing.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from localctl.files import parse_json, write_json

logger = logging.getLogger(__name__)
LOCK = ".lock"
BEAT, PATIENCE = 15.0, 120.0
_SETTLE = 0.3  # for two that take over the same folder in the same moment; the later one has it


class FolderInUse(ValueError):
    """Another run writes to the folder."""


class FolderLock:
    """The right to write to ``folder``, which is made if it is not there. Held until :meth:`release`.

    Raises:
        FolderInUse: another process has it; the message names process, machine and since when.
        OSError: the folder cannot be written to.
    """

    def __init__(self, folder: Path, *, patience: float = PATIENCE) -> None:
        self.folder, self.path = folder, folder / LOCK
        self._made = [path for path in (folder, *folder.parents) if not path.exists()]
        self._token = uuid.uuid4().hex
        self._about = {
            "token": self._token,
            "host": socket.gethostname(),
            "space": _space(),
            "pid": os.getpid(),
            "began": _began(os.getpid()),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        }
        self._done = threading.Event()
        folder.mkdir(parents=True, exist_ok=True)
        try:
            self._take(patience)
        except BaseException:
            self._remove_made()
            raise
        self._pid = os.getpid()
        threading.Thread(target=self._renew, daemon=True, name="folder lock").start()

    @property
    def mine(self) -> bool:
        """Whether the folder and the file are still there, and nobody else has taken it over."""
        return _read(self.path).get("token") == self._token

    @property
    def taken(self) -> str:
        """Who has taken the folder over meanwhile, in words; empty if nobody has."""
        found = _read(self.path)
        return _who(found) if found and found.get("token") != self._token else ""

    def renew(self) -> None:
        """Put the file back that somebody has removed. OSError where that cannot be done."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.path, self._about, end="")

    def release(self) -> None:
        """Let others write. What was made for the lock alone goes, too."""
        if self._done.is_set() or os.getpid() != self._pid:  # a forked process is not the owner
            return
        self._done.set()
        if self.mine:
            self.path.unlink(missing_ok=True)
            self._remove_made()

    def _take(self, patience: float) -> None:
        text = json.dumps(self._about).encode()
        try:
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            self._take_over(patience)
            return
        try:
            os.write(descriptor, text)
        except OSError as error:
            self.path.unlink(missing_ok=True)
            raise OSError(f"{self.path} could not be written: {error.strerror}") from error
        finally:
            os.close(descriptor)

    def _take_over(self, patience: float) -> None:
        """Take the folder from an owner that is gone."""
        seen, owner = _state(self.path), _read(self.path)
        alive = _lives(owner) if not self.path.is_symlink() else False  # none of us makes a link
        if alive is None:  # of another machine, or not readable
            logger.info(
                f"{self.folder} is held by {_who(owner)}: looking for up to {patience:.0f} s whether that still lives."
            )
            end = time.monotonic() + patience
            while time.monotonic() < end and _state(self.path) == seen:
                time.sleep(min(1.0, patience / 10))
            alive = _state(self.path) not in (seen, None)
        if alive:
            raise FolderInUse(
                f"{self.folder} is in use by {_who(owner)}; wait until it has ended, or choose another --output_dir."
            )
        if _read(self.path).get("token") == owner.get("token"):
            write_json(self.path, self._about, end="")
        time.sleep(_SETTLE)
        if not self.mine:
            raise FolderInUse(f"{self.folder} was taken in this moment by {_who(_read(self.path))}; start again later.")

    def _renew(self) -> None:
        """Give the owner's sign of life, from a thread that ends with the process."""
        while not self._done.wait(BEAT):
            try:
                if self.mine:
                    os.utime(self.path)
            except OSError:
                continue  # a disk that is away for a moment

    def _remove_made(self) -> None:
        for path in self._made:
            try:
                path.rmdir()
            except OSError:  # something lies in it
                return


def _lives(owner: dict[str, Any]) -> bool | None:
    """Whether the process of a lock is alive; None where it cannot be seen from here."""
    if not owner or (owner.get("host"), owner.get("space")) != (socket.gethostname(), _space()):
        return None
    pid = owner.get("pid")
    if not isinstance(pid, int) or pid == os.getpid():  # an earlier run of this very process
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return _began(pid) == owner.get("began")  # or the number belongs to another process by now


def _began(pid: int) -> str | None:
    """When process ``pid`` began, in the kernel's own count; empty if it has ended, None where the system does not
    say."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None if not Path("/proc/self/stat").exists() else ""
    return "" if fields[0] == "Z" else fields[19]


def _space() -> str:
    """In which numbers of processes mean the same: this start of this machine, and its container."""
    parts = []
    for read in (Path("/proc/sys/kernel/random/boot_id").read_text, lambda: os.readlink("/proc/self/ns/pid")):
        try:
            parts.append(read().strip())
        except OSError:
            parts.append("")
    return " ".join(parts)


def _read(path: Path) -> dict[str, Any]:
    """Return what a lock says; empty where it is not there or says nothing."""
    try:
        found = parse_json(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _state(path: Path) -> tuple[int, bytes] | None:
    """Return what changes when a lock is renewed or taken."""
    try:
        content = path.read_bytes()  # first: opening a file makes a network disk look again
        return path.stat().st_mtime_ns, content
    except OSError:
        return None


def _who(owner: dict[str, Any]) -> str:
    if not owner:
        return "a process that does not say its name"
    return f"process {owner.get('pid')} on {owner.get('host')} (since {owner.get('since')})"
