"""What nodes say to each other while they meet and after: lines of JSON over TCP, proven first.

    head → guest   {"hello": …, "nonce": …}           who listens here
    guest → head   {"nonce": …, "proof": …}           that it belongs to this job
    head → guest   {"proof": …, "addresses": […]}     that the head does, and where it listens
    guest → head   {"node": {…}}                      which node it is, and what it has
    head → guest   {"welcome": {…}} or {"refused": …}

Neither side shows the job's token: each proves that it knows it by what it makes of the other's
nonce. A stranger's server on a candidate port, or a stranger's client on ours, learns nothing.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import socket
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

HELLO = "bigtrain-join-1"
LARGEST_LINE = 1 << 20
LARGEST_STRANGERS_LINE = 4096

# A node that is gone is noticed within about 25 s on both sides, whatever took it.
_IDLE_S, _INTERVAL_S, _PROBES = 5, 5, 4


class LineReader:
    """Cuts what arrives into messages."""

    def __init__(self, *, limit: int = LARGEST_STRANGERS_LINE) -> None:
        self.limit = limit
        self.waiting: deque[dict[str, Any]] = deque()
        """Whole messages that came along with the one that `receive` returned."""
        self._rest = b""

    def feed(self, data: bytes) -> Iterator[dict[str, Any]]:
        """The messages that `data` completes. ValueError for one that is too long, too deep
        or no object."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        if max(map(len, (*lines, self._rest))) > self.limit:
            raise ValueError(f"a message of more than {self.limit} bytes")
        for line in lines:
            try:
                message = json.loads(line)
            except RecursionError:
                raise ValueError("a message nested too deep") from None
            if not isinstance(message, dict):
                raise ValueError("a message that is no object")
            yield message


def encode(message: Mapping[str, Any]) -> bytes:
    """A message as it is sent."""
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"


def receive(connection: socket.socket, reader: LineReader) -> dict[str, Any]:
    """The next message. ConnectionError when the other side has left, ValueError for nonsense."""
    while not reader.waiting:
        data = connection.recv(65_536)
        if not data:
            raise ConnectionError("the connection was closed")
        reader.waiting.extend(reader.feed(data))
    return reader.waiting.popleft()


def prove(token: bytes, *, side: str, head_nonce: str, guest_nonce: str) -> str:
    """Proof of knowing `token`, good for one connection and one of its sides."""
    text = f"{HELLO} {side} {head_nonce} {guest_nonce}".encode()
    return hmac.new(token, text, hashlib.sha256).hexdigest()


def is_proof(proof: object, token: bytes, **context: str) -> bool:
    """Whether `proof` is what `prove` makes; takes as long for a wrong one as for the right one."""
    return isinstance(proof, str) and hmac.compare_digest(
        proof.encode(errors="replace"), prove(token, **context).encode()
    )


def keep_alive(connection: socket.socket) -> None:
    """Let the kernel find out when the other machine is gone, though nothing is being said."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for name, value in (
        ("TCP_KEEPIDLE", _IDLE_S),
        ("TCP_KEEPINTVL", _INTERVAL_S),
        ("TCP_KEEPCNT", _PROBES),
        ("TCP_USER_TIMEOUT", 1000 * (_IDLE_S + _INTERVAL_S * _PROBES)),
    ):
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
