"""`trainer.accelerator` answers what scripts ask accelerate's own for, or says what to do."""

from __future__ import annotations

import operator
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import transformers
from accelerate.logging import get_logger
from accelerate.state import PartialState
from accelerate.utils import gather_object
from torch import nn
from torch.utils.data import DataLoader

from bigtrain.errors import UnsupportedError
from bigtrain.topology import RankInfo
from bigtrain.trainer.arguments import TrainingArguments
from bigtrain.trainer.trainer import Trainer
from tests.engine.harness import run_ranks
from tests.trainer.samples import Points, Regression, Sentences, arguments, trainer

PUBLIC = [name for name in dir(accelerate.Accelerator) if not name.startswith("_")]
STATE = ["deepspeed_plugin", "fsdp_plugin", "is_fsdp2", "num_processes", "distributed_type"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    folder = tmp_path_factory.mktemp("out")
    run = trainer(folder, model=Regression(), data=Points(8), max_steps=1)
    run.train()
    return run


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_is_there_or_says_what_to_do_instead(run: Trainer, name: str) -> None:
    if not hasattr(run.accelerator, name):
        with pytest.raises(UnsupportedError, match=rf"trainer\.accelerator has no {name}: \S+ "):
            getattr(run.accelerator, name)


@pytest.mark.parametrize("part", ["accelerator", "accelerator.state"])
@pytest.mark.parametrize("precision", [{}, {"bf16": True}], ids=["fp32", "bf16"])
def test_what_accelerate_holds_is_there_with_its_value_or_says_what_to_do_instead(
    tmp_path: Path, part: str, precision: dict[str, Any]
) -> None:
    theirs, ours = (
        operator.attrgetter(part)(
            kind(model=Regression(), args=arguments(tmp_path, kind=args, **precision))
        )
        for kind, args in (
            (transformers.Trainer, transformers.TrainingArguments),
            (Trainer, TrainingArguments),
        )
    )
    for name, value in vars(theirs).items():
        if name.startswith("_"):
            continue
        try:
            answer = getattr(ours, name)
        except UnsupportedError as said:
            assert f"trainer.accelerator has no {name}: " in str(said)
            continue
        if isinstance(value, (type(None), bool, int, str, list)):
            assert answer == value, name


def test_most_of_what_scripts_use_is_there(run: Trainer) -> None:
    missing = [name for name in PUBLIC if not hasattr(run.accelerator, name)]
    assert len(missing) < 30 and all(hasattr(run.accelerator.state, name) for name in STATE)
    with pytest.raises(UnsupportedError, match="no deepspeed_config: accelerator.deepspeed_plugin"):
        _ = run.accelerator.deepspeed_config
    with pytest.raises(AttributeError, match="no attribute 'whatever'"):
        _ = run.accelerator.whatever


def test_a_loop_as_for_accelerate_works_around_the_trainers_parts(
    run: Trainer, tmp_path: Path
) -> None:
    accelerator = run.accelerator
    loader = accelerator.prepare(DataLoader(Points(8), batch_size=2))
    rest = list(accelerator.skip_first_batches(loader, 3))
    assert len(rest) == 1 and torch.equal(rest[0]["x"], Points(8).x[6:])
    with accelerator.accumulate(run.model), accelerator.main_process_first():
        assert accelerator.gradient_accumulation_steps == 1
    assert accelerator.on_main_process(lambda: 1)() == 1
    assert accelerator.on_process(process_index=1)(lambda: 1)() is None
    with accelerator.split_between_processes(["a", "b"]) as share:
        assert share == ["a", "b"]
    accelerator.save({"x": torch.ones(2)}, tmp_path / "x.bin")
    accelerator.save({"x": torch.ones(2)}, tmp_path / "x.safetensors", safe_serialization=True)
    assert torch.load(tmp_path / "x.bin", weights_only=True)["x"].tolist() == [1, 1]
    assert accelerator.check_trigger() is False
    accelerator.set_trigger()
    assert (accelerator.check_trigger(), accelerator.check_trigger()) == (True, False)


def test_the_trainers_own_model_is_prepared_by_the_engine(tmp_path: Path) -> None:
    run = trainer(tmp_path, model=Regression(), data=Points(8), eval_dataset=Points(8))
    asked: list[Any] = []
    prepare = run.accelerator.prepare_model

    def recording(model: nn.Module, **kwargs: Any) -> nn.Module:
        asked.append((model, kwargs))
        return prepare(model, **kwargs)

    run.accelerator.prepare_model = recording  # type: ignore[method-assign]
    run.evaluate()
    assert asked == [(run.model, {"evaluation_mode": True})]


def test_a_step_that_overflowed_is_said(tmp_path: Path) -> None:
    skipped: list[bool] = []

    class Overflowing(Trainer):
        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
            loss = super().training_step(model, inputs, num_items_in_batch)
            if self.state.global_step == 6:
                model.layer.bias.grad.fill_(float("inf"))
            return loss

        def _get_learning_rate(self) -> float:
            skipped.append(self.accelerator.optimizer_step_was_skipped)
            return super()._get_learning_rate()

    args = arguments(tmp_path, fp16=True, max_steps=8, logging_strategy="no")
    Overflowing(model=Regression(), args=args, train_dataset=Points(32)).train()
    assert skipped[5:] == [False, True, False]  # the first ones look for a scale


def _on_two_ranks(world: RankInfo, folder: str) -> list[Any]:
    run = trainer(folder, data=Sentences(8), max_steps=1, fsdp="full_shard")
    accelerator, order = run.accelerator, []
    with accelerator.main_process_first():
        order = [path.name for path in Path(folder).glob("first")]
        if accelerator.is_main_process:
            (Path(folder) / "first").touch()
    if world.rank == 1:
        accelerator.set_trigger()
    with accelerator.split_between_processes(["a", "b", "c"]) as share:
        plugin: Any = accelerator.state.fsdp_plugin
        return [order, share, accelerator.check_trigger(), plugin.fsdp_version]


def test_ranks_take_turns_and_shares(tmp_path: Path) -> None:
    assert run_ranks(2, _on_two_ranks, str(tmp_path)) == [
        [[], ["a", "b"], True, 2],
        [["first"], ["c"], True, 2],
    ]


def _reduced(world: RankInfo, folder: str) -> list[Any]:
    """By the trainer's accelerator, and by accelerate itself."""
    rank = float(world.rank)
    data = {"a": torch.tensor([1.0, 4.0]) * (rank + 1), "b": [torch.tensor(rank)]}
    ours = trainer(folder, data=Sentences(8)).accelerator
    found = []
    for accelerator in (ours, accelerate.Accelerator(cpu=True)):
        values = [accelerator.reduce(data, how, 0.5) for how in ("sum", "mean", "max", "none")]
        found.append([[one["a"].tolist(), one["b"][0].item()] for one in values])
    return found


@pytest.mark.parametrize("ranks", [1, 2])
def test_values_are_reduced_as_accelerate_reduces_them(tmp_path: Path, ranks: int) -> None:
    for ours, theirs in run_ranks(ranks, _reduced, str(tmp_path)):
        assert ours == theirs


def _asked_of_accelerate(world: RankInfo, folder: str) -> list[Any]:
    PartialState._reset_state()
    trainer(folder, data=Sentences(8))
    get_logger(__name__).info("refused while accelerate knows no process")
    state, own = PartialState(), accelerate.Accelerator(cpu=True)
    gathered = gather_object([world.rank])
    summed = own.reduce(torch.tensor(world.rank + 1.0)).item()
    return [gathered, summed, state.process_index, state.is_main_process, own.num_processes]


@pytest.mark.parametrize("ranks", [1, 2])
def test_accelerates_own_functions_know_the_ranks(tmp_path: Path, ranks: int) -> None:
    everyone = list(range(ranks))
    assert run_ranks(ranks, _asked_of_accelerate, str(tmp_path)) == [
        [everyone, sum(everyone) + ranks, rank, rank == 0, ranks] for rank in everyone
    ]


def test_deepspeeds_config_can_be_asked_for(tmp_path: Path) -> None:
    config = {
        "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
        "train_micro_batch_size_per_gpu": "auto",
    }
    run = trainer(tmp_path, deepspeed=config)
    plugin: Any = run.accelerator.state.deepspeed_plugin
    run.end()
    assert (plugin.zero_stage, plugin.offload_optimizer_device) == (2, "cpu")
    assert plugin.deepspeed_config["zero_optimization"]["stage"] == 2
    assert plugin.offload_param_device == "none"


def _one_step(world: RankInfo, folder: str, fields: dict[str, Any], own: bool) -> dict[str, Any]:
    """The weights after one step, by the trainer's loop or by one of the script's own."""
    run = trainer(
        folder,
        max_steps=1,
        data=Sentences(16),
        max_grad_norm=0,
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        save_strategy="no",
        **fields,
    )
    if own:
        model, optimizer = run.accelerator.prepare(run.model, run.create_optimizer())
        batch = next(iter(run.get_train_dataloader()))
        items = run._get_num_items_in_batch([batch], run.args.device)
        run.training_step(model, batch, num_items_in_batch=items)
        optimizer.step()
    else:
        run.train()
    return {name: tensor for name, tensor in run.engine.full_weights() if tensor is not None}


@pytest.mark.parametrize("fields", [{}, {"fsdp": "full_shard"}], ids=["ddp", "fsdp"])
def test_a_loop_of_the_scripts_own_trains_what_accelerate_prepared(
    tmp_path: Path, fields: dict[str, Any]
) -> None:
    own, trained = (run_ranks(2, _one_step, str(tmp_path), fields, way)[0] for way in (True, False))
    assert own.keys() == trained.keys() and own
    assert all(torch.equal(own[name], trained[name]) for name in own)


def test_an_optimizer_beside_the_trainers_is_refused(run: Trainer) -> None:
    other = torch.optim.SGD(Regression().parameters(), lr=0.1)
    with pytest.raises(UnsupportedError, match="the trainer's model and optimizer alone"):
        run.accelerator.prepare(other)
    with pytest.raises(UnsupportedError, match="evaluation_mode=True"):
        run.accelerator.prepare(Regression())


def _rebalanced(world: RankInfo, folder: str) -> tuple[list[int], str]:
    rows = [{"input_ids": list(range(1 + index % 8))} for index in range(16)]
    run = trainer(
        folder,
        data=rows,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        train_sampling_strategy="batch_rebalance",
    )
    sampler = run.get_train_dataloader().batch_sampler
    return [index for batch in sampler for index in batch], type(sampler).__name__


def test_a_sampler_that_knows_ranks_is_not_cut_again(tmp_path: Path) -> None:
    (one, kind), (other, _) = run_ranks(2, _rebalanced, str(tmp_path))
    assert set(one) | set(other) == set(range(16)) and not set(one) & set(other)
    assert kind == "BatchSamplerShard"  # as accelerate's, which scripts look into
