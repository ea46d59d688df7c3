"""Nodes are threads here, and the network is the loopback; everything else is the real thing."""

from __future__ import annotations

import contextlib
import errno
import itertools
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from bigtrain.cluster import rendezvous, rendezvous_head
from bigtrain.cluster.rendezvous import Joined, Member, RefusedError, Seat, join
from bigtrain.cluster.rendezvous_address import LocalAddress
from bigtrain.errors import ConfigError, LaunchError

NONSENSE = [b"GET / HTTP/1.1\r\n\r\n", b"\0" * 9000, b"{}\n", b"[]\n", b'{"nonce": 1}\n']
NONSENSE += [b"[" * 3900 + b"\n"]


def seats(num_nodes: int, **fields: Any) -> list[Seat]:
    job = secrets.token_hex(8)
    defaults = {
        "job": job,
        "token": job.encode(),
        "head_names": ("127.0.0.1",),
        "hosts": tuple(f"rack{k}" for k in range(num_nodes)),
        "deadline_s": 20.0,
    }
    return [
        Seat(node_rank=k, num_nodes=num_nodes, host=f"rack{k}", **(defaults | fields))
        for k in range(num_nodes)
    ]


def decide(members: Sequence[Member]) -> Mapping[str, Any]:
    return {"hosts": [member.host for member in members]}


def meet(
    places: Sequence[Seat],
    *,
    delays: Mapping[int, float] | None = None,
    decide: Callable[[Sequence[Member]], Mapping[str, Any]] = decide,
) -> list[Future[Joined]]:
    """What became of every node's attempt to meet the others."""

    def node(index: int) -> Joined:
        time.sleep((delays or {}).get(index, 0.0))
        return join(places[index], lambda: {"number": index}, decide=decide)

    with ThreadPoolExecutor(len(places)) as pool:
        return [pool.submit(node, index) for index in range(len(places))]


@contextlib.contextmanager
def closed_after(futures: Sequence[Future[Joined]]) -> Iterator[list[Joined]]:
    results = [future.result() for future in futures]
    try:
        yield results
    finally:
        for joined in results:
            for connection in (joined.listener, *joined.connections.values()):
                if connection is not None:
                    connection.close()


def errors(futures: Sequence[Future[Joined]]) -> list[str]:
    return [str(future.exception()) for future in futures]


def test_all_nodes_get_the_same_address_and_the_first_ones_decision() -> None:
    with closed_after(meet(seats(4))) as results:
        assert {(j.address, j.port) for j in results} == {("127.0.0.1", results[0].port)}
        assert all(j.decision == {"hosts": ["rack0", "rack1", "rack2", "rack3"]} for j in results)
        assert sorted(results[0].connections) == [1, 2, 3]


def test_the_socket_that_was_met_at_is_kept_and_still_listens() -> None:
    with closed_after(meet(seats(2))) as (first, second):
        assert first.listener is not None and second.listener is None
        assert first.listener.getsockname() == (second.address, second.port)
        with socket.create_connection((second.address, second.port), timeout=5):
            first.listener.settimeout(5)
            first.listener.accept()[0].close()


def test_nodes_that_start_unevenly_meet_all_the_same() -> None:
    for delays in ({0: 1.5}, {2: 1.5}):
        with closed_after(meet(seats(3), delays=delays)) as results:
            assert len(results) == 3


def test_a_port_that_is_taken_is_passed_over_by_all() -> None:
    places = seats(3)
    with (
        socket.create_server(("127.0.0.1", places[0].ports[0])),
        closed_after(meet(places)) as results,
    ):
        assert {joined.port for joined in results} == {places[0].ports[1]}


def test_another_jobs_first_node_on_our_port_is_not_joined() -> None:
    ours = seats(2)
    theirs = seats(2, job=ours[0].job, token=b"another job's", deadline_s=6.0)
    with ThreadPoolExecutor(1) as pool:
        stranger = pool.submit(join, theirs[0], dict, decide=decide)
        time.sleep(0.3)  # they sit on the first candidate now
        with closed_after(meet(ours)) as results:
            assert {joined.port for joined in results} == {ours[0].ports[1]}
        assert "missing: rack1" in str(stranger.exception())


def test_strangers_that_dial_in_do_no_harm() -> None:
    places = seats(2)
    stop = threading.Event()

    def pester() -> None:
        while not stop.is_set():
            with (
                contextlib.suppress(OSError),
                socket.create_connection(
                    ("127.0.0.1", places[0].ports[0]), timeout=1
                ) as connection,
            ):
                connection.sendall(secrets.choice(NONSENSE))
            time.sleep(0.01)

    with ThreadPoolExecutor(1) as pool:
        pool.submit(pester)
        try:
            with closed_after(meet(places, delays={1: 1.0})) as results:
                assert len(results) == 2
        finally:
            stop.set()


