"""Every argument beyond the listed ones has an effect that is shown here, or a test that is named.

Most can be seen without training: what a loader, a model or a callback was made with.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from torch._dynamo import register_backend
from transformers import TrainerCallback
from transformers.trainer_utils import EvalPrediction

from bigtrain.arguments.schema import load_schema
from bigtrain.translate import topology_for, translate
from tests.arguments.rows import ARGUMENT_ROWS
from tests.trainer.samples import Points, Regression, Sentences, tiny_llama, trainer

Probe = Callable[..., Any]
TESTS = Path(__file__).parents[1]


def _run(folder: Path, **changed: Any) -> Any:
    return trainer(folder, **{"model": Regression(), "data": Points(10), **changed})


def _trained(folder: Path, **changed: Any) -> Any:
    run = _run(folder, **{"max_steps": 1, **changed})
    run.train()
    return run


def _loader(name: str) -> Probe:
    return lambda folder, **changed: getattr(_run(folder, **changed).get_train_dataloader(), name)


def _batches(folder: Path, **changed: Any) -> int:
    return len(_run(folder, **changed).get_train_dataloader())


def _context(folder: Path, **changed: Any) -> str | None:
    loader = _run(folder, dataloader_num_workers=1, **changed).get_train_dataloader()
    context = loader.multiprocessing_context
    return None if context is None else str(context.get_start_method())


def _evaluated_dtype(folder: Path, **changed: Any) -> torch.dtype:
    run = _run(folder, model=tiny_llama(), eval_dataset=Sentences(2), **changed)
    run.evaluate()
    return next(run.model.parameters()).dtype


def _seen_by_metrics(folder: Path, **changed: Any) -> tuple[int, bool, bool]:
    calls: list[EvalPrediction] = []

    def metrics(found: EvalPrediction, compute_result: bool = True) -> dict[str, float]:
        calls.append(found)
        return {}

    _run(
        folder,
        model=tiny_llama(),
        compute_metrics=metrics,
        per_device_eval_batch_size=2,
        eval_dataset=Sentences(4),
        **changed,
    ).evaluate()
    return len(calls), calls[0].inputs is not None, calls[0].losses is not None


def _predictions(folder: Path, **changed: Any) -> type:
    run = _run(folder, per_device_eval_batch_size=4, **changed)
    return type(run.predict(Points(8)).predictions)


def _deterministic(folder: Path, **changed: Any) -> bool:
    try:
        _run(folder, **changed)
        return torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def _columns(folder: Path, **changed: Any) -> set[str]:
    rows = [{"x": [0.0] * 4, "labels": 1.0, "extra": 2.0} for _ in range(4)]
    run = _run(folder, data=datasets.Dataset.from_list(rows), **changed)
    return set(next(iter(run.get_train_dataloader())))


def _first(folder: Path, **changed: Any) -> int:
    """The sample that counts as the longest, which comes first."""
    rows = [{"x": [0.0] * 4, "labels": float(n), "length": n, "rank": 8 - n} for n in range(8)]
    run = _run(
        folder,
        data=datasets.Dataset.from_list(rows),
        train_sampling_strategy="group_by_length",
        remove_unused_columns=False,  # which else takes the lengths away, as in transformers
        per_device_train_batch_size=8,
        **changed,
    )
    return int(next(iter(run.get_train_dataloader()))["labels"][0])


def _checkpointed(folder: Path, **changed: Any) -> list[bool]:
    run = _trained(folder, model=tiny_llama(), data=Sentences(4), **changed)
    return [bool(getattr(m, "gradient_checkpointing", False)) for m in run.model.model.layers]


def _kept_layers(folder: Path, **changed: Any) -> list[bool]:
    fields = {"activation_checkpointing": True, **changed}
    return _checkpointed(folder, **fields)


def _compiled(folder: Path, **changed: Any) -> list[Any]:
    """The modes that a backend of its own was called with."""
    modes: list[Any] = []

    def recording(module: Any, inputs: Any, mode: str | None = None) -> Any:
        modes.append(mode)
        return module.forward

    torch._dynamo.reset()
    register_backend(recording, name="recording")
    try:
        _trained(folder, **changed)
    finally:
        torch._dynamo.backends.registry._COMPILER_FNS.pop("recording", None)
        torch._dynamo.backends.registry._BACKENDS.pop("recording", None)
    return modes


def _adam(name: str) -> Probe:
    def probe(folder: Path, **changed: Any) -> Any:
        return _run(folder, **changed).create_optimizer().param_groups[0].get(name)

    return probe


def _bars(folder: Path, **changed: Any) -> set[str]:
    callbacks = _run(folder, **changed).callback_handler.callbacks
    return {type(one).__name__ for one in callbacks} & {"ProgressCallback", "PrinterCallback"}


def _watches_overflow(folder: Path, **changed: Any) -> bool:
    run = _trained(folder, **changed)
    return any(module._forward_hooks for module in run.model.modules())


def _cache(folder: Path, **changed: Any) -> bool:
    return bool(_run(folder, model=tiny_llama(), **changed).model.config.use_cache)


def _noise(folder: Path, **changed: Any) -> bool:
    hooked: list[bool] = []

    class Look(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            hooked.append(bool(kwargs["model"].get_input_embeddings()._forward_hooks))

    _trained(folder, model=tiny_llama(), data=Sentences(4), callbacks=[Look()], **changed)
    return hooked[0]


def _labels(folder: Path, **changed: Any) -> list[str]:
    return _run(folder, **changed).label_names


def _ddp(name: str) -> Probe:
    def probe(_: Path, **changed: Any) -> Any:
        topology = topology_for("ddp", procs_per_node=2)
        made = translate(changed, engine="ddp", topology=topology, device="cpu")
        return getattr(made.engine.settings, name)

    return probe


def _skips_logits(folder: Path, **changed: Any) -> bool:
    class Model(Regression):
        def forward(self, x: Any, labels: Any = None, skip_logits: bool = False) -> Any:
            skipped.append(skip_logits)
            return super().forward(x, labels)

    skipped: list[bool] = []
    _run(folder, model=Model(), eval_dataset=Points(2), **changed).evaluate()
    return skipped[0]


COMPILED = {"torch_compile": True, "torch_compile_backend": "recording"}
EVERY_SECOND = {"every_n_layers": 2}
# Argument → a probe, what to set, and what is seen without and with it.
SHOWN: dict[str, tuple[Probe, dict[str, Any], Any, Any]] = {
    "activation_checkpointing": (
        _checkpointed,
        {"activation_checkpointing": True},
        [False, False],
        [True, True],
    ),
    "activation_checkpointing_kwargs": (
        _kept_layers,
        {"activation_checkpointing_kwargs": EVERY_SECOND},
        [True, True],
        [True, False],
    ),
    "gradient_checkpointing": (
        _checkpointed,
        {"gradient_checkpointing": True},
        [False, False],
        [True, True],
    ),
    "gradient_checkpointing_kwargs": (
        _kept_layers,
        {"gradient_checkpointing_kwargs": EVERY_SECOND},
        [True, True],
        [True, False],
    ),
    "batch_eval_metrics": (
        _seen_by_metrics,
        {"batch_eval_metrics": True},
        (1, False, False),
        (2, False, False),
    ),
    "include_for_metrics": (
        _seen_by_metrics,
        {"include_for_metrics": ["inputs", "loss"]},
        (1, False, False),
        (1, True, True),
    ),
    "bf16_full_eval": (
        _evaluated_dtype,
        {"bf16_full_eval": True},
        torch.float32,
        torch.bfloat16,
    ),
    "fp16_full_eval": (_evaluated_dtype, {"fp16_full_eval": True}, torch.float32, torch.float16),
    "dataloader_drop_last": (_batches, {"dataloader_drop_last": True}, 3, 2),
    "dataloader_in_order": (_loader("in_order"), {"dataloader_in_order": False}, True, False),
    "dataloader_multiprocessing_context": (
        _context,
        {"dataloader_multiprocessing_context": "spawn"},
        None,
        "spawn",
    ),
    "dataloader_num_workers": (_loader("num_workers"), {"dataloader_num_workers": 2}, 0, 2),
    "dataloader_prefetch_factor": (
        _loader("prefetch_factor"),
        {"dataloader_prefetch_factor": 3, "dataloader_num_workers": 1},
        None,
        3,
    ),
    "ddp_broadcast_buffers": (
        _ddp("broadcast_buffers"),
        {"ddp_broadcast_buffers": False},
        None,
        False,
    ),
    "ddp_bucket_cap_mb": (_ddp("bucket_cap_mb"), {"ddp_bucket_cap_mb": 7}, None, 7),
    "ddp_find_unused_parameters": (
        _ddp("find_unused_parameters"),
        {"ddp_find_unused_parameters": True},
        False,
        True,
    ),
    "ddp_static_graph": (_ddp("static_graph"), {"ddp_static_graph": True}, False, True),
    "debug": (_watches_overflow, {"debug": "underflow_overflow"}, False, True),
    "disable_tqdm": (_bars, {"disable_tqdm": False}, {"PrinterCallback"}, {"ProgressCallback"}),
    "eval_do_concat_batches": (_predictions, {"eval_do_concat_batches": False}, np.ndarray, list),
    "full_determinism": (_deterministic, {"full_determinism": True}, False, True),
    "label_names": (_labels, {"label_names": ["y"]}, ["labels"], ["y"]),
    "length_column_name": (_first, {"length_column_name": "rank"}, 7, 0),
    "neftune_noise_alpha": (_noise, {"neftune_noise_alpha": 5.0}, False, True),
    "optim": (_adam("momentum"), {"optim": "sgd"}, None, 0),
    "optim_args": (
        _adam("momentum"),
        {"optim": "sgd", "optim_args": "momentum=0.5"},
        None,
        0.5,
    ),
    "remove_unused_columns": (
        _columns,
        {"remove_unused_columns": False},
        {"x", "labels"},
        {"x", "labels", "extra"},
    ),
    "torch_compile": (_compiled, COMPILED, [], [None]),
    "torch_compile_backend": (_compiled, {"torch_compile_backend": "recording"}, [], [None]),
    "torch_compile_mode": (
        _compiled,
        {**COMPILED, "torch_compile_mode": "reduce-overhead"},
        [],
        ["reduce-overhead"],
    ),
    "use_cache": (_cache, {"use_cache": True}, False, True),
    "use_liger_kernel": (
        _skips_logits,
        {"use_liger_kernel": True, "prediction_loss_only": True},
        False,
        True,
    ),
}
# Argument → the test that shows it.
ELSEWHERE = {
    "accelerator_config": "trainer/test_habits.py",
    "async_save": "trainer/test_last_save.py",
    "auto_find_batch_size": "trainer/test_habits.py",
    "average_tokens_across_devices": "trainer/test_equality.py",
    "dataloader_persistent_workers": "trainer/test_habits.py",
    "ddp_backend": "translate/test_translation.py",
    "deepspeed": "translate/test_foreign.py",
    "enable_jit_checkpoint": "trainer/test_habits.py",
    "eval_on_start": "trainer/test_equality.py",
    "eval_steps": "arguments/test_argument_rows.py",
    "eval_use_gather_object": "trainer/test_habits.py",
    "export": "trainer/test_exporting.py",
    "export_interval": "trainer/test_exporting.py",
    "fsdp": "arguments/test_sharded_rows.py",
    "fsdp_config": "translate/test_foreign.py",
    "greater_is_better": "trainer/test_habits.py",
    "hub_always_push": "trainer/test_hub.py",
    "hub_model_id": "trainer/test_hub.py",
    "hub_private_repo": "trainer/test_hub.py",
    "hub_revision": "trainer/test_hub.py",
    "hub_strategy": "trainer/test_hub.py",
    "hub_token": "trainer/test_hub.py",
    "ignore_data_skip": "trainer/test_resume_data.py",
    "include_num_input_tokens_seen": "trainer/test_equality.py",
    "label_smoothing_factor": "trainer/test_equality.py",
    "load_best_model_at_end": "trainer/test_habits.py",
    "metric_for_best_model": "trainer/test_habits.py",
    "on_save_failure": "trainer/test_survival.py",
    "parallelism_config": "arguments/test_values.py",
    "push_to_hub": "trainer/test_hub.py",
    "report_to": "trainer/test_report_to.py",
    "reset_optimizer": "trainer/test_survival.py",
    "resume_from_checkpoint": "arguments/test_argument_rows.py",
    "skip_memory_metrics": "trainer/test_habits.py",
    "train_sampling_strategy": "trainer/test_equality.py",
}
# Argument → what this suite lacks for showing it.
NOT_HERE = {
    "dataloader_pin_memory": "a GPU",
    "ddp_timeout": "a collective that waits for minutes",
    "liger_kernel_config": "liger-kernel",
    "local_rank": "anything that reads it: it has no effect",
    "optim_target_modules": "an optimizer that reads it (GaLore, APOLLO)",
    "project": "trackio or wandb",
    "run_name": "trackio, wandb or mlflow",
    "tf32": "a GPU",
    "trackio_bucket_id": "trackio",
    "trackio_space_id": "trackio",
    "trackio_static_space_id": "trackio",
}


def test_every_other_argument_is_shown_or_said_not_to_be() -> None:
    tables = [set(SHOWN), set(ELSEWHERE), set(NOT_HERE)]
    assert set.union(*tables) == set(load_schema()) - set(ARGUMENT_ROWS)
    assert sum(map(len, tables)) == len(set.union(*tables))
    unread = [
        name
        for name, test in ELSEWHERE.items()
        if not re.search(rf"\b{name}\b", (TESTS / test).read_text(encoding="utf-8"))
    ]
    assert unread == []


@pytest.mark.parametrize("name", SHOWN)
def test_an_argument_has_its_effect(tmp_path: Path, name: str) -> None:
    probe, fields, without, changed = SHOWN[name]
    assert probe(tmp_path) == without
    assert probe(tmp_path, **fields) == changed
