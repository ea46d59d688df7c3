"""Optimizer state that can't be divided resumes where it was, and is refused by name elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from bigtrain.checkpoint.inspect import inspect_checkpoint, verify
from bigtrain.checkpoint.load import group_names, open_checkpoint, restore
from bigtrain.checkpoint.manifest import Progress
from bigtrain.checkpoint.save import save_checkpoint
from bigtrain.engine import build_engine
from bigtrain.topology import RankInfo
from tests.checkpoint import matrix
from tests.checkpoint.matrix import SAVED_AT, STEPS, Case
from tests.engine import recipes
from tests.engine.harness import run_ranks


class Blocks(torch.optim.Optimizer):
    """Like SGD with its steps scaled by the largest gradient of every eight elements so far, which
    it keeps in 8 bits and a scale, as quantised optimizers do: of what the rank has, in its order.
    """

    def __init__(self, params: Any, lr: float = 1e-2) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group["lr"])

    def _update(self, parameter: Tensor, lr: float) -> None:
        grad, weights = parameter.grad, parameter
        if isinstance(grad, DTensor):
            grad, weights = grad.to_local(), parameter.to_local()  # type: ignore[attr-defined]
        if not grad.numel():
            return
        flat = nn.functional.pad(grad.flatten(), (0, -grad.numel() % 8)).view(-1, 8)
        largest = flat.abs().amax(1)
        state = self.state[parameter]
        if state:
            largest = torch.maximum(largest, state["blocks"].float() * state["scale"] / 255)
        state["scale"] = largest.max().view(1)
        state["blocks"] = (largest / state["scale"].clamp(min=1e-30) * 255).round().to(torch.uint8)
        known = (state["blocks"].float() * state["scale"] / 255 + 1e-8).repeat_interleave(8)
        weights -= lr * grad / known[: grad.numel()].view_as(grad)


class Rows(torch.optim.Optimizer):
    """Keeps a mean over each row, factored as Adafactor does: of DTensors, a DTensor."""

    def __init__(self, params: Any, lr: float = 1e-2) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                row = parameter.grad.square().mean(-1, keepdim=True)
                state["row"] = row if not state else 0.9 * state["row"] + 0.1 * row
                parameter -= group["lr"] * parameter.grad / (state["row"].sqrt() + 1e-8)


def prepare(case: Case, world: RankInfo, cls: Any, *, seed: int) -> tuple[Any, nn.Module]:
    config = recipes.engine_config(case.engine, world_size=world.world_size)
    engine = build_engine(config, world=world, device=recipes.CPU)
    model = engine.construct(
        lambda: matrix.make_model(case, seed=seed),
        lambda: matrix.make_model(case, seed=seed, on_meta=True),
    )
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return engine, engine.prepare(model, cls(trained))


def write(world: RankInfo, case: Case, path: Path, cls: Any) -> list[float]:
    engine, model = prepare(case, world, cls, seed=0)
    matrix.train(engine, model, world, first=0, last=SAVED_AT)
    save_checkpoint(
        path,
        engine=engine,
        world=world,
        run_id="opaque",
        progress=Progress(step=SAVED_AT),
        scheduler_state=None,
        rng_state=None,
        write_files=lambda staging: matrix.write_model(engine, staging),
    )
    return matrix.train(engine, model, world, first=SAVED_AT, last=STEPS)


def read(world: RankInfo, case: Case, path: Path, cls: Any, optimizer: bool = True) -> list[float]:
    engine, model = prepare(case, world, cls, seed=7)
    with open_checkpoint(path, names=group_names(engine)) as loaded:
        restore(engine, loaded, world=world, optimizer=optimizer)
    return matrix.train(engine, model, world, first=SAVED_AT, last=STEPS)


@pytest.mark.parametrize(
    ("case", "cls"),
    [
        (Case("fsdp", 2), Blocks),
        (Case("fsdp", 2), Rows),
        (Case("zero1", 2), Blocks),
        (Case("zero2", 2), Blocks),
        (Case("zero3", 2), Blocks),
    ],
    ids=lambda each: str(each) if isinstance(each, Case) else each.__name__,
)
def test_it_goes_on_at_the_same_size_and_is_refused_by_name_at_another(
    tmp_path: Path, case: Case, cls: Any
) -> None:
    path = tmp_path / "checkpoint-3"
    whole = run_ranks(2, write, case, path, cls)
    assert list(verify(inspect_checkpoint(path))) == []
    assert run_ranks(2, read, case, path, cls) == whole

    kinds = "blocks|scale|row"
    for other in (Case(case.engine, 1), Case("ddp", 2), Case("single", 1)):
        with pytest.raises(AssertionError) as refused:
            run_ranks(other.world_size, read, other, path, cls)
        text = str(refused.value)
        assert any(f"the optimizer's {kind!r} of '" in text for kind in kinds.split("|")), text
        assert f"it was kept as 2 ranks of engine {case.engine} had it" in text
        assert "reset_optimizer: true" in text
    run_ranks(1, read, Case("single", 1), path, cls, False)


def test_what_is_whole_on_every_rank_is_refused_where_it_would_be_divided(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint-3"
    whole = run_ranks(2, write, Case("ddp", 2), path, Blocks)
    assert run_ranks(2, read, Case("ddp", 2), path, Blocks) == whole
    with pytest.raises(AssertionError, match="such a state can't be divided over ranks"):
        run_ranks(2, read, Case("fsdp", 2), path, Blocks)
