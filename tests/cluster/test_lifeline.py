"""Nodes are threads here; the connections between them are real."""

from __future__ import annotations

import dataclasses
import secrets
import socket
import threading
import time
from collections.abc import Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from bigtrain.cluster import lifeline, supervisor
from bigtrain.cluster.attempts import Attempt, with_spares
from bigtrain.cluster.lifeline import Ending, Lifeline, Verdict, judge
from bigtrain.cluster.rendezvous import Joined, Seat, join
from bigtrain.cluster.rendezvous_wire import LineReader, receive
from bigtrain.cluster.signals import EXIT_AGAIN

VANISHED = "node2 vanished: the machine, its network or its agent is gone"


class Node:
    """A lifeline, and what was asked of its node."""

    def __init__(self, seat: Seat) -> None:
        joined = join(seat, dict, decide=lambda members: {})
        if joined.listener is not None:
            joined.listener.close()
        self.concluded: list[tuple[Verdict, set[int]]] = []
        self.connections = joined.connections
        self.lifeline = Lifeline(seat, joined, places=range(3))
        self.following: Attempt | None = None
        self.begin()

    def begin(self) -> None:
        self.told_to_end, self.notified = threading.Event(), threading.Event()
        self.lifeline.begin(on_end=self.told_to_end.set, on_notice=self.notified.set)

    def leave(self, code: int = 0, failure: str | None = None, time: float = 0.0) -> Verdict:
        ending = Ending(code=code, failure=failure, time=time)
        return self.lifeline.leave(ending, conclude=self.conclude)

    def conclude(self, verdict: Verdict, alive: Collection[int]) -> Verdict:
        self.concluded.append((verdict, set(alive)))
        following, self.following = self.following, None
        successor = None if following is None else dataclasses.asdict(following)
        return dataclasses.replace(verdict, successor=successor)

    def die(self) -> None:
        for connection in self.connections.values():
            connection.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def nodes() -> Iterator[list[Node]]:
    job = secrets.token_hex(8)
    places = [
        Seat(
            node_rank=k,
            num_nodes=3,
            host=f"node{k}",
            job=job,
            token=job.encode(),
            head_names=("127.0.0.1",),
            hosts=("node0", "node1", "node2"),
            deadline_s=20.0,
        )
        for k in range(3)
    ]
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(Node, places))
        yield found
        for node in found:
            node.lifeline.close()


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(3) as executor:
        yield executor


def settle(*futures: Future[Verdict]) -> list[Verdict]:
    return [future.result(timeout=20) for future in futures]


def test_nodes_leave_together_with_one_verdict(nodes: list[Node], pool: ThreadPoolExecutor) -> None:
    early = [pool.submit(node.leave) for node in nodes[:2]]
    time.sleep(0.3)
    assert not any(future.done() for future in early)
    assert settle(*early, pool.submit(nodes[2].leave)) == [Verdict(code=0, cause=None)] * 3
    assert nodes[0].concluded == [(Verdict(code=0, cause=None), {0, 1, 2})]
    assert not any(node.told_to_end.is_set() for node in nodes)


def test_a_failure_ends_the_others_at_once_and_is_the_verdict_of_all(
    nodes: list[Node], pool: ThreadPoolExecutor
) -> None:
    failed = pool.submit(nodes[1].leave, 3, "rank 1 failed", 100.0)
    for node in (nodes[0], nodes[2]):
        assert node.told_to_end.wait(5)
    consequence = pool.submit(nodes[2].leave, 1, "connection reset", 101.0)
    head = pool.submit(nodes[0].leave, 143)
    verdicts = settle(failed, consequence, head)
    assert verdicts == [Verdict(code=3, cause="rank 1 failed")] * 3
    assert not nodes[1].told_to_end.is_set()


def test_a_rank_that_is_failing_is_told_of_before_its_node_has_ended(
    nodes: list[Node], pool: ThreadPoolExecutor
) -> None:
    nodes[2].lifeline.warn()
    assert nodes[0].told_to_end.wait(5)
    assert nodes[1].told_to_end.wait(5)
    settle(*(pool.submit(node.leave, 1, "failed", 1.0) for node in nodes))


def test_a_node_that_vanishes_is_named_and_the_run_wants_to_go_on(
    nodes: list[Node], pool: ThreadPoolExecutor
) -> None:
    nodes[2].die()
    assert nodes[0].told_to_end.wait(5)
    assert nodes[1].told_to_end.wait(5)
    verdicts = settle(*(pool.submit(node.leave, 1, "reset by peer", 1.0) for node in nodes[:2]))
    assert verdicts == [Verdict(code=EXIT_AGAIN, cause=VANISHED, lost=("node2",))] * 2


def test_a_node_that_loses_the_first_one_ends_by_itself(
    nodes: list[Node], pool: ThreadPoolExecutor
) -> None:
    nodes[0].die()  # its own thread may still tell the last one to end, as a live node would
    for node in nodes[1:]:
        assert node.told_to_end.wait(5)
    deadline = time.monotonic() + 5
    while not all(node.lifeline.has_lost_head for node in nodes[1:]):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    verdict = pool.submit(nodes[1].leave, 143).result(timeout=20)
    assert verdict.code == EXIT_AGAIN
    assert verdict.cause is not None and verdict.cause.startswith("node0 vanished")
    nodes[2].leave(143)


