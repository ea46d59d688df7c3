"""Sharded checkpoints of a Llama, made on the spot by two ranks, for benchmarks to read."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

_WORLD = 2
_VOCABULARY = 32_000


def llama_shapes(gigabytes: float) -> OrderedDict[str, tuple[int, ...]]:
    """Names and shapes of a Llama whose fp32 weights take about that much."""
    hidden = 1024 if gigabytes < 2 else 2048
    layer = 12 * hidden * hidden + 2 * hidden
    layers = max(1, round((gigabytes * 1e9 / 4 - 2 * _VOCABULARY * hidden) / layer))
    shapes: OrderedDict[str, tuple[int, ...]] = OrderedDict()
    shapes["model.embed_tokens.weight"] = (_VOCABULARY, hidden)
    for number in range(layers):
        begin = f"model.layers.{number}"
        for name in ("q_proj", "k_proj", "v_proj"):
            shapes[f"{begin}.self_attn.{name}.weight"] = (hidden, hidden)
        for name in ("gate_proj", "up_proj", "down_proj"):
            shapes[f"{begin}.mlp.{name}.weight"] = (3 * hidden, hidden)
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{begin}.{name}.weight"] = (hidden,)
    shapes["model.norm.weight"] = (hidden,)
    shapes["lm_head.weight"] = (_VOCABULARY, hidden)
    return shapes


def write_zero(out: Path, stage: int, shapes: OrderedDict[str, tuple[int, ...]]) -> None:
    """What DeepSpeed 0.19 saves of one parameter group."""
    import torch
    from deepspeed.runtime.zero.config import ZeroStageEnum

    step = out / "global_step1"
    step.mkdir(parents=True)
    (out / "latest").write_text(step.name)
    sizes = [math.prod(shape) for shape in shapes.values()]
    total = sum(sizes)
    share = -(-total // (2 * _WORLD)) * 2 if stage == 2 else sum(-(-n // _WORLD) for n in sizes)
    names = [OrderedDict((name, torch.Size(shape)) for name, shape in shapes.items())]
    common: dict[str, Any] = {
        "buffer_names": [],
        "param_shapes": names,
        "frozen_param_shapes": {},
        "frozen_param_fragments": {},
        "shared_params": {},
        "global_steps": 1,
        "mp_world_size": 1,
        "ds_version": "0.19.8",
    }
    for rank in range(_WORLD):
        masters = torch.empty(share).uniform_(-1, 1)
        padding = share * _WORLD - total if stage == 2 and rank == _WORLD - 1 else 0
        moments = {"step": torch.tensor(1.0), "exp_avg": masters, "exp_avg_sq": masters}
        inner = {"state": {0: moments}, "param_groups": [{"lr": 1e-3, "params": [0]}]}
        state: dict[str, Any] = {"zero_stage": ZeroStageEnum(stage)}
        if stage == 2:
            state |= {
                "base_optimizer_state": inner,
                "single_partition_of_fp32_groups": [masters[: share - padding]],
                "group_paddings": [padding],
                "param_alignment_paddings": [[0] * len(shapes)],
                "partition_count": [_WORLD],
            }
        else:
            empty = OrderedDict((name, torch.empty(0)) for name in shapes)
            name = f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt"
            torch.save({"module": empty, **common}, step / name)
            state |= {
                "optimizer_state_dict": inner,
                "fp32_flat_groups": [masters],
                "partition_count": _WORLD,
            }
        name = f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        torch.save({"optimizer_state_dict": state}, step / name)
    if stage == 2:
        flat, at = torch.zeros(total, dtype=torch.bfloat16), 0
        module: OrderedDict[str, Any] = OrderedDict()
        for (name, shape), size in zip(shapes.items(), sizes, strict=True):
            module[name], at = flat[at : at + size].view(shape), at + size
        torch.save({"module": module, **common}, step / "mp_rank_00_model_states.pt")


def write_dcp(out: Path, shapes: OrderedDict[str, tuple[int, ...]]) -> None:
    """By torch itself, on two ranks."""
    script = (
        "import json, os, sys\n"
        "import torch, torch.distributed as dist, torch.distributed.checkpoint as dcp\n"
        "from torch.distributed.device_mesh import init_device_mesh\n"
        "from torch.distributed.tensor import DTensor, Shard\n"
        "dist.init_process_group('gloo')\n"
        f"mesh = init_device_mesh('cpu', ({_WORLD},))\n"
        "local = lambda shape: torch.empty(shape[0] // 2, *shape[1:]).uniform_(-1, 1)\n"
        "state = {name: DTensor.from_local(local(shape), mesh, [Shard(0)])\n"
        "         for name, shape in json.loads(sys.argv[2]).items()}\n"
        "dcp.save({'model': state}, checkpoint_id=sys.argv[1])\n"
        "where = sys.argv[1].replace('dcp', 'hf')\n"
        "writer = dcp.HuggingFaceStorageWriter(where, save_distributed=True,\n"
        "    fqn_to_index_mapping={name: 1 for name in state})\n"
        "dcp.save(state, storage_writer=writer)\n"
        "json.dump(list(state), open(where + '/names.json', 'w'))\n"
        "dist.barrier()\n"
        "os._exit(0)  # on a busy machine, gloo's threads abort a process that tidies up\n"
    )
    path = out.with_name("write_dcp.py")
    path.write_text(script)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*launcher, f"--nproc-per-node={_WORLD}", str(path), str(out), json.dumps(shapes)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
