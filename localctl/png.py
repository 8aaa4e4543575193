"""The chunks of a PNG file."""

from __future__ import annotations

from pathlib import Path

MOST = 2**30  # bytes of the largest file that is read at once
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_TEXTS = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")  # comments, workflows, colour profiles


def is_png(source: Path | bytes) -> bool:
    """Return whether a file, or its content, starts with the PNG signature; False for files over ``MOST`` bytes."""
    if isinstance(source, bytes):
        return source.startswith(PNG_SIGNATURE)
    with source.open("rb") as file:
        return source.stat().st_size <= MOST and file.read(len(PNG_SIGNATURE)) == PNG_SIGNATURE


def without_texts(content: bytes) -> bytes:
    """Return the content of a PNG file without its texts and colour profile; the pixels do not change.

    Pillow refuses files in which these are over 1 MB. Bytes that are no chunks are returned unchanged.
    """
    parts, place = [content[: len(PNG_SIGNATURE)]], len(PNG_SIGNATURE)
    while place + 12 <= len(content):
        end = place + 12 + int.from_bytes(content[place : place + 4], "big")
        if content[place + 4 : place + 8] not in _TEXTS:
            parts.append(content[place:end])
        place = end
    return b"".join([*parts, content[place:]])
