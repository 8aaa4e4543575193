"""Attacks on the running studio by HTTP: each is named, each is refused, and the page goes on serving."""

from __future__ import annotations

import random
import socket
from pathlib import Path
from typing import Any

import pytest
from studio_http import API, Visitor, free_port

import localctl
from localctl.bases import BASES
from localctl.studio.config import StudioConfig
from localctl.studio.server import MAX_UPLOAD, serve

pytest_plugins = ["studio_http"]
SCENE: dict[str, Any] = {
    "width": 64,
    "height": 64,
    "regions": [{"id": "r1", "color": 0, "phrase": "a red circle", "box": [0, 0, 0.5, 1]}],
}


def test_only_what_the_flags_say_is_open_whatever_the_environment(served: Any) -> None:
    assert served.share is False and served.share_url is None
    assert served.server_name == "127.0.0.1" and served.allowed_paths == [] and served.max_file_size == MAX_UPLOAD
    assert served.mcp_server is False and served.enable_monitoring is False and served.analytics_enabled is False
    assert served.show_error is False and served.delete_cache is not None
    assert served._queue.max_size == 32 and served.api_open is False


def test_no_handler_is_offered_as_an_api(visitor: Visitor) -> None:
    described = visitor.get(f"{API}/info").json()
    assert described["named_endpoints"] == {} and described["unnamed_endpoints"] == {}
    for path in ("/docs", "/redoc", "/openapi.json"):
        assert visitor.get(path).status_code in (403, 404)


PATHS = {
    "an absolute path": "/etc/passwd",
    "the code": str(Path(localctl.__file__)),
    "the weights": f"{BASES['micro'].id_or_path}/model_index.json",
    "a relative path": "../../../../etc/passwd",
    "an encoded path": "..%2f..%2f..%2fetc%2fpasswd",
    "twice encoded": "%252e%252e%252fetc%252fpasswd",
    "a null byte": "/etc/passwd%00.png",
    "an address": "http://127.0.0.1:22/",
    "the metadata of a cloud": "http://169.254.169.254/latest/meta-data/",
    "the environment": "/proc/self/environ",
}


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())
def test_files_of_the_server_are_not_served(visitor: Visitor, path: str) -> None:
    for route in (
        f"{API}/file={path}",
        f"{API}/file/{path}",
        f"{API}/proxy={path}",
        f"/static/{path}",
        f"/assets/{path}",
    ):
        answer = visitor.get(route)
        assert answer.status_code >= 300, route
        assert "root:" not in answer.text and "_class_name" not in answer.text and "PATH=" not in answer.text


def test_monitoring_and_development_routes_are_closed(visitor: Visitor) -> None:
    for path in (
        "/monitoring",
        "/monitoring/summary",
        f"{API}/profiling/traces",
        f"{API}/vibe-code",
        "/gradio_api/mcp/",
    ):
        answer = visitor.get(path)
        assert answer.status_code >= 400 or "analytics" not in answer.text.lower(), path
    assert visitor.post(f"{API}/vibe-edit", json={"prompt": "x"}).status_code >= 400


def test_an_upload_over_the_limit_is_refused(visitor: Visitor) -> None:
    assert visitor.upload("large.png", bytes(MAX_UPLOAD + 1_000_000)).status_code == 413
    assert visitor.upload("huge.png", bytes(25_000_000)).status_code == 413


def test_a_body_over_the_limit_is_refused_even_if_it_hides_its_length(visitor: Visitor) -> None:
    assert visitor.post(f"{API}/queue/join", content=b" " * 25_000_000).status_code == 413
    chunks = (b" " * 1_000_000 for _ in range(30))
    assert visitor.post(f"{API}/queue/join", content=chunks).status_code >= 400


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:1", "file://", "http://[::1"])
def test_requests_of_other_sites_are_refused(visitor: Visitor, origin: str) -> None:
    for path in (f"{API}/queue/join", f"{API}/upload", f"{API}/run/predict"):
        assert visitor.post(path, headers={"Origin": origin}).status_code == 403
    assert visitor.get("/config", headers={"Origin": origin}).status_code == 403


