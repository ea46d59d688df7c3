"""The trainer on engines that span ranks: train, evaluate, save, resume, as on one process."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from bigtrain.errors import ConfigError, UnsupportedError
from bigtrain.topology import RankInfo
from bigtrain.trainer.trainer import Trainer
from tests.engine.harness import run_ranks
from tests.trainer.samples import (
    Points,
    Regression,
    Sentences,
    arguments,
    losses,
    tiny_llama,
    trainer,
)

STEPS = 6
ENGINES: dict[str, dict[str, Any]] = {
    "ddp": {},
    "fsdp": {"fsdp": "full_shard"},
    "zero3": {"deepspeed": {"zero_optimization": {"stage": 3}}},
}


@dataclass(frozen=True, kw_only=True)
class Outcome:
    engine: str
    losses: list[tuple[float, float]]
    before: dict[str, float]
    after: dict[str, float]
    predictions: int
    rates: list[float]


def _train(
    world: RankInfo, folder: str, changed: dict[str, Any], resume: str | None, accumulation: int
) -> Outcome:
    run = trainer(
        folder,
        data=Sentences(48),
        eval_dataset=Sentences(11),
        gradient_accumulation_steps=accumulation,
        learning_rate=1e-3,
        save_strategy="steps",
        save_steps=STEPS - 1,
        **changed,
    )
    before = run.evaluate()
    run.train(resume_from_checkpoint=resume)
    run.save_model(str(Path(folder) / "final"))
    return Outcome(
        engine=run.engine.name,
        losses=losses(run),
        before=before,
        after=run.evaluate(),
        predictions=len(run.predict(Sentences(7)).predictions),
        rates=[e["learning_rate"] for e in run.state.log_history if "learning_rate" in e],
    )


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Outcome, Path]:
    """One process with the same global batch."""
    folder = tmp_path_factory.mktemp("alone")
    return run_ranks(1, _train, str(folder), {}, None, 4)[0], folder


@pytest.fixture(scope="module", params=ENGINES)
def spread(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, list[Outcome], Path]:
    """Two ranks on each engine: its name, what came out on each rank, and where."""
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, run_ranks(2, _train, str(folder), ENGINES[request.param], None, 2), folder


def test_an_engine_trains_as_one_process_does(
    spread: tuple[str, list[Outcome], Path], alone: tuple[Outcome, Path]
) -> None:
    (name, ranks, folder), (reference, reference_folder) = spread, alone
    assert ranks[0].engine == name
    assert ranks[0].losses == ranks[1].losses
    torch.testing.assert_close(
        torch.tensor(ranks[0].losses), torch.tensor(reference.losses), rtol=1e-6, atol=0
    )
    assert ranks[0].rates == reference.rates
    assert ranks[0].after["eval_loss"] < ranks[0].before["eval_loss"]
    assert ranks[0].predictions == ranks[1].predictions == 7
    one, other = (
        LlamaForCausalLM.from_pretrained(each / "final") for each in (folder, reference_folder)
    )
    for ours, expected in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)


def test_an_engine_resumes_to_the_last_bit(
    tmp_path: Path, spread: tuple[str, list[Outcome], Path]
) -> None:
    name, whole, folder = spread
    checkpoint = str(folder / f"checkpoint-{STEPS - 1}")
    rest = run_ranks(2, _train, str(tmp_path), ENGINES[name], checkpoint, 2)
    assert rest[0].losses == whole[0].losses
    assert rest[0].after["eval_loss"] == whole[0].after["eval_loss"]


def test_a_checkpoint_goes_from_engine_to_engine(
    tmp_path: Path, alone: tuple[Outcome, Path]
) -> None:
    reference, folder = alone
    checkpoint = str(folder / f"checkpoint-{STEPS - 1}")
    rest = run_ranks(2, _train, str(tmp_path), ENGINES["fsdp"], checkpoint, 2)[0]
    torch.testing.assert_close(
        torch.tensor(rest.losses), torch.tensor(reference.losses), rtol=1e-6, atol=0
    )


class Scaled(Regression):
    """With a parameter that has no dims, as CLIP's `logit_scale`."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor, labels: Tensor | None = None) -> tuple[Tensor, ...]:
        return super().forward(self.scale * x, labels)


