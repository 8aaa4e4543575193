"""Download the images of a list of URLs, each with a caption file beside it: input for make_dataset.py.

    python data/download_images.py --list urls.txt --output photos
    python data/download_images.py --list part-0.parquet --url_column URL --caption_column TEXT --output photos
    python data/download_images.py --list urls.txt --output photos --condition canny   # a complete dataset

A list is .txt (a URL per line, then optionally a tab and a caption), .jsonl (url, text) or .parquet. manifest.jsonl
gets a line per URL: file, sha256, size and caption, or the error. A second call continues where the first one stopped;
--retry tries failed URLs again. The manifest can be used as a list: a file whose sha256 differs is then refused, so
that others get exactly the same images.

For more than some 100,000 URLs use img2dataset, and data/convert.py on the tars that it writes (data/README.md).

--condition writes edges or palettes into a folder of that name, and metadata.jsonl: train on them with
data=imagefolder data.path=photos condition=column data.conditioning_image_column=canny condition.channels=1.
(condition=canny does not need these files: training computes such conditions from the cropped images.)
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import sys
import urllib.error
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from fetching import Refused, WebLimits, fetch_bytes
from PIL import Image
from tqdm import tqdm

from localctl.cli.arguments import Arguments
from localctl.cli.program import one_sentence
from localctl.conditions import FROM_IMAGE, ConditionConfig, extract
from localctl.data.bad_rows import BadRow
from localctl.data.folders import mark_made
from localctl.data.rows import METADATA, captions_of, check_utf8, split_lines
from localctl.files import first_line, json_lines, parse_json, sha256, write_text
from localctl.images import ImageError, Limits, condition_to_pil, load_image
from localctl.labels import shorten
from localctl.sizes import PHOTO_PIXELS

MANIFEST = "manifest.jsonl"
SIGNATURES = {
    **{b"\x89PNG": ".png", b"\xff\xd8\xff": ".jpg", b"RIFF": ".webp", b"GIF8": ".gif", b"BM": ".bmp"},
    **{b"II*\0": ".tif", b"MM\0*": ".tif", b"\0\0\0\x0cjP": ".jp2"},
}
MANY = 100_000  # URLs
CONDITION_SIDE = 1024  # as in make_dataset.py


@one_sentence("download_images.py")
def main(argv: Sequence[str] | None = None) -> int:
    """Download the list. Returns 0 even if some URLs failed; 2 after a user's error; 1 on a full disk."""
    args = parse(argv)
    wanted = {item["url"]: item for item in read_list(args)}
    manifest = args.output / MANIFEST
    if len(wanted) > MANY:
        print(f"{len(wanted)} URLs: img2dataset is faster for lists of this length (data/README.md)", file=sys.stderr)
    fetched = 0
    try:
        args.output.mkdir(parents=True, exist_ok=True)
        before = manifest.read_bytes() if manifest.exists() else b""
        rows = read_manifest(before)
        done = finished(rows, args.output, args.retry)
        todo = [item for url, item in wanted.items() if url not in done]
        counts: Counter[str] = Counter({"here already": len(wanted) - len(todo)})
        with manifest.open("a", encoding="utf-8") as file:
            if before and not before.endswith(b"\n"):
                file.write("\n")  # a killed run left the last line incomplete
            for result in fetch_all(todo, args):
                counts["fetched" if "file" in result else result["error"].split(":")[0]] += 1
                file.write(json_lines([result]))
                file.flush()
                fetched += "file" in result
                rows.append(result)
        if args.condition:
            write_metadata(args, {row["url"]: row for row in rows if "file" in row})
    except OSError as error:
        raise OSError(
            f"{args.output} could not be written to ({error.strerror or first_line(error)}) after {fetched} images "
            "were fetched, which are kept; free some space and call again to continue."
        ) from None
    print(", ".join(f"{number} {what}" for what, number in counts.items() if number), f"({manifest})")
    return 0


