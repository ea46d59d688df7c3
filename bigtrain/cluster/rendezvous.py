"""How the nodes of a run find each other: one listens, the others dial, all have one deadline.

The number of nodes and their ranks are known beforehand (from Slurm, or from flags), so there is
nothing to negotiate. The first node listens on one of 16 ports that follow from the job, and the
others try these until one answers that knows the job's token. The socket that the first node
listens on is kept, and later becomes the ranks' store: no port is ever closed and bound again.

    Seat ── join ──┬─ first node:  rendezvous_head.Head        ──┬── Joined
                   └─ the others:  dial, prove, wait (below)   ──┘
"""

from __future__ import annotations

import contextlib
import ipaddress
import random
import secrets
import selectors
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from bigtrain.cluster import rendezvous_address, rendezvous_wire
from bigtrain.cluster.rendezvous_wire import LineReader
from bigtrain.errors import LaunchError

DEFAULT_DEADLINE_S = 600.0

_HELLO_S, _HANDSHAKE_S = 3.0, 10.0
_SHORTEST_KNOCK_S, _LONGEST_KNOCK_S, _ANOTHER_KNOCK_S = 0.5, 3.0, 0.1
_SHORTEST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 1.0
_AFTER_DEADLINE_S = 30.0
"""The first node's clock decides; the others give it this long to say what it decided."""
_COME_BACK_S = 60.0
"""How long a node looks again for a first node that it has met and lost."""

Place: TypeAlias = tuple[str, int]
"""An address and a port."""
Decide: TypeAlias = Callable[["Sequence[Member]"], Mapping[str, Any]]


class RefusedError(LaunchError):
    """The first node let no one in. It says why itself, so that the others need not."""


class _LostHeadError(LaunchError):
    """The connection to the first node broke before all had come."""


@dataclass(frozen=True, kw_only=True)
class Seat:
    """This node's place in the run, and where the first node is to be found."""

    node_rank: int
    num_nodes: int
    host: str
    job: str
    """The same on all nodes of this start of the run, and on no other's: ports follow from it."""
    token: bytes
    """What only this run's nodes know."""
    head_names: tuple[str, ...] = ()
    """Names and addresses of the first node, best first."""
    hosts: tuple[str, ...] = ()
    """Every node's name by its rank, where they are known: to name those that are missing."""
    port: int | None = None
    """A fixed port instead of the job's candidates."""
    interface: str | None = None
    """The only interface (or address) to listen on; None: whichever all nodes reach."""
    deadline_s: float = DEFAULT_DEADLINE_S
    num_needed: int | None = None
    """With how many nodes, the first among them, the run starts when the deadline passes; None:
    only with all."""

    def __post_init__(self) -> None:
        if not 0 <= self.node_rank < self.num_nodes:
            raise LaunchError(
                f"node rank {self.node_rank} ({self.host}) is not one of {self.num_nodes} nodes "
                f"(0 to {self.num_nodes - 1})"
            )

    @property
    def ports(self) -> tuple[int, ...]:
        return (self.port,) if self.port else rendezvous_address.candidate_ports(self.job)

    def name_of(self, node_rank: int) -> str:
        """A node as a person knows it."""
        known = node_rank < len(self.hosts)
        return self.hosts[node_rank] if known else f"node {node_rank}"


@dataclass(frozen=True, kw_only=True)
class Member:
    """A node that has come."""

    node_rank: int
    host: str
    facts: Mapping[str, Any]
    reaches: Mapping[str, str]
    """The first node's addresses that this node can dial → its own address on the way there."""
    clock_offset_s: float
    """How far its clock is ahead of the first node's, the message's travel included."""


@dataclass(frozen=True, kw_only=True)
class Joined:
    """All nodes have met."""

    address: str
    """Of the first node: the one that all nodes reach."""
    port: int
    listener: socket.socket | None
    """On the first node: listens at `address` and `port`; the store takes it over."""
    own_address: str
    """This node's own on the way to the first one."""
    connections: Mapping[int, socket.socket]
    """The first node's to every other, by node rank; of any other node, its one to node 0."""
    readers: Mapping[int, LineReader]
    """Of the same connections: what they have read already may hold what was sent after."""
    decision: Mapping[str, Any]
    """What the first node decided for all."""
    seconds: float


def join(
    seat: Seat,
    facts: Callable[[], Mapping[str, Any]],
    *,
    decide: Decide,
    say: Callable[[str], None] = lambda text: None,
) -> Joined:
    """Meet the other nodes. All nodes call it; it returns on all of them or raises on all.

    `facts` says what this node has; it is asked once the first node is known to be there, so that
    it can look for what that wrote. On the first node, `decide` turns what the nodes said of
    themselves into what all are told; its LaunchError is raised on every node. Other LaunchErrors
    name the nodes that are missing, or that claim the same rank.
    """
    if seat.node_rank == 0:
        from bigtrain.cluster.rendezvous_head import Head

        if seat.port is not None:  # ranks were typed by hand
            _Guest(seat).refuse_twin()
        with Head(seat, say=say) as head:
            return head.gather(facts(), decide)
    return _Guest(seat).join(facts)


