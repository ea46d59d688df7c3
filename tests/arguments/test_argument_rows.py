"""What each argument of TrainingArguments does, on one process."""

from __future__ import annotations

import math
import runpy
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import transformers
from torch import Tensor
from transformers import EarlyStoppingCallback
from transformers.testing_utils import CaptureLogger
from transformers.trainer_pt_utils import EvalLoopContainer

from bigtrain.data.byte_tokenizer import make_byte_tokenizer
from bigtrain.errors import CheckpointError, UnsupportedError
from bigtrain.topology import RankInfo
from bigtrain.trainer.arguments import TrainingArguments
from tests.arguments.rows import (
    Events,
    Seen,
    by_hand,
    checkpoints,
    logged,
    logged_steps,
    trained,
    trainer,
    weights,
)
from tests.engine.harness import run_ranks
from tests.trainer.samples import Points, Sentences, tiny_llama

shows = pytest.mark.shows


# ---- Where, and what for ----


@shows("output_dir")
def test_output_dir_takes_checkpoints_and_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = trained(tmp_path / "out", save_strategy="epoch")
    run.save_model()
    assert (tmp_path / "out" / "checkpoint-4").is_dir()
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@shows("overwrite_output_dir")
def test_overwrite_output_dir_continues_unless_resuming_is_off(tmp_path: Path) -> None:
    trained(tmp_path, save_strategy="epoch")
    begun = Events("on_train_begin")
    for resume in (None, False):
        run = trainer(tmp_path, overwrite_output_dir=True, num_train_epochs=2, callbacks=[begun])
        run.train(resume_from_checkpoint=resume)
    trained(tmp_path, num_train_epochs=2, callbacks=[begun])
    assert begun.steps == [4, 0, 0]
    assert checkpoints(tmp_path) == [4]


def _script(folder: Path, *flags: str) -> set[str]:
    """What the bundled training script left behind, given a tiny model and some lines."""
    model, lines = folder / "model", folder / "lines.txt"
    tiny_llama(vocab_size=257).save_pretrained(model)
    make_byte_tokenizer().save_pretrained(model)
    lines.write_text("one two three four five six seven\n" * 60)
    words = ["train.py", "--model", str(model), "--train_files", str(lines), "--use_cpu"]
    words += ["--eval_files", str(lines), "--predict_files", str(lines), "--report_to", "none"]
    words += ["--sequence_length", "16", "--max_steps", "1", "--output_dir", str(folder / "out")]
    script = Path(__file__).parents[2] / "launch" / "train.py"
    with patch.object(sys, "argv", [*words, "--disable_tqdm", "true", *flags]):
        runpy.run_path(str(script), run_name="__main__")
    return {path.name for path in (folder / "out").iterdir()}


@shows("do_train")
def test_do_train_lets_the_bundled_script_train(tmp_path: Path) -> None:
    assert "model.safetensors" in _script(tmp_path, "--do_train")


@shows("do_eval")
def test_do_eval_lets_the_bundled_script_evaluate(tmp_path: Path) -> None:
    assert "eval_results.json" in _script(tmp_path, "--do_eval")


@shows("do_predict")
def test_do_predict_lets_the_bundled_script_predict(tmp_path: Path) -> None:
    assert "predict_results.json" in _script(tmp_path, "--do_predict")


# ---- Evaluation ----


@shows("eval_strategy")
def test_eval_strategy_says_when(tmp_path: Path) -> None:
    steps = {"eval_steps": 3, "num_train_epochs": 2}
    found = {
        strategy: logged_steps(trained(tmp_path, eval_strategy=strategy, **steps), "eval_loss")
        for strategy in ("no", "steps", "epoch", "epochs")
    }
    assert found == {"no": [], "steps": [3, 6, 8], "epoch": [4, 8], "epochs": [4, 8]}


@shows("prediction_loss_only")
def test_prediction_loss_only_keeps_no_predictions(tmp_path: Path) -> None:
    predictions, labels, metrics = trainer(tmp_path, prediction_loss_only=True).predict(Points(6))
    assert predictions is None and labels is None
    assert metrics is not None and metrics["test_loss"] > 0


@shows("per_device_eval_batch_size")
def test_per_device_eval_batch_size_is_of_a_prediction_step(tmp_path: Path) -> None:
    steps = Events("on_prediction_step")
    trainer(tmp_path, per_device_eval_batch_size=5, callbacks=[steps]).evaluate()
    assert len(steps.steps) == 3


