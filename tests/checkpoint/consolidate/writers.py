"""Writes real checkpoints by DeepSpeed and torch on several ranks, and what their own tools say
is in them. Run as a program, so that its imports are paid once for all ranks and kinds.

    writers.py OUT WORLD [WORLD …]

    OUT/<kind>-<world>/            the checkpoint
    OUT/<kind>-<world>.expected.pt the state dict that the format's own tool makes of it
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.update(DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo")

import deepspeed
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accelerate.utils.fsdp_utils import merge_fsdp_weights
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from transformers import LlamaConfig, LlamaForCausalLM

torch.set_num_threads(1)

ZERO = [f"zero{stage}{suffix}" for stage in (1, 2, 3) for suffix in ("", "_fp32")]
ZERO += ["llama_zero2", "llama_zero3"]


class Odd(nn.Module):
    """One element, odd shapes, fewer elements than ranks; frozen, tied; all buffer types."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(5, 7))
        self.scale = nn.Parameter(torch.tensor([1.5]))  # DeepSpeed can't broadcast a 0-dim one
        self.single = nn.Parameter(torch.randn(1))
        self.three = nn.Parameter(torch.randn(2, 3, 5))
        self.bias = nn.Parameter(torch.randn(3))
        self.frozen = nn.Parameter(torch.randn(4, 3), requires_grad=False)
        self.tied = self.first
        self.register_buffer("count", torch.tensor(7))
        self.register_buffer("mask", torch.tensor([True, False, True]))
        self.register_buffer("mean", torch.randn(3))
        self.register_buffer("hidden", torch.randn(3), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        total = (x @ self.first).sum() + self.tied.sum() * self.scale + self.frozen.sum()
        return total + self.three.sum() ** 2 + self.bias.sum() * self.single.sum()


def llama() -> LlamaForCausalLM:
    torch.manual_seed(1)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32,
            intermediate_size=51,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=67,
            tie_word_embeddings=True,
        )
    )


def write_zero(out: Path, world: int) -> None:
    for stage in (1, 2, 3):
        for bf16 in (True, False):
            torch.manual_seed(0)
            engine = _engine(Odd(), stage, bf16=bf16)
            for _ in range(2):
                x = torch.randn(4, 5, dtype=torch.bfloat16 if bf16 else torch.float32)
                engine.backward(engine(x).sum())
                engine.step()
            name = f"zero{stage}-{world}" if bf16 else f"zero{stage}_fp32-{world}"
            engine.save_checkpoint(str(out / name), tag="global_step2")
    for stage in (2, 3):
        engine = _engine(llama(), stage, bf16=False)
        tokens = torch.arange(12)[None]
        engine.backward(engine(input_ids=tokens, labels=tokens).loss)
        engine.step()
        target = out / f"llama_zero{stage}-{world}"
        engine.save_checkpoint(str(target))
        engine.eval()
        with torch.no_grad():
            logits = engine(input_ids=tokens).logits
        if dist.get_rank() == 0:
            engine.module.config.save_pretrained(target)
            torch.save(logits, target.with_name(f"{target.name}.logits.pt"))
    dist.barrier()


def _engine(model: nn.Module, stage: int, *, bf16: bool) -> Any:
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": bf16},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
    optimizer = torch.optim.AdamW(groups, lr=0.01)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def write_dcp(out: Path, world: int) -> None:
    """Cut by rows, by columns and by the middle dim; whole; more ranks than rows."""
    mesh = init_device_mesh("cpu", (world,))
    torch.manual_seed(3)
    tensors: dict[str, Any] = {
        "lm_head.weight": (torch.randn(7, 5), Shard(0)),
        "model.columns": (torch.randn(6, 11), Shard(1)),
        "model.middle": (torch.randn(3, 5, 4), Shard(1)),
        "model.few_rows": (torch.randn(1, 9), Shard(0)),
        "model.ints": (torch.arange(20).reshape(4, 5), Shard(1)),
        "model.bools": (torch.tensor([True, False, True]), Shard(0)),
        "model.half": (torch.randn(9, 2).to(torch.bfloat16), Shard(0)),
        "model.whole": (torch.randn(3), Replicate()),
    }
    state: dict[str, Any] = {
        name: distribute_tensor(value, mesh, [place]) for name, (value, place) in tensors.items()
    }
    state["model.scalar"] = torch.tensor(2.5)
    state["model.empty"] = torch.empty(0, 3)
    optimizer = {"state": {name: {"exp_avg": value} for name, value in state.items()}}
    dcp.save(state, checkpoint_id=str(out / f"dcp_bare-{world}"))
    dcp.save({"model": state, "optim": optimizer}, checkpoint_id=str(out / f"dcp_both-{world}"))
    fsdp = out / f"fsdp-{world}" / "pytorch_model_fsdp_0"
    dcp.save({"model": state}, checkpoint_id=str(fsdp))


def write_expected(out: Path, world: int) -> None:
    """What each format's own tool makes of it."""
    for kind in ZERO:
        expected = get_fp32_state_dict_from_zero_checkpoint(str(out / f"{kind}-{world}"))
        torch.save(dict(expected), out / f"{kind}-{world}.expected.pt")
    for kind in ("dcp_bare", "dcp_both"):
        target = out / f"{kind}-{world}.expected.pt"
        dcp_to_torch_save(out / f"{kind}-{world}", target)
        if kind == "dcp_both":
            torch.save(torch.load(target)["model"], target)
    merged = out / f"merged-{world}"
    merge_fsdp_weights(str(out / f"fsdp-{world}" / "pytorch_model_fsdp_0"), str(merged))
    torch.save(load_file(merged / "model.safetensors"), out / f"fsdp-{world}.expected.pt")


def on_ranks(world: int, function: Callable[[Path, int], None], out: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = set(_forked(world, port, function, out))
    while children:
        pid, code = os.waitpid(-1, 0)
        children.discard(pid)
        if code:
            for other in children:
                os.kill(other, signal.SIGKILL)
            sys.exit(f"{function.__name__} on {world} ranks: one failed with {code}")


def _forked(
    world: int, port: int, function: Callable[[Path, int], None], out: Path
) -> Iterator[int]:
    for rank in range(world):
        pid = os.fork()
        if pid:
            yield pid
            continue
        code = 1
        try:
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port}
            os.environ.update({name: str(value) for name, value in place.items()})
            os.environ["MASTER_ADDR"] = "127.0.0.1"
            # Compiled at its first use, for which ranks would wait on each other; not needed here.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
            deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
            function(out, world)
            dist.destroy_process_group()
            code = 0
        except Exception:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)


def main(out: Path, worlds: list[int]) -> None:
    for world in worlds:
        on_ranks(world, write_zero, out)
        on_ranks(world, write_dcp, out)
        write_expected(out, world)


if __name__ == "__main__":
    main(Path(sys.argv[1]), [int(world) for world in sys.argv[2:]])
