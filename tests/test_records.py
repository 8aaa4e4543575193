"""Records of settings: validated however they are made, and every mistake is one sentence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import pytest

from localctl.bases import SCHEDULERS
from localctl.records import Decay, Finite, NotNegative, Positive, Rate, Share, record
from localctl.settings import CHANNELS, MASK_KINDS, ConditionKind, MixedKind
from localctl.training.watch_settings import SchedulerName


@record("inner")
@dataclass(kw_only=True)
class Inner:
    count: Positive = 3
    kind: Literal["a", "b"] = "a"
    pair: int | tuple[int, int] = 1
    names: tuple[str, ...] | None = None
    table: Mapping[str, Rate] | None = None

    def __post_init__(self) -> None:
        if self.count == 7:
            raise ValueError("Seven is not for inner.count; give eight.")


@record()
@dataclass(kw_only=True)
class Outer:
    inner: Inner = field(default_factory=Inner)
    steps: NotNegative = 0
    share: Share = 0.5
    decay: Decay = 0.9
    scale: Finite = 1.0
    on: bool = False
    text: str = "x"


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"steps": -1}, "steps must be at least 0, not -1."),
        ({"steps": "-1"}, "steps must be at least 0, not -1."),
        ({"steps": "few"}, "steps must be a whole number, not 'few'."),
        ({"steps": 1.5}, "steps must be a whole number, not 1.5."),
        ({"share": 1.5}, "share must be at most 1, not 1.5."),
        ({"decay": 1}, "decay must be below 1, not 1."),
        ({"scale": float("nan")}, "scale must be a finite number, not nan."),
        ({"scale": "much"}, "scale must be a number, not 'much'."),
        ({"on": "perhaps"}, "on must be true or false, not 'perhaps'."),
        ({"text": [1]}, "text must be text, not [1]."),
        ({"inner": 3}, "inner must be a section of settings, not 3."),
        ({"inner": {"kind": "c"}}, "Unknown inner.kind 'c'; choose one of a, b."),
        ({"inner": {"count": 7}}, "Seven is not for inner.count; give eight."),
        ({"inner": {"pair": [1, 2, 3]}}, "inner.pair takes 2 values, not 3."),
        ({"inner": {"pair": [1]}}, "inner.pair takes 2 values, not 1."),
        ({"inner": {"names": 3}}, "inner.names must be a list like [1, 2], not 3."),
        ({"inner": {"table": {"x": -1}}}, "inner.table.x must be at least 0, not -1."),
        ({"inner": {"table": [1]}}, "inner.table must be a mapping like {a: 1}, not [1]."),
        ({"inner": {"cuont": 1}}, "There is no setting 'inner.cuont'; did you mean inner.count?"),
        ({"stepps": 1}, "There is no setting 'stepps'; did you mean steps?"),
    ],
)
def test_a_mistake_names_the_setting_its_value_and_the_way_out(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError) as caught:
        Outer(**values)
    assert str(caught.value) == sentence


def test_a_section_by_itself_names_its_settings_in_full() -> None:
    with pytest.raises(ValueError, match="^inner.count must be at least 1, not 0.$"):
        Inner(count=0)
    with pytest.raises(ValueError, match="^inner.count must be at least 1, not 0.$"):
        replace(Inner(), count=0)


def test_values_are_converted_and_texts_stay_as_they_are() -> None:
    class Marked(str):
        pass

    made = Outer(inner={"count": "4", "names": ["x", Marked("y")]}, text="caf\udce9")  # type: ignore[arg-type]
    again = replace(made, steps=2)
    assert made.inner == Inner(count=4, names=("x", "y")) and again.inner is made.inner
    assert again.text == "caf\udce9" and isinstance((made.inner.names or ())[1], Marked)


def test_choices_are_those_of_the_tables() -> None:
    assert SchedulerName.__args__ == tuple(SCHEDULERS)
    assert ConditionKind.__args__ == tuple(CHANNELS)
    assert (*MixedKind.__args__, "mixture") == MASK_KINDS
