"""Images from other hosts: https only, hosts of a list only, never an address that is not public.

The name is resolved once, every address it has is checked, and the connection goes to a checked address, so that
neither a redirect nor a name server that changes its mind leads into the private network.
"""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import urljoin, urlsplit

from vl2.runtime.serve.api_error import ApiError

Fetch = Callable[[str], bytes]
MOST_REDIRECTS = 3
FETCH_SECONDS = 15.0
_PORT = 443
_CHUNK = 65536
_REDIRECTS = (301, 302, 303, 307, 308)
# Global by their number, but they stand for another address, or once were a site's own.
_TRANSLATED = tuple(map(ipaddress.ip_network, ("64:ff9b::/96", "64:ff9b:1::/48", "2002::/16", "2001::/32", "::/96",
                                             "fec0::/10")))


@dataclass(frozen=True)
class Reply:
    """What a host answered: status, where it redirects to, the body up to one byte more than allowed."""

    status: int
    location: str | None
    body: bytes


@dataclass(frozen=True)
class Request:
    """One GET: to which address, for which host and path, how many bytes at most, until when (time.monotonic)."""

    address: str
    host: str
    target: str
    limit: int
    deadline: float


Resolve = Callable[[str], list[str]]
Transport = Callable[[Request], Reply]


def resolve(host: str) -> list[str]:
    """Every address of a host name."""
    return [entry[4][0] for entry in socket.getaddrinfo(host, _PORT, type=socket.SOCK_STREAM)]


def get(request: Request) -> Reply:
    """One GET over TLS whose certificate is checked for the host. Raises OSError and http.client.HTTPException."""
    connection = _Connection(request)
    try:
        connection.request("GET", request.target, headers={"Accept": "image/*", "User-Agent": "vl2-serve"})
        response = connection.getresponse()
        body = bytearray()
        while len(body) <= request.limit and (chunk := response.read1(_CHUNK)):
            body += chunk
            if time.monotonic() > request.deadline:
                raise TimeoutError("the time is up")
        return Reply(response.status, response.getheader("Location"), bytes(body[:request.limit + 1]))
    finally:
        connection.close()


class _Connection(http.client.HTTPSConnection):
    """To an address that was checked, in the name of the host."""

    def __init__(self, request: Request):
        super().__init__(request.host, _PORT, timeout=_left(request.deadline))
        self._address = request.address

    def connect(self) -> None:
        plain = socket.create_connection((self._address, _PORT), self.timeout)
        self.sock = ssl.create_default_context().wrap_socket(plain, server_hostname=self.host)


def _left(deadline: float) -> float:
    return max(0.1, deadline - time.monotonic())


class RemoteImages:
    """Callable, https URL → bytes. hosts: those allowed. limit: bytes of an image. resolve, transport: for tests."""

    def __init__(self, hosts: frozenset[str], limit: int, resolve: Resolve = resolve, transport: Transport = get):
        self._hosts = frozenset(map(str.lower, hosts))
        self._limit, self._resolve, self._transport = limit, resolve, transport

    def __call__(self, url: str) -> bytes:
        """Raises ApiError: 400 for what is not allowed or not there, 413 for too many bytes."""
        deadline = time.monotonic() + FETCH_SECONDS
        for _ in range(MOST_REDIRECTS + 1):
            host, target = self._allowed(url)
            reply = self._ask(host, target, deadline)
            if reply.status not in _REDIRECTS:
                break
            url = urljoin(f"https://{host}{target}", reply.location or "")
        if reply.status != 200:
            raise ApiError(400, f"{host} answered {reply.status} for an image", "messages")
        if len(reply.body) > self._limit:
            raise ApiError(413, f"an image of {host} has more than {self._limit:,} bytes", "messages")
        return reply.body

    def _allowed(self, url: str) -> tuple[str, str]:
        """(host, path with query) of a URL that may be fetched."""
        try:
            parts = urlsplit(url)
            host, port = (parts.hostname or "").lower(), parts.port
        except ValueError as error:
            raise ApiError(400, f"the image URL cannot be read: {error}", "messages") from error
        if parts.scheme != "https" or port not in (None, _PORT) or parts.username is not None:
            raise ApiError(400, f"images are fetched by https on port {_PORT} without a user only", "messages")
        if host not in self._hosts:
            raise ApiError(400, f"images are not fetched from {host!r}, allowed are {', '.join(sorted(self._hosts))}",
                           "messages")
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        if not target.isascii() or any(sign <= " " for sign in target):
            raise ApiError(400, "the image URL holds characters that must be percent-encoded", "messages")
        return host, target

    def _ask(self, host: str, target: str, deadline: float) -> Reply:
        try:
            addresses = self._resolve(host)
            if not addresses or not all(map(is_public, addresses)):
                raise ApiError(400, f"{host} has an address that is not public", "messages")
            return self._transport(Request(addresses[0], host, target, self._limit, deadline))
        except (OSError, UnicodeError, http.client.HTTPException) as error:
            raise ApiError(400, f"{host} cannot be reached for an image: {type(error).__name__}", "messages") from error


def is_public(address: str) -> bool:
    """Whether an address is one of the public internet; those that wrap another one are not."""
    try:
        number = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(number, ipaddress.IPv6Address):
        if number.ipv4_mapped is not None:
            number = number.ipv4_mapped
        elif any(number in network for network in _TRANSLATED):
            return False
    return number.is_global and not number.is_multicast and not number.is_reserved
