"""The files in a folder of data: hidden ones are skipped, and names denote splits by the rules of `datasets`."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from functools import lru_cache
from pathlib import Path

from localctl.images import EXTENSIONS

# `datasets` recognises a split by these words and the characters around them (datasets.data_files); here in any case.
SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_AROUND = "[-._ 0-9]"
_SPLIT_NAMES = {
    split: re.compile(rf"(?:^|{_AROUND})(?:{'|'.join(words)})(?:$|{_AROUND})", re.IGNORECASE)
    for split, words in SPLIT_WORDS.items()
}
_HIDDEN = (".", "@", "__")  # .ipynb_checkpoints, ._1.jpg, @eaDir, __MACOSX
_MADE = ".made_by_localctl"
_BINS = ("$recycle.bin", "#recycle", "#snapshot", "lost+found", "system volume information")
# Formats of images and videos that Pillow cannot read, or that it is not allowed to read here.
NOT_READ = (".heic", ".heif", ".jxl", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".rw2", ".orf", ".psd") + (
    *(".svg", ".eps", ".ps", ".pdf", ".wmf", ".emf", ".tga", ".exr", ".hdr", ".ico", ".icns", ".cur", ".pcx", ".dcx"),
    *(".qoi", ".dds", ".blp", ".xbm", ".xpm", ".sgi", ".ras", ".pfm", ".fits", ".fit", ".avifs", ".mpg", ".mp4"),
    *(".mov", ".webm", ".avi", ".mkv", ".gifv"),
)


def is_hidden(name: str) -> bool:
    """Return whether a file or folder is hidden, or was put there by a system or program."""
    return name.startswith(_HIDDEN) or name.lower() in _BINS


def is_image(name: str) -> bool:
    """Return whether a file is an image, by its extension in any case."""
    return name.lower().endswith(EXTENSIONS)


class Walk:
    """An iterable over a folder and all folders below it, sorted, without hidden ones and links to folders.

    left_out: with ``count``, the number of images and folders that were skipped, by a few words on why. locked: folders
    that cannot be read. Both are complete after the iteration.
    """

    def __init__(self, root: Path, count: bool = False) -> None:
        self.root, self.count = root, count
        self.left_out: Counter[str] = Counter()
        self.locked: list[Path] = []

    def __iter__(self) -> Iterator[tuple[Path, list[str], list[str]]]:
        """Yield (folder, names of folders, names of files); folders removed from the list of names are skipped."""
        for folder, below, files in os.walk(self.root, onerror=self._note_locked):
            linked = {name for name in below if os.path.islink(os.path.join(folder, name))}
            if self.count:
                self._count(folder, below, files, linked)
            below[:] = sorted(name for name in below if not is_hidden(name) and name not in linked)
            yield Path(folder), below, sorted(name for name in files if not is_hidden(name))

    def _count(self, folder: str, below: Sequence[str], files: Sequence[str], linked: Collection[str]) -> None:
        self.left_out["linked folder"] += len(linked)
        hidden = [name for name in below if is_hidden(name) and name not in linked]
        self.left_out["hidden image"] += sum(is_image(name) and is_hidden(name) for name in files)
        self.left_out["hidden image"] += sum(_images_below(os.path.join(folder, name)) for name in hidden)
        for name in files:
            extension = os.path.splitext(name)[1].lower()
            self.left_out[extension] += extension in NOT_READ and not is_hidden(name)

    def _note_locked(self, error: OSError) -> None:
        self.locked.append(Path(str(error.filename)))
        self.left_out["locked folder"] += 1


def _images_below(folder: str) -> int:
    return sum(is_image(name) for _, _, files in os.walk(folder) for name in files)


def mark_made(folder: Path) -> None:
    """Mark ``folder`` as written by a script, so that a later call does not take its files for photos."""
    (folder / _MADE).write_text("Written by a script in data/, which skips this folder when it searches for photos.\n")


def is_made(folder: Path) -> bool:
    """Return whether :func:`mark_made` was called for ``folder``."""
    return os.path.lexists(folder / _MADE)


def count_words(counts: Counter[str]) -> str:
    """Format counts: ``3 .heic, 1 linked folder``, the most frequent first; empty if all are 0."""
    return ", ".join(f"{number} {what}" for what, number in counts.most_common() if number)


@lru_cache(maxsize=4096)
def split_named(name: str) -> str | None:
    """Return the split that the name of a file or folder denotes by the rules of `datasets`, None if it denotes none.

    That is ``train``, ``validation`` or ``test``, from ``val2017``, ``Training``, ``train-00000-of-00002.parquet`` ...
    """
    return next((split for split, pattern in _SPLIT_NAMES.items() if pattern.search(name)), None)


@lru_cache(maxsize=64)
def canonical(split: str) -> str:
    """Return the usual name of a split: ``validation`` for ``val``, ``valid`` or ``dev``; other names unchanged."""
    return next((name for name, words in SPLIT_WORDS.items() if split.lower() in words), split)


def split_of(parts: Sequence[str], wanted: str) -> str | None:
    """Return the split that the outermost of the ``parts`` of a path denotes; None if none does.

    wanted: a split with another name than the usual ones is recognised by a part that equals it.
    """
    if canonical(wanted) not in SPLIT_WORDS and wanted in parts:
        return wanted
    return next((split for part in parts if (split := split_named(part))), None)


def select(splits: Sequence[str | None], wanted: str, place: str) -> tuple[list[int], Counter[str]]:
    """Select the members of the split ``wanted``. If none is named ``train``, unnamed ones belong to ``train``.

    Returns:
        Their indices, and the number of members of each other split.

    Raises:
        ValueError: the split has no members; the message lists the splits that exist.
    """
    named = [index for index, split in enumerate(splits) if split == canonical(wanted)]
    if not named and canonical(wanted) == "train":
        named = [index for index, split in enumerate(splits) if split is None]
    if not named:
        there = count_words(Counter(split or "in no split" for split in splits))
        raise ValueError(
            f"Nothing in {place} belongs to the split {wanted!r} (there are: {there}); choose another data.split or "
            "data.validation_split."
        )
    taken = set(named)
    return named, Counter(split or "no split at all" for index, split in enumerate(splits) if index not in taken)
