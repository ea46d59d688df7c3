from __future__ import annotations

import ipaddress

from bigtrain.cluster.rendezvous_address import (
    candidate_ports,
    listening_addresses,
    local_addresses,
    resolve,
)


def test_candidate_ports_follow_from_the_job_and_are_not_ephemeral() -> None:
    assert candidate_ports("12.0") == candidate_ports("12.0")
    assert candidate_ports("12.0") != candidate_ports("12.1")
    ports = candidate_ports("12.0")
    assert len(set(ports)) == 16
    assert all(20_000 <= port < 32_000 for port in ports)


def test_an_own_name_that_means_127_0_1_1_hides_no_network() -> None:
    own = [local.address for local in local_addresses()]
    listening = [local.address for local in listening_addresses(["127.0.1.1"], interface=None)]
    outer = [address for address in own if not ipaddress.ip_address(address).is_loopback]
    assert listening[-1] == "127.0.1.1" or listening[0] == "127.0.1.1"
    assert set(outer) < set(listening)
    only = listening_addresses(["127.0.0.1"], interface=None)
    assert [local.address for local in only] == ["127.0.0.1"]


def test_loopback_comes_last_and_unknown_names_are_left_out() -> None:
    own = local_addresses()
    assert own[-1].interface == "lo"
    assert resolve(["no-such-host.invalid", "127.0.0.1", "127.0.0.1"]) == ["127.0.0.1"]