@shows("eval_accumulation_steps")
def test_eval_accumulation_steps_move_what_is_kept_off_the_device(tmp_path: Path) -> None:
    run = trainer(tmp_path, per_device_eval_batch_size=2, eval_accumulation_steps=2)
    move = EvalLoopContainer.to_cpu_and_numpy
    with patch.object(EvalLoopContainer, "to_cpu_and_numpy", autospec=True) as moved:
        moved.side_effect = move
        result = run.predict(Points(12))
    # Four kinds after 2, 4 and 6 batches, and once more at the end.
    assert moved.call_count == 4 * 4
    assert len(result.predictions) == 12


@shows("eval_delay")
def test_eval_delay_puts_off_the_first_evaluation(tmp_path: Path) -> None:
    run = trained(tmp_path, eval_strategy="steps", eval_steps=1, eval_delay=3)
    assert logged_steps(run, "eval_loss") == [3, 4]
    run = trained(tmp_path, eval_strategy="epoch", eval_delay=2, num_train_epochs=3)
    assert logged_steps(run, "eval_loss") == [8, 12]


@shows("jit_mode_eval")
def test_jit_mode_eval_evaluates_through_a_trace(tmp_path: Path) -> None:
    plain = trainer(tmp_path).evaluate()["eval_loss"]
    with patch.object(torch.jit, "trace", wraps=torch.jit.trace) as trace:
        traced = trainer(tmp_path, jit_mode_eval=True).evaluate()["eval_loss"]
    assert trace.call_count == 1
    assert traced == pytest.approx(plain)


# ---- How much ----


@shows("per_device_train_batch_size")
def test_per_device_train_batch_size_is_of_a_step(tmp_path: Path) -> None:
    assert trained(tmp_path, per_device_train_batch_size=2).state.global_step == 8


@shows("gradient_accumulation_steps")
def test_accumulated_batches_are_one_large_batch(tmp_path: Path) -> None:
    fields = {"train_sampling_strategy": "sequential", "learning_rate": 0.1}
    small = trained(
        tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4, **fields
    )
    large = trained(tmp_path, per_device_train_batch_size=8, **fields)
    assert small.state.global_step == large.state.global_step == 2
    torch.testing.assert_close(weights(small), weights(large))


@shows("num_train_epochs")
def test_num_train_epochs_may_have_a_fraction(tmp_path: Path) -> None:
    run = trained(tmp_path, num_train_epochs=2.5)
    assert (run.state.global_step, run.state.epoch) == (10, 2.5)


@shows("max_steps")
def test_max_steps_win_over_epochs(tmp_path: Path) -> None:
    assert trained(tmp_path, num_train_epochs=9, max_steps=6).state.global_step == 6


# ---- AdamW, as torch does it ----


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        pytest.param({"learning_rate": 0.2}, {"lr": 0.2}, marks=shows("learning_rate")),
        pytest.param({"weight_decay": 0.5}, {"weight_decay": 0.5}, marks=shows("weight_decay")),
        pytest.param({"adam_beta1": 0.2}, {"betas": (0.2, 0.999)}, marks=shows("adam_beta1")),
        pytest.param({"adam_beta2": 0.2}, {"betas": (0.9, 0.2)}, marks=shows("adam_beta2")),
        pytest.param({"adam_epsilon": 1.0}, {"eps": 1.0}, marks=shows("adam_epsilon")),
        pytest.param(
            {"max_grad_norm": 0.01, "adam_epsilon": 1.0},
            {"clip": 0.01, "eps": 1.0},
            marks=shows("max_grad_norm"),
        ),
    ],
    ids=lambda case: next(iter(case)),
)
def test_adamw_does_what_torchs_does(
    tmp_path: Path, said: dict[str, Any], expected: dict[str, Any]
) -> None:
    fields = {
        "train_sampling_strategy": "sequential",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0,
    }
    run = trained(tmp_path, **{**fields, **said})
    torch.testing.assert_close(weights(run), by_hand(**expected))
    assert not torch.allclose(weights(run), by_hand(), atol=1e-5)


@shows("max_grad_norm")
def test_a_gradient_norm_is_logged_with_and_without_clipping(tmp_path: Path) -> None:
    norms = [logged(trained(tmp_path, max_grad_norm=limit), "grad_norm") for limit in (0, 1e-6)]
    assert len(norms[0]) == len(norms[1]) == 4 and norms[0][0] == pytest.approx(norms[1][0])
    assert norms[0][-1] != norms[1][-1]  # clipped to nothing, the model has not moved


