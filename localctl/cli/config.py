"""Configuration: YAML groups composed by Hydra, overridden on the command line, validated by typed dataclasses.

The command line mixes Hydra's spelling (``base=sd15 loss.weight=1e-3 experiment=NAME``) with the ecosystem's
(``--max_train_steps 100``, ``--max-train-steps=100``); names and aliases are the same in both. Hydra only composes the
groups: values are passed on literally, so commas, parentheses and ``$`` in a prompt or path have no special meaning.
The records (``localctl.records``) convert and validate them.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from localctl.cli.arguments import BOOLS, VERSION
from localctl.cli.help import help_text
from localctl.messages import nearest
from localctl.redaction import mark_environment

_PLACES = (Path(__file__).resolve().parents[1] / "config", Path(__file__).resolve().parents[2] / "config")
CONFIG_DIR = _PLACES[0] if _PLACES[0].is_dir() else _PLACES[1]  # of the installed package, or of a checkout
NO_ALIASES: Mapping[str, str] = types.MappingProxyType({})

Settings = TypeVar("Settings")


def load_config(
    argv: Sequence[str],
    schema: type[Settings],
    *,
    aliases: Mapping[str, str] = NO_ALIASES,
    free_groups: Mapping[str, str] = NO_ALIASES,
    elsewhere: Mapping[str, str] = NO_ALIASES,
    name: str = "train",
    config_dir: Path = CONFIG_DIR,
) -> Settings:
    """Compose ``config_dir/name.yaml`` with the choices in ``argv`` and return a validated instance of ``schema``.

    Args:
        argv: ``key=value``, ``group=option``, ``--key value``, ``--key=value``, and ``--key`` alone for a bool.
        schema: a record (``localctl.records``); nested records are groups or sections.
        aliases: flag -> key or group, where the ecosystem's name differs from ours.
        free_groups: group -> key to set if a path or hub id is given instead of an option (``base=./folder``).
        elsewhere: flag of other programs -> a sentence on what replaces it here.

    Raises:
        ValueError: an unknown key, flag or option, with the nearest known one; or an invalid value.
    """
    groups = config_groups(name, config_dir)
    keys = schema_keys(schema)
    chosen: dict[str, str] = {}
    changed: dict[str, str] = {}
    for key, value in _read_arguments(argv, keys, groups, aliases, elsewhere):
        if key not in groups:
            changed[key] = value
        elif value not in groups[key] and key in free_groups and _is_place(value):
            changed[free_groups[key]] = value
        else:
            _check_known(f"option for {key}", value, groups[key], place=key in free_groups)
            chosen[key] = value
    try:
        with initialize_config_dir(str(config_dir), version_base="1.3"):
            composed = compose(name, overrides=[f"{group}={option}" for group, option in chosen.items()])
        raw, resolved = OmegaConf.to_container(composed), OmegaConf.to_container(composed, resolve=True)
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise ValueError(
            f"The configuration {config_dir / name}.yaml cannot be resolved ({_on_one_line(error)})."
        ) from error
    values = cast(dict[str, Any], mark_environment(raw, resolved))
    for key, value in changed.items():
        _set(values, key.split("."), value)
    return schema(**_for_pydantic(schema, values))


def _on_one_line(error: Exception) -> str:
    """Return an exception's message on one line: those of YAML have several."""
    return " ".join(str(error).split())[:300].rstrip(".")


def config_groups(name: str = "train", config_dir: Path = CONFIG_DIR) -> dict[str, list[str]]:
    """Return group -> its options, for the groups in the defaults of ``config_dir/name.yaml``. Other folders there are
    groups of other programs: a setting may have the same name, such as adapter."""
    if not config_dir.is_dir():
        raise ValueError(f"The configuration folder {config_dir} is missing; install the package again.")
    path = config_dir / f"{name}.yaml"
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeError, yaml.YAMLError) as error:
        raise ValueError(f"The configuration {path} cannot be read ({_on_one_line(error)}).") from error
    defaults = content.get("defaults", []) if isinstance(content, dict) else []
    names = sorted(group for entry in defaults or () if isinstance(entry, dict) for group in entry)
    return {group: sorted(file.stem for file in (config_dir / group).glob("*.yaml")) for group in names}


def schema_keys(schema: type, prefix: str = "") -> dict[str, Any]:
    """Return dotted key -> type of every value in a dataclass and its nested dataclasses."""
    keys: dict[str, Any] = {}
    for name, hint in typing.get_type_hints(schema).items():
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            keys |= schema_keys(hint, f"{prefix}{name}.")
        else:
            keys[prefix + name] = hint
    return keys


