"""One run at a time in a folder, whoever was killed and wherever it ran."""

import json
import os
import socket
import threading
import time

import pytest
from log_helpers import logged
from process_helpers import finish, start, wait_for

from localctl import lock
from localctl.lock import LOCK, FolderInUse, FolderLock


def owned_by(folder, **changes):
    """A lock in ``folder`` as another process would have left it."""
    folder.mkdir(exist_ok=True)
    parent = os.getppid()
    about = {"token": "other", "host": socket.gethostname(), "space": lock._pid_space(), "pid": parent} | {
        "began": lock.start_time(parent),
        "since": "2026-01-01 00:00:00",
    }
    (folder / LOCK).write_text(json.dumps(about | changes))


def test_a_living_owner_on_this_machine_is_named(tmp_path):
    owned_by(tmp_path)
    with pytest.raises(FolderInUse, match=f"is in use by process {os.getppid()} on .* .since 2026.*--output_dir"):
        FolderLock(tmp_path)
    assert json.loads((tmp_path / LOCK).read_text())["token"] == "other"


@pytest.mark.parametrize("gone", [{"pid": 2**22 + 7}, {"began": "12"}, {"pid": "x"}, {"pid": 10**30, "began": "1"}])
def test_an_owner_that_is_gone_is_no_owner(tmp_path, gone):
    """Killed, or its number belongs to another process by now."""
    owned_by(tmp_path, **gone)
    if gone.get("pid") == 10**30:
        with pytest.raises(FolderInUse):  # no process can be asked for by that number: the safe side
            FolderLock(tmp_path)
        return
    held = FolderLock(tmp_path)
    assert held.mine and not held.taken
    held.release()
    assert not (tmp_path / LOCK).exists()


def hold(folder):
    FolderLock(folder)
    time.sleep(60)


def test_kill_9_frees_the_folder_at_once(tmp_path):
    process = start(hold, tmp_path / "out")
    wait_for(lambda: lock._read(tmp_path / "out" / LOCK), process)
    with pytest.raises(FolderInUse, match=f"process {process.pid} "):
        FolderLock(tmp_path / "out")
    process.kill()
    assert finish(process) == -9
    FolderLock(tmp_path / "out").release()


@pytest.mark.parametrize("elsewhere", [{"host": "another"}, {"space": "another container"}])
def test_an_owner_elsewhere_lives_as_long_as_it_renews(tmp_path, elsewhere):
    owned_by(tmp_path, **elsewhere)
    ended = threading.Event()

    def renew():
        while not ended.wait(0.02):
            os.utime(tmp_path / LOCK)

    owner = threading.Thread(target=renew)
    owner.start()
    said = logged()
    try:
        with pytest.raises(FolderInUse, match="since 2026"):
            FolderLock(tmp_path, patience=0.5)
    finally:
        ended.set()
        owner.join()
    assert len(said) == 1 and "looking for up to" in said[0]
    FolderLock(tmp_path, patience=0.2).release()


@pytest.mark.parametrize("content", [b"", b"\xff", b"[" * 100_000, b"[1]", b'{"host": 3}'])
def test_a_lock_that_says_nothing_is_waited_for(tmp_path, content):
    (tmp_path / LOCK).write_bytes(content)
    said = logged()
    FolderLock(tmp_path, patience=0.2).release()
    assert "unknown process" in said[0] or "process None" in said[0]


def test_a_link_is_replaced_and_what_it_leads_to_stays(tmp_path):
    target, out = tmp_path / "mine", tmp_path / "out"
    target.write_text("mine")
    out.mkdir()
    (out / LOCK).symlink_to(target)
    said = logged()
    held = FolderLock(out)
    assert held.mine and target.read_text() == "mine" and not said  # nobody of ours: not waited for
    held.release()


def test_what_was_made_for_the_lock_goes_with_it(tmp_path):
    FolderLock(tmp_path / "a" / "b").release()
    assert list(tmp_path.iterdir()) == []
    held = FolderLock(tmp_path / "a" / "b")
    (tmp_path / "a" / "b" / "kept").write_text("")
    held.release()
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["kept"]


def test_an_owner_that_slept_too_long_learns_of_its_successor(tmp_path):
    held = FolderLock(tmp_path)
    owned_by(tmp_path, host="another", pid=5)
    assert not held.mine and held.taken.startswith("process 5 on another")
    held.release()
    assert json.loads((tmp_path / LOCK).read_text())["host"] == "another"


def test_one_that_somebody_removed_is_put_back(tmp_path):
    held = FolderLock(tmp_path / "out")
    (tmp_path / "out" / LOCK).unlink()
    (tmp_path / "out").rmdir()
    assert not held.mine and held.taken == ""
    held.renew()
    assert held.mine
    held.release()


def test_the_owner_renews(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.01)
    held = FolderLock(tmp_path)
    os.utime(tmp_path / LOCK, (1, 1))
    end = time.monotonic() + 20
    while (tmp_path / LOCK).stat().st_mtime < 2:
        assert time.monotonic() < end
        time.sleep(0.01)
    held.release()
