"""What is read of transformers' sources is what transformers itself says."""

from __future__ import annotations

import dataclasses
import importlib.util

import pytest

from bigtrain import run_inputs
from bigtrain.arguments import installed


def test_names_and_keys_are_those_of_transformers() -> None:
    from transformers.debug_utils import DebugOption
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    from transformers.trainer_pt_utils import AcceleratorConfig

    assert installed.debug_options() == tuple(option.value for option in DebugOption)
    fields = dataclasses.fields(AcceleratorConfig)
    assert installed.accelerator_keys() == tuple(field.name for field in fields)
    names = set(ALL_ATTENTION_FUNCTIONS.valid_keys())
    assert set(installed.attention_implementations()) == {"eager", *names}


def test_optimizers_need_the_packages_that_transformers_imports() -> None:
    from transformers import TrainingArguments
    from transformers.trainer_optimizer import _OPTIMIZER_HANDLERS, OptimizerContext

    packages = installed.optimizer_packages()
    for name, handler in _OPTIMIZER_HANDLERS.items():
        args = TrainingArguments(output_dir="x", optim=name, use_cpu=True, report_to="none")
        if name in packages and importlib.util.find_spec(packages[name]) is None:
            context = OptimizerContext(args, None, {}, {}, {})
            with pytest.raises((ImportError, ValueError)):
                handler(context)
            found = dict(run_inputs.package_faults({"optim": str(name.value)}))
            assert packages[name] in found["training.optim"]
    assert packages["adamw_8bit"] == "bitsandbytes"
    assert not {"adamw_torch", "adafactor", "sgd", "adagrad", "rmsprop"} & packages.keys()


def test_packages_that_are_missing_here_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *_: name == "tensorboardX" or None
    )
    training = {"report_to": ["wandb", "tensorboard", "flyte"], "use_liger_kernel": True}

    monkeypatch.setattr(run_inputs, "reporters", lambda: ("wandb", "tensorboard", "flyte"))
    monkeypatch.setattr(installed, "optimizer_packages", dict)
    assert list(run_inputs.package_faults(training)) == [
        ("training.report_to", "wandb needs wandb, which is not installed"),
        ("training.report_to", "flyte needs flytekit, which is not installed"),
        ("training.use_liger_kernel", "it needs liger_kernel, which is not installed"),
    ]
    assert list(run_inputs.package_faults({"report_to": "all"})) == []