class _Guest:
    """Any node but the first; or one that may not be the only first."""

    def __init__(self, seat: Seat) -> None:
        self._seat = seat
        self._started = time.monotonic()
        self._deadline = self._started + seat.deadline_s
        self._silent: set[Place] = set()
        """Places where something answers that is not ours: tried last."""
        self._instance = secrets.token_hex(8)
        """Tells this process that comes again from another one of the same rank."""

    def join(self, facts: Callable[[], Mapping[str, Any]]) -> Joined:
        lost: _LostHeadError | None = None
        while True:
            try:
                return self._join_once(facts)
            except _LostHeadError as error:
                lost = error
                self._deadline = min(self._deadline, time.monotonic() + _COME_BACK_S)
            except LaunchError as error:
                if lost is None or isinstance(error, RefusedError):
                    raise
                raise LaunchError(f"{lost}, and did not find it again") from error

    def refuse_twin(self) -> None:
        """LaunchError, here and there, if another first node of this run listens already."""
        addresses = rendezvous_address.resolve(self._seat.head_names)
        found = self._try(addresses, _SHORTEST_KNOCK_S)
        if found is not None:
            connection, reader, _ = found
            with connection:
                answer = self._introduce(connection, reader, self._introduction({}, {}))
            raise LaunchError(str(answer.get("refused")))

    def _join_once(self, facts: Callable[[], Mapping[str, Any]]) -> Joined:
        connection, reader, addresses = self._dial()
        with contextlib.ExitStack() as unless_joined:
            unless_joined.callback(connection.close)
            reaches = self._reachable(connection, addresses)
            introduction = self._introduction(facts(), reaches)
            answer = self._introduce(connection, reader, introduction)
            if "refused" in answer:
                raise RefusedError(str(answer["refused"]))
            unless_joined.pop_all()
        welcome = answer["welcome"]
        return Joined(
            address=welcome["address"],
            port=welcome["port"],
            listener=None,
            own_address=reaches[welcome["address"]],
            connections={0: connection},
            readers={0: reader},
            decision=welcome["decision"],
            seconds=time.monotonic() - self._started,
        )

    def _introduction(
        self, facts: Mapping[str, Any], reaches: Mapping[str, str]
    ) -> Mapping[str, Any]:
        return {
            "node_rank": self._seat.node_rank,
            "instance": self._instance,
            "num_nodes": self._seat.num_nodes,
            "host": self._seat.host,
            "facts": facts,
            "reaches": reaches,
            "time": time.time(),
        }

    def _introduce(
        self, connection: socket.socket, reader: LineReader, introduction: Mapping[str, Any]
    ) -> dict[str, Any]:
        """What the first node answers, which it does when it knows of all."""
        reader.limit = rendezvous_wire.LARGEST_LINE
        left = max(0.0, self._deadline - time.monotonic())
        try:
            rendezvous_wire.keep_alive(connection)
            connection.settimeout(left + _AFTER_DEADLINE_S)
            connection.sendall(rendezvous_wire.encode({"node": introduction}))
            answer = rendezvous_wire.receive(connection, reader)
            connection.settimeout(None)
        except (OSError, ValueError) as error:
            raise self._lost_head(error) from error
        return answer

    def _dial(self) -> tuple[socket.socket, LineReader, list[str]]:
        """A proven connection to the first node, and all addresses at which that listens."""
        patience, pause = _SHORTEST_KNOCK_S, _SHORTEST_PAUSE_S
        while True:
            addresses = rendezvous_address.resolve(self._seat.head_names)
            found = self._try(addresses, patience)
            if found is not None:
                return found
            if time.monotonic() > self._deadline:
                raise self._no_head(addresses)
            # Thousands of nodes must not knock in step.
            time.sleep(pause * random.uniform(0.5, 1.5))
            patience = min(_LONGEST_KNOCK_S, 2 * patience)
            pause = min(_LONGEST_PAUSE_S, 2 * pause)

    def _try(
        self, addresses: Sequence[str], patience: float
    ) -> tuple[socket.socket, LineReader, list[str]] | None:
        """At the port where the first node nearly always is; then at all places at once: one that
        swallows what is sent to it holds up no other."""
        places = [(address, port) for port in self._seat.ports for address in addresses]
        likely = [place for place in places[: len(addresses)] if place not in self._silent]
        found = self._try_places(likely, _ANOTHER_KNOCK_S)
        return self._try_places(places, patience) if found is None else found

    def _try_places(
        self, places: Sequence[Place], patience: float
    ) -> tuple[socket.socket, LineReader, list[str]] | None:
        opened = _knock(places, patience, enough=lambda place: place not in self._silent)
        try:
            answered = [place for place in places if place in opened]
            for place in sorted(answered, key=lambda place: place in self._silent):
                with contextlib.suppress(OSError, ValueError, KeyError):
                    reader, listening = _prove(opened[place], self._seat.token)
                    return opened.pop(place), reader, listening
                self._silent.add(place)
            return None
        finally:
            for connection in opened.values():
                connection.close()

    def _reachable(self, connection: socket.socket, listening: Sequence[str]) -> dict[str, str]:
        """The first node's addresses that can be dialled from here → the own address used."""
        used, port = connection.getpeername()[:2]
        reaches = {used: connection.getsockname()[0]}
        opened = _knock([(a, port) for a in listening if a != used], _LONGEST_KNOCK_S)
        for (address, _), probe in opened.items():
            with probe, contextlib.suppress(OSError, ValueError, KeyError):
                _prove(probe, self._seat.token)
                reaches[address] = probe.getsockname()[0]
        return reaches

    def _no_head(self, addresses: Sequence[str]) -> LaunchError:
        seat = self._seat
        where = ", ".join(addresses) or f"{', '.join(seat.head_names)} (no such name is known)"
        return LaunchError(
            f"{seat.host} (node {seat.node_rank}) found no first node ({seat.name_of(0)}) within "
            f"{seat.deadline_s:.0f} s at {where}, ports {', '.join(map(str, seat.ports))}; has it "
            "started, and does a firewall stand between?"
        )

    def _lost_head(self, error: Exception) -> _LostHeadError:
        return _LostHeadError(
            f"{self._seat.host} (node {self._seat.node_rank}) lost the first node "
            f"({self._seat.name_of(0)}) while the nodes were meeting: {error}"
        )


