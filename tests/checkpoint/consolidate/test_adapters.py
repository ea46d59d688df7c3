"""LoRA adapters: what PEFT reads of them, and what PEFT merges."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig

from bigtrain.checkpoint.consolidate import consolidate
from bigtrain.errors import CheckpointError

peft = pytest.importorskip("peft")

TOKENS = torch.arange(12)[None]
LORA: dict[str, Any] = {
    "r": 4,
    "lora_alpha": 24,
    "target_modules": ["q_proj", "down_proj", "embed_tokens"],
    "modules_to_save": ["lm_head"],
    "alpha_pattern": {"layers.1.self_attn.q_proj": 3},
    "task_type": "CAUSAL_LM",
}


def llama() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=51,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=67,
    )
    return AutoModelForCausalLM.from_config(config)


def adapted(model: Any, options: dict[str, Any]) -> Any:
    """As if trained: no part of the adapter is zero, no saved module as it was."""
    model = peft.get_peft_model(model, peft.LoraConfig(**options))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
    return model.eval()


def write_live(model: Any, path: Path, *, prefix: str = "", trained_only: bool = False) -> Path:
    """A checkpoint of the whole live model, as sharded engines save it, or of what was trained."""
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    state = {
        prefix + name: value
        for name, value in model.state_dict().items()
        if name in trained or not trained_only
    }
    dcp.save({"model": state}, checkpoint_id=str(path), no_dist=True)
    model.peft_config["default"].save_pretrained(path)
    model.config.save_pretrained(path)
    return path


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=TOKENS).logits
    return found


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
def test_peft_loads_the_adapter_of_a_live_model(prefix: str, tmp_path: Path) -> None:
    base = llama()
    model = adapted(llama(), LORA)

    consolidate(write_live(model, tmp_path / "in", prefix=prefix), tmp_path / "out")

    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors"}
    model.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    theirs = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    ours = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "out").eval()
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("form", ["safetensors", "torch"])
@pytest.mark.parametrize("rslora", [False, True])
def test_merged_is_what_peft_merges(form: str, rslora: bool, tmp_path: Path) -> None:
    options = LORA | ({"use_rslora": True, "alpha_pattern": {}} if rslora else {})
    model = adapted(llama(), options)
    source = write_live(model, tmp_path / "in")

    consolidate(source, tmp_path / "out", merge_adapter=True, format=form, verify=True)

    expected = model.merge_and_unload()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ours, theirs = loaded.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logits(loaded), logits(expected), rtol=1e-4, atol=1e-5)
    assert not (tmp_path / "out" / "adapter_config.json").exists()


@pytest.mark.parametrize("beginning", [True, False, "gaussian", "orthogonal", "mica"])
def test_beginnings_that_leave_the_model_as_it_is_are_merged(
    beginning: bool | str, tmp_path: Path
) -> None:
    llama().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    targets = ["q_proj"] if beginning == "orthogonal" else LORA["target_modules"]
    model = adapted(base, LORA | {"init_lora_weights": beginning, "target_modules": targets})
    model.save_pretrained(tmp_path / "in", save_embedding_layers=False)

    consolidate(tmp_path / "in", tmp_path / "out", merge_adapter=True)

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-5)


def test_pissa_merges_with_its_own_changed_base_and_not_with_the_first_one(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    targets = ["q_proj", "down_proj"]
    model = adapted(base, LORA | {"init_lora_weights": "pissa", "target_modules": targets})
    model.save_pretrained(tmp_path / "in", save_embedding_layers=False)

    consolidate(write_live(model, tmp_path / "live"), tmp_path / "out", merge_adapter=True)

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-5)
    with pytest.raises(CheckpointError, match=r"its beginning \(pissa\) changed the model's own"):
        consolidate(tmp_path / "in", tmp_path / "no", merge_adapter=True)


def test_an_adapter_alone_is_merged_into_the_model_that_it_names(tmp_path: Path) -> None:
    llama().to(torch.bfloat16).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = adapted(base, LORA)
    model.save_pretrained(tmp_path / "in", save_embedding_layers=False)

    summary = consolidate(tmp_path / "in", tmp_path / "out", merge_adapter=True, verify=True)

    expected = model.merge_and_unload().state_dict()
    ours = load_file(tmp_path / "out" / "model.safetensors")
    assert f"on {tmp_path / 'base'}" in summary.kind
    for name, value in ours.items():
        assert value.dtype == torch.bfloat16 or "lm_head" in name
        torch.testing.assert_close(value.float(), expected[name].float(), rtol=0.01, atol=0.01)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_layers_that_are_stored_transposed_are_merged_so(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=67))
    options = {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "r": 3}
    model = adapted(model, options)
    consolidate(write_live(model, tmp_path / "in"), tmp_path / "out", merge_adapter=True)
    expected = model.merge_and_unload()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(loaded), logits(expected), rtol=1e-4, atol=1e-5)


def test_a_matrix_of_several_tiles_is_merged_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bigtrain.checkpoint.consolidate import stream

    monkeypatch.setattr(stream, "_TILE_BYTES", 1000)
    model = adapted(llama(), LORA)
    consolidate(write_live(model, tmp_path / "in"), tmp_path / "out", merge_adapter=True)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-5)


def test_factors_as_large_as_the_model_are_merged_by_pieces_and_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bigtrain.checkpoint.consolidate import product, stream

    for module, name, nbytes in (
        (stream, "_MERGED_BYTES", 4000),
        (product, "_PIECE_BYTES", 1600),
        (product, "_WHOLE_BYTES", 0),
        (product, "_READ_BYTES", 300),
    ):
        monkeypatch.setattr(module, name, nbytes)
    model = adapted(llama(), LORA | {"r": 12})
    source = write_live(model, tmp_path / "in")

    consolidate(source, tmp_path / "out", merge_adapter=True, verify=True)

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-3, atol=1e-4)
    factor = model.state_dict()[
        "base_model.model.model.layers.0.mlp.down_proj.lora_B.default.weight"
    ]
    flip_a_bit(source, factor.numpy().tobytes())
    with pytest.raises(CheckpointError, match=r"(?s)checksum differs.*layers\.0\.mlp\.down_proj"):
        consolidate(source, tmp_path / "again", merge_adapter=True, trust_times=True)


def flip_a_bit(source: Path, content: bytes) -> None:
    """In the middle of these bytes, wherever they lie."""
    for path in source.glob("*.distcp"):
        stored = bytearray(path.read_bytes())
        if (at := stored.find(content)) >= 0:
            stored[at + len(content) // 2] ^= 4
            path.write_bytes(stored)
            return
    raise AssertionError("it is nowhere")


def test_an_adapter_takes_little_memory_however_large_its_factors(tmp_path: Path) -> None:
    # Both factors whole would take 120 MB in bf16 and float32.
    rows, columns, rank = 20_000, 252, 1016
    for name in ("base", "in"):
        (tmp_path / name).mkdir()
    weight = {"l.weight": torch.empty(rows, columns).normal_()}
    save_file(weight, tmp_path / "base" / "model.safetensors")
    factors = {"lora_A.weight": (rank, columns), "lora_B.weight": (rows, rank)}
    stored = {
        f"base_model.model.l.{name}": torch.empty(shape, dtype=torch.bfloat16).normal_()
        for name, shape in factors.items()
    }
    save_file(stored, tmp_path / "in" / "adapter_model.safetensors")
    peft.LoraConfig(r=rank, base_model_name_or_path=str(tmp_path / "base")).save_pretrained(
        tmp_path / "in"
    )
    code = (
        "import sys; from bigtrain.checkpoint.consolidate import consolidate\n"
        "consolidate(*sys.argv[1:3], merge_adapter=True)\n"
        "print(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "in"), str(tmp_path / "out")]

    done = subprocess.run(command, capture_output=True, text=True, check=True)

    assert int(done.stdout.split()[1]) < 100_000  # KiB


def without_config(source: Path) -> None:
    (source / "adapter_config.json").unlink()


def with_dora(source: Path) -> None:
    change(source, use_dora=True)


def as_another_kind(source: Path) -> None:
    change(source, peft_type="LOHA")


def change(source: Path, **fields: object) -> None:
    path = source / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (without_config, "there is no adapter_config.json beside the adapter"),
        (with_dora, "it uses DoRA, which can't be merged here; merge it by PEFT's"),
        (as_another_kind, "it is a LOHA adapter, which can't be merged here"),
    ],
)
def test_what_can_not_be_merged_is_refused(
    spoil: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    source = write_live(adapted(llama(), LORA), tmp_path / "in")
    spoil(source)
    with pytest.raises(CheckpointError, match=message):
        consolidate(source, tmp_path / "out", merge_adapter=True)


def test_an_adapter_whose_model_is_not_here_is_refused(tmp_path: Path) -> None:
    adapted(llama(), LORA).save_pretrained(tmp_path / "in", save_embedding_layers=False)
    change(tmp_path / "in", base_model_name_or_path="someone/some-model")
    with pytest.raises(CheckpointError, match="its model 'someone/some-model' is no directory"):
        consolidate(tmp_path / "in", tmp_path / "out", merge_adapter=True)


def test_nothing_to_merge_is_said(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    save_file({"w": torch.randn(3)}, tmp_path / "in" / "model.safetensors")
    with pytest.raises(CheckpointError, match="holds no LoRA adapter to merge"):
        consolidate(tmp_path / "in", tmp_path / "out", merge_adapter=True)


def adapter_alone(path: Path, **fields: object) -> Path:
    """Of one square layer, with its model beside it."""
    for name in ("base", "in"):
        (path / name).mkdir(parents=True)
    save_file({"l.weight": torch.zeros(8, 8)}, path / "base" / "model.safetensors")
    factors = {"base_model.model.l.lora_A.weight": torch.ones(1, 8)}
    factors["base_model.model.l.lora_B.weight"] = torch.ones(8, 1)
    save_file(factors, path / "in" / "adapter_model.safetensors")
    config = peft.LoraConfig(r=1, lora_alpha=1, base_model_name_or_path=str(path / "base"))
    config.save_pretrained(path / "in")
    change(path / "in", **fields)
    return path / "in"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        *[
            ({"init_lora_weights": start}, rf"its beginning \({start}\) changed the model's own")
            for start in ("pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga")
        ],
        ({"init_lora_weights": "new"}, r"its beginning \(new\) is not known here, and may have"),
        ({"some_later_option": {"x": 1}}, "it uses some_later_option, which can't be merged"),
        ({"lora_alpha": "strong"}, "lora_alpha is 'strong', which PEFT never writes"),
        ({"lora_alpha": 10**400}, "lora_alpha is .* which PEFT never writes"),
        ({"alpha_pattern": {"(": 1}}, "alpha_pattern is .* which PEFT never writes"),
        ({"alpha_pattern": [1]}, "alpha_pattern is .* which PEFT never writes"),
        ({"rank_pattern": {"l": "1"}}, "rank_pattern is .* which PEFT never writes"),
        ({"r": 0}, "r is 0, which PEFT never writes"),
        ({"r": "1"}, "r is '1', which PEFT never writes"),
        ({"r": 2}, r"l\.weight is adapted with rank 1, and its configuration says 2"),
        ({"rank_pattern": {"l": 3}}, "adapted with rank 1, and its configuration says 3"),
        ({"base_model_name_or_path": 5}, "base_model_name_or_path is 5, which PEFT never"),
        ({"use_qalora": True}, "it uses use_qalora, which can't be merged"),
        ({"alora_invocation_tokens": [1]}, "it uses alora_invocation_tokens"),
        ({"layer_replication": [[0, 1]]}, "it uses layer_replication"),
        ({"fan_in_fan_out": True}, "is square, and PEFT follows fan_in_fan_out in some"),
    ],
)
def test_what_would_merge_into_other_weights_is_refused(
    fields: dict[str, object], message: str, tmp_path: Path
) -> None:
    source = adapter_alone(tmp_path, **fields)
    with pytest.raises(CheckpointError, match=message):
        consolidate(source, tmp_path / "out", merge_adapter=True)
