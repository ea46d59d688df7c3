from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from bigtrain.errors import LaunchError
from bigtrain.slurm.nodelist import expand

NODELISTS = [
    "node1",
    "node[0-3]",
    "rack[01-02]n[03-04,7]",
    "n[9-11]",
    "n[09-11]",
    "n[1-010]",
    "n[1-2,005-007]",
    "a7,b,a7",
    "login,n[1-2],m3",
    "r[1-2][3-4]",
    "n[1-3]x[1-2]y[1-2]",
    "n[1-2]x[1-2]z[1-3]y[1-2]",
    "a[7,5-6]b[2,1]",
    "abc[1-2]d[1]",
    "n[18446744073709551610-18446744073709551612]",
    "gpu-a100-[001-003]",
    "a,,b",
    " a, b c ",
    "",
]


@pytest.mark.skipif(shutil.which("scontrol") is None, reason="no scontrol to compare with")
@pytest.mark.parametrize("nodelist", NODELISTS)
def test_a_nodelist_is_written_out_as_scontrol_does(nodelist: str, tmp_path: Path) -> None:
    config = tmp_path / "slurm.conf"
    config.write_text("ClusterName=none\nSlurmctldHost=localhost\n")
    theirs = subprocess.run(
        ["scontrol", "show", "hostnames", nodelist],
        env={**os.environ, "SLURM_CONF": str(config)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert list(expand(nodelist)) == theirs


@pytest.mark.parametrize(
    "nodelist",
    ["n[1", "n1]", "n[]", "n[3-1]", "n[a-c]", "n[1-2-3]", "n[ 1-2 ]", "n[1,]", "n[-2]"],
)
def test_what_slurm_never_writes_is_refused_by_name(nodelist: str) -> None:
    with pytest.raises(LaunchError, match="is not a list of nodes as Slurm writes one"):
        expand(nodelist)


@pytest.mark.parametrize("nodelist", ["n[0-99999999]", "n[0-9999]m[0-9999]", "a[0-65535],b[0-9]"])
def test_a_short_text_does_not_become_endless_work(nodelist: str) -> None:
    with pytest.raises(LaunchError, match="65536"):
        expand(nodelist)
