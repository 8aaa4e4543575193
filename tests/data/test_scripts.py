"""The scripts in data/: from pictures and addresses to data sets that train."""

import hashlib
import json
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from file_data import identities, picture, png, write_metadata
from PIL import Image

from localctl.conditions import ConditionConfig, extract
from localctl.data import DataConfig, open_files
from localctl.images import load_image

sys.path.append(str(Path(__file__).parents[2] / "data"))
import download_images  # noqa: E402
import make_dataset  # noqa: E402


@pytest.fixture
def photos(tmp_path):
    root = tmp_path / "photos"
    (root / "more").mkdir(parents=True)
    for i, name in enumerate(("a.png", "b.jpg", "more/a.png", "broken.png", "silent.png")):
        picture(i).save(root / name, quality=100)
        (root / name).with_suffix(".txt").write_text(f"picture {i}\n")
    (root / "broken.png").write_bytes(b"<html>")
    (root / "silent.txt").unlink()
    return root


def opened(path, name, kind="canny", **options):
    data = DataConfig(name=name, path=str(path), resolution=32, validation_share=0, **options)
    return open_files(data, ConditionConfig(kind=kind), "train")


@pytest.mark.parametrize("name", ["imagefolder", "folder"])
def test_a_folder_of_pictures_becomes_a_data_set(photos, tmp_path, capsys, name):
    masks = tmp_path / "masks"
    (masks / "more").mkdir(parents=True)
    for i, file in enumerate(("a.png", "b.png", "more/a.png")):
        picture(i).save(masks / file)
    argv = ["--images", str(photos), "--output", str(tmp_path / "out"), "--format", name]
    assert make_dataset.main([*argv, "--masks", str(masks), "--condition", "sobel"]) == 0
    captured = capsys.readouterr()
    assert "3 examples" in captured.out and "1 caption missing, 1 not a picture" in captured.out
    assert "left out broken.png" in captured.err
    options = {"conditioning_image_column": "sobel"} if name == "imagefolder" else {}
    column = opened(tmp_path / "out", name, "column", **(options or {"conditioning_image_column": "sobel"}))
    for i in range(3):
        example = column[i]
        number = int(example.caption.split()[1])
        assert identities((example.pixels[:1] + 1) / 2) == identities(example.mask[None]) == [number]
    assert sorted(column[i].caption for i in range(3)) == ["picture 0", "picture 1", "picture 2"]
    assert make_dataset.main(argv) == 2 and "not empty" in capsys.readouterr().err


def test_conditions_are_those_of_training_and_captions_may_come_from_a_list(tmp_path, capsys):
    rng = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    Image.fromarray(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)).save(tmp_path / "photos" / "x.png")
    write_metadata(tmp_path, [{"file_name": "x.png", "text": "grüne Wiese"}])
    argv = ["--images", str(tmp_path / "photos"), "--output", str(tmp_path / "out"), "--condition", "canny"]
    assert make_dataset.main([*argv, "--captions", str(tmp_path / "metadata.jsonl")]) == 0
    assert opened(tmp_path / "out", "imagefolder")[0].caption == "grüne Wiese"
    written = np.asarray(load_image(next((tmp_path / "out" / "canny").iterdir())))[..., 0] / 255
    assert np.array_equal(written, extract(ConditionConfig(), np.asarray(load_image(tmp_path / "photos/x.png")))[0])
    for wrong in (["--images", "nowhere"], ["--images", str(tmp_path / "out" / "canny" / "none")]):
        assert make_dataset.main([*wrong, "--output", str(tmp_path / "other")]) == 2
    assert (
        make_dataset.main([*argv[:2], "--output", str(tmp_path / "o"), "--captions", str(tmp_path / "photos/x.png")])
        == 2
    )
    assert "--captions" in capsys.readouterr().err


