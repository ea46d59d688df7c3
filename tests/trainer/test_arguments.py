"""TrainingArguments: the fields that transformers dropped, and facts about this process."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate.state import PartialState
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from bigtrain.errors import UnsupportedError
from bigtrain.layers import Override
from bigtrain.plan import write_plan
from bigtrain.planning import Request, Surroundings, make_plan
from bigtrain.trainer.arguments import TrainingArguments
from tests.trainer.samples import trainer


@pytest.fixture
def in_two_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    for name, value in ranks.items():
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("in_two_ranks")
def test_the_place_in_the_run_is_the_launchers_and_no_group_is_joined(tmp_path: Path) -> None:
    PartialState._reset_state()
    args = TrainingArguments(output_dir=str(tmp_path), log_on_each_node=True)
    assert (args.process_index, args.world_size, args.local_process_index) == (1, 2, 1)
    assert (args.should_log, args.should_save) == (False, False)
    assert args.parallel_mode.value == "distributed"
    assert not dist.is_initialized()
    assert PartialState._shared_state == {}


def test_alone_this_is_the_one_process(tmp_path: Path) -> None:
    args = TrainingArguments(output_dir=str(tmp_path))
    assert (args.process_index, args.world_size, args.should_save) == (0, 1, True)
    assert args.device == torch.device("cpu") and args.n_gpu == 0
    assert args.train_batch_size == 8


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("gradient_accumulation_steps", {}),
        ("per_device_train_batch_size", {}),
        ("per_device_eval_batch_size", {"eval_strategy": "epochs"}),
        ("per_device_eval_batch_size", {"eval_on_start": True}),
    ],
)
def test_a_number_of_nothing_is_refused_by_name(
    name: str, more: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=f"^{name} is 0; it must be at least 1$"):
        TrainingArguments(output_dir=str(tmp_path), **{name: 0}, **more)


def test_what_transformers_trains_with_is_taken(tmp_path: Path) -> None:
    args = TrainingArguments(
        output_dir=str(tmp_path), per_device_eval_batch_size=0, gradient_accumulation_steps=-1
    )
    assert args.per_device_eval_batch_size == 0
    assert TrainingArguments(output_dir="x", eval_strategy="steps", eval_steps=0).eval_steps == 500


@pytest.mark.parametrize("steps", [{"save_steps": 0}, {"logging_steps": -1}])
def test_steps_that_never_come_are_the_script_s_to_say(
    steps: dict[str, Any], tmp_path: Path
) -> None:
    trainer(tmp_path, max_steps=1, **steps).train()


@pytest.mark.parametrize("said_by", ["flag", "nobody"])
def test_the_launcher_s_output_dir_wins_over_the_script_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said_by: str
) -> None:
    (tmp_path / "train.py").write_text("import bigtrain\n")
    said = Override(key="output_dir", value="said", origin="flag --output-dir")
    plan = make_plan(
        Request(target="train.py", overrides=(said,) if said_by == "flag" else ()),
        Surroundings(environment={}, working_dir=tmp_path, is_rehearsal=True),
    )
    write_plan(plan, tmp_path / "plan.json")
    monkeypatch.setenv("BIGTRAIN_PLAN", str(tmp_path / "plan.json"))

    args = TrainingArguments(output_dir=str(tmp_path / "own"))

    wanted = {"flag": "said", "nobody": "own"}[said_by]
    assert args.output_dir == str(tmp_path / wanted)


def test_bf16_needs_no_permission_on_a_machine_without_a_gpu(tmp_path: Path) -> None:
    assert TrainingArguments(output_dir=str(tmp_path), bf16=True).use_cpu is False


@pytest.mark.parametrize(
    ("said", "steps"),
    [
        ({"warmup_ratio": 0.1}, 10),
        ({"warmup_steps": 7, "warmup_ratio": 0.1}, 7),
        ({"warmup_steps": 0.25}, 25),
        ({}, 0),
    ],
)
def test_warmup_steps_win_over_the_ratio(tmp_path: Path, said: dict[str, Any], steps: int) -> None:
    args = TrainingArguments(output_dir=str(tmp_path), **said)
    assert args.get_warmup_steps(100) == steps


def test_epochs_is_understood(tmp_path: Path) -> None:
    args = TrainingArguments(output_dir=str(tmp_path), eval_strategy="epochs")
    assert (args.eval_strategy.value, args.do_eval) == ("epoch", True)


def test_a_backend_that_is_gone_is_warned_about(tmp_path: Path) -> None:
    with pytest.warns(FutureWarning, match="fp16_backend"):
        TrainingArguments(output_dir=str(tmp_path), fp16_backend="apex")


def test_ipex_is_refused_where_it_is_not_installed(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="intel_extension_for_pytorch"):
        TrainingArguments(output_dir=str(tmp_path), use_ipex=True)


def test_an_unknown_level_is_refused_with_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="O0, O1, O2, O3"):
        TrainingArguments(output_dir=str(tmp_path), fp16_opt_level="O7")


def test_deepspeed_in_the_arguments_leaves_other_models_alone(tmp_path: Path) -> None:
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    config = {"zero_optimization": {"stage": 3}}
    args = TrainingArguments(output_dir=str(tmp_path), deepspeed=config)
    assert args.deepspeed == config
    assert not is_deepspeed_zero3_enabled()


@pytest.mark.usefixtures("in_two_ranks")
def test_saved_arguments_know_no_place_of_their_own(tmp_path: Path) -> None:
    args = TrainingArguments(output_dir=str(tmp_path))
    assert args.process_index == 1
    saved = pickle.dumps(args)
    assert "_ranks" not in pickle.loads(saved).__dict__


def test_tensorboard_goes_to_logging_dir(tmp_path: Path) -> None:
    board = tmp_path / "board"
    run = trainer(tmp_path / "out", max_steps=2, report_to="tensorboard", logging_dir=str(board))
    run.train()
    assert list(board.glob("events.out.tfevents.*"))


def test_evaluation_through_a_trace_gives_the_same_loss(tmp_path: Path) -> None:
    from tests.trainer.samples import Points, Regression

    figures = []
    for traced in (False, True):
        run = trainer(
            tmp_path,
            model=Regression(),
            data=Points(8),
            eval_dataset=Points(6),
            jit_mode_eval=traced,
        )
        figures.append(run.evaluate()["eval_loss"])
    assert figures[0] == pytest.approx(figures[1], rel=1e-6)


def test_a_model_that_can_not_be_traced_is_evaluated_anyway(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from tests.trainer.samples import Sentences

    run = trainer(tmp_path, eval_dataset=Sentences(4), jit_mode_eval=True)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no trace")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.jit, "trace", fail)
        assert run.evaluate()["eval_loss"] > 0
    assert "can't be traced (no trace)" in caplog.text


def test_deepspeeds_json_can_be_asked_for_as_transformers_resolves_it(tmp_path: Path) -> None:
    given = {
        "zero_optimization": {"stage": 3},
        "train_micro_batch_size_per_gpu": "auto",
        "train_batch_size": "auto",
        "bf16": {"enabled": "auto"},
    }
    args = TrainingArguments(
        output_dir=str(tmp_path),
        deepspeed=given,
        bf16=True,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
    )
    assert args.deepspeed_plugin.zero_stage == 3
    config = args.hf_deepspeed_config
    assert config.is_zero3() and config.dtype() == torch.bfloat16
    assert config.config["train_micro_batch_size_per_gpu"] == 4
    assert config.config["train_batch_size"] == 4 * 2 * args.world_size
    assert not is_deepspeed_zero3_enabled()  # no model is built under `zero.Init`
    assert pickle.loads(pickle.dumps(args)).deepspeed_plugin.zero_stage == 3
    plain = TrainingArguments(output_dir=str(tmp_path))
    assert plain.deepspeed_plugin is None and not hasattr(plain, "hf_deepspeed_config")


def test_a_configured_state_has_to_be_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {"use_configured_state": True}
    monkeypatch.setattr(PartialState, "_shared_state", {})
    with pytest.raises(ValueError, match="requires a pre-configured"):
        TrainingArguments(output_dir=str(tmp_path), accelerator_config=asked)
    monkeypatch.setattr(PartialState, "_shared_state", {"device": torch.device("cpu")})
    TrainingArguments(output_dir=str(tmp_path), accelerator_config=asked)
