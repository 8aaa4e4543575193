"""Download files within limits: servers may be slow, send endless data, or redirect to the local network."""

from __future__ import annotations

import http.client
import io
import ipaddress
import socket
import ssl
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any
from urllib.parse import urlsplit

OPT_OUT = ("noai", "noimageai")  # values of X-Robots-Tag
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


class Refused(Exception):
    """A URL is not fetched; the message is the reason."""


@dataclass(frozen=True)
class WebLimits:
    """Limits of a download.

    patience: longest time without data, in seconds. total: longest time for a URL with all its redirections, in
    seconds. max_bytes: size of the body. inner: whether addresses of this machine and its network are allowed.
    """

    patience: float
    total: float
    max_bytes: int
    inner: bool = False


def fetch_bytes(url: str, limits: WebLimits) -> bytes:
    """Download the content of an http or https URL, following redirections.

    Raises:
        Refused: too large, too slow, truncated, an inner address, not http, or its owner opted out of machine learning.
        OSError, ValueError, http.client.HTTPException: no answer, or an invalid one.
    """
    if not url.lower().startswith(("http://", "https://")):
        raise Refused("no http address")
    clock = _Clock(limits)
    opener = urllib.request.OpenerDirector()  # http and https only, also after a redirection
    for handler in (
        _Handler(clock),
        urllib.request.HTTPRedirectHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.ProxyHandler(),
        urllib.request.UnknownHandler(),
    ):
        opener.add_handler(handler)
    content = bytearray()
    request = urllib.request.Request(url, headers={"User-Agent": "localctl"})
    with opener.open(request, timeout=clock.left()) as answer:
        if any(word in (answer.headers.get("X-Robots-Tag") or "").lower() for word in OPT_OUT):
            raise Refused("opted out of machine learning")
        while block := answer.read1(65_536):
            content += block
            if len(content) > limits.max_bytes:
                raise Refused("too many bytes")
        if answer.length:
            raise Refused("cut off")
    return bytes(content)


def is_public(address: str) -> bool:
    """Return whether an IP address is public: not of this machine, its network or a reserved range, also not in the
    form of an IPv6 address that contains an IPv4 address."""
    found = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(found, ipaddress.IPv6Address):
        last = ipaddress.IPv4Address(int(found) % 2**32)
        found = found.ipv4_mapped or found.sixtofour or (last if found in _NAT64 or int(found) < 2**32 else found)
    return found.is_global and not found.is_multicast


class _Clock:
    """The remaining time for a URL."""

    def __init__(self, limits: WebLimits) -> None:
        self.limits = limits
        self._ends = time.monotonic() + limits.total

    def left(self) -> float:
        """Return the seconds to wait for the next byte. Refused when the total time is spent."""
        rest = self._ends - time.monotonic()
        if rest <= 0:
            raise Refused("too slow")
        return min(rest, self.limits.patience)

    def connect(self, place: tuple[str, int], *options: Any, proxied: bool = False) -> socket.socket:
        """Connect as ``socket.create_connection`` does, but to public addresses only, except for the user's proxy.

        The host name is resolved once, and the connection uses the address that was checked, so that a second lookup
        cannot lead to another one.
        """
        found = socket.getaddrinfo(*place, type=socket.SOCK_STREAM)
        if not proxied:
            self.check(found)
        failure: OSError | None = None
        for family, kind, protocol, _, address in found:
            opened = socket.socket(family, kind, protocol)
            try:
                opened.settimeout(self.left())
                opened.connect(address)
                return opened
            except OSError as error:
                failure = error
                opened.close()
            except Refused:
                opened.close()
                raise
        raise failure or OSError("no address")

    def check(self, found: list[Any]) -> None:
        """Raise Refused if one of the addresses of a host name is an inner one."""
        if not self.limits.inner and not all(is_public(str(entry[4][0])) for entry in found):
            raise Refused("inner address")


class _Handler(urllib.request.HTTPHandler, urllib.request.HTTPSHandler):
    """Opens http and https URLs within the time of a clock."""

    def __init__(self, clock: _Clock) -> None:
        super().__init__()
        self._clock = clock

    def http_open(self, req: urllib.request.Request) -> Any:
        return self.do_open(self._connecting(http.client.HTTPConnection, req), req)

    def https_open(self, req: urllib.request.Request) -> Any:
        return self.do_open(self._connecting(http.client.HTTPSConnection, req, context=_trusted()), req)

    def _connecting(self, kind: type, req: urllib.request.Request, **options: Any) -> Any:
        proxied = req.has_proxy() or getattr(req, "_tunnel_host", None) is not None
        if proxied:
            self._check_behind_proxy(req)

        def connecting(host: str, timeout: float) -> Any:
            connection = kind(host, timeout=self._clock.left(), **options)
            connection._create_connection = partial(self._clock.connect, proxied=proxied)
            connection.response_class = partial(_PacedResponse, clock=self._clock)
            return connection

        return connecting

    def _check_behind_proxy(self, req: urllib.request.Request) -> None:
        """Check the addresses of a host name on this machine; the proxy resolves it again, which cannot be checked."""
        try:
            self._clock.check(socket.getaddrinfo(urlsplit(req.full_url).hostname, None))
        except OSError:
            return


@cache
def _trusted() -> ssl.SSLContext:
    """Load the certificates of this machine once, as this may take as long as a download."""
    return ssl.create_default_context()


class _PacedResponse(http.client.HTTPResponse):
    """A response that waits for every byte, also of the status and headers, within the time of the clock."""

    def __init__(self, sock: socket.socket, *args: Any, clock: _Clock, **options: Any) -> None:
        super().__init__(sock, *args, **options)
        self.fp.close()
        self.fp = io.BufferedReader(_Paced(sock, clock.left))


class _Paced(io.RawIOBase):
    """The bytes of a socket. left: called before each read; returns the seconds to wait."""

    def __init__(self, sock: socket.socket, left: Callable[[], float]) -> None:
        self._socket, self._left = sock, left
        self._bytes = sock.makefile("rb", buffering=0)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        self._socket.settimeout(self._left())
        try:
            return self._bytes.readinto(buffer)
        except TimeoutError:
            self._left()  # raises Refused if the total time is spent
            raise

    def close(self) -> None:
        self._bytes.close()
        super().close()
