"""What lies in a folder of data: hidden names are passed over, and splits told by their names as `datasets` does."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from functools import lru_cache
from pathlib import Path

from localctl.images import EXTENSIONS

# The words and the characters around them by which `datasets` knows a split (datasets.data_files), here in any case.
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
# Photos of cameras and programs that Pillow cannot read, or that we do not let it read.
NOT_READ = (".heic", ".heif", ".jxl", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".rw2", ".orf", ".psd") + (
    *(".svg", ".eps", ".ps", ".pdf", ".wmf", ".emf", ".tga", ".exr", ".hdr", ".ico", ".icns", ".cur", ".pcx", ".dcx"),
    *(".qoi", ".dds", ".blp", ".xbm", ".xpm", ".sgi", ".ras", ".pfm", ".fits", ".fit", ".avifs", ".mpg", ".mp4"),
    *(".mov", ".webm", ".avi", ".mkv", ".gifv"),
)


def is_hidden(name: str) -> bool:
    """Tell whether a file or folder is none of the user's own: hidden, or put there by a program."""
    return name.startswith(_HIDDEN) or name.lower() in _BINS


def is_image(name: str) -> bool:
    """Tell whether a file is an image, by its extension in any case."""
    return name.lower().endswith(EXTENSIONS)


class Walk:
    """Goes through a folder and all below it, in order, without hidden ones and links to folders.

    left_out: what images, or folders that may hold some, were passed over on the way, with ``count``: by a few words on
    why. locked: folders that cannot be read.
    """

    def __init__(self, root: Path, count: bool = False) -> None:
        self.root, self.count = root, count
        self.left_out: Counter[str] = Counter()
        self.locked: list[Path] = []

    def __iter__(self) -> Iterator[tuple[Path, list[str], list[str]]]:
        """Yield (folder, names of folders, names of files); taking names out of the first list passes those folders
        over."""
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
    """Note that a script wrote what lies in ``folder``, so that it is not taken for photos when one is called again."""
    (folder / _MADE).write_text("Written by a script in data/; passed over where photos are looked for.\n")


def is_made(folder: Path) -> bool:
    """Tell whether :func:`mark_made` was called for it."""
    return os.path.lexists(folder / _MADE)


def count_words(counts: Counter[str]) -> str:
    """Put counts into words: ``3 .heic, 1 linked folder``, the most frequent first; empty when there is nothing."""
    return ", ".join(f"{number} {what}" for what, number in counts.most_common() if number)


@lru_cache(maxsize=4096)
def split_named(name: str) -> str | None:
    """Return ``train``, ``validation`` or ``test`` where a file or folder is called so, as `datasets` sees it:
    ``val2017``, ``Training``, ``train-00000-of-00002.parquet``."""
    return next((split for split, pattern in _SPLIT_NAMES.items() if pattern.search(name)), None)


@lru_cache(maxsize=64)
def canonical(split: str) -> str:
    """Return the usual name of a split: ``validation`` for ``val``, ``valid`` or ``dev``. Other names stay as they
    are."""
    return next((name for name, words in SPLIT_WORDS.items() if split.lower() in words), split)


def split_of(parts: Sequence[str], wanted: str) -> str | None:
    """Return the split that a path with these ``parts`` belongs to, by the outermost part that names one; None =
    unnamed.

    wanted: a split with a name of its own is known by a part of just this name.
    """
    if canonical(wanted) not in SPLIT_WORDS and wanted in parts:
        return wanted
    return next((split for part in parts if (split := split_named(part))), None)


def select(splits: Sequence[str | None], wanted: str, place: str) -> tuple[list[int], Counter[str]]:
    """Choose what belongs to the split ``wanted``: what is named so; of ``train``, where nothing is, what has no name.

    Returns:
        The indices, and how many of each other split are left.

    Raises:
        ValueError: nothing belongs to it; lists the splits that there are.
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
