"""The first node's side of the meeting: it listens, counts, and names who is missing."""

from __future__ import annotations

import contextlib
import errno
import resource
import secrets
import selectors
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from bigtrain.cluster import rendezvous_address, rendezvous_wire
from bigtrain.cluster.rendezvous import Decide, Joined, Member, Seat
from bigtrain.cluster.rendezvous_wire import LineReader
from bigtrain.errors import LaunchError

_BACKLOG = 4096
_STRANGERS_HAVE_S = 30.0
_SPARE_CONNECTIONS = 256
_SAY_EVERY_S = 10.0
_TICK_S = 1.0
_SEND_S = 30.0
_MOST_NAMED = 8


@dataclass(kw_only=True, eq=False)
class _Visitor:
    """Someone who has dialled: a stranger until proven, a probe until it says which node it is."""

    connection: socket.socket
    place: str
    nonce: str
    came: float
    reader: LineReader = field(default_factory=LineReader)
    proven: bool = False
    member: Member | None = None
    instance: str = ""
    """The process that dialled."""


class Head:
    """Listens from the moment it is entered; `gather` once."""

    def __init__(self, seat: Seat, *, say: Callable[[str], None]) -> None:
        self._seat = seat
        self._say = say
        self._started = time.monotonic()
        self._visitors: dict[socket.socket, _Visitor] = {}
        self._members: dict[int, _Visitor] = {}
        self._listeners: dict[str, socket.socket] = {}
        self._selector = selectors.DefaultSelector()
        self._refusal: str | None = None

    def __enter__(self) -> Head:
        _allow_open_files(self._seat.num_nodes + _SPARE_CONNECTIONS)
        expected = rendezvous_address.resolve(self._seat.head_names)
        own = rendezvous_address.listening_addresses(expected, interface=self._seat.interface)
        self._addresses = [local.address for local in own]
        self._port = self._listen()
        for listener in self._listeners.values():
            self._selector.register(listener, selectors.EVENT_READ)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Whoever is left over when the meeting ends is sent away; members are kept if it ended
        well, and what is kept was taken out by then."""
        self._selector.close()
        for kept in (*self._visitors, *self._listeners.values()):
            kept.close()

    def gather(self, facts: Mapping[str, Any], decide: Decide) -> Joined:
        """All nodes, once the last one has come. LaunchError on every node if it can't be."""
        try:
            self._await_all()
            members = [self._myself(facts), *(self._member(k) for k in sorted(self._members))]
            address = self._common_address(members)
            decision = decide(members)
        except LaunchError as error:
            self._broadcast({"refused": str(error)})
            raise
        welcome = {"address": address, "port": self._port, "decision": decision}
        self._broadcast({"welcome": welcome})
        connections = {rank: self._kept(visitor) for rank, visitor in self._members.items()}
        readers = {rank: visitor.reader for rank, visitor in self._members.items()}
        listener = self._listeners.pop(address)
        listener.setblocking(True)
        return Joined(
            address=address,
            port=self._port,
            listener=listener,
            own_address=address,
            connections=connections,
            readers=readers,
            decision=decision,
            seconds=time.monotonic() - self._started,
        )

    # Listening

    def _listen(self) -> int:
        """The first of the job's ports that is free at all addresses of this node."""
        for port in self._seat.ports:
            try:
                for address in list(self._addresses):
                    self._listen_at(address, port)
                return port
            except OSError as error:
                for listener in self._listeners.values():
                    listener.close()
                self._listeners.clear()
                if error.errno != errno.EADDRINUSE:
                    where = f"{', '.join(self._addresses)}, port {port}"
                    raise LaunchError(f"can't listen at {where}: {error.strerror}") from error
        raise LaunchError(
            f"{self._seat.host} can't listen for the other nodes: the ports "
            f"{', '.join(map(str, self._seat.ports))} are all taken"
        )

    def _listen_at(self, address: str, port: int) -> None:
        """At an address that can be had; one that is not ready yet is done without."""
        try:
            self._listeners[address] = _listening_socket(address, port)
        except OSError as error:
            is_alone = len(self._addresses) == 1
            if is_alone or error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                raise
            self._addresses.remove(address)

    def _await_all(self) -> None:
        limit = self._started + self._seat.deadline_s
        say_at = self._started + _SAY_EVERY_S
        look_at = self._started + _TICK_S
        while len(self._members) < self._seat.num_nodes - 1:
            for key, _ in self._selector.select(_TICK_S):
                self._serve(key.fileobj)
            now = time.monotonic()
            if self._refusal is not None:
                raise LaunchError(self._refusal)
            if now >= limit:
                if len(self._members) + 1 >= (self._seat.num_needed or self._seat.num_nodes):
                    return
                raise LaunchError(self._missing_message())
            if now >= say_at:
                self._say(self._progress())
                say_at = now + _SAY_EVERY_S
            if now >= look_at:  # and not each time: with n nodes that would be n times n
                self._drop_strangers(now)
                look_at = now + _TICK_S

    def _serve(self, ready: Any) -> None:
        visitor = self._visitors.get(ready)
        if visitor is None:
            self._accept(ready)
            return
        try:
            data = visitor.connection.recv(65_536)
            if not data:
                raise ConnectionError
            for message in visitor.reader.feed(data):
                self._take(visitor, message)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            self._drop(visitor)

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                connection, peer = listener.accept()
            except OSError:
                return  # no more at the moment, or one that has left again
            connection.settimeout(_SEND_S)
            visitor = _Visitor(
                connection=connection,
                place=str(peer[0]),
                nonce=secrets.token_hex(16),
                came=time.monotonic(),
            )
            self._visitors[connection] = visitor
            self._selector.register(connection, selectors.EVENT_READ)
            with contextlib.suppress(OSError):
                hello = {"hello": rendezvous_wire.HELLO, "nonce": visitor.nonce}
                connection.sendall(rendezvous_wire.encode(hello))

    # What visitors say

    def _take(self, visitor: _Visitor, message: Mapping[str, Any]) -> None:
        if not visitor.proven:
            self._check_proof(visitor, message)
        elif visitor.member is None:
            self._admit(visitor, message["node"])

    def _check_proof(self, visitor: _Visitor, message: Mapping[str, Any]) -> None:
        nonces = {"head_nonce": visitor.nonce, "guest_nonce": str(message["nonce"])}
        token = self._seat.token
        if not rendezvous_wire.is_proof(message["proof"], token, side="guest", **nonces):
            raise ValueError("not one of this job's nodes")
        visitor.proven = True
        visitor.reader.limit = rendezvous_wire.LARGEST_LINE
        proof = rendezvous_wire.prove(token, side="head", **nonces)
        answer = {"proof": proof, "addresses": self._addresses}
        visitor.connection.sendall(rendezvous_wire.encode(answer))

    def _admit(self, visitor: _Visitor, node: Mapping[str, Any]) -> None:
        rank, host = int(node["node_rank"]), str(node["host"])
        visitor.instance = str(node["instance"])
        visitor.member = Member(
            node_rank=rank,
            host=host,
            facts=dict(node["facts"]),
            reaches=dict(node["reaches"]),
            clock_offset_s=float(node["time"]) - time.time(),
        )
        if node["num_nodes"] != self._seat.num_nodes:
            self._refusal = (
                f"{host} takes part in a run of {node['num_nodes']} nodes, and {self._seat.host} "
                f"in one of {self._seat.num_nodes}"
            )
            return
        before = self._members.get(rank)
        if before is not None and before.instance == visitor.instance:
            self._drop(before)  # its connection broke, which was noticed there first
            before = None
        if before is not None or rank == 0:
            first = self._member(rank).host if before else self._seat.host
            self._refusal = (
                f"{first} and {host} ({visitor.place}) both say that they are node {rank}; each "
                "node has a rank of its own (--node-rank; in a Slurm job it is read inside the "
                "task, not in the batch script)"
            )
            return
        self._members[rank] = visitor
        rendezvous_wire.keep_alive(visitor.connection)

    def _drop(self, visitor: _Visitor) -> None:
        """Someone has left, or is none of ours. A node that dies while waiting may come again."""
        self._selector.unregister(visitor.connection)
        visitor.connection.close()
        del self._visitors[visitor.connection]
        member = visitor.member
        if member is not None and self._members.get(member.node_rank) is visitor:
            del self._members[member.node_rank]

    def _drop_strangers(self, now: float) -> None:
        # Who has proven that it belongs here may take its time to say what it has.
        waiting = [v for v in self._visitors.values() if not v.proven]
        late = [v for v in waiting if now - v.came > _STRANGERS_HAVE_S]
        crowd = len(waiting) - self._seat.num_nodes - _SPARE_CONNECTIONS
        for visitor in {*late, *waiting[: max(0, crowd)]}:
            self._drop(visitor)

    # What comes of it

    def _member(self, rank: int) -> Member:
        member = self._members[rank].member
        assert member is not None
        return member

    def _myself(self, facts: Mapping[str, Any]) -> Member:
        return Member(
            node_rank=0,
            host=self._seat.host,
            facts=facts,
            reaches={address: address for address in self._addresses},
            clock_offset_s=0.0,
        )

    def _common_address(self, members: Sequence[Member]) -> str:
        for address in self._addresses:
            if all(address in member.reaches for member in members):
                return address
        reached = [f"  {m.host} reaches {', '.join(m.reaches)}" for m in members[:_MOST_NAMED]]
        raise LaunchError(
            "\n".join(
                [
                    f"{self._seat.host} has no address that all nodes can reach; name an "
                    "interface that leads to all of them",
                    *reached,
                ]
            )
        )

    def _broadcast(self, message: Mapping[str, Any]) -> None:
        data = rendezvous_wire.encode(message)
        for visitor in self._visitors.values():
            if visitor.member is not None:
                with contextlib.suppress(OSError):  # its absence shows soon enough
                    visitor.connection.sendall(data)

    def _kept(self, visitor: _Visitor) -> socket.socket:
        del self._visitors[visitor.connection]
        visitor.connection.settimeout(None)
        return visitor.connection

    def _missing(self) -> str:
        ranks = [k for k in range(1, self._seat.num_nodes) if k not in self._members]
        names = [self._seat.name_of(rank) for rank in ranks[:_MOST_NAMED]]
        more = len(ranks) - len(names)
        return ", ".join(names) + (f" and {more} more" if more else "")

    def _progress(self) -> str:
        here = len(self._members) + 1
        return f"{here} of {self._seat.num_nodes} nodes are here; waiting for {self._missing()}"

    def _missing_message(self) -> str:
        return (
            f"{self._progress().partition(';')[0]} after {self._seat.deadline_s:.0f} s; missing: "
            f"{self._missing()}"
        )


def _listening_socket(address: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listener = socket.create_server((address, port), family=family, backlog=_BACKLOG)
    listener.setblocking(False)
    return listener


def _allow_open_files(number: int) -> None:
    """One connection per node is kept: raise this process's own limit as far as it may be."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = number + 256
    if soft != resource.RLIM_INFINITY and soft < wanted:
        limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
