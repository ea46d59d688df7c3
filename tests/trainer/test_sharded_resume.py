"""Going on in the middle of an epoch on two ranks: exactly, with an adapter too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from bigtrain.topology import RankInfo
from tests.engine.harness import run_ranks
from tests.trainer.samples import Sentences, Stream, losses, tiny_llama, trainer
from tests.trainer.test_resume_data import Ragged, _padded

HALF = 3
ENGINES: dict[str, dict[str, Any]] = {
    "ddp": {},
    "fsdp": {"fsdp": "full_shard"},
    "zero2": {"deepspeed": {"zero_optimization": {"stage": 2}}},
    "zero3": {"deepspeed": {"zero_optimization": {"stage": 3}}},
}
KINDS: dict[str, dict[str, Any]] = {
    "iterable": {"data": Stream, "max_steps": 7},
    "grouped by length": {
        "data": Ragged,
        "train_sampling_strategy": "group_by_length",
        "data_collator": _padded,
    },
    "workers": {"dataloader_num_workers": 2},
    "accumulation": {"gradient_accumulation_steps": 2},
}
EVERY_ENGINE = [
    pytest.param(name, marks=[] if name == "fsdp" else pytest.mark.slow) for name in ENGINES
]


def _whole_and_rest(world: RankInfo, folder: str, engine: str) -> dict[str, Any]:
    """Losses of each kind of run, as it ran through and as it was gone on with."""
    found = {}
    for number, (kind, changed) in enumerate(KINDS.items()):
        place = Path(folder) / str(number)
        runs = []
        for resume in (None, str(place / f"checkpoint-{HALF}")):
            fields = {"per_device_train_batch_size": 2, **changed, **ENGINES[engine]}
            data = fields.pop("data", Sentences)(44 if "accumulation" in kind else 22)
            run = trainer(
                place,
                model=tiny_llama(dropout=0.1),
                data=data,
                save_strategy="steps",
                save_steps=HALF,
                **fields,
            )
            run.train(resume_from_checkpoint=resume)
            runs.append(losses(run))
        found[kind] = tuple(runs)
    return found


@pytest.mark.parametrize("engine", EVERY_ENGINE)
def test_ranks_go_on_in_mid_epoch_to_the_last_bit(tmp_path: Path, engine: str) -> None:
    for kind, (whole, rest) in run_ranks(2, _whole_and_rest, str(tmp_path), engine)[0].items():
        assert whole == rest and len(whole) > 2 * HALF, kind


# ---- Adapters ----


def _adapted(seed: int) -> Any:
    peft = pytest.importorskip("peft")
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return peft.get_peft_model(tiny_llama(), config)


def _adapter(world: RankInfo, folder: str, engine: str) -> Any:
    place = Path(folder)
    runs = []
    for seed, resume in ((0, None), (1, str(place / "checkpoint-4"))):
        run = trainer(
            place,
            model=_adapted(seed),
            per_device_train_batch_size=2,
            save_strategy="steps",
            save_steps=4,
            **ENGINES[engine],
        )
        run.train(resume_from_checkpoint=resume)
        runs.append(losses(run))
    run.save_model(str(place / "adapter"))
    whole = dict(run.engine.full_weights())
    return runs, whole


@pytest.mark.parametrize("engine", EVERY_ENGINE)
def test_ranks_save_and_resume_an_adapter_and_export_it_alone(tmp_path: Path, engine: str) -> None:
    peft = pytest.importorskip("peft")
    (whole, rest), weights = run_ranks(2, _adapter, str(tmp_path), engine)[0]
    assert whole == rest and len(whole) == 12
    names = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json"} <= names
    assert "model.safetensors" not in names
    loaded = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter").state_dict()
    adapters = [name for name in weights if "lora_" in name]
    assert len(adapters) == 8
    assert all(torch.equal(loaded[name], weights[name]) for name in adapters)
