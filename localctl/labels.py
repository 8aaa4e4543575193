"""Anybody's text on one line."""

from __future__ import annotations

MOST = 2000  # letters that are looked at; no sheet is wide enough to show more


def one_line(text: str) -> str:
    """Shorten ``text`` to one line: line breaks, tabs, control characters, half surrogate pairs and whatever else has
    no shape of its own become spaces."""
    text = text.lstrip()[: MOST + 1]
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())


def shorten(text: str, most: int = 120) -> str:
    """Shorten ``text`` to one line of at most ``most`` letters: as part of a message."""
    text = one_line(text)
    return text if len(text) <= most else f"{text[: most - 3]}..."
