"""Small files: JSON of anybody's, texts written whole."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from localctl.files import first_line, parse_json, read_json, set_aside, write_text, writing


def test_first_line_is_part_of_a_sentence():
    assert first_line(ValueError("one.\ntwo")) == "one"
    assert first_line(MemoryError()) == "MemoryError"


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 100_000, "1" * 5_000, b"\xff\xfe{}", b"\xe9", "nonsense", ""]
)
def test_what_is_no_json_is_a_value_error(text):
    with pytest.raises(ValueError):
        parse_json(text)


def test_a_byte_order_mark_is_read_over(tmp_path):
    assert parse_json("\ufeff[1]") == parse_json(b"\xef\xbb\xbf[1]") == [1]
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(tmp_path / "a.json", "The file") == {"a": 1}


def test_read_json_names_the_file(tmp_path):
    with pytest.raises(ValueError, match="^The layout .*none.json cannot be read"):
        read_json(tmp_path / "none.json", "The layout")
    with pytest.raises(ValueError, match="^The layout .* cannot be read"):
        read_json(tmp_path, "The layout")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="deep.json is not valid JSON .nested too deep"):
        read_json(tmp_path / "deep.json", "The layout")


def test_write_text_replaces_a_link_and_keeps_its_target(tmp_path):
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_text("mine")
    link.symlink_to(target)
    write_text(link, "é\ud800")
    assert target.read_text() == "mine" and not link.is_symlink()
    assert link.read_text(encoding="utf-8") == "é\\ud800"
    assert stat.S_IMODE(link.stat().st_mode) == stat.S_IMODE(target.stat().st_mode)
    assert sorted(os.listdir(tmp_path)) == ["link", "target"]


def test_write_text_that_fails_names_the_file_and_leaves_nothing(tmp_path):
    with pytest.raises(OSError, match="none/a.txt could not be written: No such file"):
        write_text(tmp_path / "none" / "a.txt", "")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder could not be written"):
        write_text(tmp_path / "folder", "")
    assert os.listdir(tmp_path) == ["folder"]


def test_a_file_that_is_not_finished_leaves_nothing_and_only_its_own_errors_name_it(tmp_path):
    path, gone = tmp_path / "a.txt", tmp_path / "gone"
    path.write_text("old")
    with pytest.raises(FileNotFoundError) as missing, writing(path):
        gone.read_bytes()
    assert missing.value.filename == str(gone)
    with pytest.raises(OSError, match="a.txt could not be written: No space left") as full, writing(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert full.value.strerror == "No space left on device"
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), writing(path) as file:
            file.write(b"half")
            raise error
    assert os.listdir(tmp_path) == ["a.txt"] and path.read_text() == "old"


def test_files_of_an_earlier_run_are_moved_and_no_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    (folder / "steps").mkdir(parents=True)
    (folder / "earlier_1").mkdir()
    elsewhere.mkdir()
    for path in (folder / "a.png", folder / "steps" / "a.png", folder / "notes.txt", elsewhere / "a.png"):
        path.write_text(path.name)
    (folder / "linked").symlink_to(elsewhere)
    (folder / "b.png").symlink_to(elsewhere / "a.png")
    patterns = ("*.png", "*/a.png")
    reached = tmp_path / "by_a_link"
    reached.symlink_to(folder)  # the folder itself may be reached by one
    assert set_aside(reached, patterns) == reached / "earlier_2"
    kept = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert kept == {"earlier_2/a.png", "earlier_2/steps/a.png", "notes.txt", "b.png"}
    assert (elsewhere / "a.png").is_file() and set_aside(folder, ("*.jpg",)) is None

    def refuse(self: Path, *target: Path) -> None:
        raise PermissionError(1, "Operation not permitted")

    (folder / "a.png").write_text("new")
    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OSError, match="a.png is of an earlier run and cannot .* [(]Operation .* another output folder"):
        set_aside(folder, ("a.png",))
    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(OSError, match="earlier_1 cannot be created .* another output folder"):
        set_aside(folder, ("a.png",))
