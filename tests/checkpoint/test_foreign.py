"""Training goes on, with its optimizer, from what other tools wrote."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
)

from bigtrain.checkpoint.foreign import is_foreign, numbers_as_names, read_foreign
from bigtrain.checkpoint.inspect import inspect_checkpoint, verify
from bigtrain.checkpoint.load import group_names, open_checkpoint, restore
from bigtrain.errors import CheckpointError
from bigtrain.topology import RankInfo
from tests.checkpoint import matrix
from tests.checkpoint.matrix import SAVED_AT, STEPS, Case, Ran
from tests.checkpoint.test_matrix import assert_goes_on
from tests.engine.harness import run_ranks

SINGLE = Case("single", 1)


def write_as(world: RankInfo, case: Case, path: Path, save: Callable[..., None]) -> Ran:
    """Train on an engine, and save what it holds by someone else's means."""
    engine, model = matrix.prepare(case, world, seed=0)
    matrix.train(engine, model, world, first=0, last=SAVED_AT)
    save(engine, model, path, world)
    ran = matrix._ran(engine, world)
    losses = matrix.train(engine, model, world, first=SAVED_AT, last=STEPS)
    engine.close()
    return Ran(tensors=ran.tensors, groups=ran.groups, losses=losses, scale=ran.scale)


def by_deepspeed(engine: Any, model: Any, path: Path, world: RankInfo) -> None:
    engine._deepspeed.save_checkpoint(str(path))


def by_transformers_with_deepspeed(engine: Any, model: Any, path: Path, world: RankInfo) -> None:
    engine._deepspeed.save_checkpoint(str(path))
    (path / "trainer_state.json").write_text(f'{{"global_step": {SAVED_AT}, "epoch": 0.5}}')
    torch.save({"cpu": torch.random.get_rng_state()}, path / f"rng_state_{world.rank}.pth")


def by_accelerate_with_deepspeed(engine: Any, model: Any, path: Path, world: RankInfo) -> None:
    """As `Accelerator.save_state` does: the tag is always the same."""
    engine._deepspeed.save_checkpoint(str(path), "pytorch_model")


def by_accelerate_fsdp(engine: Any, model: Any, path: Path, world: RankInfo) -> None:
    """As `save_fsdp_model` and `save_fsdp_optimizer` do with FSDP2."""
    dcp.save({"model": get_model_state_dict(model)}, checkpoint_id=path / "pytorch_model_fsdp_0")
    state = get_optimizer_state_dict(model, engine.optimizer)
    dcp.save({"optimizer": state}, checkpoint_id=path / "optimizer_0")


def by_torchtitan(engine: Any, model: Any, path: Path, world: RankInfo) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    state = get_optimizer_state_dict(model, engine.optimizer, options=options)
    dcp.save({**get_model_state_dict(model), "optimizer": state}, checkpoint_id=path)


def by_accelerate(engine: Any, model: Any, path: Path, world: RankInfo) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    accelerator.prepare(model, engine.optimizer)
    accelerator.save_state(str(path), safe_serialization=True)


WRITERS = {
    "deepspeed stage 1": (Case("zero1", 2), by_deepspeed),
    "deepspeed stage 2": (Case("zero2", 3), by_deepspeed),
    "deepspeed stage 3": (Case("zero3", 2), by_deepspeed),
    "transformers with deepspeed": (Case("zero3", 2), by_transformers_with_deepspeed),
    "accelerate with deepspeed": (Case("zero2", 2), by_accelerate_with_deepspeed),
    "accelerate with fsdp": (Case("fsdp", 2), by_accelerate_fsdp),
    "torchtitan": (Case("fsdp", 2), by_torchtitan),
    "accelerate": (SINGLE, by_accelerate),
}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("reader", [SINGLE, Case("fsdp", 2), Case("zero2", 2)], ids=str)
def test_training_goes_on_bit_equal_from_what_others_wrote(
    tmp_path: Path, name: str, reader: Case
) -> None:
    writer, save = WRITERS[name]
    path = tmp_path / f"checkpoint-{SAVED_AT}"
    before = run_ranks(writer.world_size, write_as, writer, path, save)[0]
    assert is_foreign(path)
    after = run_ranks(reader.world_size, matrix.read, reader, path)[0]
    # The order of groups' parameters is each format's own.
    assert_goes_on(writer, before, reader, after)