# ---- The learning rate's schedule ----


def _rates(tmp_path: Path, **changed: Any) -> list[float]:
    run = trained(tmp_path, learning_rate=1.0, num_train_epochs=2, max_grad_norm=1e-9, **changed)
    return logged(run, "learning_rate")


@shows("lr_scheduler_type")
def test_lr_scheduler_type_names_the_curve(tmp_path: Path) -> None:
    assert _rates(tmp_path, lr_scheduler_type="constant") == [1.0] * 8
    assert _rates(tmp_path, lr_scheduler_type="linear") == pytest.approx(
        [1 - step / 8 for step in range(8)]
    )
    assert _rates(tmp_path, lr_scheduler_type="cosine") == pytest.approx(
        [(1 + math.cos(math.pi * step / 8)) / 2 for step in range(8)]
    )
    for name in ("cosine_with_restarts", "polynomial", "constant_with_warmup"):
        assert _rates(tmp_path, lr_scheduler_type=name)[0] == 1.0


@shows("lr_scheduler_kwargs")
def test_lr_scheduler_kwargs_go_to_the_schedule(tmp_path: Path) -> None:
    rates = _rates(
        tmp_path, lr_scheduler_type="cosine_with_restarts", lr_scheduler_kwargs={"num_cycles": 2}
    )
    assert rates[:4] == pytest.approx(rates[4:])


@shows("warmup_steps")
def test_warmup_steps_are_a_number_or_a_share(tmp_path: Path) -> None:
    rising = [0.0, 0.25, 0.5, 0.75, 1.0]
    assert _rates(tmp_path, warmup_steps=4)[:5] == pytest.approx(rising)
    assert _rates(tmp_path, warmup_steps=0.5)[:5] == pytest.approx(rising)


@shows("warmup_ratio")
def test_warmup_ratio_counts_where_warmup_steps_are_unset(tmp_path: Path) -> None:
    assert _rates(tmp_path, warmup_ratio=0.5)[:3] == pytest.approx([0.0, 0.25, 0.5])
    assert _rates(tmp_path, warmup_ratio=0.5, warmup_steps=2)[:3] == pytest.approx([0, 0.5, 1])


# ---- The device ----


@shows("torch_empty_cache_steps")
def test_torch_empty_cache_steps_empty_it_every_so_often(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trainer(tmp_path, torch_empty_cache_steps=2, num_train_epochs=2)
    emptied: list[int] = []
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.accelerator, "empty_cache", lambda: emptied.append(run.state.global_step)
    )
    run.train()
    assert emptied == [0, 2, 4, 6]


@shows("use_cpu")
def test_use_cpu_counts_where_there_is_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    devices = [
        TrainingArguments(output_dir=str(tmp_path), use_cpu=asked).device.type
        for asked in (True, False)
    ]
    assert devices == ["cpu", "cuda"]


@shows("bf16")
def test_bf16_computes_in_bf16_and_keeps_fp32_masters(tmp_path: Path) -> None:
    run = trained(tmp_path, bf16=True)
    assert run.model.dtypes == {torch.bfloat16}
    assert {p.dtype for p in run.model.parameters()} == {torch.float32}
    late: Any = Seen().bfloat16()
    kept = trained(tmp_path, bf16=True, model=late, max_steps=1)
    assert {p.dtype for p in kept.model.parameters()} == {torch.float32}


@shows("fp16")
def test_fp16_computes_in_fp16_and_scales_the_loss(tmp_path: Path) -> None:
    run = trained(tmp_path, fp16=True, save_strategy="epoch")
    assert run.model.dtypes == {torch.float16}
    assert {p.dtype for p in run.model.parameters()} == {torch.float32}
    assert (tmp_path / "checkpoint-4" / "scaler.pt").is_file()


@shows("fp16_opt_level")
def test_fp16_opt_level_says_how_much_is_in_fp16(tmp_path: Path) -> None:
    found = {}
    for level in ("O0", "O1", "O2", "O3"):
        model, seen = tiny_llama(), set()
        norm = model.model.layers[0].input_layernorm  # which autocast leaves in fp32
        norm.register_forward_hook(lambda module, *_, seen=seen: seen.add(module.weight.dtype))
        run = trained(
            tmp_path, fp16=True, fp16_opt_level=level, model=model, train_dataset=Sentences(16)
        )
        kept = {parameter.dtype for parameter in model.parameters()}
        moments = {state["exp_avg"].dtype for state in run.optimizer.state.values()}
        found[level] = seen, kept, moments, bool(run.engine.scaler_state())
    fp32, fp16 = {torch.float32}, {torch.float16}
    assert found == {
        "O0": (fp32, fp32, fp32, False),
        "O1": (fp32, fp32, fp32, True),
        "O2": (fp16, fp32, fp32, True),
        "O3": (fp16, fp16, fp16, True),
    }


