from __future__ import annotations

import errno
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from bigtrain.checkpoint import staging as stagings
from bigtrain.checkpoint.blocks import hash_file
from bigtrain.checkpoint.commit import _check_complete
from bigtrain.checkpoint.find import find_checkpoint, require_checkpoint
from bigtrain.checkpoint.manifest import Part
from bigtrain.checkpoint.staging import naming_failed_write
from bigtrain.checkpoint.verify import verify_checkpoint
from bigtrain.errors import CheckpointError
from bigtrain.topology import RankInfo
from tests.checkpoint.stand_in import StandIn, make_state, save

ALONE = RankInfo()


def save_step(output_dir: Path, step: int, *, run_id: str = "run") -> Path:
    target = output_dir / f"checkpoint-{step}"
    engine = StandIn(*make_state(seed=step), world=ALONE, is_sharded=True)
    save(target, engine, step=step, run_id=run_id)
    return target


def names(output_dir: Path) -> list[str]:
    return sorted(path.name for path in output_dir.iterdir())


def test_rotation_keeps_the_newest_the_protected_and_what_is_not_ours(tmp_path: Path) -> None:
    for step in (2, 4, 6, 8, 10):
        save_step(tmp_path, step)
    save_step(tmp_path, 1, run_id="another run")
    (tmp_path / "checkpoint-3").mkdir()
    removed = stagings.rotate(tmp_path, run_id="run", keep=2, protect={tmp_path / "checkpoint-4"})
    assert [path.name for path in removed] == ["checkpoint-2", "checkpoint-6", "checkpoint-8"]
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-10", "checkpoint-3", "checkpoint-4"]
    assert stagings.rotate(tmp_path, run_id="run", keep=0) == [tmp_path / "checkpoint-4"]
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-10", "checkpoint-3"]


def test_what_was_committed_last_is_the_newest_whatever_its_step(tmp_path: Path) -> None:
    for step in (4, 6, 8, 2):
        save_step(tmp_path, step)
    assert find_checkpoint(tmp_path).path == tmp_path / "checkpoint-2"
    removed = stagings.rotate(tmp_path, run_id="run", keep=2)
    assert [path.name for path in removed] == ["checkpoint-4", "checkpoint-6"]


def test_a_restart_finds_only_what_was_committed_since(tmp_path: Path) -> None:
    save_step(tmp_path, 4)
    since = datetime.now(UTC)
    assert find_checkpoint(tmp_path, since=since).path is None
    later = save_step(tmp_path, 2)
    assert find_checkpoint(tmp_path, since=since).path == later


def test_leftovers_of_this_run_go_and_those_of_others_stay(tmp_path: Path) -> None:
    ours = stagings.new_staging(tmp_path / "checkpoint-5", run_id="run")
    kept = stagings.new_staging(tmp_path / "checkpoint-5", run_id="run")
    theirs = stagings.new_staging(tmp_path / "checkpoint-5", run_id="another run")
    (tmp_path / "checkpoint-5.tmp-mine").mkdir()
    stagings.clear_leftovers(tmp_path, run_id="run", keep={kept})
    assert names(tmp_path) == sorted([kept.name, theirs.name, "checkpoint-5.tmp-mine"])
    assert not ours.exists()


def test_what_was_set_aside_for_a_commit_that_never_came_is_found_and_restored(
    tmp_path: Path,
) -> None:
    target = save_step(tmp_path, 5)
    aside = stagings._beside(target, role="old", run_id="run")
    target.rename(aside)
    assert find_checkpoint(tmp_path, run_id="run").path == aside
    stagings.clear_leftovers(tmp_path, run_id="run")
    assert names(tmp_path) == ["checkpoint-5"]
    verify_checkpoint(target, deep=True)


def test_an_attempt_whose_staging_was_cleared_cannot_commit(tmp_path: Path) -> None:
    target = save_step(tmp_path, 5)
    staging = stagings.new_staging(target, run_id="run")
    engine = StandIn(*make_state(), world=ALONE, is_sharded=True)

    def lose_staging(path: Path) -> None:
        stagings.clear_leftovers(tmp_path, run_id="run")
        assert not path.exists()

    with pytest.raises(CheckpointError, match="only one attempt of a run may write to it"):
        save(target, engine, write_files=lose_staging)
    with pytest.raises((CheckpointError, OSError)):
        stagings.commit(staging, target, run_id="run")
    assert names(tmp_path) == ["checkpoint-5"]
    verify_checkpoint(target, deep=True)