def progress_of(world: RankInfo, path: Path) -> tuple[Any, ...]:
    with open_checkpoint(path) as loaded:
        rng = [loaded.rng_state(rank) for rank in range(3)]
        return loaded.progress.step, loaded.world_size, loaded.run_id, [r is not None for r in rng]


def test_the_small_files_beside_it_are_read(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint-9"
    case, save = WRITERS["transformers with deepspeed"]
    run_ranks(2, write_as, case, path, save)
    assert progress_of(RankInfo(), path) == (SAVED_AT, 2, None, [True, True, False])


def load_damaged(world: RankInfo, path: Path) -> str:
    engine, _ = matrix.prepare(Case("fsdp", 2), world, seed=1)
    try:
        with open_checkpoint(path, names=group_names(engine)) as loaded:
            restore(engine, loaded, world=world)
    except CheckpointError as fault:
        return str(fault)
    finally:
        engine.close()
    return "loaded"


def test_a_flipped_bit_in_a_foreign_file_is_an_error_on_all_ranks(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint-3"
    run_ranks(2, write_as, Case("zero3", 2), path, by_deepspeed)
    step = next(path.glob("global_step*"))
    victim = next(step.glob("*zero_pp_rank_1*optim_states.pt"))
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 4
    victim.write_bytes(data)
    messages = run_ranks(2, load_damaged, path)
    assert messages[0] == messages[1]
    assert str(victim) in messages[0] and "their checksum differs" in messages[0]


class Hostile:
    """Leaves `marker` wherever it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self._marker,))


def test_a_hostile_file_does_nothing(tmp_path: Path) -> None:
    marker = tmp_path / "was-run"
    run_ranks(1, write_as, SINGLE, tmp_path / "c", by_accelerate)
    state = {"state": {0: {"exp_avg": Hostile(marker)}}, "param_groups": [{"params": [0]}]}
    torch.save(state, tmp_path / "c" / "optimizer.bin")
    (tmp_path / "c" / "scheduler.bin").write_bytes(pickle.dumps(Hostile(marker)))
    found = read_foreign(tmp_path / "c", names=[["a"]])
    assert ("a", "exp_avg") not in found.index.entries
    with (
        open_checkpoint(tmp_path / "c", names=[["a"]]) as loaded,
        pytest.raises(CheckpointError, match="can't be loaded without running what it holds"),
    ):
        loaded.scheduler_state()
    assert not marker.exists()


def test_other_groups_than_the_file_numbers_are_refused(tmp_path: Path) -> None:
    run_ranks(1, write_as, SINGLE, tmp_path / "c", by_accelerate)
    with pytest.raises(CheckpointError, match="numbers its parameters and does not name them"):
        read_foreign(tmp_path / "c", names=[["a"], ["b"]])


def flip_in(path: Path, record: str) -> None:
    """One bit of the last bytes of a zip's record."""
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as zipped:
        info = next(info for info in zipped.infolist() if info.filename.endswith(record))
        payload = zipped.read(info)
    content[content.index(payload) + len(payload) - 3] ^= 1
    path.write_bytes(content)


def faults_of(path: Path) -> list[str]:
    return [fault.message for fault in verify(inspect_checkpoint(path))]


def test_a_flipped_bit_in_a_small_foreign_file_is_found(tmp_path: Path) -> None:
    path = tmp_path / "c"
    run_ranks(1, write_as, SINGLE, path, by_accelerate)
    torch.save({"last_epoch": 4}, path / "scheduler.bin")
    assert faults_of(path) == []
    flip_in(path / "scheduler.bin", "data.pkl")
    flip_in(path / "random_states_0.pkl", "data/0")
    assert [fault.split(" is not as")[0] for fault in faults_of(path)] == [
        f"{path}/scheduler.bin: its record scheduler/data.pkl",
        f"{path}/random_states_0.pkl: its record random_states_0/data/0",
    ]
    with open_checkpoint(path, names=numbers_as_names(path)) as loaded:
        with pytest.raises(CheckpointError, match=r"scheduler\.bin: its record"):
            loaded.scheduler_state()
        with pytest.raises(CheckpointError, match=r"random_states_0\.pkl: its record"):
            loaded.rng_state(0)


def test_a_small_foreign_file_without_checksums_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "c"
    run_ranks(1, write_as, SINGLE, path, by_accelerate)
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"last_epoch": 4}, path / "scheduler.bin")
    finally:
        torch.serialization.set_crc32_options(True)
    assert faults_of(path) == []
    with open_checkpoint(path, names=numbers_as_names(path)) as loaded:
        assert loaded.scheduler_state() == {"last_epoch": 4}
