"""The list of bad rows that a run records."""

import json

import pytest

from localctl.data import Problem, Quarantine, TooManyBadRows
from localctl.data.bad_rows import QUARANTINE


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_quarantine_lists_each_row_once_and_stops_at_the_limit(tmp_path):
    def bad(i):
        return Problem(f"{i}.png", "image damaged" if i % 2 else "caption missing", f"number {i} is bad")

    quarantine = Quarantine(tmp_path, rows=200, max_fraction=0.01)
    quarantine.add([], step=1)
    assert not (tmp_path / "quarantine.jsonl").exists() and quarantine.summary() == ""
    quarantine.add([bad(1), bad(1)], step=2)
    quarantine.add([bad(1), bad(2)], step=5)
    assert [(r["key"], r["step"]) for r in rows_of(quarantine.path)] == [("1.png", 2), ("2.png", 5)]
    assert "2 of 200 rows unusable and replaced (1 caption missing, 1 image damaged)" in quarantine.summary()
    with pytest.raises(TooManyBadRows, match=r"3 of 200 .*max_bad_fraction=0.01.*1.png: number 1.*3.png: number 3 is"):
        quarantine.add([bad(3)], step=6)
    with quarantine.path.open("a") as file:
        file.write('{"step": 7, "key": "torn')  # by a kill
    with quarantine.path.open("a") as file:
        file.write('\\n{"step": 8, "key": "{torn}\\n[1]\\n{"step": 1}\\n')  # a half that ends like a whole
    resumed = Quarantine(tmp_path, rows=200, max_fraction=0.01, start=4)
    assert list(resumed.problems) == ["1.png"] and [r["key"] for r in rows_of(resumed.path)] == ["1.png"]
    Quarantine(tmp_path, rows=200, max_fraction=0.01, start=0)
    assert not resumed.path.exists()
    Quarantine(None, rows=10, max_fraction=0.5).add([bad(1)], step=1)  # another process counts without writing


@pytest.mark.parametrize(
    ("rows", "share", "allowed"), [(15, 0.01, 1), (40, 0.01, 1), (40, 0.1, 4), (300, 0.01, 3), (15, 0, 0)]
)
def test_one_bad_row_never_stops_a_run_unless_asked_to(rows, share, allowed):
    quarantine = Quarantine(None, rows, share)
    for number in range(allowed):
        quarantine.add([Problem(f"{number}.png", "image damaged", "bad")], step=1)
    with pytest.raises(TooManyBadRows):
        quarantine.add([Problem("last.png", "image damaged", "bad")], step=2)


@pytest.mark.parametrize(
    "rest", [b'{"step": 1, "key": {"a": 1}', b"[" * 100_000, b"\xff\xfe", b"[1]", b'{"step": "1"}', b"3"]
)
def test_a_list_that_ends_in_anything_is_read_as_far_as_it_is_ours(tmp_path, rest):
    """A killed run leaves half a line, which may end in a bracket all the same."""
    ours = {"step": 1, "key": "a", "reason": "damaged", "detail": "it is"}
    (tmp_path / QUARANTINE).write_bytes(json.dumps(ours).encode() + b"\n" + rest)
    quarantine = Quarantine(tmp_path, 10, 0.5, start=3)
    assert list(quarantine.problems) == ["a"]
    quarantine.add([Problem("b", "damaged", "it is")], 4)
    lines = (tmp_path / QUARANTINE).read_text().splitlines()
    assert [json.loads(line)["key"] for line in lines] == ["a", "b"]