def test_the_newest_that_verifies_is_found_and_the_others_named(tmp_path: Path) -> None:
    for step in (9, 10, 11, 12, 100):
        save_step(tmp_path, step)
    save_step(tmp_path, 200, run_id="another run")
    (tmp_path / "checkpoint-300").mkdir()
    (tmp_path / "checkpoint-100" / "manifest.json").unlink()
    (tmp_path / "checkpoint-12" / "scheduler.pt").unlink()
    weights = tmp_path / "checkpoint-11" / "weights" / "__0_0.distcp"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    found = find_checkpoint(tmp_path, run_id="run")
    assert found.path == tmp_path / "checkpoint-10"
    reasons = {path.name: reason for path, reason in found.passed_over}
    assert list(reasons) == [f"checkpoint-{n}" for n in (300, 100, 200, 12, 11)]
    assert "never committed" in reasons["checkpoint-300"]
    assert reasons["checkpoint-200"] == "belongs to another run (another run)"
    assert "never committed" in reasons["checkpoint-100"]
    assert reasons["checkpoint-12"].endswith("scheduler.pt: is missing")
    assert "hash differs" in reasons["checkpoint-11"]


def test_nothing_is_found_where_there_is_nothing(tmp_path: Path) -> None:
    assert find_checkpoint(tmp_path).path is None
    assert find_checkpoint(tmp_path / "absent").path is None


def test_a_path_that_is_no_checkpoint_is_explained(tmp_path: Path) -> None:
    target = save_step(tmp_path, 5)
    assert require_checkpoint(target) == target
    (tmp_path / "empty").mkdir()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "file").write_text("")
    expected = {
        tmp_path: f"holds no checkpoint itself; give one of {target}",
        tmp_path / "absent": f"does not exist; give one of {target}",
        tmp_path / "a" / "b": f"does not exist; there is no checkpoint in {tmp_path / 'a'} either",
        tmp_path / "file": f"is a file, not a checkpoint's directory; give one of {target}",
        tmp_path / "empty": "is empty; give a directory such as checkpoint-500",
        target / "weights": "holds no checkpoint (it has no manifest.json); "
        f"there is no checkpoint in {target} either",
        tmp_path / "model": "is a model without training state (it has no manifest.json); "
        "to start from its weights, give it as model.name",
    }
    for path, message in expected.items():
        with pytest.raises(CheckpointError) as caught:
            require_checkpoint(path)
        assert str(caught.value) == f"{path} {message}"


def test_a_file_that_another_attempt_took_away_stops_the_commit(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(b"1234")
    whole = hash_file(tmp_path / "weights")
    _check_complete(tmp_path, [Part(rank=0, files={"weights": whole})])
    for files in ({"weights": replace(whole, size=5)}, {"optimizer": whole}):
        with pytest.raises(CheckpointError, match="is not there as its rank wrote it"):
            _check_complete(tmp_path, [Part(rank=0, files=files)])


def test_a_node_whose_clock_is_behind_still_commits_the_newest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Ahead(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return datetime.now(tz) + timedelta(hours=1)

    with monkeypatch.context() as patch:
        patch.setattr(stagings, "datetime", Ahead)
        save_step(tmp_path, 4)
    save_step(tmp_path, 6)
    assert find_checkpoint(tmp_path).path == tmp_path / "checkpoint-6"
    assert stagings.rotate(tmp_path, run_id="run", keep=1) == [tmp_path / "checkpoint-4"]


def test_a_step_that_was_moved_elsewhere_and_linked_is_replaced_and_left_there(
    tmp_path: Path,
) -> None:
    moved = save_step(tmp_path, 4).rename(tmp_path / "elsewhere")
    (tmp_path / "checkpoint-4").symlink_to(moved)
    save_step(tmp_path, 4)
    assert names(tmp_path) == ["checkpoint-4", "elsewhere"]
    assert not (tmp_path / "checkpoint-4").is_symlink()
    verify_checkpoint(moved)


@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        (OSError(errno.EFBIG, "File too large"), "File too large; .* ulimit -f"),
        (ValueError("I/O error: File too large (os error 27)"), "File too large; .* ulimit -f"),
        (OSError(errno.EDQUOT, "quota"), "quota there is used up: free some"),
    ],
)
def test_a_save_that_a_limit_cuts_short_names_checkpoint_cause_and_help(
    tmp_path: Path, fault: Exception, cause: str
) -> None:
    target = tmp_path / "checkpoint-7"
    said = f"^{target} could not be saved, which takes 2.0 MB: .*{cause}.* are untouched$"
    with (
        pytest.raises(CheckpointError, match=said),
        naming_failed_write(target, needed=2_000_000),
    ):
        raise fault
