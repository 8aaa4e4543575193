"""Make a dataset from a folder of images.

    python data/make_dataset.py --images photos --output dataset                       # captions from photos/NAME.txt
    python data/make_dataset.py --images photos --output dataset --captions captions.jsonl --format folder \\
        --condition canny sobel --masks masks

`imagefolder` writes images/, metadata.jsonl and a folder per condition; `folder` a folder per image with
original.jpg, caption.txt, mask.png and one file per condition. Images and masks are copied unchanged. Edges and
palettes need not be written: training computes them from the cropped images. Hidden folders and the output of this
script are skipped; everything else that is left out is named or counted.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from localctl.cli.arguments import Arguments
from localctl.cli.program import one_sentence
from localctl.conditions import FROM_IMAGE, ConditionConfig, extract
from localctl.data.bad_rows import BadRow, Problem, count_reasons
from localctl.data.folders import Walk, count_words, is_hidden, is_image, is_made, mark_made, split_named, split_of
from localctl.data.lists import metadata_lines
from localctl.data.rows import METADATA, captions_of, read_caption
from localctl.files import json_lines, parse_json, write_text
from localctl.images import EXTENSIONS, ImageError, Limits, condition_to_pil, load_image
from localctl.labels import shorten
from localctl.sizes import PHOTO_PIXELS

# The condition of a photo over 16 million pixels is reduced to twice this on its short side.
CONDITION_SIDE = 1024


@one_sentence("make_dataset.py")
def main(argv: Sequence[str] | None = None) -> int:
    """Make the dataset. Returns 0; 2 after a user's error and 1 on a full disk, each printed in one sentence."""
    args = parse(argv)
    images, left_out = find_images(args)
    captions = None if args.captions is None else read_captions(args.captions)
    writer = Writer(args)
    lines, problems, taken = [], [], []
    try:
        args.output.mkdir(parents=True, exist_ok=True)
        mark_made(args.output)
        for image in tqdm(images, desc="images", mininterval=1):
            name = image.relative_to(args.images).as_posix()
            try:
                lines.append(writer.write(image, name, caption_for(image, name, captions)))
                taken.append(name)
            except (BadRow, ImageError) as bad:
                problems.append(Problem(name, bad.reason, str(bad)))
        if args.format == "imagefolder" and lines:  # atomically
            write_text(args.output / METADATA, json_lines(lines, ensure_ascii=False))
    except OSError as error:
        raise OSError(
            f"{args.output} could not be written to ({error.strerror or error}) after {len(taken)} of {len(images)} "
            "examples; free some space, remove the folder and call again."
        ) from None
    if all(problem.reason == "caption missing" for problem in problems) and not lines:
        raise ValueError(_no_captions(len(images), args))
    for problem in problems:
        print(shorten(f"left out {problem.key}: {problem.detail}", 600), file=sys.stderr)
    if not lines:
        raise ValueError(f"None of the {len(images)} images can be used ({count_reasons(problems)}).")
    words = ", ".join(filter(None, (count_reasons(problems), count_words(left_out))))
    print(f"{len(lines)} example{'' if len(lines) == 1 else 's'} in {args.output}; left out: {words or 'none'}")
    if captions is not None and (unused := len(captions.keys() - set(taken))):
        print(f"{unused} lines of {args.captions} name no image of the dataset")
    if writer.several and args.format == "folder":
        print(f"{writer.several} images have several captions, of which caption.txt holds the first")
    most = 1 if args.format == "folder" else None  # how many folders above an image can name its split
    splits = Counter(split for name in taken if (split := split_of(name.split("/")[:-1][:most], "train")))
    if splits:
        print(f"splits, by the names of folders: {count_words(splits)}; the rest is trained on only if none is 'train'")
    print(f"next: python -m localctl.data check data={args.format} data.path={args.output}")
    return 0


