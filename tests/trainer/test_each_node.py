"""With `save_on_each_node`, nodes without shared storage go on from what is on their own disks."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from bigtrain.checkpoint.verify import verify_checkpoint
from bigtrain.errors import CheckpointError
from bigtrain.topology import RankInfo
from tests.engine import harness
from tests.trainer.samples import Sentences, losses, trainer
from tests.trainer.test_survival import KilledWhileSaving

RANKS_PER_NODE = 2
EVERY, STEPS = 2, 6
ENGINES: dict[str, dict[str, Any]] = {
    "ddp": {},
    "fsdp": {"fsdp": "full_shard"},
    "zero1": {"deepspeed": {"zero_optimization": {"stage": 1}}},
    "zero3": {"deepspeed": {"zero_optimization": {"stage": 3}}},
}


def on_nodes(world: RankInfo, disks: Sequence[Path]) -> Path:
    """This process as a rank of one of the nodes, whose disks these are; its disk."""
    node = world.rank // RANKS_PER_NODE
    os.environ["LOCAL_RANK"] = str(world.rank % RANKS_PER_NODE)
    os.environ["LOCAL_WORLD_SIZE"] = str(RANKS_PER_NODE)
    os.environ["GROUP_RANK"] = str(node)
    return disks[node]


def run_of(disk: Path, cls: Any = None, **changed: Any) -> Any:
    fields = {
        "max_steps": STEPS,
        "save_strategy": "steps",
        "save_steps": EVERY,
        "gradient_accumulation_steps": 1,
        "per_device_train_batch_size": 2,
        "save_on_each_node": True,
    } | changed
    run = trainer(disk, data=Sentences(60), **fields)
    if cls is None:
        return run
    return cls(model=run.model, args=run.args, train_dataset=Sentences(60))


def train(
    world: RankInfo, disks: Sequence[Path], changed: dict[str, Any], resume: bool | str = False
) -> tuple[int, list[Any]]:
    disk = on_nodes(world, disks)
    run = run_of(disk, **changed)
    run.train(resume_from_checkpoint=str(disk / resume) if isinstance(resume, str) else resume)
    return run._initial_global_step, losses(run)


def names(disk: Path) -> list[str]:
    return sorted(path.name for path in disk.iterdir())


@pytest.fixture
def disks(tmp_path: Path) -> list[Path]:
    return [tmp_path / "one", tmp_path / "two"]


@pytest.mark.parametrize("later", [True, False], ids=["background", "at once"])
@pytest.mark.parametrize(
    "engine",
    [
        "ddp",
        "fsdp",
        *(pytest.param(e, marks=pytest.mark.slow) for e in ("zero1", "zero3")),
    ],
)
def test_each_node_goes_on_from_its_own_disk(disks: list[Path], engine: str, later: bool) -> None:
    changed = ENGINES[engine] | {"async_save": later, "save_total_limit": 2}
    _, whole = harness.run_ranks(4, train, disks, changed)[0]
    for disk in disks:
        assert names(disk) == ["checkpoint-4", "checkpoint-6"]
        verify_checkpoint(disk / "checkpoint-4", deep=True)
        shutil.rmtree(disk / "checkpoint-6")
    own = [{p.name for p in (d / "checkpoint-4").rglob("*.distcp")} for d in disks]
    if engine != "ddp":
        assert own == [{"__0_0.distcp", "__1_0.distcp"}, {"__2_0.distcp", "__3_0.distcp"}]
    changed |= {"save_strategy": "no"}
    for step, found in harness.run_ranks(4, train, disks, changed, True):
        assert (step, found) == (4, whole)
    for step, found in harness.run_ranks(4, train, disks, changed, "checkpoint-4"):
        assert (step, found) == (4, whole)


def test_the_newest_counts_that_all_nodes_have_whole(disks: list[Path]) -> None:
    changed = ENGINES["fsdp"]
    _, whole = harness.run_ranks(4, train, disks, changed)[0]
    shutil.rmtree(disks[0] / "checkpoint-6")
    damaged = next((disks[1] / "checkpoint-4" / "weights").glob("*.distcp"))
    damaged.write_bytes(bytes(damaged.stat().st_size))
    changed = changed | {"save_strategy": "no"}
    for step, found in harness.run_ranks(4, train, disks, changed, True):
        assert (step, found) == (2, whole)


def test_a_node_that_is_needed_and_not_there_is_named(disks: list[Path], tmp_path: Path) -> None:
    changed = ENGINES["fsdp"]
    harness.run_ranks(4, train, disks, changed)
    for number in (2, 4, 6):
        path = disks[1] / f"checkpoint-{number}" / "manifest.json"
        assert [node["ranks"] for node in json.loads(path.read_text())["nodes"]] == [[0, 1], [2, 3]]
    other = [disks[0], tmp_path / "new"]
    host = os.uname().nodename
    with pytest.raises(AssertionError) as caught:
        harness.run_ranks(4, train, other, changed, True)
    assert "no checkpoint is whole on the disks of these nodes: checkpoint-6 is not whole" in str(
        caught.value
    )
    assert f"node {host} has what ranks 2, 3 wrote, and isn't in this job" in str(caught.value)
    # The nodes are there, and have changed places: each reads what the other has.
    with pytest.raises(AssertionError, match="is on the disk of .*, which wrote it as rank 2"):
        harness.run_ranks(4, train, disks[::-1], changed, True)
    # Copied together they are one checkpoint, from which anything goes on.
    for disk in disks:
        shutil.copytree(disk / "checkpoint-6", tmp_path / "both", dirs_exist_ok=True)
    changed = {"save_strategy": "no", "max_steps": 7, "save_on_each_node": False}
    changed |= {"per_device_train_batch_size": 8}
    step, _ = harness.run_ranks(1, train, [tmp_path / "a"], changed, str(tmp_path / "both"))[0]
    assert step == 6


def die_of_one_node(world: RankInfo, disks: Sequence[Path], changed: dict[str, Any]) -> None:
    disk = on_nodes(world, disks)
    cls = KilledWhileSaving if world.rank == 2 else None
    run = run_of(disk, cls, **changed)
    try:
        run.train(resume_from_checkpoint=True)
    except Exception:
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_node_that_dies_while_it_saves_loses_nothing(disks: list[Path]) -> None:
    changed = ENGINES["fsdp"]
    _, whole = harness.run_ranks(4, train, disks, changed)[0]
    for disk in disks:
        shutil.rmtree(disk / "checkpoint-6")
        shutil.rmtree(disk / "checkpoint-4")
    with pytest.raises(AssertionError, match="exit codes"):
        harness.run_ranks(4, die_of_one_node, disks, changed)
    for step, found in harness.run_ranks(4, train, disks, changed, True):
        assert (step, found) == (2, whole)
    for disk in disks:
        assert [n for n in names(disk) if n.startswith("checkpoint")] == [
            "checkpoint-2", "checkpoint-4", "checkpoint-6",
        ]  # fmt: skip


def test_storage_that_all_nodes_share_takes_one_checkpoint(tmp_path: Path) -> None:
    shared = [tmp_path / "shared"] * 2
    _, whole = harness.run_ranks(4, train, shared, ENGINES["fsdp"])[0]
    manifest = json.loads((shared[0] / "checkpoint-4" / "manifest.json").read_text())
    assert manifest["nodes"] == []
    shutil.rmtree(shared[0] / "checkpoint-6")
    changed = ENGINES["fsdp"] | {"save_strategy": "no"}
    for step, found in harness.run_ranks(4, train, shared, changed, True):
        assert (step, found) == (4, whole)


def test_a_save_that_fails_on_one_node_fails_on_all(
    disks: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from bigtrain.checkpoint import commit

    def full(staging: Path, target: Path, *, run_id: str) -> None:
        if disks[1] in target.parents:
            raise CheckpointError("no space on the second disk")
        real(staging, target, run_id=run_id)

    real = commit.stagings.commit
    monkeypatch.setattr(commit.stagings, "commit", full)
    with pytest.raises(AssertionError, match="no space on the second disk"):
        harness.run_ranks(4, train, disks, ENGINES["fsdp"] | {"async_save": True})
    # What one node has committed alone is passed over, and named.
    assert [n for n in names(disks[1]) if "checkpoint" in n] == []
    monkeypatch.undo()
    with pytest.raises(AssertionError, match="checkpoint-2 is not whole"):
        harness.run_ranks(4, train, disks, ENGINES["fsdp"], True)
