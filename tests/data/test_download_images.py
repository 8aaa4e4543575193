"""data/download_images.py: photos from URLs, and URLs that are not downloaded."""

import errno
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
from file_data import identities, opened, picture, png

from localctl.conditions import ConditionConfig, extract
from localctl.images import load_image

sys.path.append(str(Path(__file__).parents[2] / "data"))
import download_images
import fetching
import make_dataset


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
        if self.path == "/inside":
            self.send_response(302)
            self.send_header("Location", "http://169.254.169.254/latest/meta-data")
            self.end_headers()
            return
        if self.path in ("/drip", "/drip_headers"):
            self.drip(b"HTTP/1.0 200 OK\r\n" + b"\r\n" * (self.path == "/drip"))
            return
        if self.path == "/html":
            content = b"<html>not found, sorry</html>"
        if self.path == "/large":
            content = content + b"\0" * 60_000
        if self.path == "/slow":
            time.sleep(2.5)
        if self.path == "/private":
            headers["X-Robots-Tag"] = "noai"
        self.send_response(200)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        try:
            self.wfile.write(content[: len(content) // 2] if self.path == "/half" else content)
        except OSError:  # the client has closed the connection
            return

    def drip(self, begin):
        """Send a response that never ends and never pauses for long."""
        try:
            self.wfile.write(begin)
            while True:
                time.sleep(0.05)
                self.wfile.write(b"x")
        except OSError:
            self.close_connection = True

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
    limits = ("--timeout", "1.5", "--max_bytes", "50000", "--allow_inner_addresses")
    return download_images.main(["--list", str(listed), "--output", str(folder), *limits, *more])


def test_urls_become_images_with_a_manifest(server, tmp_path, capsys):
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
        "/gone": "HTTP 404", "/html": "of unknown format", "/large": "too many bytes", "/slow": "no answer",
        "/private": "opted out of machine learning", "/half": "damaged", "/moved": errors["/moved"],
        "file:///etc/hostname": "no http address", "http://127.0.0.1:9/": "no answer",
    }  # fmt: skip
    assert errors["/moved"] in ("no answer", "HTTP 302") and "1 fetched" in capsys.readouterr().out
    assert len(list((tmp_path / "photos").rglob("*.png"))) == 1 and not list(tmp_path.rglob("*.part"))
    assert make_dataset.main(["--images", str(tmp_path / "photos"), "--output", str(tmp_path / "out")]) == 0
    assert opened(tmp_path / "out", "imagefolder")[0].caption == "caption of good"


def test_a_server_that_drips_is_given_up(server, tmp_path):
    (tmp_path / "urls.txt").write_text(f"{server}/drip\n{server}/drip_headers\n{server}/good\n")
    assert fetch(tmp_path / "urls.txt", tmp_path / "photos", "--timeout", "0.2", "--threads", "1") == 0
    rows = rows_of(tmp_path / "photos")
    assert rows[f"{server}/drip"]["error"] == rows[f"{server}/drip_headers"]["error"] == "too slow"
    assert "file" in rows[f"{server}/good"]


def test_inner_addresses_are_not_asked_unless_allowed(server, tmp_path, monkeypatch):
    port = server.rpartition(":")[2]
    inner = [server, f"http://localhost:{port}/a", f"http://2130706433:{port}/b", f"http://[::ffff:127.0.0.1]:{port}/c"]
    (tmp_path / "urls.txt").write_text("\n".join(inner))
    argv = ["--list", str(tmp_path / "urls.txt"), "--output", str(tmp_path / "photos")]
    assert download_images.main(argv) == 0 and not Handler.asked
    assert [row["error"] for row in rows_of(tmp_path / "photos").values()] == ["inner address"] * 4
    # a redirection: the server itself is taken for a public one
    public = fetching.is_public
    monkeypatch.setattr(fetching, "is_public", lambda address: address == "127.0.0.1" or public(address))
    (tmp_path / "urls.txt").write_text(f"{server}/inside")
    assert download_images.main([*argv[:3], str(tmp_path / "more")]) == 0 and Handler.asked == {"/inside": 1}
    assert rows_of(tmp_path / "more")[f"{server}/inside"]["error"] == "inner address"


@pytest.mark.parametrize(
    ("address", "public"),
    [("8.8.8.8", True), ("2001:4860:4860::8888", True), ("127.0.0.1", False), ("10.1.2.3", False), ("::1", False)]
    + [("169.254.169.254", False), ("100.64.0.1", False), ("0.0.0.0", False), ("224.0.0.1", False)]
    + [("::ffff:192.168.0.1", False), ("64:ff9b::7f00:1", False), ("64:ff9b::808:808", True), ("2002:7f00:1::", False)]
    + [("::7f00:1", False), ("fc00::1", False), ("fe80::1%eth0", False)],
)  # fmt: skip
def test_public_addresses(address, public):
    assert fetching.is_public(address) is public


def test_a_proxy_may_be_inside_and_what_is_behind_it_may_not(server, tmp_path, monkeypatch):
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", server)
    (tmp_path / "urls.txt").write_text("http://nowhere.invalid/good\nhttp://10.0.0.1/good\nhttp://localhost/good\n")
    assert download_images.main(["--list", str(tmp_path / "urls.txt"), "--output", str(tmp_path / "photos")]) == 0
    rows = rows_of(tmp_path / "photos")
    assert "file" in rows.pop("http://nowhere.invalid/good")  # a name that only the proxy may know
    assert {row["error"] for row in rows.values()} == {"inner address"}
    assert Handler.asked == {"http://nowhere.invalid/good": 1}


def test_addresses_that_are_no_text(server, tmp_path):
    rows = [
        {"url": [f"{server}/a"], "text": "a"},
        {"url": None},
        {"url": 7},
        {"url": {"x": 1}},
        {"url": "http://\ud83d/"},
    ]
    rows += [{"url": f"{server}/good", "text": ["first", "second"]}, {"url": f"{server}/odd", "text": {"x": "\udcff"}}]
    (tmp_path / "urls.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for _ in range(2):
        assert fetch(tmp_path / "urls.jsonl", tmp_path / "photos") == 0
        found = rows_of(tmp_path / "photos")
        assert len(found) == 7 and sum("file" in row for row in found.values()) == 2
    assert found['["' + f"{server}/a" + '"]']["error"] == "no http address"
    good = tmp_path / "photos" / found[f"{server}/good"]["file"]
    assert good.with_suffix(".txt").read_text() == "first"


@pytest.mark.parametrize("letter", ["\u2028", "\u0085", "\x1e", "\v"])
def test_letters_that_python_takes_for_line_ends(server, tmp_path, letter):
    line = {"url": f"{server}/good", "text": f"a{letter}b", "error": "no answer"}
    (tmp_path / "list.jsonl").write_bytes(json.dumps(line, ensure_ascii=False).encode() + b"\n")
    photos = tmp_path / "photos"
    photos.mkdir()
    if letter > " ":
        (photos / "manifest.jsonl").write_bytes((tmp_path / "list.jsonl").read_bytes())
        assert fetch(tmp_path / "list.jsonl", photos) == 0 and not Handler.asked
    assert fetch(tmp_path / "list.jsonl", photos, "--retry") == 0 and Handler.asked["/good"] == 1
    assert fetch(photos / "manifest.jsonl", tmp_path / "others") == 0 and Handler.asked["/good"] == 2
    (tmp_path / "list.txt").write_text(f"{server}/good\ta{letter}b\n{server}/two\tc\n")
    assert fetch(tmp_path / "list.txt", tmp_path / "third") == 0
    assert rows_of(tmp_path / "third")[f"{server}/good"]["text"] == f"a{letter}b"


def test_a_full_disk_ends_with_one_sentence_and_what_is_there_stays(server, tmp_path, monkeypatch, capsys):
    (tmp_path / "urls.txt").write_text("\n".join(f"{server}/{i}" for i in range(6)))
    write, written = Path.write_bytes, []

    def full_after_two(self, content):
        if len(written) == 2:
            write(self, content[:10])
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(self)
        return write(self, content)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full_after_two)
        assert fetch(tmp_path / "urls.txt", tmp_path / "photos", "--threads", "1") == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "No space left on device" in error and "after 2 images were fetched" in error
    assert not list((tmp_path / "photos").rglob("*.part"))
    assert fetch(tmp_path / "urls.txt", tmp_path / "photos") == 0
    assert "2 here already, 4 fetched" in capsys.readouterr().out


def test_conditions_are_computed_while_fetching(server, tmp_path, capsys):
    (tmp_path / "urls.txt").write_text(f"{server}/one\tcaption one\n{server}/gone\tx\n")
    photos = tmp_path / "photos"
    assert fetch(tmp_path / "urls.txt", photos) == 0  # without, at first
    (tmp_path / "urls.txt").write_text(f"{server}/one\tcaption one\n{server}/two\tcaption two\n")
    assert fetch(tmp_path / "urls.txt", photos, "--condition", "canny", "palette") == 0
    assert Handler.asked == {"/one": 1, "/gone": 1, "/two": 1}
    options = {"conditioning_image_column": "palette"}
    source = opened(photos, "imagefolder", "column", **options)
    assert sorted(source[i].caption for i in range(2)) == ["caption one", "caption two"]
    assert identities((source[0].pixels[:1] + 1) / 2) == identities(source[0].condition[:1]) == [3]
    assert not any("left out" in remark or "no line" in remark for remark in source.rows.remarks())
    for name in ("canny", "palette"):
        files = list((photos / name).rglob("*.png"))
        assert len(files) == 2
    image = load_image(photos / rows_of(photos)[f"{server}/two"]["file"])
    edges = load_image(photos / "canny" / (rows_of(photos)[f"{server}/two"]["file"] + ".png"))
    assert np.array_equal(np.asarray(edges)[..., 0] / 255, extract(ConditionConfig(), np.asarray(image))[0])
    capsys.readouterr()
    assert make_dataset.main(["--images", str(photos), "--output", str(tmp_path / "out")]) == 0
    assert "2 examples" in capsys.readouterr().out  # edges are no photos


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


def test_a_manifest_pins_the_images(server, tmp_path):
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