@shows("fp16_backend")
def test_fp16_backend_is_warned_about(tmp_path: Path) -> None:
    with pytest.warns(FutureWarning, match="fp16_backend='apex' has no effect"):
        trainer(tmp_path, fp16_backend="apex")


@shows("use_ipex")
def test_use_ipex_is_refused_with_what_to_do_instead(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="intel_extension_for_pytorch.*bf16: true"):
        trainer(tmp_path, use_ipex=True)


# ---- Logging ----


@shows("log_level")
def test_log_level_is_the_main_processs(tmp_path: Path) -> None:
    logger = transformers.logging.get_logger()
    said = {}
    for level in ("debug", "error"):
        with CaptureLogger(logger) as captured:
            trained(tmp_path, log_level=level)
        said[level] = "Running training" in captured.out
    assert said == {"debug": True, "error": False}


def _verbosity(world: RankInfo, folder: str) -> int:
    trainer(folder, log_level="error", log_level_replica="info")
    return int(transformers.logging.get_verbosity())


@shows("log_level_replica")
def test_log_level_replica_is_the_other_processes(tmp_path: Path) -> None:
    levels = run_ranks(2, _verbosity, str(tmp_path))
    assert levels == [transformers.logging.ERROR, transformers.logging.INFO]


@pytest.fixture
def on_second_node(monkeypatch: pytest.MonkeyPatch) -> None:
    place = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    for name, value in {**place, "GROUP_RANK": "1"}.items():
        monkeypatch.setenv(name, value)


@shows("log_on_each_node")
@pytest.mark.usefixtures("on_second_node")
def test_log_on_each_node_or_on_the_first_alone(tmp_path: Path) -> None:
    asked = {
        each: TrainingArguments(str(tmp_path), log_on_each_node=each) for each in (True, False)
    }
    assert {each: args.should_log for each, args in asked.items()} == {True: True, False: False}


@shows("logging_dir")
def test_logging_dir_is_tensorboards(tmp_path: Path) -> None:
    trained(tmp_path / "out", report_to="tensorboard", logging_dir=str(tmp_path / "board"))
    assert list((tmp_path / "board").glob("events.out.tfevents.*"))


@shows("logging_strategy")
def test_logging_strategy_says_when(tmp_path: Path) -> None:
    found = {
        strategy: logged_steps(trained(tmp_path, logging_strategy=strategy, num_train_epochs=2))
        for strategy in ("no", "epoch", "steps")
    }
    assert found == {"no": [], "epoch": [4, 8], "steps": [1, 2, 3, 4, 5, 6, 7, 8]}


@shows("logging_first_step")
def test_logging_first_step_logs_it_too(tmp_path: Path) -> None:
    run = trained(tmp_path, logging_first_step=True, logging_steps=3)
    assert logged_steps(run) == [1, 3]


@shows("logging_steps")
def test_logging_steps_are_a_number_or_a_share(tmp_path: Path) -> None:
    assert logged_steps(trained(tmp_path, logging_steps=2)) == [2, 4]
    assert logged_steps(trained(tmp_path, logging_steps=0.25, num_train_epochs=2)) == [2, 4, 6, 8]


class LosesItself(Seen):
    """Its third loss is no number, though its gradient is."""

    def forward(self, x: Tensor, labels: Tensor | None = None) -> tuple[Tensor, ...]:
        outputs = super().forward(x, labels)
        if labels is None or len(self.rows) != 12:
            return outputs
        return (outputs[0] * 0 + float("nan"), *outputs[1:])


@shows("logging_nan_inf_filter")
def test_logging_nan_inf_filter_leaves_such_losses_out_of_the_mean(tmp_path: Path) -> None:
    fields = {"logging_steps": 4, "train_sampling_strategy": "sequential", "learning_rate": 0.0}
    kept = trained(tmp_path, model=LosesItself(), logging_nan_inf_filter=False, **fields)
    left_out = trained(tmp_path, model=LosesItself(), logging_nan_inf_filter=True, **fields)
    assert math.isnan(logged(kept, "loss")[0])
    assert math.isfinite(logged(left_out, "loss")[0])