def _no_captions(count: int, args: argparse.Namespace) -> str:
    if args.captions is not None:
        return (
            f"None of the {count} images in {args.images} has a caption in {args.captions}; its file_name is the path "
            "below --images."
        )
    return (
        f"None of the {count} images in {args.images} has a caption; write one into a text file of the same name "
        "beside each image (cat.jpg, cat.txt), or give a list with --captions."
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the flags."""
    parser = Arguments("make_dataset.py", __doc__)
    add = parser.add_argument
    add("--images", type=Path, required=True, help="folder of images, also in subfolders")
    add("--output", type=Path, required=True, help="a new folder")
    add("--format", choices=("imagefolder", "folder"), default="imagefolder")
    add("--captions", type=Path, help="jsonl or csv with file_name and text; default: a .txt beside each image")
    add("--condition", nargs="*", default=[], choices=FROM_IMAGE, help="conditions to write as files")
    add("--masks", type=Path, help="folder of masks named like the images, white = controlled")
    add("--max_pixels", type=int, default=PHOTO_PIXELS, help="larger images are left out; see data.max_pixels")
    args = parser.read(argv)
    args.images, args.output = args.images.expanduser(), args.output.expanduser()
    return args


def find_images(args: argparse.Namespace) -> tuple[list[Path], Counter[str]]:
    """Find the images, sorted, and count other files. ValueError if there are no images, or the output folder exists
    and is not empty."""
    for flag, folder in (("--images", args.images), ("--masks", args.masks)):
        if folder is not None and not folder.is_dir():
            raise ValueError(f"There is no folder {folder}; check {flag}.")
    if args.output.exists() and (
        not args.output.is_dir() or any(not is_hidden(file.name) for file in args.output.iterdir())
    ):
        raise ValueError(f"{args.output} exists and is not empty; choose another --output.")
    walk, images, made = Walk(args.images, count=True), [], 0
    for folder, below, files in walk:
        mine = [name for name in below if is_made(folder / name)]
        below[:] = [name for name in below if name not in mine]
        made += len(mine)
        images += [folder / name for name in files if is_image(name)]
    walk.left_out["folder that this script wrote"] = made
    if not images:
        words = count_words(walk.left_out)
        raise ValueError(
            f"There is no image in {args.images}{f' (left out: {words})' if words else ''}; check --images. Supported "
            f"are {', '.join(EXTENSIONS)}."
        )
    return sorted(images), walk.left_out


def read_captions(path: Path) -> dict[str, Any]:
    """Read file_name -> text. ValueError if the file has no such lines."""
    found, broken = {}, 0
    for _, line in metadata_lines(path):
        try:
            row = parse_json(line)
            found[os.path.normpath(row["file_name"])] = row["text"]
        except (ValueError, KeyError, TypeError):
            broken += 1
    if not found:
        raise ValueError(f"{path} has no line with file_name and text; check --captions.")
    if broken:
        print(f"{broken} lines of {path} have no file_name and text and are left out", file=sys.stderr)
    return found


def caption_for(image: Path, name: str, captions: dict[str, Any] | None) -> tuple[str, ...]:
    """Return the captions of an image, at least one. BadRow if there is none."""
    if captions is not None:
        return captions_of(captions.get(name))
    content = read_caption(image.with_suffix(".txt"))
    return captions_of(read_caption(image.with_suffix(".TXT")) if content is None else content)


class Writer:
    """Writes examples under unique names. several: number of examples with more than one caption."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.several = 0
        self._stems: set[str] = set()

    def write(self, source: Path, name: str, captions: tuple[str, ...]) -> dict[str, Any]:
        """Write an example, and return its line of metadata. BadRow or ImageError before anything is written."""
        args = self.args
        image = load_image(source, limits=Limits(args.max_pixels, (CONDITION_SIDE, CONDITION_SIDE)))
        mask = None if args.masks is None else find_mask(args.masks / name)
        places = self._places(name, mask)
        self.several += len(captions) > 1
        copy(source, place(args.output, places["image"]))
        line: dict[str, Any] = {"file_name": places["image"]}
        if mask is not None:
            copy(mask, place(args.output, places["mask"]))
            line["mask_file_name"] = places["mask"]
        for kind in args.condition:
            condition = condition_to_pil(extract(ConditionConfig(kind=kind), np.asarray(image)))
            condition.save(place(args.output, places[kind]))
            line[f"{kind}_file_name"] = places[kind]
        if args.format == "folder":
            place(args.output, places["caption"]).write_text(captions[0] + "\n", encoding="utf-8")
        return line | {"text": captions[0] if len(captions) == 1 else list(captions)}

    def _places(self, name: str, mask: Path | None) -> dict[str, str]:
        """Return the file of each part, relative to the output. BadRow for a name that is not UTF-8 or too long."""
        try:
            name.encode()
        except UnicodeEncodeError:
            raise BadRow("name not UTF-8", "its name is not UTF-8; rename it") from None
        stem = name.replace("/", "_")  # with the extension: a.jpg and a.png are two images
        if len(stem.encode()) > 240:
            raise BadRow("name too long", "its name and those of its folders have over 240 bytes together; rename it")
        while stem in self._stems:  # a/b.jpg and a_b.jpg
            stem = f"{stem}_"
        self._stems.add(stem)
        first, _, rest = name.partition("/")
        folder = f"{first}/{stem[len(first) + 1 :]}" if rest and split_named(first) else stem
        suffix = mask.suffix.lower() if mask is not None else ""
        kinds = self.args.condition
        if self.args.format == "folder":
            own = {"image": f"original{Path(name).suffix.lower()}", "mask": f"mask{suffix}", "caption": "caption.txt"}
            return {what: f"{folder}/{file}" for what, file in {**own, **{k: f"{k}.png" for k in kinds}}.items()}
        return {"image": f"images/{name}", "mask": f"masks/{stem}{suffix}"} | {k: f"{k}/{stem}.png" for k in kinds}


def find_mask(beside: Path) -> Path:
    """Find the mask with the name of an image and any extension. BadRow if there is none."""
    found = (beside.with_suffix(end) for extension in (".png", *EXTENSIONS) for end in (extension, extension.upper()))
    mask = next((file for file in found if file.is_file()), None)
    if mask is None:
        raise BadRow("mask missing", f"there is no mask {beside.with_suffix('.png')}")
    return mask


def place(root: Path, name: str) -> Path:
    """Return ``root / name``, and create its folder."""
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    return root / name


def copy(source: Path, target: Path) -> None:
    """Copy a file. BadRow if ``source`` cannot be read; OSError if ``target`` cannot be written."""
    try:
        shutil.copyfile(source, target)
    except OSError as error:
        if error.filename == str(source) and error.filename2 is None:  # on a full disk, filename2 is set
            raise BadRow("image unreadable", f"it cannot be read ({error.strerror})") from None
        raise


if __name__ == "__main__":
    sys.exit(main())
