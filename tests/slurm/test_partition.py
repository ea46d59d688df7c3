from __future__ import annotations

from bigtrain.slurm.partition import NodeShape, read_shapes

MIXED = """\
gpu|10|64|1|(null)
gpu|3|64+|515000+|gpu:a100:8(S:0-1),nvme:1
gpu|2|32|256000|gpu:4
gpu|1|32|128000|gpu:4
"""


def test_a_job_for_gpus_gets_the_nodes_that_have_them() -> None:
    found = read_shapes(MIXED, default_only=False)
    assert found is not None
    assert found.has_gpus
    assert found.cpus(8) == 64
    assert found.cpus(4) == 32
    assert found.cpus(2) == 16
    assert found.cpus(0) == 32
    assert found.cpus(16) == 32  # none has as many, which sbatch will say
    assert [found.nodes(gpus) for gpus in (0, 4, 5, 16)] == [16, 6, 3, 0]


def test_the_largest_node_s_memory_is_known_where_slurm_knows_it() -> None:
    found = read_shapes(MIXED, default_only=False)
    assert found is not None
    assert found.largest_memory_mib == 515_000
    unset = read_shapes("debug*|1|8|1|(null)\nother|1|4|9000|gpu:1\n", default_only=True)
    assert unset is not None
    assert unset.largest_memory_mib is None


def test_a_partition_without_gpus_has_none() -> None:
    found = read_shapes("debug*|1|8|1|(null)\nother|1|4|1|gpu:1\n", default_only=True)
    assert found is not None
    assert found.shapes == (NodeShape(cpus=8, gpus=0),)
    assert not found.has_gpus


def test_what_is_no_row_is_passed_over() -> None:
    assert read_shapes("", default_only=False) is None
    assert read_shapes("sinfo: hello\n", default_only=False) is None
    assert read_shapes("gpu|1|8|1|gpu:2\n", default_only=True) is None
