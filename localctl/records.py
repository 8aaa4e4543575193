"""Records of settings: dataclasses whose values pydantic validates, with every mistake reported in one sentence.

A record is a keyword-only dataclass decorated with :func:`record`. Its annotations state the type and range of each
setting (``Literal`` for choices, the types below for ranges); checks across settings belong in its ``__post_init__``.
"""

from __future__ import annotations

import functools
import typing
from collections.abc import Callable, Mapping
from dataclasses import is_dataclass
from typing import Annotated, Any, TypeVar

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import ArgsKwargs, ErrorDetails

from localctl.messages import nearest
from localctl.sizes import shown

Positive = Annotated[int, Field(ge=1)]
NotNegative = Annotated[int, Field(ge=0)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Rate = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]

_CONFIG = ConfigDict(extra="forbid", coerce_numbers_to_str=True)
_LIMITS = {
    "greater_than_equal": "at least {ge:g}",
    "greater_than": "above {gt:g}",
    "less_than_equal": "at most {le:g}",
    "less_than": "below {lt:g}",
    "finite_number": "a finite number",
}
_KINDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "text",
    "tuple": "a list like [1, 2]",
    "dict": "a mapping like {a: 1}",
    "mapping": "a mapping like {a: 1}",
    "dataclass": "a section of settings",
}

Class = TypeVar("Class", bound=type)


def record(section: str = "") -> Callable[[Class], Class]:
    """Decorate a keyword-only dataclass, so that its constructor and ``replace`` validate and convert the values.

    section: dotted name that error sentences put before the settings of a record that is not part of another.

    The decorated class raises a ValueError in one sentence for an unknown setting, and for a value of another type or
    out of range. Nested dicts become the records of those fields.
    """

    def decorate(cls: Class) -> Class:
        @functools.wraps(cls.__init__)  # type: ignore[misc]  # of this very class
        def validated(self: Any, **values: Any) -> None:
            try:
                _adapter(cls).validator.validate_python(ArgsKwargs((), _replace_surrogates(values)), self_instance=self)
            except ValidationError as error:
                raise ValueError(sentence(error, cls, section)) from None
            _restore_texts(self, values)

        setattr(cls, "__pydantic_config__", _CONFIG)  # noqa: B010  # unknown to mypy
        setattr(cls, "__init__", validated)  # noqa: B010
        return cls

    return decorate


def _replace_surrogates(given: Any) -> Any:
    """Return ``given`` with question marks for lone surrogates in texts, as of a path in another encoding, which
    pydantic refuses."""
    if isinstance(given, str):
        return given.encode("utf-8", "replace").decode()
    if isinstance(given, (list, tuple)):
        return type(given)(map(_replace_surrogates, given))
    if isinstance(given, Mapping):
        return {name: _replace_surrogates(value) for name, value in given.items()}
    return given


def _restore_texts(made: Any, given: Any) -> Any:
    """Return ``made``, the values that pydantic returned for ``given``, with the very texts of ``given``.

    pydantic turns subclasses of ``str`` into plain texts, which would no longer mask values from the environment
    (``localctl.redaction``), and surrogates were replaced for it.
    """
    if isinstance(given, str) and made == _replace_surrogates(given):
        return given
    if isinstance(given, (list, tuple)) and isinstance(made, (list, tuple)):
        return type(made)(map(_restore_texts, made, given))
    if isinstance(given, Mapping):
        inside = made if isinstance(made, dict) else vars(made)
        inside.update({name: _restore_texts(inside[name], value) for name, value in given.items()})
    return made


@functools.cache
def _adapter(cls: type) -> TypeAdapter[Any]:
    return TypeAdapter(cls)


def sentence(error: ValidationError, cls: type, section: str = "") -> str:
    """Return pydantic's first error as a sentence that names the setting, its value and what is allowed."""
    details = error.errors(include_url=False)
    key, hint = _locate(details[0], cls, section)
    detail = [item for item in details if _locate(item, cls, section)[0] == key][-1]  # the last type of a union
    kind, value, context = detail["type"], shown(detail["input"]), detail.get("ctx", {})
    if kind == "value_error":  # raised in __post_init__, already a sentence
        return str(context["error"])
    if kind == "unexpected_keyword_argument":
        prefix = key[: len(key) - len(str(detail["loc"][-1]))]
        return f"There is no setting {key!r}; {nearest(key, [prefix + name for name in typing.get_type_hints(hint)])}"
    if kind == "literal_error":
        choices = context["expected"].replace(" or ", ", ").replace("'", "")
        return f"Unknown {key} {value}; choose one of {choices}."
    if kind == "missing":  # in a list that is too short
        return f"{key} takes {int(detail['loc'][-1]) + 1} values, not {len(detail['input'])}."
    if kind in ("too_long", "too_short"):
        many = f"{context['max_length']}" if kind == "too_long" else f"at least {context['min_length']}"
        return f"{key} takes {many} values, not {len(detail['input'])}."
    if kind in _LIMITS and isinstance(detail["input"], str):  # a number given as text
        value = detail["input"]
    wanted = _LIMITS[kind].format(**context) if kind in _LIMITS else _KINDS.get(kind.partition("_")[0], detail["msg"])
    return f"{key} must be {wanted}, not {value}."


def _locate(detail: ErrorDetails, cls: type, section: str) -> tuple[str, Any]:
    """Return the dotted name of the setting in error, and its type, or the record that lacks it."""
    parts, hint = [section] if section else [], typing.cast(Any, cls)
    for part in detail["loc"]:
        if is_dataclass(hint):
            parts.append(str(part))
            hint = typing.get_type_hints(hint).get(str(part), hint)
        elif Mapping in {typing.get_origin(kind) for kind in (hint, *typing.get_args(hint))}:
            parts += [] if detail["loc"][-1] == "[key]" else [str(part)]
            break
        else:  # an index in a list, or the name of a type
            break
    return ".".join(parts), hint
