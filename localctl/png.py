"""The chunks of a PNG file."""

from __future__ import annotations

from pathlib import Path

MOST = 2**30  # bytes that are read at once
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_TEXTS = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")  # comments, workflows, colour profiles


def is_png(source: Path | bytes) -> bool:
    """Tell whether a file of a size to be read at once, or its content, begins as a PNG does."""
    if isinstance(source, bytes):
        return source.startswith(PNG_SIGNATURE)
    with source.open("rb") as file:
        return source.stat().st_size <= MOST and file.read(len(PNG_SIGNATURE)) == PNG_SIGNATURE


def without_texts(content: bytes) -> bytes:
    """Return a PNG file without its texts and colour profile. Pillow refuses a file whose are over 1 MB; they change
    none of its pixels. What does not look like chunks stays as it is."""
    kept, place = [content[: len(PNG_SIGNATURE)]], len(PNG_SIGNATURE)
    while place + 12 <= len(content):
        end = place + 12 + int.from_bytes(content[place : place + 4], "big")
        if content[place + 4 : place + 8] not in _TEXTS:
            kept.append(content[place:end])
        place = end
    return b"".join([*kept, content[place:]])
