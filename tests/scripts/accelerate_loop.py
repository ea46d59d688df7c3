"""A script as people have it: accelerate's Accelerator around a loop of its own."""

import json
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM


def main() -> None:
    accelerator = Accelerator(cpu="--use_cpu" in sys.argv)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            vocab_size=64,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    rows = torch.randint(0, 64, (16, 16), generator=torch.Generator().manual_seed(0))
    loader = DataLoader(rows, batch_size=2)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    losses = []
    for batch in loader:
        loss = model(input_ids=batch, labels=batch).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(accelerator.gather(loss.detach().reshape(1)).mean().item())
    parameter = next(accelerator.unwrap_model(model).parameters())
    seen = {
        "world": accelerator.num_processes,
        "kind": str(accelerator.distributed_type),
        "parameter": type(parameter).__name__,
        "is_cut": hasattr(parameter, "ds_tensor") or hasattr(parameter, "device_mesh"),
        "optimizer": type(optimizer).__name__,
        "losses": losses,
    }
    path = Path(sys.argv[1], f"rank-{accelerator.process_index}.json")
    path.write_text(json.dumps(seen))
    accelerator.end_training()


if __name__ == "__main__":
    main()