def test_a_stranger_that_answers_with_nonsense_is_passed_over() -> None:
    places = seats(2)

    def answer(stranger: socket.socket) -> None:
        with contextlib.suppress(OSError):
            for text in itertools.cycle(NONSENSE):
                stranger.accept()[0].sendall(text)

    with socket.create_server(("127.0.0.1", places[0].ports[0])) as stranger:
        threading.Thread(target=answer, args=(stranger,), daemon=True).start()
        with closed_after(meet(places, delays={0: 1.0})) as results:
            assert {joined.port for joined in results} == {places[0].ports[1]}


def test_missing_nodes_are_named_on_every_node_that_came() -> None:
    places = seats(5, deadline_s=1.0)
    futures = meet([places[0], places[3]])
    assert errors(futures) == [
        "2 of 5 nodes are here after 1 s; missing: rack1, rack2, rack4",
        "2 of 5 nodes are here after 1 s; missing: rack1, rack2, rack4",
    ]
    assert isinstance(futures[1].exception(), RefusedError)


def test_spare_nodes_that_are_missing_are_done_without_when_the_time_is_up() -> None:
    places = seats(5, deadline_s=1.5, num_needed=2)
    with closed_after(meet([places[0], places[2], places[3]])) as results:
        assert results[0].decision == {"hosts": ["rack0", "rack2", "rack3"]}
        assert sorted(results[0].connections) == [2, 3]
    assert "1 of 5 nodes are here" in errors(meet([seats(5, deadline_s=1.0, num_needed=2)[0]]))[0]


def test_a_first_node_that_never_comes_is_named_with_what_was_tried() -> None:
    place = seats(2, deadline_s=0.5, port=1)[1]
    with pytest.raises(LaunchError) as caught:
        join(place, dict, decide=decide)
    assert str(caught.value) == (
        "rack1 (node 1) found no first node (rack0) within 0 s at 127.0.0.1, ports 1; has it "
        "started, and does a firewall stand between?"
    )


def test_two_nodes_with_the_same_rank_are_refused_by_name() -> None:
    places = seats(3)
    twin = Seat(**{**vars(places[1]), "host": "rack9"})
    for message in errors(meet([places[0], places[1], twin])):
        assert "both say that they are node 1" in message
        assert "rack1" in message and "rack9" in message


def test_nodes_of_runs_of_different_sizes_are_refused() -> None:
    places = seats(2)
    twin = seats(3, job=places[0].job, token=places[0].token)[2]
    for message in errors(meet([places[0], twin])):
        assert message == "rack2 takes part in a run of 3 nodes, and rack0 in one of 2"


def test_a_second_first_node_is_refused() -> None:
    places = seats(2, port=_free_port())
    twin = Seat(**{**vars(places[0]), "host": "rack9"})
    (first, second) = errors(meet([places[0], twin], delays={1: 0.5}))
    assert first.startswith("rack0 and rack9 (127.0.0.1) both say that they are node 0; each node")
    assert second == first


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


class _Relay:
    """Passes bytes on to a port, and breaks the first connection when a node introduces itself:
    on both sides, or only on the node's, so that the first node does not learn of it."""

    def __init__(self, port: int, *, hides_it: bool) -> None:
        self._port, self._hides_it = port, hides_it
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.introductions = 0
        self._kept: list[socket.socket] = []
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                guest = self._listener.accept()[0]
                head = socket.socket()
                while head.connect_ex(("127.0.0.1", self._port)) != 0:
                    time.sleep(0.05)
                for ends in ((guest, head), (head, guest)):
                    threading.Thread(target=self._pass_on, args=ends, daemon=True).start()

    def _pass_on(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65_536):
                target.sendall(data)
                if b'"reaches"' in data:
                    self.introductions += 1
                    if self.introductions == 1:
                        self._kept.append(target)
                        time.sleep(0.3)
                        source.shutdown(socket.SHUT_RDWR)
                        break
        if not (self._hides_it and target in self._kept):
            with contextlib.suppress(OSError):
                target.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._listener.close()


@pytest.mark.parametrize("hides_it", [False, True])
def test_a_node_that_loses_its_connection_while_it_waits_comes_again(hides_it: bool) -> None:
    port = _free_port()
    relay = _Relay(port, hides_it=hides_it)
    places = seats(3, port=port)
    places[1] = Seat(**{**vars(places[1]), "port": relay.port})
    with closed_after(meet(places, delays={2: 2.0})) as results:
        assert results[0].decision == {"hosts": ["rack0", "rack1", "rack2"]}
        assert relay.introductions == 2
    relay.close()