def settings_or_help(
    program: str,
    argv: Sequence[str],
    schema: type[Settings],
    *,
    about: str | None = None,
    aliases: Mapping[str, str] = NO_ALIASES,
    free_groups: Mapping[str, str] = NO_ALIASES,
    elsewhere: Mapping[str, str] = NO_ALIASES,
    name: str = "train",
) -> Settings | None:
    """Load settings as :func:`load_config` does; for ``--help`` or ``--version``, print it and return None.

    ``about``: the beginning of the help, usually the docstring of ``program``.
    """
    if "--version" in argv:
        print(VERSION)
        return None
    if {"-h", "--help"} & set(argv):
        defaults = load_config([], schema, aliases=aliases, name=name)
        if about:
            print(about.strip(), end="\n\n")
        print(help_text(program, defaults, config_groups(name), CONFIG_DIR, aliases))
        return None
    return load_config(argv, schema, aliases=aliases, free_groups=free_groups, elsewhere=elsewhere, name=name)


def _read_arguments(
    argv: Sequence[str],
    keys: Mapping[str, Any],
    groups: Mapping[str, Any],
    aliases: Mapping[str, str],
    elsewhere: Mapping[str, str],
) -> list[tuple[str, str]]:
    """Parse ``argv`` into (key or group, text) pairs with known names; later pairs take precedence."""
    known = [*keys, *groups, *aliases]
    pairs: list[tuple[str, str]] = []
    rest = list(argv)
    while rest:
        token = rest.pop(0)
        flag = token.startswith("--")
        name, equals, value = token.removeprefix("--").partition("=")
        if not flag and not equals:
            raise ValueError(f"Cannot read the argument {token!r}; write key=value or --key value.")
        name = name.replace("-", "_")
        key = name if name in keys or name in groups else aliases.get(name, name)
        if name in elsewhere and key not in keys and key not in groups:
            raise ValueError(f"There is no {'--' if flag else ''}{name} here: {elsewhere[name]}")
        if key not in keys and key not in groups:
            _check_known("flag" if flag else "setting", name, known, show="--" if flag else "")
        if flag and not equals:
            value = _flag_value(name, keys.get(key), rest)
        pairs.append((key, value))
    return pairs


def _flag_value(name: str, hint: Any, rest: list[str]) -> str:
    """Pop the value of a flag from ``rest``; a bool without a value is true."""
    if hint is bool:
        return rest.pop(0) if rest and rest[0].lower() in BOOLS else "true"
    if not rest or rest[0].startswith("--"):
        raise ValueError(f"The flag --{name} needs a value.")
    return rest.pop(0)


def _check_known(kind: str, name: str, known: Sequence[str], show: str = "", place: bool = False) -> None:
    """Raise a ValueError that suggests similar names unless ``name`` is in ``known``. ``place``: a folder that is there
    or a hub id would do, too."""
    if name not in known:
        else_place = ", or a folder or hub id (owner/name)" if place else ""
        few = f"known are {', '.join(known)}{else_place}." if kind.startswith("option") and known else "see --help."
        hint = nearest(show + name, [show + item for item in known], few)
        raise ValueError(f"There is no {kind} {show + name!r}; {hint}")


def _is_place(value: str) -> bool:
    """Return whether a value looks like a folder or hub id, not like a mistyped option."""
    return "/" in value or value.startswith((".", "~")) or Path(value).exists()


def _set(values: dict[str, Any], path: Sequence[str], value: Any) -> None:
    for part in path[:-1]:
        values = values.setdefault(part, {})
    values[path[-1]] = value


_NULLS = ("null", "none")


def _for_pydantic(schema: type, values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Convert ``values`` of YAML and of the command line for pydantic: the texts null and none become None where
    that is allowed, lists and mappings are parsed as YAML, and true or false for a number is refused."""
    read: dict[str, Any] = {}
    hints = typing.get_type_hints(schema)
    for name, value in values.items():
        hint = hints.get(name)
        kinds = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
        if dataclasses.is_dataclass(hint) and isinstance(hint, type) and isinstance(value, Mapping):
            value = _for_pydantic(hint, value, f"{prefix}{name}.")
        elif isinstance(value, bool) and bool not in kinds:
            value = str(value).lower()
        elif isinstance(value, str) and types.NoneType in kinds and value.lower() in _NULLS:
            value = None
        elif isinstance(value, str) and not {str, bool} & {*kinds}:
            value = _number_or_list(value, kinds, prefix + name)
        read[name] = value
    return read


def _number_or_list(text: str, kinds: Sequence[Any], key: str) -> Any:
    """Parse 1e3 for a whole number, and a list or mapping as YAML; return other texts for pydantic to parse."""
    if int in kinds and not text.strip().lstrip("+-").isdigit():  # a float would round large whole numbers
        with suppress(ValueError):
            return float(text)
    structured = {typing.get_origin(kind) for kind in kinds} & {tuple, collections.abc.Mapping}
    if structured and (text.lstrip()[:1] in ("[", "{", "-") or ": " in text):
        try:
            return yaml.safe_load(text)
        except yaml.YAMLError:
            raise ValueError(
                f"{key} cannot be read from {text!r}; write a list as [1, 2] and a mapping as {{a: 1}}."
            ) from None
    return text
