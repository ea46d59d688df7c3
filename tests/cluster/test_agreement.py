from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest

from bigtrain.cluster.agreement import StorageToken, compare, node_facts
from bigtrain.cluster.rendezvous import Member
from bigtrain.errors import LaunchError
from bigtrain.plan import RunPlan
from bigtrain.topology import Topology
from bigtrain.translate.config import EngineConfig, SingleSettings


def make_plan(**fields: Any) -> RunPlan:
    defaults: dict[str, Any] = {
        "name": "run",
        "kind": "run_file",
        "source": "/a/run.yaml",
        "working_dir": "/a",
        "topology": Topology(nodes=2, procs_per_node=2),
        "device": "cpu",
        "engine": EngineConfig(name="single", settings=SingleSettings()),
        "output_dir": "/a/out",
    }
    return RunPlan(**(defaults | fields))


def facts(plan: RunPlan, **changes: Any) -> dict[str, Any]:
    whole = node_facts(plan, gpus=(), cores=8, sees_output=True)
    return whole | changes


def members(*all_facts: dict[str, Any], offset: float = 0.0) -> list[Member]:
    return [
        Member(node_rank=k, host=f"node{k}", facts=f, reaches={}, clock_offset_s=k * offset)
        for k, f in enumerate(all_facts)
    ]


def test_nodes_that_are_alike_have_nothing_to_say() -> None:
    plan = make_plan()
    assert compare(members(facts(plan), facts(plan)), plan) == []


def test_what_may_differ_between_nodes_is_not_compared() -> None:
    plan = make_plan()
    other = dataclasses.replace(plan, attempt=3, threads_per_rank=9, origins={"a": "elsewhere"})
    assert compare(members(facts(plan), facts(other)), plan) == []


def test_versions_that_differ_are_refused_with_a_table() -> None:
    plan = make_plan()
    odd = facts(plan, versions={"python": "3.11.7", "torch": "2.12.0", "bigtrain": "0.1.0"})
    even = facts(plan, versions={"python": "3.11.7", "torch": "2.13.0", "bigtrain": "0.1.0"})
    with pytest.raises(LaunchError) as caught:
        compare(members(even, odd, even), plan)
    assert str(caught.value) == (
        "the nodes can't train together:\n"
        "versions differ; install the same everywhere\n"
        "  node   torch\n"
        "  node0  2.13.0\n"
        "  node1  2.12.0\n"
        "  node2  2.13.0"
    )


def test_plans_that_differ_are_refused_by_the_field() -> None:
    plan = make_plan()
    other = make_plan(training={"learning_rate": 1.0})
    with pytest.raises(LaunchError, match=r"plan differ; start all nodes with the same run file"):
        compare(members(facts(plan), facts(other)), plan)


def test_storage_that_is_not_shared_is_refused_where_a_resume_would_need_it() -> None:
    plan = make_plan()
    blind = members(facts(plan), facts(plan, sees_output=False))
    with pytest.raises(LaunchError) as caught:
        compare(blind, plan)
    assert str(caught.value).splitlines()[1] == (
        "output_dir /a/out is not the same storage everywhere: node1 can't see what node0 wrote "
        "there, so a resume would not find the checkpoint; give an output_dir that all nodes "
        "share, let each node keep its own part (training.save_on_each_node: true), or save none "
        "(training.save_strategy: no)"
    )
    assert compare(blind, make_plan(training={"save_on_each_node": True})) == []
    assert compare(blind, make_plan(training={"save_strategy": "no"})) == []


def test_missing_gpus_are_refused_and_unlike_ones_said() -> None:
    plan = make_plan(device="cuda")
    full, short = facts(plan, gpus=["H100", "H100"]), facts(plan, gpus=["H100"])
    with pytest.raises(LaunchError, match=r"2 processes on each node need 2 GPUs there\n  node"):
        compare(members(full, short), plan)
    notes = compare(members(full, facts(plan, gpus=["A100", "A100"])), plan)
    assert notes[0] == "devices differ; the slowest sets the pace"
    assert notes[1:] == ["  node   devices", "  node0  2x H100", "  node1  2x A100"]


def test_clocks_that_differ_are_said() -> None:
    plan = make_plan()
    notes = compare(members(facts(plan), facts(plan), offset=61.0), plan)
    assert notes == [
        "clocks differ from node0's; times in logs do too",
        "  node   ahead by",
        "  node1  61.0 s",
    ]


def test_a_storage_token_is_seen_where_it_was_written_and_nowhere_else(tmp_path: Path) -> None:
    token = StorageToken(str(tmp_path / "shared"), mark="abc")
    assert not token.is_there()
    token.write()
    assert token.is_there()
    assert not StorageToken(str(tmp_path / "other"), mark="abc").is_there()
    token.remove()
    assert not token.is_there()


def test_facts_are_gathered_without_importing_torch() -> None:
    before = "torch" in sys.modules
    versions = facts(make_plan())["versions"]
    assert versions["torch"] and versions["python"]
    assert ("torch" in sys.modules) == before