def test_a_first_node_that_was_met_and_is_gone_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "_COME_BACK_S", 1.0)
    places = seats(2)
    stop = threading.Event()

    def leave() -> dict[str, Any]:
        stop.set()
        time.sleep(1.0)
        return {}

    head = rendezvous_head.Head(places[0], say=lambda text: None)
    with ThreadPoolExecutor(1) as pool:
        with head:
            guest = pool.submit(join, places[1], leave, decide=decide)
            while not stop.is_set():
                for key, _ in head._selector.select(0.1):
                    head._serve(key.fileobj)
        text = str(guest.exception())
    assert re.search(r"rack1 \(node 1\) lost the first node \(rack0\) .*, and did not find", text)


def test_an_address_that_swallows_everything_holds_up_no_other() -> None:
    places = seats(2, head_names=("127.0.0.2", "127.0.0.1"))
    with contextlib.ExitStack() as stack:
        for port in places[0].ports:  # with its queue full, the kernel drops what knocks
            hole = stack.enter_context(socket.create_server(("127.0.0.2", port), backlog=0))
            for _ in range(2):
                knocker = stack.enter_context(socket.socket())
                knocker.setblocking(False)
                knocker.connect_ex(hole.getsockname())
        with closed_after(meet(places, delays={0: 1.5})) as results:
            assert {joined.address for joined in results} == {"127.0.0.1"}
            assert results[1].seconds < 12


def test_an_address_that_can_not_be_listened_at_is_done_without(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gone = LocalAddress(address="192.0.2.1", interface="gone0")
    here = LocalAddress(address="127.0.0.1", interface="lo")
    monkeypatch.setattr(
        "bigtrain.cluster.rendezvous_address.listening_addresses",
        lambda expected, *, interface: [gone, here],
    )
    with closed_after(meet(seats(2))) as results:
        assert {joined.address for joined in results} == {"127.0.0.1"}


def test_nodes_meet_over_ipv6() -> None:
    with closed_after(meet(seats(3, head_names=("::1",)))) as results:
        assert {joined.address for joined in results} == {"::1"}
        assert results[0].listener is not None
        assert results[0].listener.family == socket.AF_INET6


def test_a_system_without_ipv6_passes_over_its_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    class OldSocket(socket.socket):
        def __init__(self, family: int = -1, *words: Any, **named: Any) -> None:
            if family == socket.AF_INET6:
                raise OSError(errno.EAFNOSUPPORT, "Address family not supported by protocol")
            super().__init__(family, *words, **named)

    monkeypatch.setattr(socket, "socket", OldSocket)
    with closed_after(meet(seats(2, head_names=("::1", "127.0.0.1")))) as results:
        assert {joined.address for joined in results} == {"127.0.0.1"}


def test_what_the_first_node_refuses_is_raised_on_all() -> None:
    def refuse(members: Sequence[Member]) -> Mapping[str, Any]:
        raise LaunchError("the nodes can't train together")

    futures = meet(seats(3), decide=refuse)
    assert errors(futures) == ["the nodes can't train together"] * 3


def test_a_host_without_a_name_is_met_by_its_address() -> None:
    with closed_after(meet(seats(2, head_names=("no-such-host.invalid", "127.0.0.1")))) as results:
        assert {joined.address for joined in results} == {"127.0.0.1"}


def test_a_node_that_dies_while_it_joins_may_come_again() -> None:
    places = seats(3)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(join, places[0], dict, decide=decide)
        with pytest.raises(ZeroDivisionError):
            join(places[1], lambda: {"number": 1 // 0}, decide=decide)
        others = meet(places[1:])
        with closed_after([first, *others]) as results:
            assert len(results) == 3


def test_clocks_are_compared_while_meeting() -> None:
    offsets: list[float] = []

    def note(members: Sequence[Member]) -> Mapping[str, Any]:
        offsets.extend(member.clock_offset_s for member in members)
        return {}

    with closed_after(meet(seats(2), decide=note)):
        assert offsets[0] == 0.0
        assert abs(offsets[1]) < 1.0


def test_a_rank_outside_the_run_is_refused() -> None:
    with pytest.raises(LaunchError, match=r"node rank 4 \(rack4\) is not one of 4 nodes"):
        Seat(node_rank=4, num_nodes=4, host="rack4", job="1", token=b"")


def test_an_interface_that_is_not_there_is_refused_with_those_that_are() -> None:
    with pytest.raises(ConfigError, match=r"the interface ib9 is not up here; there are .*lo"):
        join(seats(2, interface="ib9")[0], dict, decide=decide)


def test_a_node_that_is_slow_to_say_what_it_has_is_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rendezvous_head, "_STRANGERS_HAVE_S", 0.5)
    places = seats(2)

    def slow() -> dict[str, Any]:
        time.sleep(2.5)
        return {"number": 1}

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(join, places[0], dict, decide=decide)
        second = pool.submit(join, places[1], slow, decide=decide)
        with closed_after([first, second]) as results:
            assert len(results) == 2
