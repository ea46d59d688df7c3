"""How long nodes take to meet, and how that grows: simulated agents on the loopback.

Every agent is a thread that does all that a node's agent does between its start and the moment
when it knows where the ranks' store is: it dials, proves itself, says what it has and waits for
the last one. The first node runs the real thing in a process of its own. As a comparison, the same
number of clients meet at torch's TCPStore by counting up one key, as launchers do that use it.
All agents share this machine's cores with the first node, which on a cluster has its own: the
first node's processor time, shown beside the whole, is the part that grows there.

    python benchmarks/rendezvous.py --agents 64 512 4096 --repeats 3 [--json] [--no-store]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import secrets
import statistics
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from bigtrain.cluster.rendezvous import Joined, Member, Seat, join

_PROCESSES = 8
_HEAD_START_S = 0.5
_STACK_BYTES = 256 * 1024
_FACTS = {"versions": dict.fromkeys("abcdefgh", "1.2.3"), "plan": {"x": "0" * 900}}


@dataclass(frozen=True, kw_only=True)
class Meeting:
    """How long one took."""

    seconds: float
    head_cpu_s: float
    """Of the first node's process: the agents have processes of their own."""
    agents_cpu_s: float
    """Of all other agents together; on a cluster each has a machine for its share."""


def main() -> None:
    """Measure and print, for each number of agents."""
    arguments = _parse_arguments()
    _allow_open_files()
    os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # it warns of every client without a host name
    rows = []
    for agents in arguments.agents:
        row: dict[str, Any] = {"agents": agents}
        row["join_s"] = _repeat(arguments.repeats, _meet, agents)
        if arguments.store:
            row["tcpstore_s"] = _repeat(arguments.repeats, _meet_at_store, agents)
        rows.append(row)
        if not arguments.json:
            _show(row)
    if arguments.json:
        print(json.dumps({"cores": os.cpu_count(), "rows": rows}, indent=2))


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--agents", type=int, nargs="+", default=[64, 512, 4096])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--no-store", dest="store", action="store_false")
    return parser.parse_args()


def _repeat(times: int, measure: Callable[[int], Meeting], agents: int) -> dict[str, float]:
    meetings = [measure(agents) for _ in range(times)]
    seconds = [meeting.seconds for meeting in meetings]
    return {
        "median": statistics.median(seconds),
        "min": min(seconds),
        "max": max(seconds),
        "head_cpu": statistics.median(meeting.head_cpu_s for meeting in meetings),
        "agents_cpu": statistics.median(meeting.agents_cpu_s for meeting in meetings),
    }


def _show(row: dict[str, Any]) -> None:
    parts = [f"{row['agents']:>5} agents"]
    for name, label in (("join_s", "bigtrain"), ("tcpstore_s", "torch TCPStore")):
        if name in row:
            times = row[name]
            parts.append(
                f"{label} {times['median']:.3f} s ({times['min']:.3f}-{times['max']:.3f}), "
                f"cpu of the first node {times['head_cpu']:.3f}, of the others "
                f"{times['agents_cpu']:.3f}"
            )
    print("  ".join(parts), flush=True)


def _seat(node_rank: int, agents: int, job: str) -> Seat:
    return Seat(
        node_rank=node_rank,
        num_nodes=agents,
        host=f"node{node_rank}",
        job=job,
        token=job.encode(),
        head_names=("127.0.0.1",),
        deadline_s=120,
    )


def _meet(agents: int) -> Meeting:
    """From the word to go until the last agent has heard that all are there."""
    job = secrets.token_hex(8)

    def agent(rank: int) -> None:
        joined = join(_seat(rank, agents, job), lambda: _FACTS, decide=_decide)
        for connection in joined.connections.values():
            connection.close()

    def head() -> Joined:
        return join(_seat(0, agents, job), lambda: _FACTS, decide=_decide)

    return _run(agents, agent=agent, head=head)


def _decide(members: list[Member]) -> dict[str, Any]:
    return {"nodes": len(members)}


def _meet_at_store(agents: int) -> Meeting:
    """The same through torch: every client adds one to a key and waits for the last one's word."""
    import socket

    from torch.distributed import TCPStore

    with socket.create_server(("127.0.0.1", 0), backlog=4096) as probe:
        port = probe.getsockname()[1]

    def agent(rank: int) -> None:
        store = TCPStore("127.0.0.1", port, is_master=False)
        store.set(f"node/{rank}", json.dumps(_FACTS))
        if store.add("count", 1) == agents - 1:
            store.set("all", "1")
        store.get("all")

    def head() -> object:
        store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
        store.get("all")
        return store

    return _run(agents, agent=agent, head=head)


def _run(agents: int, *, agent: Callable[[int], None], head: Callable[[], object]) -> Meeting:
    context = multiprocessing.get_context("fork")
    shares = [range(1 + k, agents, _PROCESSES) for k in range(min(_PROCESSES, agents - 1))]
    ready, done = context.Semaphore(0), context.Semaphore(0)
    used_by_agents = context.Value("d", 0.0)
    go, leave = context.Event(), context.Event()
    workers = [
        context.Process(target=_agents, args=(share, agent, ready, go, done, leave, used_by_agents))
        for share in shares
    ]
    for worker in workers:
        worker.start()
    for _ in workers:
        ready.acquire()
    with ThreadPoolExecutor(1) as pool:
        # Both kinds of head listen before the first agent dials: else the retry pauses of the two
        # would be compared, and not the meeting.
        meeting = pool.submit(head)
        time.sleep(_HEAD_START_S)
        started, used = time.monotonic(), time.process_time()
        go.set()
        for _ in workers:
            done.acquire()
        seconds, head_cpu_s = time.monotonic() - started, time.process_time() - used
        kept = meeting.result()
    leave.set()
    for worker in workers:
        worker.join()
        if worker.exitcode != 0:
            raise SystemExit(f"an agent failed: exit code {worker.exitcode}")
    if isinstance(kept, Joined):
        for connection in (kept.listener, *kept.connections.values()):
            if connection is not None:
                connection.close()
    return Meeting(seconds=seconds, head_cpu_s=head_cpu_s, agents_cpu_s=used_by_agents.value)


def _agents(
    ranks: range,
    agent: Callable[[int], None],
    ready: Any,
    go: Any,
    done: Any,
    leave: Any,
    used_by_agents: Any,
) -> None:
    threading.stack_size(_STACK_BYTES)
    failures: list[BaseException] = []
    start = threading.Event()

    def run(rank: int) -> None:
        start.wait()
        try:
            agent(rank)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    ready.release()
    go.wait()
    used = time.process_time()
    start.set()
    for thread in threads:
        thread.join()
    with used_by_agents.get_lock():
        used_by_agents.value += time.process_time() - used
    done.release()
    leave.wait()
    if failures:
        print(f"{len(failures)} agents failed, one with {failures[0]!r}")
        raise SystemExit(1)


def _allow_open_files() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


if __name__ == "__main__":
    main()