def fetch_all(todo: Sequence[dict[str, Any]], args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Fetch ``todo`` in ``args.threads`` threads, and yield the lines of the manifest in order."""
    pool = ThreadPoolExecutor(args.threads)
    try:
        results = pool.map(lambda item: fetch(item, args), todo)
        yield from tqdm(results, total=len(todo), desc="fetching", mininterval=1)
    finally:
        pool.shutdown(cancel_futures=True)  # running downloads end by their own time limit


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the flags."""
    parser = Arguments("download_images.py", __doc__)
    add = parser.add_argument
    add("--list", type=Path, required=True, help=".txt, .jsonl or .parquet")
    add("--output", type=Path, required=True, help="folder for images, captions and manifest.jsonl")
    add("--url_column", default="url")
    add("--caption_column", default="text")
    add("--timeout", type=float, default=15, help="seconds without data; four times this for a whole image")
    add("--max_bytes", type=int, default=20_000_000, help="larger files are refused")
    add("--max_pixels", type=int, default=PHOTO_PIXELS, help="larger images are refused; see data.max_pixels")
    add("--threads", type=int, default=8, help="downloads at a time")
    add("--retry", action="store_true", help="try URLs again that failed before")
    add("--condition", nargs="*", default=[], choices=FROM_IMAGE, help="conditions to write, and metadata.jsonl")
    add("--allow_inner_addresses", action="store_true", help="allow addresses of the local network (127.0.0.1, 10.*)")
    args = parser.read(argv)
    args.list, args.output = args.list.expanduser(), args.output.expanduser()
    if not (args.timeout > 0 and args.threads > 0 and args.max_bytes > 0):
        parser.error("--timeout, --threads and --max_bytes must be above 0")
    return args


def read_list(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Read url, text and, if given, sha256 of each row. ValueError if the list cannot be read."""
    path, url, text = args.list, args.url_column, args.caption_column
    try:
        if path.suffix.lower() == ".parquet":
            import pyarrow.parquet as pq

            names = {url, text, "sha256"} & set(pq.read_schema(path).names)
            rows = pq.read_table(path, columns=sorted(names)).to_pylist()
        else:
            content = path.read_bytes()
            check_utf8(content, str(path))
            lines = [line for line in split_lines(content.removeprefix(b"\xef\xbb\xbf")) if line.strip()]
            if path.suffix.lower() == ".jsonl":
                rows = [parse_json(line) for line in lines]
            else:
                texts = [line.decode().strip() for line in lines]
                rows = [dict(zip((url, text), line.split("\t", 1), strict=False)) for line in texts]
        return iter([{"url": as_url(row[url]), "text": row.get(text), "sha256": row.get("sha256")} for row in rows])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        why = f"no {error}" if isinstance(error, KeyError) else first_line(error)
        raise ValueError(f"{path} is no list with a column {url!r} ({why}); check --list and --url_column.") from None


def as_url(value: Any) -> str:
    """Return a cell as a URL; other types become a text that is no URL, which fails when it is fetched."""
    return value.strip() if isinstance(value, str) else json.dumps(value, default=str)


def read_manifest(content: bytes) -> list[dict[str, Any]]:
    """Parse the rows of a manifest; skip a line that a killed run left incomplete."""
    rows = []
    for line in split_lines(content):
        try:
            row = parse_json(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("url"), str):
            rows.append(row)
    return rows


def finished(rows: Sequence[dict[str, Any]], folder: Path, retry: bool) -> set[str]:
    """Return the URLs that are done: those with a complete file, and without ``retry`` those that failed."""
    done: set[str] = set()
    for row in rows:
        complete = is_complete(row, folder)
        (done.add if complete or ("error" in row and not retry) else done.discard)(row["url"])
    return done


def is_complete(row: dict[str, Any], folder: Path) -> bool:
    """Return whether ``folder`` holds the complete file of a row of the manifest."""
    name = row.get("file")
    if not isinstance(name, str) or os.path.isabs(name) or ".." in Path(name).parts:
        return False
    file = folder / name
    return file.is_file() and file.stat().st_size == row.get("bytes")


def fetch(item: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Fetch a URL, write its files, and return its line of the manifest. OSError when the disk is full."""
    url = item["url"]
    limits = WebLimits(args.timeout, 4 * args.timeout, args.max_bytes, args.allow_inner_addresses)
    try:
        content = fetch_bytes(url, limits)
        digest = sha256(content)
        if item["sha256"] not in (None, digest):
            raise Refused("not the listed image (sha256)")
        image = load_image(content, "the file", photo_limits(args))
    except (Refused, ImageError) as refusal:
        reason = refusal.reason if isinstance(refusal, ImageError) else str(refusal)
        return {"url": url, "text": item["text"], "error": reason}
    except (OSError, ValueError, http.client.HTTPException) as error:  # URLError and timeouts are OSErrors
        reason = f"HTTP {error.code}" if isinstance(error, urllib.error.HTTPError) else "no answer"
        return {"url": url, "text": item["text"], "error": f"{reason}: {shorten(str(error))}"}
    extension = next((end for start, end in SIGNATURES.items() if content.startswith(start)), None)
    extension = extension or (".avif" if content[4:8] == b"ftyp" else ".png")
    stem = sha256(url.encode(errors="replace"))[:20]
    place = args.output / stem[:2] / f"{stem}{extension}"
    place.parent.mkdir(exist_ok=True)
    if caption := one_caption(item["text"]):
        place.with_suffix(".txt").write_text(caption, encoding="utf-8", errors="replace")
    part = place.with_suffix(".part")
    try:
        part.write_bytes(content)
        part.replace(place)  # images are written atomically
    except OSError:
        part.unlink(missing_ok=True)
        raise
    name = place.relative_to(args.output).as_posix()
    write_conditions(args, name, image)
    return {"url": url, "text": item["text"], "file": name, "sha256": digest, "bytes": len(content)}


def photo_limits(args: argparse.Namespace) -> Limits:
    """Return the limits for reading an image."""
    return Limits(args.max_pixels, (CONDITION_SIDE, CONDITION_SIDE))


def one_caption(text: Any) -> str:
    """Return the text of the caption file: the first of several captions, "" if there is none."""
    try:
        return captions_of(text)[0]
    except BadRow:
        return "" if text is None or isinstance(text, (list, dict)) else str(text)


def condition_name(name: str, kind: str) -> str:
    """Return the file of the condition of the image ``name``, both relative to the output folder."""
    return f"{kind}/{name}.png"


def write_conditions(args: argparse.Namespace, name: str, image: Image.Image | None = None) -> None:
    """Write missing conditions of the image ``name``. ``image``: the decoded image; None = read it, which raises
    ImageError if it is damaged."""
    missing = [kind for kind in args.condition if not (args.output / condition_name(name, kind)).is_file()]
    if not missing:
        return
    pixels = np.asarray(image or load_image(args.output / name, limits=photo_limits(args)))
    for kind in missing:
        place = args.output / condition_name(name, kind)
        place.parent.mkdir(parents=True, exist_ok=True)
        part = place.with_suffix(".part")
        condition_to_pil(extract(ConditionConfig(kind=kind), pixels)).save(part, "PNG")
        part.replace(place)


def write_metadata(args: argparse.Namespace, rows: dict[str, dict[str, Any]]) -> None:
    """Write metadata.jsonl for all complete images, and their missing conditions, also for images of earlier calls."""
    for kind in args.condition:
        (args.output / kind).mkdir(exist_ok=True)
        mark_made(args.output / kind)  # so that make_dataset.py does not take them for photos
    lines = []
    for row in tqdm(rows.values(), desc="conditions", mininterval=1):
        try:
            if not is_complete(row, args.output):
                continue
            write_conditions(args, row["file"])
        except ImageError:
            continue
        line = {"file_name": row["file"], "text": row.get("text")}
        lines.append(line | {f"{kind}_file_name": condition_name(row["file"], kind) for kind in args.condition})
    write_text(args.output / METADATA, json_lines(lines))


if __name__ == "__main__":
    sys.exit(main())
