"""A lock that lets one run at a time write to a folder, also on a disk that several machines share.

A lock file names its owner: machine and process. On that machine the folder is free as soon as the process has ended,
even by ``kill -9``. Other machines (or containers) cannot see the process, so the owner renews the file every ``BEAT``
seconds; a file that was not renewed for ``PATIENCE`` seconds has lost its owner. Clocks are not compared, and the file
system needs no locks. An owner that was suspended for longer finds another owner in the file, and ends without writing.
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

from localctl.files import not_written, parse_json, write_json

logger = logging.getLogger(__name__)
LOCK = ".lock"
BEAT, PATIENCE = 15.0, 120.0
_SETTLE = 0.3  # if two runs take over a folder at the same time, the later one wins


class FolderInUse(ValueError):
    """Another run writes to the folder."""


class FolderLock:
    """The exclusive right to write to ``folder``, which is created if missing. Held until :meth:`release`. flag: that
    names the folder.

    Raises:
        FolderInUse: another process holds it; the message names the process, its machine and the time it started.
        OSError: the folder cannot be written to.
    """

    def __init__(self, folder: Path, *, patience: float = PATIENCE, flag: str = "--output_dir") -> None:
        self.folder, self.path, self._flag = folder, folder / LOCK, flag
        self._made = [path for path in (folder, *folder.parents) if not path.exists()]
        self._token = uuid.uuid4().hex
        self._about = {
            "token": self._token,
            "host": socket.gethostname(),
            "space": _pid_space(),
            "pid": os.getpid(),
            "began": start_time(os.getpid()),
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
        """Whether the lock file still exists and names this owner."""
        return _read(self.path).get("token") == self._token

    @property
    def taken(self) -> str:
        """Description of the process that has taken over the folder; empty if there is none."""
        found = _read(self.path)
        return _who(found) if found and found.get("token") != self._token else ""

    def renew(self) -> None:
        """Restore a lock file that was removed. OSError if it cannot be written."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.path, self._about, end="")

    def release(self) -> None:
        """Release the folder, and remove folders that were created for the lock and are empty."""
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
            raise not_written(self.path, error) from error
        finally:
            os.close(descriptor)

    def _take_over(self, patience: float) -> None:
        """Take the folder from an owner that is gone."""
        seen, owner = _state(self.path), _read(self.path)
        alive = _is_alive(owner) if not self.path.is_symlink() else False  # a link is no lock of ours
        if alive is None:  # on another machine, or the file is not readable
            logger.info(
                f"{self.folder} is held by {_who(owner)}: looking for up to {patience:.0f} s whether that still lives."
            )
            end = time.monotonic() + patience
            while time.monotonic() < end and _state(self.path) == seen:
                time.sleep(min(1.0, patience / 10))
            alive = _state(self.path) not in (seen, None)
        if alive:
            raise FolderInUse(
                f"{self.folder} is in use by {_who(owner)}; wait until it has ended, or choose another {self._flag}."
            )
        if _read(self.path).get("token") == owner.get("token"):
            write_json(self.path, self._about, end="")
        time.sleep(_SETTLE)
        if not self.mine:
            raise FolderInUse(f"{self.folder} was just taken by {_who(_read(self.path))}; start again later.")

    def _renew(self) -> None:
        """Renew the lock file regularly; runs in a thread that ends with the process."""
        while not self._done.wait(BEAT):
            try:
                if self.mine:
                    os.utime(self.path)
            except OSError:
                continue  # the disk may be back at the next attempt

    def _remove_made(self) -> None:
        for path in self._made:
            try:
                path.rmdir()
            except OSError:  # not empty
                return


def _is_alive(owner: dict[str, Any]) -> bool | None:
    """Return whether the owner's process is alive; None if it runs on another machine or in another container."""
    if not owner or (owner.get("host"), owner.get("space")) != (socket.gethostname(), _pid_space()):
        return None
    pid = owner.get("pid")
    if not isinstance(pid, int) or pid == os.getpid():  # the id of this process was that of an earlier run
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return start_time(pid) == owner.get("began")  # else another process has this id now


def start_time(pid: int) -> str | None:
    """Return the start time of process ``pid`` in the kernel's clock ticks; "" if it has ended, None if the system has
    no /proc."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None if not Path("/proc/self/stat").exists() else ""
    return "" if fields[0] == "Z" else fields[19]


def _pid_space() -> str:
    """Return the space in which process ids are unique: the boot of this machine, and the container."""
    parts = []
    for read in (Path("/proc/sys/kernel/random/boot_id").read_text, lambda: os.readlink("/proc/self/ns/pid")):
        try:
            parts.append(read().strip())
        except OSError:
            parts.append("")
    return " ".join(parts)


def _read(path: Path) -> dict[str, Any]:
    """Return the content of a lock file; empty if it is missing or damaged."""
    try:
        found = parse_json(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _state(path: Path) -> tuple[int, bytes] | None:
    """Return the lock file's time and content: they change when it is renewed or taken over. None if it is missing."""
    try:
        content = path.read_bytes()  # first: opening the file refreshes the cache of a network disk
        return path.stat().st_mtime_ns, content
    except OSError:
        return None


def _who(owner: dict[str, Any]) -> str:
    if not owner:
        return "an unknown process"
    return f"process {owner.get('pid')} on {owner.get('host')} (since {owner.get('since')})"
