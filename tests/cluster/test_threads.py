from __future__ import annotations

from pathlib import Path

import pytest

from bigtrain.cluster import threads


def _cpu(tree: Path, number: int, package: int, core: int) -> None:
    folder = tree / f"cpu{number}" / "topology"
    folder.mkdir(parents=True)
    (folder / "physical_package_id").write_text(f"{package}\n")
    (folder / "core_id").write_text(f"{core}\n")


def test_hyper_threads_of_a_core_count_once_and_packages_apart(tmp_path: Path) -> None:
    for number, (package, core) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)] * 2):
        _cpu(tmp_path, number, package, core)
    assert threads._physical_cores(set(range(8)), tmp_path) == 4
    assert threads._physical_cores({0, 4}, tmp_path) == 1


def test_a_machine_that_does_not_tell_has_a_core_per_cpu(tmp_path: Path) -> None:
    assert threads._physical_cores({0, 1, 2}, tmp_path) == 3


@pytest.mark.parametrize(
    ("text", "limit"), [("max 100000", None), ("150000 100000", 1.5), ("", None), ("x y", None)]
)
def test_a_version_2_control_group_limits(tmp_path: Path, text: str, limit: float | None) -> None:
    (tmp_path / "cpu.max").write_text(text + "\n")
    assert threads._cgroup_quota(tmp_path) == limit


def test_a_version_1_control_group_limits(tmp_path: Path) -> None:
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    for quota, limit in (("-1", None), ("250000", 2.5)):
        (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text(quota + "\n")
        assert threads._cgroup_quota(tmp_path) == limit


def test_ranks_share_the_cores_and_each_has_one_thread_at_least() -> None:
    cores = threads.available_cores()
    assert threads.per_rank(1) == cores
    assert threads.per_rank(cores * 3) == 1
    assert threads.sensible(cores * 4)
    assert not threads.sensible(cores * 4 + 1)
