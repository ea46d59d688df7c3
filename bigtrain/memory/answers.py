"""The process that answers `questions`: one question as JSON on stdin, its answer on stdout.

`{"kind": "shapes", "config" | "name", …}`: every parameter's name, shape and dtype, from the model
on the meta device. `{"kind": "trace", …}`: the activations of one micro-batch, from the real model
on fake tensors: no memory is taken, whatever the model's size. Where the model can't be made, the
last line on stderr says why.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations import moe
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.pytorch_utils import Conv1D

from bigtrain.engine.casting import cast_weights
from bigtrain.memory.live_bytes import LiveBytes
from bigtrain.memory.questions import REFUSED
from bigtrain.model_section import add_adapters, gist

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def main() -> None:
    """Answer the one question on stdin."""
    question = json.load(sys.stdin)
    answers: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
        "shapes": _shapes,
        "trace": _trace,
    }
    try:
        answer = answers[question["kind"]](question)
    except Exception as error:  # whatever a model's own code raises
        sys.stderr.write(f"{type(error).__name__}: {gist(error)}\n")
        sys.exit(1 if isinstance(error, (ImportError, MemoryError)) else REFUSED)
    sys.stdout.write("\n" + json.dumps(answer) + "\n")


def _shapes(question: Mapping[str, Any]) -> dict[str, Any]:
    with torch.device("meta"):
        model = _make_model(question)
    transposed = {id(module.weight) for module in model.modules() if isinstance(module, Conv1D)}
    parameters = [
        {
            "name": name,
            "shape": list(parameter.shape),
            "dtype": str(parameter.dtype).removeprefix("torch."),
            "trained": parameter.requires_grad,
            "transposed": id(parameter) in transposed,
        }
        for name, parameter in model.named_parameters()
    ]
    return {"parameters": parameters, "config": _plain(model.config.to_dict())}


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    kept = (int, float, str, bool, type(None))
    plain = {key: value for key, value in config.items() if isinstance(value, kept)}
    inner = config.get("text_config")
    return {**plain, "text_config": _plain(inner)} if isinstance(inner, Mapping) else plain


def _make_model(question: Mapping[str, Any], **options: Any) -> Any:
    dtype = _DTYPES.get(question.get("dtype") or "")
    if question.get("config"):
        fields = dict(question["config"])
        config = CONFIG_MAPPING[fields.pop("model_type")](**fields)
    else:
        config = AutoConfig.from_pretrained(
            question["name"], revision=question.get("revision") or "main"
        )
    stored = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    return AutoModelForCausalLM.from_config(config, dtype=dtype or stored, **options)


def _trace(question: Mapping[str, Any]) -> dict[str, Any]:
    compute = _DTYPES[question["compute_dtype"]]
    options = {}
    if question.get("attn_implementation"):
        options["attn_implementation"] = question["attn_implementation"]
    with torch.device("meta"):
        model = _make_model({**question, "dtype": question["weights_dtype"]}, **options)
        model = _adapted(model, question.get("lora"))
        if question.get("lora") and not question["autocast"]:
            model = model.to(compute)  # adapters, too, compute in what the engine gathers them in
        cast_weights(model, compute if question["cast_weights"] else None)
    model.config.use_cache = False
    if question["recompute"]:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if compute is not torch.bfloat16:
        # The kernel for experts knows bf16 alone on fake tensors; its stand-in keeps the same.
        moe._can_use_grouped_mm = lambda *_: False
    with FakeTensorMode(allow_non_fake_inputs=True):
        _make_fake(model)
        autocast = question["autocast"]
        context = torch.autocast("cpu", dtype=compute) if autocast else nullcontext()
        meter = _Meter(model)
        size = (question["sequences"], question["sequence_length"])
        with meter:
            ids = torch.zeros(size, dtype=torch.int64)
            with context:
                loss = model.train()(input_ids=ids, labels=ids).loss
            loss.backward()
    return {"head": meter.peaks[-1], "layers": meter.peaks[:-1], "fixed": 2 * ids.nbytes}


def _adapted(model: Any, lora: Mapping[str, Any] | None) -> Any:
    return add_adapters(model, lora) if lora else model


def _make_fake(model: nn.Module) -> None:
    """Give every parameter and buffer a fake tensor on the CPU in place of its meta tensor."""
    made: dict[int, Any] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in made:
                fake = torch.empty(parameter.shape, dtype=parameter.dtype)
                made[id(parameter)] = nn.Parameter(fake, requires_grad=parameter.requires_grad)
            module._parameters[name] = made[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


class _Meter(LiveBytes):
    """Live bytes of all that is made while it is on, but for the parameters' gradients.

    `peaks[k]` is the most during the backward pass of layer k, `peaks[-1]` the most before it
    reaches the last layer: in the forward pass and in the head.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        layers = _layers(model)
        self.peaks = [0] * (len(layers) + 1)
        self._phase = len(layers)
        for parameter in model.parameters():
            self.forget(parameter)
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._subtract)
        for index, layer in enumerate(layers):
            layer.register_forward_hook(self._watch(index))

    def changed(self) -> None:
        self.peaks[self._phase] = max(self.peaks[self._phase], self.live)

    def _subtract(self, parameter: Tensor) -> None:
        """A gradient is the engine's to count."""
        if parameter.grad is not None:
            self.forget(parameter.grad)

    def _watch(self, index: int) -> Callable[[Any, Any, Any], None]:
        def enter(_: Tensor) -> None:
            self._phase = index
            self.changed()

        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            if hidden.requires_grad:
                hidden.register_hook(enter)

        return hook


def _layers(model: nn.Module) -> list[nn.Module]:
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    found = max(lists, key=lambda members: sum(p.numel() for p in members.parameters()))
    return list(found)


if __name__ == "__main__":
    main()
