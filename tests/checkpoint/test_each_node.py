"""What nodes keep of a checkpoint on disks of their own."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from bigtrain.checkpoint.load import group_names, open_checkpoint, restore
from bigtrain.checkpoint.manifest import NodeOfCheckpoint, Progress
from bigtrain.checkpoint.nodes import Held, Holdings, agree, is_apart
from bigtrain.checkpoint.save import Saver, SaveRequest
from bigtrain.topology import RankInfo
from tests.checkpoint import matrix
from tests.checkpoint.matrix import Case
from tests.engine.harness import run_ranks

HYBRID = Case("fsdp", 4, shard=2)


def as_node(world: RankInfo) -> RankInfo:
    """Two ranks a node."""
    return dataclasses.replace(
        world, local_rank=world.rank % 2, local_world_size=2, node_rank=world.rank // 2
    )


def write_and_read(world: RankInfo, folder: Path) -> bool:
    world = as_node(world)
    engine, model = matrix.prepare(HYBRID, world, seed=0)
    matrix.train(engine, model, world, first=0, last=2)
    target = folder / f"{world.node_rank}" / "checkpoint-2"
    request = SaveRequest(
        target=target,
        run_id="r",
        progress=Progress(step=2),
        scheduler_state=None,
        rng_state={"cpu": torch.random.get_rng_state()},
        write_files=lambda staging: None,
    )
    Saver(world, in_background=False, on_each_node=True).save(request, engine)
    before = [piece.data.clone() for piece in engine.local_state(optimizer=True)]
    engine.close()
    engine, model = matrix.prepare(HYBRID, world, seed=7)
    with open_checkpoint(target, names=group_names(engine)) as loaded:
        restore(engine, loaded, world=world)
    after = [piece.data for piece in engine.local_state(optimizer=True)]
    return len(before) == len(after) and all(map(torch.equal, before, after))


def test_a_node_keeps_the_replicas_that_its_ranks_hold(tmp_path: Path) -> None:
    assert run_ranks(4, write_and_read, tmp_path) == [True] * 4


def held(step: int, *, uuid: str, node: int = 0) -> Held:
    nodes = tuple(NodeOfCheckpoint(host=h, ranks=(r,)) for r, h in enumerate("ab"))
    return Held(name=f"checkpoint-{step}", uuid=uuid, created=f"{step}", node=node, nodes=nodes)


def test_nodes_agree_on_the_newest_save_that_all_have_of_one_and_the_same_attempt() -> None:
    one = Holdings(host="a", held=(held(9, uuid="x"), held(6, uuid="y"), held(3, uuid="z")))
    # The sixth step was saved twice, and the nodes have different ones.
    two = Holdings(host="b", held=(held(6, uuid="other", node=1), held(3, uuid="z", node=1)))
    found = agree([one, None, two, None])
    assert found.name == "checkpoint-3"
    assert [name for name, _ in found.passed_over] == [
        "checkpoint-9", "checkpoint-6", "checkpoint-6",
    ]  # fmt: skip
    assert "node b has what ranks 1 wrote" in found.incomplete[0]
    assert "node a has what ranks 0 wrote" in " ".join(found.incomplete[1:])


def test_a_node_that_is_new_is_named() -> None:
    everyone = [Holdings(host=h, held=(held(3, uuid="z", node=n),)) for n, h in enumerate("ab")]
    found = agree([*everyone, Holdings(host="c", held=())])
    assert found.name is None
    assert found.incomplete == (
        "checkpoint-3 is not on the disk of c, which is new to the run or has lost it",
    )


def test_shared_and_own_storage_are_told_apart() -> None:
    assert is_apart([[True, False], None, [False, True], None])
    assert not is_apart([[True, True], None, [True, True], None])