class Handler(BaseHTTPRequestHandler):
    asked: Counter = Counter()

    def do_GET(self):
        Handler.asked[self.path] += 1
        content, headers = png(picture(3)), {}
        if self.path == "/gone":
            self.send_error(404)
            return
        if self.path == "/moved":
            self.send_response(302)
            self.send_header("Location", "file:///etc/hostname")
            self.end_headers()
            return
        if self.path == "/html":
            content = b"<html>not found, sorry</html>"
        if self.path == "/large":
            content = content + b"\0" * 60_000
        if self.path == "/slow":
            time.sleep(1.5)
        if self.path == "/private":
            headers["X-Robots-Tag"] = "noai"
        self.send_response(200)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        try:
            self.wfile.write(content[: len(content) // 2] if self.path == "/half" else content)
        except OSError:  # the other side has had enough
            return

    def log_message(self, *arguments):
        return


@pytest.fixture
def server():
    Handler.asked.clear()
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{httpd.server_port}"
    httpd.shutdown()
    httpd.server_close()


def rows_of(folder):
    return {row["url"]: row for row in map(json.loads, (folder / "manifest.jsonl").read_text().splitlines())}


def fetch(listed, folder, *more):
    return download_images.main(
        ["--list", str(listed), "--output", str(folder), "--timeout", "0.6", "--max_bytes", "50000", *more]
    )


def test_addresses_become_pictures_with_a_manifest(server, tmp_path, capsys):
    paths = ("good", "gone", "html", "large", "slow", "private", "half", "moved")
    lines = [f"{server}/{path}\tcaption of {path}" for path in paths] + [
        "file:///etc/hostname\tno",
        "http://127.0.0.1:9/",
    ]
    (tmp_path / "urls.txt").write_text("\n".join(lines))
    assert fetch(tmp_path / "urls.txt", tmp_path / "photos") == 0
    rows = rows_of(tmp_path / "photos")
    good = rows.pop(f"{server}/good")
    content = (tmp_path / "photos" / good["file"]).read_bytes()
    assert good["sha256"] == hashlib.sha256(content).hexdigest() and good["bytes"] == len(content)
    errors = {url.removeprefix(server): row["error"].split(":")[0] for url, row in rows.items()}
    assert errors == {
        "/gone": "HTTP 404", "/html": "not a picture", "/large": "too many bytes", "/slow": "no answer",
        "/private": "opted out of machine learning", "/half": "damaged", "/moved": errors["/moved"],
        "file:///etc/hostname": "no http address", "http://127.0.0.1:9/": "no answer",
    }  # fmt: skip
    assert errors["/moved"] in ("no answer", "HTTP 302") and "1 fetched" in capsys.readouterr().out
    assert len(list((tmp_path / "photos").rglob("*.png"))) == 1 and not list(tmp_path.rglob("*.part"))
    assert make_dataset.main(["--images", str(tmp_path / "photos"), "--output", str(tmp_path / "out")]) == 0
    assert opened(tmp_path / "out", "imagefolder")[0].caption == "caption of good"


def test_a_second_call_continues(server, tmp_path, capsys):
    urls = [f"{server}/{name}" for name in ("one", "two", "gone")]
    pq.write_table(pa.table({"URL": urls, "TEXT": ["1", "2", "3"]}), tmp_path / "list.parquet")
    columns = ("--url_column", "URL", "--caption_column", "TEXT")
    photos = tmp_path / "photos"
    assert fetch(tmp_path / "list.parquet", photos, *columns) == 0
    (photos / rows_of(photos)[urls[0]]["file"]).unlink()  # lost
    with (photos / "manifest.jsonl").open("a") as file:
        file.write('{"url": "' + urls[1])  # killed while writing
    assert fetch(tmp_path / "list.parquet", photos, *columns) == 0
    assert Handler.asked == {"/one": 2, "/two": 1, "/gone": 1}
    assert "2 here already, 1 fetched" in capsys.readouterr().out
    assert fetch(tmp_path / "list.parquet", photos, *columns, "--retry") == 0
    assert Handler.asked["/gone"] == 2 and Handler.asked["/two"] == 1


def test_a_manifest_pins_the_pictures(server, tmp_path):
    lines = [{"url": f"{server}/good", "text": "a", "sha256": hashlib.sha256(png(picture(3))).hexdigest()},
             {"url": f"{server}/other", "text": "b", "sha256": "0" * 64}]  # fmt: skip
    (tmp_path / "pinned.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert fetch(tmp_path / "pinned.jsonl", tmp_path / "photos") == 0
    rows = rows_of(tmp_path / "photos")
    assert "file" in rows[f"{server}/good"] and "sha256" in rows[f"{server}/other"]["error"]


def test_a_list_that_is_none(tmp_path, capsys):
    assert fetch(tmp_path / "none.txt", tmp_path / "photos") == 2
    (tmp_path / "odd.jsonl").write_text("[1]")
    assert fetch(tmp_path / "odd.jsonl", tmp_path / "photos") == 2
    assert "--url_column" in capsys.readouterr().err
