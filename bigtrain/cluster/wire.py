"""Messages between the agent and its fork server: JSON and open files over a Unix socket.

The socket is of type SEQPACKET, so that one `send` is one `receive` and open files can't be
taken for those of another message. What is too long for it (a script's arguments may be) goes as a
file in memory, in place of which the message is a mark.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping, Sequence
from typing import Any

_LARGEST_MESSAGE = 1 << 16
_MOST_FILES = 4
_IN_FILE = b"@"
"""The message is in the first of the files. No JSON begins so."""


def connected_pair() -> tuple[socket.socket, socket.socket]:
    """Two ends of a private connection; neither is inherited unless it is passed on."""
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in ends:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _LARGEST_MESSAGE)
    return ends


def send(end: socket.socket, message: Mapping[str, Any], files: Sequence[int] = ()) -> None:
    """Hand over a message and copies of open files. OSError when the other end is gone."""
    data = json.dumps(message).encode()
    if len(data) <= _LARGEST_MESSAGE:
        socket.send_fds(end, [data], files)
        return
    with os.fdopen(os.memfd_create("message"), "w+b") as file:
        file.write(data)
        file.flush()
        socket.send_fds(end, [_IN_FILE], [file.fileno(), *files])


def receive(end: socket.socket) -> tuple[dict[str, Any] | None, list[int]]:
    """The next message and its files, which are the caller's to close; None: the other end left."""
    data, files, _, _ = socket.recv_fds(
        end, _LARGEST_MESSAGE, _MOST_FILES + 1, socket.MSG_CMSG_CLOEXEC
    )
    if data == _IN_FILE:
        with os.fdopen(files.pop(0), "rb") as file:
            file.seek(0)
            data = file.read()
    return (json.loads(data) if data else None), files
