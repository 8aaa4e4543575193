"""A guard before the page's own server: who may ask, how much a request may hold, what a browser may load."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from localctl.studio.config import is_loopback

logger = logging.getLogger(__name__)
MAX_BODY = 24_000_000  # bytes of a request: an upload, or all masks of a canvas
# Everything comes from this server; Gradio's templates need eval.
_POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; object-src 'none'; base-uri 'self'; "
    "form-action 'self'; frame-ancestors 'self'"
)
_HEADERS = (
    (b"content-security-policy", _POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
)

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class Guard:
    """ASGI middleware of the studio.

    Refuses a request that another site's page makes in the reader's browser (403: its ``Origin`` is not this host), one
    that names another host than this machine while the server is local (403: DNS rebinding), and one that is too large
    (413), and answers 500 where the app fails. Adds headers that let a browser load nothing from elsewhere.

    Args:
        app: what answers.
        is_local: whether the server is for this machine alone.
        checks_origin: False behind a public link, whose host name is not known here.
    """

    def __init__(self, app: Any, is_local: bool = True, checks_origin: bool = True) -> None:
        self.app = app
        self.is_local = is_local
        self.checks_origin = checks_origin

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer one request, or pass it on."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        headers = {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}
        if problem := self._problem(headers):
            await _answer(send, 403, problem)
            return
        if headers.get(b"content-length", "0").isdigit() and int(headers.get(b"content-length", "0")) > MAX_BODY:
            await _answer(send, 413, f"The request is over {MAX_BODY:,} bytes.")
            return
        await self._pass_on(scope, receive, send)

    async def _pass_on(self, scope: Message, receive: Receive, send: Send) -> None:
        """Let the app answer; what it fails on is a plain 500, where it would otherwise cut the connection."""
        begun = False

        async def watched(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self.app(scope, _counted(receive), _with_headers(watched))
        except Exception as error:
            if begun:
                raise
            logger.warning(f"{scope.get('method')} {scope['path'][:100]!r} failed ({type(error).__name__})")
            logger.debug("its traceback", exc_info=error)
            await _answer(send, 500, "This request cannot be answered.")

    def _problem(self, headers: MutableMapping[bytes, str]) -> str | None:
        host = headers.get(b"host", "")
        if self.is_local and not is_loopback(_name(host)):
            return "This server is for this machine alone."
        origin = headers.get(b"origin")
        if self.checks_origin and origin is not None and not _same(origin, host, self.is_local):
            return "Requests of other sites are refused."
        return None


def _name(host: str) -> str:
    """Return a host without its port."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _same(origin: str, host: str, is_local: bool) -> bool:
    """Return whether a page from ``origin`` is one of this server; localhost and 127.0.0.1 are the same machine."""
    try:
        from_ = urlsplit(origin)
        own = urlsplit(f"//{host}")
        ports = [part.port or {"https": 443}.get(from_.scheme, 80) for part in (from_, own)]
    except ValueError:
        return False
    if from_.scheme not in ("http", "https"):
        return False
    names = {from_.hostname, own.hostname}
    return ports[0] == ports[1] and (len(names) == 1 or (is_local and all(is_loopback(name or "") for name in names)))


def _counted(receive: Receive) -> Receive:
    """Return ``receive`` that ends a body of more than ``MAX_BODY`` bytes, whatever its header says."""
    read = 0

    async def counted() -> Message:
        nonlocal read
        message = await receive()
        read += len(message.get("body", b""))
        return {"type": "http.disconnect"} if read > MAX_BODY else message

    return counted


def _with_headers(send: Send) -> Send:
    async def sent(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message.get("headers", ()), *_HEADERS]
        await send(message)

    return sent


async def _answer(send: Send, status: int, text: str) -> None:
    headers = [(b"content-type", b"text/plain; charset=utf-8"), *_HEADERS]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": text.encode()})
