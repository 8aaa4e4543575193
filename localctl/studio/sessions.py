"""The sessions of the page: what belongs to one browser tab, in memory and in a folder of its own."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MOST_SESSIONS = 64  # the one unused for longest is forgotten beyond that
_MOST_RESULTS = 64  # files of results that a session keeps


@dataclass
class Session:
    """One browser tab: its folder, the jobs it runs, and what the last of them made.

    ``results``: by the name of its file in ``folder``, whatever the job says of each image.
    """

    folder: Path
    running: set[threading.Event] = field(default_factory=set)
    results: OrderedDict[str, Any] = field(default_factory=OrderedDict)
    made: int = 0

    def new_folder(self) -> Path:
        """Create a folder for the files of one job, of which several may begin at once."""
        while True:
            self.made += 1
            folder = self.folder / f"job_{self.made:05d}"
            with suppress(FileExistsError):
                folder.mkdir(parents=True)
                return folder

    def keep(self, path: Path, result: Any) -> None:
        """Remember what a file shows; the oldest results beyond a limit are deleted."""
        self.results[str(path.relative_to(self.folder))] = result
        while len(self.results) > _MOST_RESULTS:
            name, _ = self.results.popitem(last=False)
            with suppress(FileNotFoundError):
                (self.folder / name).unlink()
            shutil.rmtree((self.folder / name).with_suffix(""), ignore_errors=True)  # what was offered with it

    def newest(self, fits: Callable[[Any], object]) -> Any:
        """Return the newest result that ``fits``, or None."""
        return next(filter(fits, reversed(self.results.values())), None)

    def cancel(self) -> int:
        """Ask all jobs of this session to stop; return how many there were."""
        for event in list(self.running):
            event.set()
        return len(self.running)


class Sessions:
    """The sessions of one server; :meth:`close` deletes their folders."""

    def __init__(self) -> None:
        self._root = tempfile.TemporaryDirectory(prefix="localctl_studio_")
        self._sessions: OrderedDict[str, Session] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, request: Any) -> Session:
        """Return the session of a request, which is new if the page has not sent anything yet."""
        key = _key(request)
        with self._lock:
            session = self._sessions.get(key)
            if session is None:
                folder = Path(self._root.name) / key
                folder.mkdir(parents=True, exist_ok=True)
                session = self._sessions[key] = Session(folder)
            self._sessions.move_to_end(key)
            for old in self._idle(len(self._sessions) - MOST_SESSIONS):
                self._forget(old)
            return session

    def end(self, request: Any) -> None:
        """Cancel the jobs of a tab that was closed, and delete its folder."""
        with self._lock:
            self._forget(_key(request))

    def close(self) -> None:
        """Cancel all jobs and delete all folders."""
        with self._lock:
            for key in list(self._sessions):
                self._forget(key)
        self._root.cleanup()

    def __len__(self) -> int:
        return len(self._sessions)

    def _idle(self, count: int) -> Iterator[str]:
        idle = [key for key, session in self._sessions.items() if not session.running]
        yield from idle[: max(0, min(count, len(idle) - 1))]

    def _forget(self, key: str) -> None:
        session = self._sessions.pop(key, None)
        if session is not None:
            session.cancel()
            shutil.rmtree(session.folder, ignore_errors=True)


def _key(request: Any) -> str:
    """Return the name of a request's session. The page chooses its own, so it is never part of a path as it is."""
    name = str(getattr(request, "session_hash", None) or "")
    return hashlib.sha256(name.encode("utf-8", "replace")).hexdigest()[:32]
