"""One HTTP request and its whole answer, for callers that must be able to give it up."""

import asyncio
import http.client
import io
import socket
from collections.abc import Mapping
from typing import cast
from urllib.parse import urlsplit


async def exchange(
    url: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
) -> tuple[int, bytes]:
    """Status and body of the answer to a GET, or with `body` to a POST.

    It goes straight to the host, past any proxy, on a connection of its own, which is closed as
    soon as the caller is cancelled: `asyncio.timeout` bounds all of it.

    Raises:
        OSError: if there is no connection, or it breaks.
        http.client.HTTPException: if the answer is none, or ends too soon.
    """
    parts = urlsplit(url)
    secure = parts.scheme == "https"
    port = parts.port or (443 if secure else 80)
    reader, writer = await asyncio.open_connection(parts.hostname, port, ssl=secure or None)
    try:
        writer.write(_head(parts.netloc, parts.path, body, headers or {}) + (body or b""))
        await writer.drain()
        return _parsed(await reader.read())
    finally:
        writer.transport.abort()


def _head(host: str, path: str, body: bytes | None, headers: Mapping[str, str]) -> bytes:
    own = {"Host": host, "Connection": "close", "Content-Length": str(len(body or b""))}
    lines = [f"{name}: {value}" for name, value in (own | dict(headers)).items()]
    verb = "GET" if body is None else "POST"
    return "\r\n".join([f"{verb} {path or '/'} HTTP/1.1", *lines, "", ""]).encode("latin-1")


class _Received:
    """What came, as much of a socket as `http.client` reads from."""

    def __init__(self, received: bytes) -> None:
        self._received = received

    def makefile(self, mode: str) -> io.BytesIO:
        return io.BytesIO(self._received)


def _parsed(received: bytes) -> tuple[int, bytes]:
    answer = http.client.HTTPResponse(cast(socket.socket, _Received(received)))
    answer.begin()
    return answer.status, answer.read()
