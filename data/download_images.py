"""Fetch the pictures of a list of addresses, with a caption file beside each: input for make_dataset.py.

    python data/download_images.py --list urls.txt --output photos
    python data/download_images.py --list part-0.parquet --url_column URL --caption_column TEXT --output photos

A list is .txt (an address per line, a caption after a tab), .jsonl (url, text) or .parquet. manifest.jsonl gets a line
per address: file, sha256, size and caption, or why it failed. A second call continues where the first one stopped;
--retry asks failed addresses again. The manifest can itself be the list: a file whose sha256 differs is then refused,
so that others get the very same pictures.
"""

from __future__ import annotations

import argparse
import hashlib
import http.client
import json
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm

from localctl.images import ImageError, open_image

MANIFEST = "manifest.jsonl"
SIGNATURES = {b"\x89PNG": ".png", b"\xff\xd8\xff": ".jpg", b"RIFF": ".webp"}
OPT_OUT = ("noai", "noimageai")  # in X-Robots-Tag


class Refused(Exception):
    """A picture that is not taken; the message says why."""


def main(argv: Sequence[str] | None = None) -> int:
    """0 when the list was worked through, whatever failed; 2 after a mistake of the user's."""
    args = parse(argv)
    try:
        wanted = {item["url"]: item for item in read_list(args)}
    except ValueError as error:
        print(f"download_images.py: {error}", file=sys.stderr)
        return 2
    args.output.mkdir(parents=True, exist_ok=True)
    manifest = args.output / MANIFEST
    done = finished(manifest, args.output, args.retry)
    todo = [item for url, item in wanted.items() if url not in done]
    counts: Counter[str] = Counter({"here already": len(wanted) - len(todo)})
    with manifest.open("a", encoding="utf-8") as file, ThreadPoolExecutor(args.threads) as pool:
        if manifest.stat().st_size and not manifest.read_bytes().endswith(b"\n"):
            file.write("\n")  # after a kill in the middle of a line
        results = pool.map(lambda item: fetch(item, args), todo)
        for result in tqdm(results, total=len(todo), desc="fetching", mininterval=1):
            counts["fetched" if "file" in result else result["error"].split(":")[0]] += 1
            file.write(json.dumps(result, ensure_ascii=False) + "\n")
            file.flush()
    print(", ".join(f"{number} {what}" for what, number in counts.items() if number), f"({manifest})")
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--list", type=Path, required=True, help=".txt, .jsonl or .parquet")
    add("--output", type=Path, required=True, help="folder for pictures, captions and manifest.jsonl")
    add("--url_column", default="url")
    add("--caption_column", default="text")
    add("--timeout", type=float, default=15, help="seconds without an answer; a whole picture may take four times it")
    add("--max_bytes", type=int, default=20_000_000, help="larger files are not fetched")
    add("--threads", type=int, default=8, help="fetched at once")
    add("--retry", action="store_true", help="ask addresses again that failed before")
    return parser.parse_args(argv)


def read_list(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """url, text and, where known, sha256. ValueError for a list that cannot be read."""
    path, url, text = args.list, args.url_column, args.caption_column
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet as pq

            rows = pq.read_table(path, columns=[url, text]).to_pylist()
        elif path.suffix == ".jsonl":
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        else:
            lines = (line.strip() for line in path.read_text(encoding="utf-8").splitlines())
            rows = [dict(zip((url, text), line.split("\t", 1), strict=False)) for line in lines if line]
        return iter([{"url": row[url], "text": row.get(text), "sha256": row.get("sha256")} for row in rows])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no list with a column {url!r} ({error}); check --list and --url_column.") from None


def finished(manifest: Path, folder: Path, retry: bool) -> set[str]:
    """Addresses that need not be asked again: whose file is here in full, or that failed."""
    done: set[str] = set()
    for line in manifest.read_text(encoding="utf-8").splitlines() if manifest.exists() else []:
        if not line.endswith("}"):
            continue
        row = json.loads(line)
        file = folder / row.get("file", "")
        here = "file" in row and file.is_file() and file.stat().st_size == row["bytes"]
        (done.add if here or ("error" in row and not retry) else done.discard)(row["url"])
    return done


def fetch(item: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """The line of the manifest for one address; its files are written."""
    url = item["url"]
    try:
        content = download(url, args.timeout, args.max_bytes)
        digest = hashlib.sha256(content).hexdigest()
        if item["sha256"] not in (None, digest):
            raise Refused("another picture than listed (sha256)")
        open_image(content, "the file")
    except (Refused, ImageError) as refusal:
        reason = refusal.reason if isinstance(refusal, ImageError) else str(refusal)
        return {"url": url, "text": item["text"], "error": reason}
    except (OSError, ValueError, http.client.HTTPException) as error:  # URLError and timeouts are OSErrors
        reason = f"HTTP {error.code}" if isinstance(error, urllib.error.HTTPError) else "no answer"
        return {"url": url, "text": item["text"], "error": f"{reason}: {error}"}
    extension = next((end for start, end in SIGNATURES.items() if content.startswith(start)), ".png")
    stem = hashlib.sha256(url.encode()).hexdigest()[:20]
    place = args.output / stem[:2] / f"{stem}{extension}"
    place.parent.mkdir(exist_ok=True)
    if item["text"]:
        place.with_suffix(".txt").write_text(str(item["text"]), encoding="utf-8")
    part = place.with_suffix(".part")
    part.write_bytes(content)
    part.replace(place)  # a picture is there in full or not at all
    name = place.relative_to(args.output).as_posix()
    return {"url": url, "text": item["text"], "file": name, "sha256": digest, "bytes": len(content)}


def download(url: str, timeout: float, max_bytes: int) -> bytes:
    """The content of an http or https address. Refused when it is too large, too slow, or its owner opted out."""
    if not str(url).lower().startswith(("http://", "https://")):
        raise Refused("no http address")
    opener = urllib.request.OpenerDirector()  # http and https only, also after a redirection
    for handler in (
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        urllib.request.HTTPRedirectHandler,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPErrorProcessor,
        urllib.request.ProxyHandler,
        urllib.request.UnknownHandler,
    ):
        opener.add_handler(handler())
    begun, content = time.monotonic(), bytearray()
    request = urllib.request.Request(url, headers={"User-Agent": "localctl"})
    with opener.open(request, timeout=timeout) as answer:
        if any(word in (answer.headers.get("X-Robots-Tag") or "").lower() for word in OPT_OUT):
            raise Refused("opted out of machine learning")
        while block := answer.read(65_536):
            content += block
            if len(content) > max_bytes:
                raise Refused("too many bytes")
            if time.monotonic() - begun > 4 * timeout:
                raise Refused("too slow")
    return bytes(content)


if __name__ == "__main__":
    sys.exit(main())
