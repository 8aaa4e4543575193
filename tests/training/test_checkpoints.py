import json
import os
import shutil

import pytest
from log_helpers import logged

from localctl.files import sha256_of_json
from localctl.training import checkpoints
from localctl.training.checkpoints import (
    CheckpointError,
    find_checkpoint,
    list_checkpoints,
    save_checkpoint,
    set_aside_later,
    sweep,
    verify_checkpoint,
)


def save(folder, step, keep=None):
    def write(path):
        (path / "part").mkdir()
        (path / "part" / "weights.bin").write_bytes(bytes(range(200)) * (step + 1))
        (path / "state.json").write_text(str(step))

    return save_checkpoint(folder, step, write, keep=keep, info={"step was": step})


def test_round_trip(tmp_path):
    path = save(tmp_path, 3)
    assert path == tmp_path / "checkpoint-3"
    manifest = verify_checkpoint(path)
    assert manifest["step"] == 3 and manifest["info"] == {"step was": 3}
    assert set(manifest["files"]) == {"part/weights.bin", "state.json"}
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-3"]


def test_the_list_is_ordered_by_number_and_ignores_everything_else(tmp_path):
    for step in (10, 9, 100):
        save(tmp_path, step)
    (tmp_path / "checkpoint-x").mkdir()
    (tmp_path / ".checkpoint-7.tmp").mkdir()
    (tmp_path / "checkpoint-8").write_text("a file")
    assert list(list_checkpoints(tmp_path)) == [9, 10, 100]
    assert list_checkpoints(tmp_path / "none") == {}


def test_pruning_keeps_the_newest_and_comes_after_the_rename(tmp_path, monkeypatch):
    order = []
    rename, remove = checkpoints.replace_folder, shutil.rmtree
    monkeypatch.setattr(checkpoints, "replace_folder", lambda *a: (order.append("commit"), rename(*a)))
    monkeypatch.setattr(shutil, "rmtree", lambda p, **k: (order.append(f"remove {p.name}"), remove(p, **k)))
    for step in (1, 2, 3):
        save(tmp_path, step, keep=2)
    assert list(list_checkpoints(tmp_path)) == [2, 3]
    last = order[len(order) - order[::-1].index("commit") :]
    assert "remove checkpoint-1" in last, order


def test_a_failed_write_leaves_the_earlier_ones_and_nothing_else(tmp_path):
    save(tmp_path, 1)

    def fail(path):
        (path / "half").write_text("half")
        raise OSError("disk full")

    with pytest.raises(CheckpointError, match=r"checkpoint-2 could not be saved .*disk full.*--resume_from") as error:
        save_checkpoint(tmp_path, 2, fail, keep=2, info={})
    assert isinstance(error.value.__cause__, OSError)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-1"]
    verify_checkpoint(tmp_path / "checkpoint-1")


def test_the_manifest_is_written_last_and_the_folder_appears_whole(tmp_path, monkeypatch):
    seen = []
    flush = checkpoints._flush

    def watch(path):
        seen.append((path.name, (tmp_path / "checkpoint-5").exists()))
        flush(path)

    monkeypatch.setattr(checkpoints, "_flush", watch)
    save(tmp_path, 5)
    names = [name for name, _ in seen]
    assert names.index("manifest.json") > names.index("weights.bin")
    assert [exists for name, exists in seen if name == "manifest.json"] == [False]


def test_saving_the_same_step_again_replaces_it(tmp_path):
    save(tmp_path, 1)
    (tmp_path / "checkpoint-1" / "state.json").write_text("spoilt")
    save(tmp_path, 1)
    verify_checkpoint(tmp_path / "checkpoint-1")
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-1"]


