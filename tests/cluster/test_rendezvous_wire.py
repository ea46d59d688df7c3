from __future__ import annotations

import socket

import pytest

from bigtrain.cluster.rendezvous_wire import LineReader, receive


def test_messages_that_come_in_one_piece_are_all_received() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(b'{"a": 1}\n{"b": 2}\n{"c"')
        reader = LineReader()
        assert receive(ours, reader) == {"a": 1}
        assert receive(ours, reader) == {"b": 2}
        theirs.sendall(b": 3}\n")
        assert receive(ours, reader) == {"c": 3}


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        (b"[" * 3900, "nested too deep"),
        (b"0" * 4097, "more than 4096 bytes"),
        (b"[]", "no object"),
        (b"GET /", "Expecting value"),
    ],
)
def test_nonsense_is_a_value_error(line: bytes, fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        list(LineReader().feed(line + b"\n"))
