"""Shapes of runs, and this process's place as each launcher tells it."""

from __future__ import annotations

import pytest

from bigtrain.errors import ConfigError
from bigtrain.topology import RankInfo, Topology

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "GROUP_RANK": "1",
}
SLURM = {
    "SLURM_PROCID": "6",
    "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "3",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3),1",
    "SLURM_STEP_ID": "0",
}
MPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}


def test_a_process_without_a_launcher_is_alone():
    assert RankInfo.from_environment({}) == RankInfo(source="alone")


@pytest.mark.parametrize(
    ("environment", "rank"),
    [
        (
            TORCHRUN,
            RankInfo(
                rank=5,
                local_rank=1,
                node_rank=1,
                world_size=8,
                local_world_size=4,
                source="torchrun",
            ),
        ),
        (
            SLURM,
            RankInfo(
                rank=6, local_rank=0, node_rank=3, world_size=7, local_world_size=1, source="slurm"
            ),
        ),
        (
            MPI,
            RankInfo(
                rank=3, local_rank=1, node_rank=1, world_size=4, local_world_size=2, source="mpi"
            ),
        ),
    ],
    ids=["torchrun", "slurm", "mpi"],
)
def test_each_launchers_variables_name_the_rank(environment, rank):
    assert RankInfo.from_environment(environment) == rank


def test_torchrun_is_believed_before_the_srun_that_started_it():
    assert RankInfo.from_environment({**SLURM, **TORCHRUN}).source == "torchrun"


@pytest.mark.parametrize("step", [None, "4294967291", "4294967290", "batch"])
def test_the_shell_of_a_slurm_job_is_no_task_of_it(step):
    shell = {name: value for name, value in SLURM.items() if name != "SLURM_STEP_ID"}
    if step is not None:
        shell["SLURM_STEP_ID"] = step
    assert RankInfo.from_environment(shell).world_size == 1


def test_a_number_that_is_none_is_refused_by_its_variable():
    with pytest.raises(ConfigError, match=r"^WORLD_SIZE='eight' \(torchrun\) is not a whole"):
        RankInfo.from_environment({**TORCHRUN, "WORLD_SIZE": "eight"})


def test_a_rank_outside_its_world_is_refused():
    with pytest.raises(ConfigError, match=r"^rank 8 is outside the world of 8 ranks"):
        RankInfo.from_environment({**TORCHRUN, "RANK": "8"})


def test_a_world_that_the_shard_size_does_not_divide_is_refused_with_what_does():
    with pytest.raises(ConfigError) as refusal:
        Topology(nodes=2, procs_per_node=8, shard_size=6)
    assert str(refusal.value) == (
        "world size 16 is not divisible by shard size 6; use 1, 2, 4, 8, 16"
    )


def test_copies_of_the_model_are_the_world_over_the_shard():
    topology = Topology(nodes=2, procs_per_node=4, shard_size=4)
    assert (topology.world_size, topology.replicate_size) == (8, 2)
