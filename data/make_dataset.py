"""Make a data set from a folder of pictures.

    python data/make_dataset.py --images photos --output dataset                       # captions from photos/NAME.txt
    python data/make_dataset.py --images photos --output dataset --captions captions.jsonl --format folder \\
        --condition canny sobel --masks masks

`imagefolder` writes images/, metadata.jsonl and a folder per condition; `folder` a folder per picture with
original.jpg, caption.txt, mask.png and one file per condition. Pictures and masks are copied as they
are. Edges and palettes need not be written: training takes them from the picture after cropping.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from localctl.conditions import FROM_PICTURE, ConditionConfig, extract
from localctl.data.bad import BadRow, Problem, count_reasons
from localctl.data.rows import EXTENSIONS, METADATA, captions_of
from localctl.images import ImageError, condition_to_pil, load_image


def main(argv: Sequence[str] | None = None) -> int:
    """0 when a data set was written; 2 after a mistake of the user's, named in one sentence."""
    args = parse(argv)
    try:
        pictures = find_pictures(args)
        captions = None if args.captions is None else read_captions(args.captions)
    except ValueError as error:
        print(f"make_dataset.py: {error}", file=sys.stderr)
        return 2
    lines, problems = [], []
    for picture in tqdm(pictures, desc="pictures", mininterval=1):
        name = picture.relative_to(args.images)
        try:
            lines.append(write_example(args, picture, name, caption_of(picture, name.as_posix(), captions)))
        except (BadRow, ImageError) as bad:
            problems.append(Problem(name.as_posix(), bad.reason, str(bad)))
    if args.format == "imagefolder" and lines:
        written = args.output / f"{METADATA}.part"
        written.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
        written.replace(args.output / METADATA)  # all or nothing
    for problem in problems:
        print(f"left out {problem.key}: {problem.detail}", file=sys.stderr)
    print(f"{len(lines)} examples in {args.output}; left out: {count_reasons(problems) or 'none'}")
    print(f"next: python -m localctl.data check data={args.format} data.path={args.output}")
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--images", type=Path, required=True, help="folder with pictures, also in folders below it")
    add("--output", type=Path, required=True, help="a new folder")
    add("--format", choices=("imagefolder", "folder"), default="imagefolder")
    add("--captions", type=Path, help="jsonl with file_name and text; default: a .txt beside each picture")
    add("--condition", nargs="*", default=[], choices=FROM_PICTURE, help="conditions to write as files")
    add("--masks", type=Path, help="folder of masks named like the pictures, .png, white = controlled")
    return parser.parse_args(argv)


def find_pictures(args: argparse.Namespace) -> list[Path]:
    """Sorted. ValueError when there is none, or the output would be mixed with other files."""
    if not args.images.is_dir():
        raise ValueError(f"There is no folder {args.images}; check --images.")
    if args.masks is not None and not args.masks.is_dir():
        raise ValueError(f"There is no folder {args.masks}; check --masks.")
    if args.output.exists() and (not args.output.is_dir() or any(args.output.iterdir())):
        raise ValueError(f"{args.output} is there already and not empty; choose another --output.")
    pictures = sorted(p for p in args.images.rglob("*") if p.suffix.lower() in EXTENSIONS and p.is_file())
    if not pictures:
        raise ValueError(f"There is no {', '.join(EXTENSIONS)} file in {args.images}; check --images.")
    return pictures


def read_captions(path: Path) -> dict[str, str]:
    """file_name -> text. ValueError for a file that is no such list."""
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        return {row["file_name"]: row["text"] for row in rows}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no list of lines with file_name and text ({error}); check --captions.") from None


def caption_of(picture: Path, name: str, captions: dict[str, str] | None) -> str:
    if captions is not None:
        return captions_of(captions.get(name))[0]
    beside = picture.with_suffix(".txt")
    return captions_of(beside.read_bytes() if beside.is_file() else None)[0]


def write_example(args: argparse.Namespace, picture: Path, name: Path, caption: str) -> dict[str, str]:
    """Write one example; its line of metadata. BadRow or ImageError before anything is written."""
    image = load_image(picture)
    mask = None if args.masks is None else args.masks / name.with_suffix(".png")
    if mask is not None and not mask.is_file():
        raise BadRow("mask missing", f"there is no mask {mask}")
    stem = name.as_posix().replace("/", "_")  # with the extension: a.jpg and a.png are two pictures
    single = args.output / stem  # `folder` only
    places = {"image": f"images/{name.as_posix()}", "mask": f"masks/{stem}.png"}
    places |= {kind: f"{kind}/{stem}.png" for kind in args.condition}
    if args.format == "folder":
        places = {"image": f"original{name.suffix.lower()}"} | {k: f"{k}.png" for k in ("mask", *args.condition)}
    root = single if args.format == "folder" else args.output

    def place(what: str) -> Path:
        (root / places[what]).parent.mkdir(parents=True, exist_ok=True)
        return root / places[what]

    shutil.copyfile(picture, place("image"))
    line = {"file_name": places["image"]}
    if mask is not None:
        shutil.copyfile(mask, place("mask"))
        line["mask_file_name"] = places["mask"]
    for kind in args.condition:
        edges: Image.Image = condition_to_pil(extract(ConditionConfig(kind=kind), np.asarray(image)))
        edges.save(place(kind))
        line[f"{kind}_file_name"] = places[kind]
    if args.format == "folder":
        (root / "caption.txt").write_text(caption + "\n", encoding="utf-8")
    return line | {"text": caption}


if __name__ == "__main__":
    sys.exit(main())
