"""Texts from any source as one printable line."""

from __future__ import annotations

MOST = 2000  # characters; no contact sheet is wide enough for more


def one_line(text: str) -> str:
    """Return the first ``MOST`` characters of ``text`` as one line: line breaks, tabs, control characters, half
    surrogate pairs and other characters that are not printable become spaces."""
    text = text.lstrip()[: MOST + 1]
    return " ".join("".join(character if character.isprintable() else " " for character in text).split())


def shorten(text: str, most: int = 120) -> str:
    """Return ``text`` as one line of at most ``most`` characters, for a message."""
    text = one_line(text)
    return text if len(text) <= most else f"{text[: most - 3]}..."
