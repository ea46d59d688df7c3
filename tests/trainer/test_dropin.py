"""Every name of transformers' Trainer has its decision: there with the same parameters, or not."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import GenerationConfig

from bigtrain.trainer.arguments import TrainingArguments
from bigtrain.trainer.seq2seq import Seq2SeqTrainer, Seq2SeqTrainingArguments
from bigtrain.trainer.trainer import Trainer
from tests.trainer.samples import (
    Points,
    Regression,
    Sentences,
    arguments,
    tiny_llama,
    trainer,
)

# Steps of transformers' own loop, around accelerate's and DeepSpeed's objects, that this loop does
# not have. Overriding one is said at construction to have no effect.
NOT_IN_OUR_LOOP = {
    "_build_accelerator_args",
    "_clip_grad_norm",
    "_defer_fsdp_gradient_reduction",
    "_get_grad_norm",
    "_has_mixed_mesh_grads",
    "_init_training_state",
    "_inner_training_loop",
    "_issue_warnings_after_load",
    "_load_optimizer_and_scheduler",
    "_load_scaler",
    "_mixed_mesh_grad_norm",
    "_prepare_context_parallel_inputs",
    "_prepare_for_training",
    "_run_epoch",
    "_save_optimizer_and_scheduler",
    "_save_rng_state",
    "_save_scaler",
    "_sync_replicated_trainable_parameters",
    "_update_auto_batch_size",
    "_wrap_model",
}
NAMES = sorted(
    name
    for name, value in vars(transformers.Trainer).items()
    if not name.startswith("__") and name != "loss_is_scaled_for_ga" and value is not None
)


def parameters(method: Callable[..., Any]) -> list[tuple[str, Any]]:
    found = inspect.signature(method).parameters.values()
    return [(parameter.name, parameter.default) for parameter in found]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_there_with_the_same_parameters_or_is_decided_against(name: str) -> None:
    if name in NOT_IN_OUR_LOOP:
        assert not hasattr(Trainer, name)
    else:
        theirs = parameters(getattr(transformers.Trainer, name))
        assert [p for p, _ in parameters(getattr(Trainer, name))] == [p for p, _ in theirs]


def test_public_names_are_all_there() -> None:
    public = [name for name in dir(transformers.Trainer) if not name.startswith("_")]
    assert [name for name in public if not hasattr(Trainer, name)] == []
    assert set(NAMES) >= NOT_IN_OUR_LOOP


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (Trainer, transformers.Trainer),
        (Seq2SeqTrainer, transformers.Seq2SeqTrainer),
    ],
)
def test_constructors_and_overrides_take_what_transformers_take(ours: Any, theirs: Any) -> None:
    for name, method in vars(theirs).items():
        if inspect.isfunction(method) and name not in NOT_IN_OUR_LOOP:
            expected = [p for p, _ in parameters(method)]
            assert [p for p, _ in parameters(getattr(ours, name))][: len(expected)] == expected


def test_seq2seq_arguments_have_the_same_fields() -> None:
    theirs = transformers.Seq2SeqTrainingArguments.__dataclass_fields__
    ours = Seq2SeqTrainingArguments.__dataclass_fields__
    assert set(theirs) <= set(ours)
    assert {n: f.default for n, f in theirs.items()}.items() <= {
        n: f.default for n, f in ours.items()
    }.items()


def test_an_override_that_is_never_called_is_said_at_construction(tmp_path: Path) -> None:
    class Own(Trainer):
        def _wrap_model(self, model: Any) -> Any:
            return model

    with pytest.warns(UserWarning, match=r"Own overrides _wrap_model, which .* never calls"):
        Own(model=Regression(), args=arguments(tmp_path))


def test_a_model_card_tells_of_the_training(tmp_path: Path) -> None:
    run = trainer(tmp_path, max_steps=2)
    run.train()
    run.create_model_card(model_name="small", tags=["toy"])
    card = (tmp_path / "README.md").read_text()
    assert "learning_rate: 0.01" in card and "- toy" in card


# Called by scripts, by a push to the hub (test_hub) or by Ray Tune, and not by a run's loop.
NOT_IN_A_RUN = {
    "add_callback",
    "pop_callback",
    "remove_callback",
    "get_num_trainable_parameters",
    "get_learning_rates",
    "get_optimizer_group",
    "log_metrics",
    "metrics_format",
    "save_metrics",
    "save_state",
    "push_to_hub",
    "create_model_card",
    "hyperparameter_search",
    "create_optimizer_and_scheduler",
    "init_hf_repo",
    "_push_from_checkpoint",
    "_tune_save_checkpoint",
}


def test_every_method_that_can_be_overridden_is_called_in_a_run(tmp_path: Path) -> None:
    called: set[str] = set()

    def recording(name: str) -> Any:
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            called.add(name)
            return getattr(Trainer, name)(self, *args, **kwargs)

        return method

    names = [n for n in NAMES if callable(getattr(Trainer, n, None)) and n not in NOT_IN_A_RUN]
    statics = {n for n in names if isinstance(inspect.getattr_static(Trainer, n), staticmethod)}
    overridden = {name: recording(name) for name in names if name not in statics}
    kind: Any = type("Recording", (Trainer,), overridden)
    folder = str(tmp_path)
    fields = {
        "save_strategy": "steps",
        "save_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "load_best_model_at_end": True,
        "label_smoothing_factor": 0.1,
        "train_sampling_strategy": "group_by_length",
    }
    for resume, steps in ((None, 4), (f"{folder}/checkpoint-2", 6)):
        run = kind(
            model_init=lambda: tiny_llama(),
            args=arguments(folder, max_steps=steps, **fields),
            train_dataset=Sentences(16),
            eval_dataset=Sentences(6),
        )
        run.train(resume_from_checkpoint=resume)
    columns = [{name: row.tolist() for name, row in sample.items()} for sample in Sentences(5)]
    run.predict(datasets.Dataset.from_list(columns))
    run.save_model(folder)
    run.end()
    assert sorted(set(names) - statics - called) == []


def test_a_checkpoint_s_weights_go_into_the_model_that_is_given(tmp_path: Path) -> None:
    run = trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=1)
    run.train()
    trained = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    first, other = load_file(tmp_path / "checkpoint-1" / "model.safetensors"), tiny_llama(seed=5)
    run._load_from_checkpoint(tmp_path / "checkpoint-1", other)
    assert all(torch.equal(other.state_dict()[name], tensor) for name, tensor in first.items())
    now = run.model.state_dict()
    assert all(torch.equal(now[name], tensor) for name, tensor in trained.items())
    run._load_from_checkpoint(tmp_path / "checkpoint-1", run.model)
    assert all(torch.equal(now[name], tensor) for name, tensor in first.items())


def test_set_initial_training_values_answers_as_transformers_does(tmp_path: Path) -> None:
    fields = {"gradient_accumulation_steps": 3, "num_train_epochs": 2.5}
    answers = []
    for kind, args_kind in (
        (Trainer, None),
        (transformers.Trainer, transformers.TrainingArguments),
    ):
        changed = fields | ({} if args_kind is None else {"kind": args_kind})
        run = kind(
            model=Regression(), args=arguments(tmp_path, **changed), train_dataset=Points(22)
        )
        answers.append(run.set_initial_training_values(run.args, run.get_train_dataloader()))
    assert answers[0] == answers[1]


def test_a_script_may_put_bigtrains_classes_in_transformers_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind in (Trainer, TrainingArguments, Seq2SeqTrainer, Seq2SeqTrainingArguments):
        monkeypatch.setattr(transformers, kind.__name__, kind)
    args = transformers.Seq2SeqTrainingArguments(
        output_dir=str(tmp_path),
        generation_config=GenerationConfig(do_sample=False, top_p=0.9),
    )
    with pytest.raises(
        ValueError,
        match="is invalid",
    ):
        transformers.Seq2SeqTrainer(model=tiny_llama(), args=args)
    run = trainer(tmp_path, max_steps=1)
    run.train()
    run.create_model_card(model_name="small")
    assert "small" in (tmp_path / "README.md").read_text()
    with pytest.raises((RuntimeError, ValueError), match="HPSearchBackend"):
        run.hyperparameter_search(backend="none of them")