def _knock(
    places: Sequence[Place], patience: float, *, enough: Callable[[Place], bool] | None = None
) -> dict[Place, socket.socket]:
    """Connections to all places that answer within `patience`, opened side by side; once one that
    is `enough` has, the others are hardly waited for."""
    opened: dict[Place, socket.socket] = {}
    limit = time.monotonic() + patience
    with selectors.DefaultSelector() as selector:
        for place in places:
            family = socket.AF_INET6 if ":" in place[0] else socket.AF_INET
            try:
                connection = socket.socket(family, socket.SOCK_STREAM)
            except OSError:
                continue  # a system without IPv6 has addresses of it in /etc/hosts all the same
            connection.setblocking(False)
            connection.connect_ex(place)
            selector.register(connection, selectors.EVENT_WRITE, place)
        while selector.get_map() and (left := limit - time.monotonic()) > 0:
            for key, _ in selector.select(left):
                selector.unregister(key.fileobj)
                _sort_in(key, opened)
                if enough is not None and key.data in opened and enough(key.data):
                    limit = min(limit, time.monotonic() + _ANOTHER_KNOCK_S)
        for key in selector.get_map().values():
            key.fileobj.close()  # type: ignore[union-attr]
    return opened


def _sort_in(key: selectors.SelectorKey, opened: dict[Place, socket.socket]) -> None:
    connection = key.fileobj
    assert isinstance(connection, socket.socket)
    if connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0:
        opened[key.data] = connection
    else:
        connection.close()


def _prove(connection: socket.socket, token: bytes) -> tuple[LineReader, list[str]]:
    """Show that we belong to the job and see that the other side does; its addresses.

    ValueError, KeyError or OSError when it is not the first node of this job.
    """
    connection.settimeout(_HELLO_S)
    reader, guest_nonce = LineReader(), secrets.token_hex(16)
    hello = rendezvous_wire.receive(connection, reader)
    if hello.get("hello") != rendezvous_wire.HELLO:
        raise ValueError("not a bigtrain that waits for its nodes")
    connection.settimeout(_HANDSHAKE_S)
    nonces = {"head_nonce": str(hello["nonce"]), "guest_nonce": guest_nonce}
    proof = rendezvous_wire.prove(token, side="guest", **nonces)
    connection.sendall(rendezvous_wire.encode({"nonce": guest_nonce, "proof": proof}))
    answer = rendezvous_wire.receive(connection, reader)
    if not rendezvous_wire.is_proof(answer["proof"], token, side="head", **nonces):
        raise ValueError("another job's first node")
    return reader, [str(ipaddress.ip_address(address)) for address in answer["addresses"]]