def test_requests_of_the_page_itself_are_answered(visitor: Visitor) -> None:
    port = visitor.url.rsplit(":", 1)[1]
    for origin in (visitor.url, f"http://localhost:{port}"):
        assert visitor.get("/config", headers={"Origin": origin}).status_code == 200
    for name in ("localhost", "127.5.0.1", "[::1]"):  # each is an address to listen on, of this machine alone
        host = f"{name}:{port}"
        assert visitor.get("/config", headers={"Host": host, "Origin": f"http://{host}"}).status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", ""])
def test_another_name_for_this_machine_is_refused(visitor: Visitor, host: str) -> None:
    assert visitor.get("/config", headers={"Host": host}).status_code in (400, 403)


def test_a_browser_may_load_nothing_from_elsewhere(visitor: Visitor) -> None:
    answer = visitor.get("/")
    assert "default-src 'self'" in answer.headers["content-security-policy"]
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "fonts.googleapis" not in answer.text + visitor.get("/theme.css").text


@pytest.mark.parametrize(
    "path",
    ["/etc/passwd", "http://127.0.0.1/x.png", "http://169.254.169.254/a.png", "../x.png", str(Path(localctl.__file__))],
)
def test_a_photo_is_never_a_path_or_an_address_that_the_page_names(visitor: Visitor, path: str) -> None:
    event = visitor.event("place-generate")
    photo = {"path": path, "url": path, "orig_name": "x.png", "meta": {"_type": "gradio.FileData"}}
    last = visitor.run(event, visitor.values(event, photo=photo, scene=SCENE, steps=1))[-1]
    assert last["success"] is False and "root:" not in str(last)


