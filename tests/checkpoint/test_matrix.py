"""Every engine's checkpoint at every size is gone on from by every other: bit-equal state, and the
losses as if nothing had happened."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from bigtrain.topology import RankInfo
from tests.checkpoint import matrix
from tests.checkpoint.matrix import Case, Ran
from tests.engine.harness import run_ranks

ENGINES = ("ddp", "fsdp", "zero1", "zero2", "zero3")
EVERY = [
    Case("single", 1),
    *(Case(engine, size) for engine in ENGINES for size in (1, 2, 3, 4)),
    *(Case("zero3", size, offloads=True) for size in (1, 2, 3, 4)),
    Case("fsdp", 4, shard=2),
]
EACH_ONCE = [
    Case("single", 1),
    *(Case(engine, 2) for engine in ENGINES),
    Case("zero3", 2, offloads=True),
]
ADAPTERS = [
    Case("single", 1, has_adapters=True),
    *(Case(engine, size, has_adapters=True) for engine in ENGINES for size in (2, 3)),
]
ACROSS = 1e-6
"""Of a first loss, relative: the order of summation changes with the number of ranks."""


def write_all(world: RankInfo, cases: list[Case], output_dir: Path) -> list[Ran]:
    return [matrix.write(world, case, output_dir) for case in cases]


def read_all(world: RankInfo, cases: list[Case], written: list[Path]) -> list[list[Ran]]:
    return [[matrix.read(world, case, path) for path in written] for case in cases]


def write(cases: list[Case], output_dir: Path) -> dict[Case, Ran]:
    saved: dict[Case, Ran] = {}
    for size in sorted({case.world_size for case in cases}):
        here = [case for case in cases if case.world_size == size]
        saved.update(zip(here, run_ranks(size, write_all, here, output_dir)[0], strict=True))
    return saved


def check(cases: list[Case], saved: dict[Case, Ran], output_dir: Path) -> None:
    paths = [matrix.target_of(output_dir, case) for case in saved]
    for size in sorted({case.world_size for case in cases}):
        here = [case for case in cases if case.world_size == size]
        for reader, runs in zip(here, run_ranks(size, read_all, here, paths)[0], strict=True):
            for (writer, before), after in zip(saved.items(), runs, strict=True):
                assert_goes_on(writer, before, reader, after)


def assert_goes_on(writer: Case, before: Ran, reader: Case, after: Ran) -> None:
    pair = f"{writer} → {reader}"
    assert after.tensors.keys() == before.tensors.keys(), pair
    differing = [k for k, v in before.tensors.items() if not torch.equal(v, after.tensors[k])]
    assert not differing, (pair, differing[:5])
    for ours, theirs in zip(after.groups, before.groups, strict=True):
        assert set(ours["params"]) == set(theirs["params"]), pair
        assert [ours[k] for k in ("lr", "weight_decay", "betas", "eps")] == [
            theirs[k] for k in ("lr", "weight_decay", "betas", "eps")
        ], pair
    if reader == writer:
        assert after.losses == before.losses, pair
        assert after.scale == before.scale, pair
    else:
        assert after.losses[0] == pytest.approx(before.losses[0], rel=ACROSS), pair
        assert after.losses[1] == pytest.approx(before.losses[1], rel=1e-4), pair


def test_each_engine_is_read_once_and_writes_once(tmp_path: Path) -> None:
    saved = write(EACH_ONCE, tmp_path)
    order = list(saved)
    for position, reader in enumerate(order):
        chosen: dict[Any, Ran] = {case: saved[case] for case in (reader, order[position - 1])}
        check([reader], chosen, tmp_path)


Written = tuple[dict[Case, Ran], Path]


@pytest.fixture(scope="module")
def every(tmp_path_factory: pytest.TempPathFactory) -> Written:
    output_dir = tmp_path_factory.mktemp("every")
    return write(EVERY, output_dir), output_dir


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Written:
    output_dir = tmp_path_factory.mktemp("adapters")
    return write(ADAPTERS, output_dir), output_dir


@pytest.mark.slow
@pytest.mark.parametrize("reader", EVERY, ids=str)
def test_every_engine_and_size_goes_on_from_every_other(every: Written, reader: Case) -> None:
    check([reader], *every)


@pytest.mark.slow
@pytest.mark.parametrize("reader", ADAPTERS, ids=str)
def test_adapters_beside_frozen_weights_go_on_everywhere(adapters: Written, reader: Case) -> None:
    check([reader], *adapters)


@pytest.mark.slow
def test_half_precision_goes_on_with_its_loss_scale(tmp_path: Path) -> None:
    cases = [
        Case("single", 1, dtype="fp16"),
        *(Case(engine, size, dtype="fp16") for engine in ("ddp", "fsdp") for size in (1, 2, 3)),
    ]
    saved = write(cases, tmp_path)
    for case in cases:
        check([case], {case: saved[case]}, tmp_path)
        assert saved[case].scale["scale"] == saved[cases[0]].scale["scale"]