def _train_scaled(world: RankInfo, folder: str) -> list[list[float]]:
    found = []
    for stage in (0, 1, 2):
        engine = {"deepspeed": {"zero_optimization": {"stage": stage}}} if stage else {}
        run = trainer(f"{folder}/{stage}", model=Scaled(), data=Points(12), **engine)
        run.train()
        found.append([loss for loss, _ in losses(run)])
        run.engine.close()
    third = {"deepspeed": {"zero_optimization": {"stage": 3}}}
    with pytest.raises(UnsupportedError, match=r"without dims \(scale\); use engine zero2"):
        trainer(f"{folder}/3", model=Scaled(), data=Points(12), **third).train()
    return found


def test_a_parameter_without_dims_is_trained_by_zero_or_refused(tmp_path: Path) -> None:
    ((alone, *by_stage),) = run_ranks(1, _train_scaled, str(tmp_path))
    assert len(by_stage) == 2 and len(set(alone)) == 6
    for figures in by_stage:
        assert figures == pytest.approx(alone, rel=1e-5)


def _modes(world: RankInfo, folder: str, fields: dict[str, Any]) -> list[bool]:
    """Whether the model trained, at every forward pass of a training step."""
    run = trainer(
        folder,
        max_steps=3,
        data=Sentences(24),
        eval_dataset=Sentences(4),
        eval_strategy="steps",
        eval_steps=1,
        **fields,
    )
    modes: list[bool] = []
    layer = run.model.model.layers[0]
    layer.register_forward_hook(
        lambda module, *_: modes.append(module.training) if torch.is_grad_enabled() else None
    )
    run.train()
    return modes


@pytest.mark.parametrize("stage", [2, 3])
def test_an_evaluation_does_not_leave_the_model_evaluating_under_zero(
    tmp_path: Path, stage: int
) -> None:
    fields = {"deepspeed": {"zero_optimization": {"stage": stage}}}
    for modes in run_ranks(2, _modes, str(tmp_path), fields):
        assert len(modes) >= 3 and all(modes)


def _refusals(world: RankInfo, folder: str) -> list[str]:
    """What is said to the training of a frozen model on each engine."""
    said = []
    for fields in ENGINES.values():
        model = tiny_llama().requires_grad_(False)
        run = trainer(folder, model=model, eval_dataset=Sentences(4), max_steps=1, **fields)
        run.evaluate()
        with pytest.raises(ConfigError) as refused:
            run.train()
        said.append(str(refused.value))
    return said


def test_a_frozen_model_is_refused_where_it_would_learn(tmp_path: Path) -> None:
    nothing = "nothing in LlamaForCausalLM is to be trained: none of its parameters has requires"
    for said in run_ranks(2, _refusals, str(tmp_path)):
        assert len(said) == 3 and all(line.startswith(nothing) for line in said)


def test_what_never_asks_a_frozen_model_to_learn_runs(tmp_path: Path) -> None:
    class Measuring(Trainer):
        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
            return self.compute_loss(model, self._prepare_inputs(inputs)).detach()

    model = Regression().requires_grad_(False)
    args = arguments(tmp_path, max_steps=2)
    measuring = Measuring(model=model, args=args, train_dataset=Points(8))
    assert measuring.train().global_step == 2
    trainer(tmp_path, model=model, data=Points(8), num_train_epochs=0).train()


def test_a_loss_without_gradients_is_refused(tmp_path: Path) -> None:
    run = trainer(
        tmp_path,
        model=Regression(),
        data=Points(8),
        compute_loss_func=lambda outputs, labels, num_items_in_batch: outputs[0].detach().sum(),
    )
    with pytest.raises(ConfigError, match="the loss does not depend on any weight of Regression"):
        run.train()