# ---- Saving ----


@shows("save_strategy")
def test_save_strategy_says_when(tmp_path: Path) -> None:
    best = {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "loss"}
    found = {}
    for name, more in (("no", {}), ("epoch", {}), ("steps", {}), ("best", best)):
        folder = tmp_path / name
        trained(folder, save_strategy=name, save_steps=3, learning_rate=0.0, **more)
        found[name] = checkpoints(folder)
    # Nothing is learnt, so that the first evaluation stays the best.
    assert found == {"no": [], "epoch": [4], "steps": [3, 4], "best": [1]}


@shows("save_steps")
def test_save_steps_are_a_number_or_a_share(tmp_path: Path) -> None:
    for name, steps in (("number", 2), ("share", 0.5)):
        trained(tmp_path / name, save_strategy="steps", save_steps=steps)
        assert checkpoints(tmp_path / name) == [2, 4]


@shows("save_total_limit")
def test_save_total_limit_spares_the_best_and_what_is_not_this_runs(tmp_path: Path) -> None:
    foreign = tmp_path / "checkpoint-99"
    foreign.mkdir(parents=True)
    run = trained(
        tmp_path,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=2,
        eval_strategy="steps",
        eval_steps=1,
        metric_for_best_model="loss",
        learning_rate=0.0,
        num_train_epochs=2,
        save_only_model=False,
        greater_is_better=False,
        eval_delay=2,
    )
    assert run.state.best_global_step == 2
    assert checkpoints(tmp_path) == [2, 8, 99]


@shows("save_safetensors")
def test_save_safetensors_off_saves_as_torch_does(tmp_path: Path) -> None:
    for asked, name in ((True, "model.safetensors"), (False, "pytorch_model.bin")):
        run = trained(tmp_path / str(asked), save_safetensors=asked)
        run.save_model()
        assert (tmp_path / str(asked) / name).is_file()


@shows("save_on_each_node")
@pytest.mark.usefixtures("on_second_node")
def test_save_on_each_node_writes_on_this_node_too(tmp_path: Path) -> None:
    found = {
        each: TrainingArguments(str(tmp_path), save_on_each_node=each).should_save
        for each in (True, False)
    }
    assert found == {True: True, False: False}


@shows("save_only_model")
def test_save_only_model_leaves_nothing_to_resume_from(tmp_path: Path) -> None:
    trained(tmp_path, save_strategy="epoch", save_only_model=True)
    files = {path.name for path in (tmp_path / "checkpoint-4").iterdir()}
    assert "model.safetensors" in files
    assert not files & {"optimizer.pt", "scheduler.pt", "rng_state.pth"}
    with pytest.raises(CheckpointError, match="save_only_model"):
        trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


@shows("restore_callback_states_from_checkpoint")
def test_callbacks_states_come_back_when_asked_for(tmp_path: Path) -> None:
    fields = {
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "metric_for_best_model": "loss",
    }
    trained(tmp_path, callbacks=[EarlyStoppingCallback(7)], **fields)
    found = {}
    for asked in (True, False):
        run = trainer(
            tmp_path,
            callbacks=[EarlyStoppingCallback(1)],
            restore_callback_states_from_checkpoint=asked,
            **fields,
        )
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
        stopping = run.pop_callback(EarlyStoppingCallback)
        found[asked] = stopping.early_stopping_patience  # type: ignore[union-attr]
    assert found == {True: 7, False: 1}


# ---- Randomness ----


@shows("seed")
def test_seed_decides_the_order_and_all_else(tmp_path: Path) -> None:
    one, same, other = (trained(tmp_path, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(weights(one), weights(same))
    assert one.model.rows == same.model.rows != other.model.rows


@shows("data_seed")
def test_data_seed_decides_the_order_alone(tmp_path: Path) -> None:
    one, same, other = (trained(tmp_path, data_seed=seed) for seed in (1, 1, 2))
    assert one.model.rows == same.model.rows != other.model.rows
    assert sorted(one.model.rows) == sorted(other.model.rows)
    drawn = [torch.rand(1).item() for _ in (trained(tmp_path, data_seed=1),)]
    assert drawn == [torch.rand(1).item() for _ in (trained(tmp_path, data_seed=2),)]
