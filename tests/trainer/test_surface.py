"""A script changes one import: the same names, parameters and complaints as transformers'."""

from __future__ import annotations

import copy
import inspect
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.utils.data import DataLoader
from transformers import default_data_collator

from bigtrain.errors import ConfigError
from bigtrain.topology import RankInfo
from bigtrain.trainer.arguments import TrainingArguments
from bigtrain.trainer.seq2seq import Seq2SeqTrainer
from bigtrain.trainer.trainer import Trainer
from tests.engine.harness import run_ranks
from tests.trainer.samples import Points, Regression, Sentences, Stream, arguments, losses, trainer
from tests.trainer.samples import tiny_llama as llama

# The methods that scripts call and override.
METHODS = [
    "train",
    "evaluate",
    "predict",
    "save_model",
    "save_state",
    "log",
    "log_metrics",
    "save_metrics",
    "add_callback",
    "pop_callback",
    "remove_callback",
    "is_world_process_zero",
    "is_local_process_zero",
    "num_examples",
    "floating_point_ops",
    "get_train_dataloader",
    "get_eval_dataloader",
    "get_test_dataloader",
    "create_optimizer",
    "create_scheduler",
    "create_optimizer_and_scheduler",
    "get_decay_parameter_names",
    "compute_loss",
    "training_step",
    "prediction_step",
    "evaluation_loop",
    "_prepare_inputs",
    "get_batch_samples",
    "_save_checkpoint",
    "_maybe_log_save_evaluate",
    "get_optimizer_cls_and_kwargs",
    "call_model_init",
    "compute_loss_context_manager",
    "_prepare_input",
    "get_learning_rates",
    "get_num_trainable_parameters",
    "get_optimizer_group",
    "store_flos",
]


@pytest.mark.parametrize("name", METHODS)
def test_a_method_takes_what_transformers_takes(name: str) -> None:
    theirs = inspect.signature(getattr(transformers.Trainer, name)).parameters
    ours = inspect.signature(getattr(Trainer, name)).parameters
    assert list(ours) == list(theirs)
    assert [p.default for p in ours.values()] == [p.default for p in theirs.values()]


def test_the_constructor_takes_what_transformers_takes() -> None:
    theirs = list(inspect.signature(transformers.Trainer.__init__).parameters)
    assert list(inspect.signature(Trainer.__init__).parameters)[: len(theirs)] == theirs


def test_a_trainer_has_the_attributes_that_scripts_read(tmp_path: Path) -> None:
    theirs, ours = (
        kind(
            model=llama(),
            args=arguments(tmp_path, kind=kinds, max_steps=1, eval_strategy="epoch"),
            train_dataset=Sentences(8),
            eval_dataset=Sentences(4),
        )
        for kind, kinds in (
            (transformers.Trainer, transformers.TrainingArguments),
            (Trainer, TrainingArguments),
        )
    )
    theirs.train()
    ours.train()
    for part in ("", "args", "state", "control", "callback_handler"):
        one, other = (getattr(run, part) if part else run for run in (theirs, ours))
        public = {name: value for name, value in vars(one).items() if name[0] != "_"}
        assert [name for name in public if not hasattr(other, name)] == [], part
        flags = {name: bool(v) for name, v in public.items() if v is None or isinstance(v, bool)}
        assert {name: bool(getattr(other, name)) for name in flags} == flags
    assert ours.model is ours.model_wrapped
    accelerator = ours.accelerator
    assert (accelerator.num_processes, accelerator.process_index) == (1, 0)
    assert accelerator.is_main_process and accelerator.device == torch.device("cpu")
    assert accelerator.unwrap_model(ours.model_wrapped) is ours.model


def _save_as_scripts_do(run: Trainer, folder: str) -> bool:
    """FastChat's and LLaVA's `safe_save_model_for_hf_trainer`."""
    if run.deepspeed:
        run.save_model(folder)
        return True
    weights = run.model.state_dict()
    if run.args.should_save:
        run._save(folder, state_dict={name: tensor.cpu() for name, tensor in weights.items()})
    return False


def _train_and_save(world: RankInfo, folder: str, fields: dict[str, Any]) -> list[bool]:
    run = trainer(folder, max_steps=1, **fields)
    before = run.deepspeed is None
    run.train()
    by_deepspeed = _save_as_scripts_do(run, f"{folder}/final")
    return [before, by_deepspeed, by_deepspeed == (run.deepspeed is run.model_wrapped)]


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_script_that_asks_for_deepspeed_saves_the_whole_model(tmp_path: Path, stage: int) -> None:
    fields = {"deepspeed": {"zero_optimization": {"stage": stage}}} if stage else {}
    found = run_ranks(2, _train_and_save, str(tmp_path), fields)
    assert found == [[True, stage > 0, True]] * 2
    saved = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "final")
    assert saved.num_parameters() == llama().num_parameters()