def test_what_a_page_claims_to_remember_names_no_file(visitor: Visitor, tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"  # in the temporary folder, of which Gradio serves what a handler returns
    secret.write_bytes(b"secret")
    kinds = {part["id"]: part["type"] for part in visitor.config()["components"]}
    events = visitor.config()["dependencies"]
    loads = [event for event in events if [kinds[part] for part in event["inputs"]] == ["browserstate"]]
    assert len(loads) == 2  # one for each tab that is remembered
    for event in loads:
        for memory in ({"photo": str(secret)}, {"photo": {"path": str(secret)}}, {"photo": [str(secret)]}):
            answer = visitor.direct(event, [memory])
            assert answer.status_code == 200 and "secret" not in answer.text


REFUSED = {
    "a prompt that is too long": ({"prompt": "x" * 1001}, "The prompt has 1001 characters"),
    "a width that is not a multiple of 8": ({"canvas": {**SCENE, "width": 100}}, "The width 100"),
    "a huge size": ({"canvas": {**SCENE, "width": 2**40}}, "The width must be from"),
    "seventeen regions": ({"canvas": {**SCENE, "regions": SCENE["regions"] * 17}}, "There are 17 regions"),
    "a canvas that is text": ({"canvas": "<script>alert(1)</script>"}, "The canvas must be an object"),
    "a seed of text": ({"seed": "1; rm"}, None),
    "a seed with a fraction": ({"seed": 1.5}, None),
    "too many images": ({"images": 1000}, None),
    "too many steps": ({"steps": 10**9}, None),
    "an unknown method": ({"method": "../bias"}, None),
    "a photo that is a list": ({"photo": ["/etc/passwd"]}, None),
}


@pytest.mark.parametrize(("changes", "text"), REFUSED.values(), ids=REFUSED.keys())
def test_a_field_out_of_bounds_makes_no_image(visitor: Visitor, changes: dict[str, Any], text: str | None) -> None:
    event = visitor.event("place-generate")
    told = visitor.run(event, visitor.values(event, **{"canvas": SCENE, **changes}))
    assert "Step" not in str(told)
    if text is None:
        assert told[-1]["success"] is False or "job-failed" in str(told)
    else:
        assert text in str(told) and "job-failed" in str(told)


def test_markup_of_the_page_is_escaped(visitor: Visitor) -> None:
    event = visitor.event("place-prompt", "change")
    markup = '<img src=x onerror="alert(1)">'
    scene = {**SCENE, "regions": [{**SCENE["regions"][0], "phrase": markup}]}
    view = visitor.direct(event, [f"a {markup} there", scene, 1]).json()["data"][0]["parts"][0]["value"]
    assert "&lt;" in view and "<img" not in view


def test_events_that_are_not_there_are_refused(visitor: Visitor) -> None:
    for number in (-1, 10**6, "x", None, 1.5):
        assert (
            visitor.post(f"{API}/queue/join", json={"data": [], "fn_index": number, "session_hash": "s"}).status_code
            >= 400
        )
    assert (
        visitor.post(f"{API}/component_server", json={"fn_name": "__init__", "component_id": 1, "data": {}}).status_code
        >= 400
    )


def _malformed(rng: random.Random, visitor: Visitor) -> tuple[str, dict[str, Any]]:
    """Return a route and the arguments of a request that no page would make."""
    junk: list[Any] = [
        None,
        [],
        {},
        "",
        "\0",
        "x" * 5000,
        -1,
        1e308,
        True,
        [[[[]]]],
        {"path": "/etc/passwd"},
        {"__type__": "update"},
    ]
    route = rng.choice(
        [
            "queue/join",
            "run/predict",
            "upload",
            "queue/data",
            "cancel",
            "reset",
            "component_server",
            "call/x",
            "heartbeat/x/y",
        ]
    )
    kind = rng.randrange(4)
    if kind == 0:
        return route, {
            "content": rng.randbytes(rng.randrange(400)),
            "headers": {
                "content-type": rng.choice(
                    ["application/json", "text/plain", "multipart/form-data", "multipart/form-data; boundary=x"]
                )
            },
        }
    if kind == 1:
        return route, {"json": rng.choice(junk)}
    if kind == 2:
        return route, {
            "files": {"files": (rng.choice(["../../x", "a\nb.png", "x.svg", ".", "x" * 300]), rng.randbytes(50))}
        }
    body = {
        "data": [rng.choice(junk) for _ in range(rng.randrange(80))],
        "fn_index": rng.choice([*range(12), *junk]),
        "session_hash": rng.choice(junk + ["fuzz"]),
    }
    return route, {"json": body}


def fuzz(served: Any, requests: int) -> None:
    rng = random.Random(0)
    with_tab = Visitor(served.url, "fuzz")
    for _ in range(requests):
        route, options = _malformed(rng, with_tab)
        with with_tab.http.stream("POST", f"{served.url}{API}/{route}", **options) as answer:
            assert answer.status_code < 600
    assert with_tab.get("/config").status_code == 200
    event = with_tab.event("place-prompt", "change")
    assert "red" in with_tab.direct(event, ["a red circle", SCENE, 1]).json()["data"][0]["parts"][0]["value"]
    with_tab.http.close()


def test_malformed_requests_leave_it_serving(served: Any) -> None:
    fuzz(served, 40)


@pytest.mark.slow
def test_200_malformed_requests_leave_it_serving(served: Any) -> None:
    fuzz(served, 200)


def test_a_connection_that_says_nothing_does_not_block_others(served: Any, visitor: Visitor) -> None:
    host, port = served.url.removeprefix("http://").split(":")
    silent = [socket.create_connection((host, int(port)), 5) for _ in range(20)]
    try:
        assert visitor.get("/config").status_code == 200
    finally:
        for one in silent:
            one.close()


def test_a_login_is_asked_for_before_anything_is_told(served: Any) -> None:
    port = free_port()
    blocks = serve(StudioConfig(port=port, auth="me:secret"), block=False)
    try:
        stranger = Visitor(f"http://127.0.0.1:{port}")
        for path in ("/config", f"{API}/info", f"{API}/file=/etc/passwd", f"{API}/queue/data?session_hash=x"):
            assert stranger.get(path).status_code == 401, path
        assert stranger.post(f"{API}/queue/join", json={"data": [], "fn_index": 0}).status_code == 401
        assert stranger.upload("x.png", b"x").status_code == 401
        assert stranger.post("/login", data={"username": "me", "password": "guess"}).status_code == 400
        assert stranger.post("/login", data={"username": "me", "password": "secret"}).status_code == 200
        assert stranger.get("/config").status_code == 200
        stranger.http.close()
    finally:
        blocks.close()
        blocks.studio.close()