def test_a_failure_that_was_told_is_the_cause_though_a_node_is_lost_after_it(
    nodes: list[Node], pool: ThreadPoolExecutor
) -> None:
    failed = pool.submit(nodes[1].leave, 3, "rank 1 failed", 100.0)
    assert nodes[2].told_to_end.wait(5)
    nodes[2].die()
    time.sleep(0.3)
    assert (
        settle(failed, pool.submit(nodes[0].leave, 143))
        == [Verdict(code=3, cause="rank 1 failed")] * 2
    )


def test_what_is_said_right_behind_the_welcome_is_heard() -> None:
    ours, theirs = socket.socketpair()
    reader = LineReader()
    theirs.sendall(b'{"welcome": {}}\n{"end": true}\n')
    receive(ours, reader)
    seat = Seat(node_rank=1, num_nodes=2, host="node1", job="1", token=b"")
    joined = Joined(
        address="127.0.0.1",
        port=1,
        listener=None,
        own_address="127.0.0.1",
        connections={0: ours},
        readers={0: reader},
        decision={},
        seconds=0.0,
    )
    lifeline = Lifeline(seat, joined, places=range(2))
    told = threading.Event()
    lifeline.begin(on_end=told.set)
    assert told.wait(5)
    lifeline.close()
    theirs.close()


def test_the_first_nodes_notice_reaches_all_and_ends_none(
    nodes: list[Node], pool: ThreadPoolExecutor
) -> None:
    nodes[0].lifeline.give_notice()
    assert all(node.notified.wait(5) for node in nodes)
    assert not any(node.told_to_end.is_set() for node in nodes)
    verdicts = settle(*(pool.submit(node.leave, 85) for node in nodes))
    assert verdicts == [Verdict(code=EXIT_AGAIN, cause=None)] * 3


def test_each_limit_leaves_the_next_inner_one_its_time() -> None:
    inner, outer = supervisor.STOP_GRACE_S, lifeline._LEAVE_WITHIN_S
    assert supervisor.FAILURE_GRACE_S < inner < outer


def _next(*places: int) -> Attempt:
    return Attempt(fields={"attempt": 2}, plan_name="attempt-02.json", places=places)


def test_the_nodes_that_are_left_go_on_in_another_round_and_end_together(
    nodes: list[Node], pool: ThreadPoolExecutor
) -> None:
    nodes[0].following = _next(0, 1)
    nodes[2].die()
    assert nodes[1].told_to_end.wait(5)
    verdicts = settle(*(pool.submit(node.leave, 143) for node in nodes[:2]))
    assert [verdict.lost for verdict in verdicts] == [("node2",)] * 2
    for verdict in verdicts:
        assert verdict.successor is not None
        assert Attempt.from_message(verdict.successor) == _next(0, 1)
    for node in nodes[:2]:
        node.begin()
    last = settle(*(pool.submit(node.leave) for node in nodes[:2]))
    assert last == [Verdict(code=0, cause=None)] * 2
    assert not any(node.told_to_end.is_set() for node in nodes[:2])


def test_a_node_without_a_place_waits_and_its_loss_ends_nothing(
    nodes: list[Node], pool: ThreadPoolExecutor
) -> None:
    nodes[0].following = _next(0, 1)
    first = [pool.submit(node.leave) for node in nodes]
    assert all(verdict.successor for verdict in settle(*first))
    spare = pool.submit(nodes[2].lifeline.stand_by)
    nodes[0].begin()
    nodes[1].begin()
    nodes[2].die()
    time.sleep(0.3)
    assert not nodes[0].told_to_end.is_set() and not nodes[1].told_to_end.is_set()
    assert spare.result(timeout=20).code == EXIT_AGAIN  # it sees that it is cut off
    assert settle(*(pool.submit(node.leave) for node in nodes[:2]))[0].code == 0
    assert nodes[0].concluded[-1][1] == {0, 1}


def test_a_failure_in_a_round_that_a_node_has_not_begun_yet_reaches_it(
    nodes: list[Node], pool: ThreadPoolExecutor
) -> None:
    nodes[0].following = _next(0, 1, 2)
    settle(*(pool.submit(node.leave) for node in nodes))
    nodes[0].begin()
    nodes[0].lifeline.warn()
    time.sleep(0.3)
    nodes[1].begin()
    assert nodes[1].told_to_end.wait(5)
    nodes[2].begin()
    settle(*(pool.submit(node.leave, 1, "failed", 1.0) for node in nodes))


@pytest.mark.parametrize(
    ("alive", "expected"),
    [
        ({0, 2, 3, 4}, (0, 3, 2)),
        ({0, 3, 4}, (0, 3, 4)),
        ({0, 1, 2}, (0, 1, 2)),
        ({0, 4}, None),
        ({1, 2, 3, 4}, None),
    ],
)
def test_spare_nodes_take_the_places_of_lost_ones_but_for_the_first(
    alive: set[int], expected: tuple[int, ...] | None
) -> None:
    assert with_spares((0, 1, 2), alive) == expected


@pytest.mark.parametrize(
    ("codes", "expected"), [((0, 0), 0), ((85, 143), 85), ((0, 143), 143), ((130, 130), 130)]
)
def test_without_a_failure_the_wish_to_go_on_counts_most(
    codes: tuple[int, int], expected: int
) -> None:
    endings = {rank: Ending(code=code) for rank, code in enumerate(codes)}
    assert judge(endings, {}) == Verdict(code=expected, cause=None)


def test_a_kill_from_outside_is_the_cause_of_what_failed_a_moment_before() -> None:
    endings = {
        0: Ending(code=1, failure="connection reset", time=10.0),
        1: Ending(code=137, failure="killed", time=10.1, from_outside=True),
    }
    assert judge(endings, {}) == Verdict(code=137, cause="killed")
