"""Where nodes meet: the ports that a job tries, and this machine's addresses, best first."""

from __future__ import annotations

import contextlib
import hashlib
import ipaddress
import socket
from collections.abc import Sequence
from dataclasses import dataclass

from bigtrain.errors import ConfigError

NUM_CANDIDATES = 16
# Below Linux's ephemeral ports (32768 on), where any client may happen to sit.
_FIRST_PORT, _NUM_PORTS = 20_000, 12_000
# Bridges and tunnels that lead nowhere but to containers of the same machine.
_VIRTUAL = ("docker", "br-", "veth", "virbr", "cni", "flannel", "cali", "podman", "tun", "tap")


@dataclass(frozen=True, kw_only=True)
class LocalAddress:
    """One address of this machine, and the interface that has it."""

    address: str
    interface: str


def candidate_ports(job: str) -> tuple[int, ...]:
    """The same ports for the same job, others for other jobs, in the order they are tried."""
    ports: dict[int, None] = {}
    count = 0
    while len(ports) < NUM_CANDIDATES:
        digest = hashlib.blake2b(f"{job}/{count}".encode(), digest_size=8).digest()
        ports[_FIRST_PORT + int.from_bytes(digest, "big") % _NUM_PORTS] = None
        count += 1
    return tuple(ports)


def local_addresses() -> list[LocalAddress]:
    """Addresses of this machine's interfaces that are up; loopback's last."""
    import psutil

    up = {name for name, status in psutil.net_if_stats().items() if status.isup}
    found = [
        LocalAddress(address=entry.address.partition("%")[0], interface=interface)
        for interface, entries in psutil.net_if_addrs().items()
        for entry in entries
        if interface in up and entry.family in (socket.AF_INET, socket.AF_INET6)
    ]
    usable = [local for local in found if not ipaddress.ip_address(local.address).is_link_local]
    return sorted(usable, key=_reluctance)


def listening_addresses(expected: Sequence[str], *, interface: str | None) -> list[LocalAddress]:
    """Where the first node is to listen, best first: where the others will look, then the rest.

    `expected` are addresses; when all of them are the loopback's own, nothing else is listened on.
    One such as 127.0.1.1, which Debian gives a machine's own name, says nothing of the others.
    ConfigError where `interface` has no address.
    """
    own = local_addresses()
    if interface is not None:
        chosen = [local for local in own if interface in (local.interface, local.address)]
        if not chosen:
            names = ", ".join(sorted({local.interface for local in own}))
            raise ConfigError(f"the interface {interface} is not up here; there are {names}")
        return chosen
    known = {local.address for local in own}
    inner = [address for address in expected if _is_loopback(address)]
    if inner and len(inner) == len(expected) and known & set(inner):
        fitting = [local for local in own if local.address in inner]
    else:
        fitting = [local for local in own if not _is_loopback(local.address)] or own
        fitting += [LocalAddress(address=a, interface="lo") for a in inner if a not in known]
    places = {address: place for place, address in enumerate(expected)}
    return sorted(fitting, key=lambda local: places.get(local.address, len(places)))


def interface_of(address: str) -> str | None:
    """The interface of this machine that has `address`."""
    return next((own.interface for own in local_addresses() if own.address == address), None)


def interface_towards(host: str) -> str | None:
    """The interface of this machine from which the system would go to `host`; None: unknown."""
    for address in resolve([host]):
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((address, 9))  # a datagram socket sends nothing by that
            return interface_of(str(probe.getsockname()[0]))
    return None


def is_own(host: str) -> bool:
    """Whether a host name, or an address, is this machine's."""
    own = {local.address for local in local_addresses()}
    return bool(own & set(resolve([host])))


def resolve(names: Sequence[str]) -> list[str]:
    """The addresses that host names stand for, in order, each once; unknown names left out."""
    addresses: dict[str, None] = {}
    for name in names:
        try:
            entries = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError):
            continue
        for entry in sorted(entries, key=lambda entry: entry[0] != socket.AF_INET):
            addresses[str(entry[4][0])] = None
    return list(addresses)


def _reluctance(local: LocalAddress) -> tuple[bool, bool, bool]:
    # torch's store and gloo know IPv4 best.
    return (
        _is_loopback(local.address),
        local.interface.startswith(_VIRTUAL),
        ":" in local.address,
    )


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address).is_loopback