@pytest.mark.parametrize("keep", [1, 0])
def test_fewer_than_two_are_refused(tmp_path, keep):
    with pytest.raises(ValueError, match="At least 2"):
        save(tmp_path, 1, keep=keep)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_cleared_away(tmp_path):
    save(tmp_path, 1)
    (tmp_path / ".checkpoint-2.tmp").mkdir()
    (tmp_path / ".checkpoint-2.tmp" / "half").write_text("half")
    save(tmp_path, 3).rename(tmp_path / ".checkpoint-3.old")  # killed between the two renames
    save(tmp_path, 4)
    (tmp_path / ".checkpoint-4.old").mkdir()  # killed before the old one was removed
    sweep(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-3", "checkpoint-4"]
    sweep(tmp_path / "not there")


def test_one_bit_of_the_manifest_is_found(tmp_path):
    path = save(tmp_path, 1) / "manifest.json"
    whole = path.read_bytes()
    for place in range(0, len(whole), 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        if json_or_none(path) != json.loads(whole):
            with pytest.raises(ValueError, match="checkpoint-1"):
                verify_checkpoint(path.parent)


def json_or_none(path):
    try:
        return json.loads(path.read_text())
    except ValueError:
        return None


def flip_bit(path):
    data = bytearray((path / "part" / "weights.bin").read_bytes())
    data[50] ^= 1
    (path / "part" / "weights.bin").write_bytes(data)


def truncate(path):
    os.truncate(path / "part" / "weights.bin", 10)


def lose(path):
    (path / "state.json").unlink()


def spoil_manifest(path):
    (path / "manifest.json").write_text("{")


def lose_manifest(path):
    (path / "manifest.json").unlink()


def odd_manifest(path):
    (path / "manifest.json").write_text(json.dumps([1]))


@pytest.mark.parametrize("damage", [flip_bit, truncate, lose, spoil_manifest, lose_manifest, odd_manifest])
def test_damage_is_named_and_the_one_before_is_used(tmp_path, damage):
    save(tmp_path, 1)
    path = save(tmp_path, 2)
    damage(path)
    with pytest.raises(ValueError, match="checkpoint-2"):
        verify_checkpoint(path)
    said = logged()
    assert find_checkpoint(tmp_path, "latest") == tmp_path / "checkpoint-1"
    assert len(said) == 1 and "checkpoint-2" in said[0]
    with pytest.raises(ValueError, match="checkpoint-2"):
        find_checkpoint(tmp_path, str(path))


def test_find(tmp_path):
    said = logged()
    assert find_checkpoint(tmp_path, None) is None and not said
    assert find_checkpoint(tmp_path, "latest") is None
    assert "from the beginning" in said[0]
    for step in (2, 10):
        save(tmp_path, step)
    assert find_checkpoint(tmp_path, "latest") == tmp_path / "checkpoint-10"
    assert find_checkpoint(tmp_path, str(tmp_path / "checkpoint-2")) == tmp_path / "checkpoint-2"
    with pytest.raises(ValueError, match="checkpoint-3"):
        find_checkpoint(tmp_path, str(tmp_path / "checkpoint-3"))
    for step in (2, 10):
        flip_bit(tmp_path / f"checkpoint-{step}")
    with pytest.raises(ValueError, match="All 2 checkpoints"):
        find_checkpoint(tmp_path, "latest")


def test_later_ones_are_set_aside_not_deleted(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step)
    said = logged()
    set_aside_later(tmp_path, 1)
    assert list(list_checkpoints(tmp_path)) == [1] and len(said) == 2
    verify_checkpoint(tmp_path / "abandoned-checkpoint-3")


def sealed(path, **changes):
    """Forge a manifest that matches its hash."""
    body = json.loads((path / "manifest.json").read_text())
    body.pop("sha256")
    body |= changes
    body = {name: value for name, value in body.items() if value is not None}
    (path / "manifest.json").write_text(json.dumps({**body, "sha256": sha256_of_json(body)}))


MANIFESTS = {
    "brackets": lambda path: (path / "manifest.json").write_text("[" * 100_000),
    "digits": lambda path: (path / "manifest.json").write_text("9" * 5000),
    "not UTF-8": lambda path: (path / "manifest.json").write_bytes(b"\xff\xfe{}"),
    "a folder": lambda path: ((path / "manifest.json").unlink(), (path / "manifest.json").mkdir()),
    "no info": lambda path: sealed(path, info=None),
    "info a list": lambda path: sealed(path, info=[1]),
    "no files": lambda path: sealed(path, files={}),
    "step -5": lambda path: sealed(path, step=-5),
    "files a list": lambda path: sealed(path, files=[1]),
}


@pytest.mark.parametrize("damage", MANIFESTS)
def test_a_manifest_of_anybodys_is_named_and_the_one_before_used(tmp_path, damage):
    save(tmp_path, 1)
    MANIFESTS[damage](save(tmp_path, 2))
    said = logged()
    assert find_checkpoint(tmp_path, "latest") == tmp_path / "checkpoint-1"
    assert said == [f"The checkpoint {tmp_path / 'checkpoint-2'} has no readable manifest.json; use another one."]


def test_files_and_links_where_temporary_folders_should_be_are_cleared_away(tmp_path):
    target = tmp_path / "target"
    target.mkdir()
    (target / "mine").write_text("mine")
    (tmp_path / ".checkpoint-9.tmp").write_text("")
    (tmp_path / ".checkpoint-8.tmp").symlink_to(target)
    (tmp_path / ".checkpoint-7.old").symlink_to(target)
    save(tmp_path, 7)
    sweep(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"target", "checkpoint-7"}
    (tmp_path / ".checkpoint-3.tmp").symlink_to(target)
    save(tmp_path, 3)
    assert (target / "mine").read_text() == "mine" and not (tmp_path / ".checkpoint-3.tmp").is_symlink()


def test_an_old_checkpoint_that_is_a_link_is_pruned_as_a_link(tmp_path):
    save(tmp_path, 1).rename(tmp_path / "elsewhere")
    (tmp_path / "checkpoint-1").symlink_to(tmp_path / "elsewhere")
    for step in (2, 3):
        save(tmp_path, step, keep=2)
    assert list(list_checkpoints(tmp_path)) == [2, 3] and (tmp_path / "elsewhere" / "state.json").exists()


def test_one_pruned_between_two_looks_is_no_damage(tmp_path, monkeypatch):
    for step in (1, 2, 3):
        save(tmp_path, step)
    verify, said = checkpoints.verify_checkpoint, logged()

    def pruned(path):
        if path.name == "checkpoint-3":
            shutil.rmtree(path)
        return verify(path)

    monkeypatch.setattr(checkpoints, "verify_checkpoint", pruned)
    assert find_checkpoint(tmp_path, "latest") == tmp_path / "checkpoint-2" and said == []


def test_a_checkpoint_behind_a_link_lies_in_the_folder_of_the_link(tmp_path):
    save(tmp_path / "else", 2)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "checkpoint-2").symlink_to(tmp_path / "else" / "checkpoint-2")
    link = find_checkpoint(tmp_path / "out", "latest")
    assert checkpoints.lies_in(link, tmp_path / "out") and checkpoints.lies_in(link, tmp_path / "else")
    assert not checkpoints.lies_in(tmp_path / "else" / "checkpoint-2", tmp_path / "out")


@pytest.mark.parametrize("text", ["[enforce fail at inline_container.cc:672] . unexpected pos 1 vs 2", ""])
def test_a_full_disk_is_said_with_its_room(tmp_path, text):
    def full(path):
        raise RuntimeError(text) from OSError(28, "No space left on device") if not text else RuntimeError(text)

    with pytest.raises(CheckpointError) as error:
        save_checkpoint(tmp_path, 1, full, info={})
    said = str(error.value)
    assert "inline_container" not in said and " MB free there" in said and str(tmp_path) in said
    assert ("No space left on device" if not text else "the disk is full") in said


def test_folders_are_written_whole_or_not_at_all(tmp_path):
    def good(path):
        (path / "file").write_text("new")

    def bad(path):
        good(path)
        raise RuntimeError("I/O error: full")

    checkpoints.write_folders(tmp_path, {"a": good, "b": good})
    (tmp_path / "a" / "file").write_text("old")
    with pytest.raises(OSError, match=r"a and b could not be written to .*\(I/O error: full, .* free there"):
        checkpoints.write_folders(tmp_path, {"a": good, "b": bad})
    assert (tmp_path / "a" / "file").read_text() == "old" and len(list(tmp_path.iterdir())) == 2
    (tmp_path / "a").rename(tmp_path / ".a.old")
    (tmp_path / ".b.tmp").mkdir()
    checkpoints.sweep_folders(tmp_path, ("a", "b"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