def test_overridden_steps_are_called_as_transformers_calls_them(tmp_path: Path) -> None:
    class Weighted(Trainer):
        def compute_loss(
            self,
            model: Any,
            inputs: Any,
            return_outputs: bool = False,
            num_items_in_batch: Any = None,
        ) -> Any:
            loss, outputs = super().compute_loss(
                model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch
            )
            return (2 * loss, outputs) if return_outputs else 2 * loss

        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
            model.train()
            inputs = self._prepare_inputs(inputs)
            with self.compute_loss_context_manager():
                loss = self.compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
            self.accelerator.backward(loss)
            return loss.detach()

    args = arguments(tmp_path, max_grad_norm=0, max_steps=1)
    doubled = Weighted(model=llama(), args=args, train_dataset=Sentences(8))
    plain = Trainer(model=llama(), args=args, train_dataset=Sentences(8))
    doubled.train()
    plain.train()
    assert losses(doubled)[0] == pytest.approx([2 * figure for figure in losses(plain)[0]])


def test_a_plain_loader_from_an_override_is_used_as_it_is(tmp_path: Path) -> None:
    class Own(Trainer):
        def get_train_dataloader(self) -> DataLoader[Any]:
            return DataLoader(Sentences(12), batch_size=3)

    run = Own(model=llama(), args=arguments(tmp_path, num_train_epochs=1))
    run.train()
    assert run.state.global_step == 4


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda out: Trainer(args=arguments(out)), RuntimeError, "`model` or `model_init`"),
        (
            lambda out: Trainer(model=llama(), model_init=llama, args=arguments(out)),
            ValueError,
            "but not both",
        ),
        (
            lambda out: Trainer(model="gpt2", args=arguments(out)),  # type: ignore[arg-type]
            TypeError,
            "model must be an nn.Module, not the string 'gpt2': give what `from_pretrained` loads",
        ),
        (
            lambda out: Trainer(model=Regression, args=arguments(out)),  # type: ignore[arg-type]
            TypeError,
            "model must be an nn.Module, not the class Regression: give an instance of it",
        ),
        (
            lambda out: Trainer(model_init=lambda: llama, args=arguments(out)),
            TypeError,
            "what model_init returns must be an nn.Module, not a function",
        ),
        (
            lambda out: trainer(out, data=Stream(4)),
            ValueError,
            "max_steps has to be specified",
        ),
        (
            lambda out: arguments(out, load_best_model_at_end=True, eval_strategy="steps"),
            ValueError,
            "requires the save and eval strategy to match",
        ),
        (lambda out: arguments(out, bf16=True, fp16=True), ValueError, "but not both"),
        (lambda out: trainer(out, eval_strategy="epoch"), ValueError, "pass an `eval_dataset`"),
        (
            lambda out: Trainer(model=llama(), args=arguments(out), tokenizer=object()),
            TypeError,
            "processing_class",
        ),
        (
            lambda out: trainer(
                out, fp16=True, fp16_opt_level="O3", deepspeed={"zero_optimization": {"stage": 2}}
            ),
            ConfigError,
            "O3.*DeepSpeed keeps fp32 masters",
        ),
    ],
)
def test_wrong_use_is_refused_at_construction(
    tmp_path: Path, make: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make(tmp_path)


WATCHING = {
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "load_best_model_at_end": True,
    "metric_for_best_model": "f1",
}


@pytest.mark.parametrize("kind", [KeyError, ValueError])
def test_a_metric_that_can_not_exist_is_named_at_construction(
    tmp_path: Path, kind: type[Exception]
) -> None:
    with pytest.raises(kind, match=r"eval_f1.*eval_loss"):
        trainer(tmp_path, eval_dataset=Sentences(4), **WATCHING)
    sets = {"seen": Sentences(4), "unseen": Sentences(4)}
    with pytest.raises(kind, match=r"eval_f1.*eval_seen_loss.*eval_unseen_loss"):
        trainer(tmp_path, eval_dataset=sets, **WATCHING)
    trainer(tmp_path, eval_dataset=sets, **{**WATCHING, "metric_for_best_model": "unseen_loss"})


def test_a_metric_that_does_not_exist_is_named_with_those_that_do(tmp_path: Path) -> None:
    run = trainer(
        tmp_path,
        eval_dataset=Sentences(4),
        compute_metrics=lambda found: {"accuracy": 0.5},
        **WATCHING,
    )
    with pytest.raises(KeyError, match=r"eval_f1.*eval_loss.*eval_accuracy"):
        run.train()


def test_eval_on_start_names_such_a_metric_before_any_step(tmp_path: Path) -> None:
    run = trainer(
        tmp_path,
        eval_dataset=Sentences(4),
        compute_metrics=lambda found: {"accuracy": 0.5},
        eval_on_start=True,
        **WATCHING,
    )
    with pytest.raises(KeyError, match=r"eval_f1.*eval_loss.*eval_accuracy"):
        run.train()
    assert run.state.global_step == 0


def test_transformers_own_arguments_are_taken_too(tmp_path: Path) -> None:
    args = arguments(tmp_path, kind=transformers.TrainingArguments, max_steps=1)
    run = Trainer(model=Regression(), args=args, train_dataset=Points(4))
    assert isinstance(run.args, TrainingArguments)
    run.train()


def test_without_a_launcher_nothing_but_transformers_files_is_written(tmp_path: Path) -> None:
    trainer(tmp_path, max_steps=1).train()
    assert list(tmp_path.iterdir()) == []


def test_a_script_without_arguments_runs(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from bigtrain import Trainer\n"
        "from tests.trainer.samples import Points, Regression\n"
        "Trainer(model=Regression(), train_dataset=Points(8)).train()\n"
        "import torch.distributed as dist\n"
        "assert not dist.is_initialized()\n"
    )
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=tmp_path,
        env={"PYTHONPATH": root, "PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "tmp_trainer" / "checkpoint-3").is_dir()


# ---- transformers' own arguments ----


@dataclass
class OwnArguments(transformers.TrainingArguments):  # type: ignore[misc]
    """What a script for transformers' Trainer defines."""

    margin: float = 0.5

    def get_warmup_steps(self, num_training_steps: int) -> int:
        return 0 if self.margin else 1


def test_transformers_own_arguments_stay_the_scripts(tmp_path: Path) -> None:
    args = arguments(tmp_path, kind=transformers.TrainingArguments, max_steps=2)
    run = Trainer(model=Regression(), args=args, train_dataset=Points(16))
    assert run.args is args
    args.max_steps = 3
    assert run.train().global_step == 3


def test_a_class_of_arguments_over_transformers_keeps_its_fields_and_methods(
    tmp_path: Path,
) -> None:
    args = arguments(tmp_path, kind=OwnArguments, margin=0.25, save_strategy="epoch")
    run = Trainer(model=Regression(), args=args, train_dataset=Points(8))
    assert run.args is args and isinstance(args, OwnArguments)
    assert isinstance(args, TrainingArguments) and args.export == "last"
    assert {"margin", "overwrite_output_dir"} <= set(args.to_dict())
    args.margin = 0.75
    run.train()
    rates = [entry["learning_rate"] for entry in run.state.log_history if "loss" in entry]
    assert rates[0] == args.learning_rate  # its own warmup, of no step
    read = torch.load(tmp_path / "checkpoint-2" / "training_args.bin", weights_only=False)
    assert isinstance(read, OwnArguments) and isinstance(read, TrainingArguments)
    assert read.margin == 0.75 and copy.deepcopy(args).margin == 0.75
    again = Trainer(model=Regression(), args=args, train_dataset=Points(8))
    again.train(resume_from_checkpoint=True)


def test_arguments_that_lack_what_seq2seq_needs_are_refused(tmp_path: Path) -> None:
    args = arguments(tmp_path, kind=OwnArguments)
    with pytest.raises(TypeError, match=r"nor transformers\.Seq2SeqTrainingArguments"):
        Seq2SeqTrainer(model=Regression(), args=args)
    theirs = arguments(tmp_path, kind=transformers.Seq2SeqTrainingArguments)
    assert Seq2SeqTrainer(model=Regression(), args=theirs).args is theirs
    Trainer(model=Regression(), args=arguments(tmp_path, kind=type(theirs).__bases__[0]))


def test_arguments_decide_whether_the_model_goes_to_the_device(tmp_path: Path) -> None:
    moved: list[nn.Module] = []

    class Recording(Trainer):
        def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
            moved.append(model)

    class Elsewhere(TrainingArguments):
        place_model_on_device = False

    for kind, fields, expected in (
        (TrainingArguments, {}, True),
        (Elsewhere, {}, False),
        (TrainingArguments, {"bf16_full_eval": True}, False),
    ):
        moved.clear()
        run = Recording(model=Regression(), args=arguments(tmp_path, kind=kind, **fields))
        assert (bool(moved), run.place_model_on_device) == (expected, expected)


def test_a_collator_that_counts_as_false_is_used(tmp_path: Path) -> None:
    class Collator:
        def __len__(self) -> int:
            return 0

        def __call__(self, samples: list[Any]) -> Any:
            return default_data_collator(samples)

    collator = Collator()
    assert trainer(tmp_path, data_collator=collator).data_collator is collator
