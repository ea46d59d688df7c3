"""What ranks without an agent say of their nodes; whole runs of them are in tests/slurm."""

from __future__ import annotations

from bigtrain.cluster.rendezvous import Member
from bigtrain.own_agreement import _nodes


def _rank(node: int, *, gpus: list[str], clock: float = 100.0) -> Member:
    facts = {"gpus": gpus, "sees_output": True}
    return Member(node_rank=node, host=f"n{node}", facts=facts, reaches={}, clock_offset_s=clock)


def test_a_node_has_the_gpus_that_each_of_its_ranks_sees_or_all_of_them_together() -> None:
    whole = [_rank(node, gpus=["A", "A"]) for node in (0, 0, 1, 1)]
    bound = [_rank(node, gpus=["A"]) for node in (0, 0, 1, 1)]
    for ranks in (whole, bound):
        assert [node.facts["gpus"] for node in _nodes(ranks, 2)] == [["A", "A"], ["A", "A"]]
    assert [node.facts["gpus"] for node in _nodes(bound[:3], 2)] == [["A", "A"], ["A"]]


def test_clocks_are_against_the_first_ranks() -> None:
    nodes = _nodes([_rank(0, gpus=[]), _rank(1, gpus=[], clock=160.0)], 1)
    assert [(node.host, node.clock_offset_s) for node in nodes] == [("n0", 0.0), ("n1", 60.0)]
