"""A script as people have it: it goes as transformers' run_clm_no_trainer.py does. One loop around
accelerate's Accelerator, with accumulation, clipping, a schedule, gathered evaluation, whole states
that it goes on from, and a model saved in the end."""

import argparse
import json
import math
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, ProjectConfiguration, set_seed
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    default_data_collator,
    get_scheduler,
)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model_name_or_path", required=True)
    parser.add_argument("--train_file", type=Path, required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--block_size", type=int, default=32)
    parser.add_argument("--per_device_train_batch_size", type=int, default=2)
    parser.add_argument("--gradient_accumulation_steps", type=int, default=2)
    parser.add_argument("--max_train_steps", type=int, default=6)
    parser.add_argument("--checkpointing_steps", type=int, default=3)
    parser.add_argument("--resume_from_checkpoint", type=Path)
    parser.add_argument("--learning_rate", type=float, default=1e-2)
    parser.add_argument("--max_grad_norm", type=float, default=1.0)
    return parser.parse_args()


def blocks_of(path: Path, tokenizer, size: int) -> list[dict[str, list[int]]]:
    ids = tokenizer(path.read_text())["input_ids"]
    cut = [ids[i : i + size] for i in range(0, len(ids) - size, size)]
    return [{"input_ids": row, "labels": row} for row in cut]


def main() -> None:
    args = parse_args()
    accelerator = Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True),
        project_config=ProjectConfiguration(project_dir=str(args.output_dir)),
    )
    set_seed(0)
    if accelerator.is_main_process:
        args.output_dir.mkdir(parents=True, exist_ok=True)
    accelerator.wait_for_everyone()

    tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
    model = AutoModelForCausalLM.from_pretrained(args.model_name_or_path)
    with accelerator.main_process_first():
        rows = blocks_of(args.train_file, tokenizer, args.block_size)
    held_out, rows = rows[:7], rows[7:]  # seven: the last batch of the ranks isn't full
    train = DataLoader(
        rows,
        shuffle=True,
        collate_fn=default_data_collator,
        batch_size=args.per_device_train_batch_size,
    )
    evaluated = DataLoader(held_out, collate_fn=default_data_collator, batch_size=2)

    without_decay = ["bias", "layer_norm.weight", "layernorm.weight", "norm.weight"]
    named = list(model.named_parameters())
    groups = [
        {"params": [p for n, p in named if not n.endswith(tuple(without_decay))]},
        {"params": [p for n, p in named if n.endswith(tuple(without_decay))], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, weight_decay=0.1)
    schedule = get_scheduler(
        "linear",
        optimizer,
        num_warmup_steps=2 * accelerator.num_processes,
        num_training_steps=args.max_train_steps * accelerator.num_processes,
    )
    model, optimizer, train, evaluated, schedule = accelerator.prepare(
        model, optimizer, train, evaluated, schedule
    )

    done = 0
    if args.resume_from_checkpoint is not None:
        accelerator.load_state(str(args.resume_from_checkpoint))
        done = int(args.resume_from_checkpoint.name.removeprefix("step_"))
    losses: dict[int, float] = {}
    norms: dict[int, float] = {}
    batches = accelerator.skip_first_batches(train, done * args.gradient_accumulation_steps)
    model.train()
    total = torch.zeros(())
    for batch in batches:
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            total += loss.detach().float()
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                norm = accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            done += 1
            mean = accelerator.gather(total.reshape(1)).mean() / args.gradient_accumulation_steps
            losses[done] = mean.item()
            if norm is not None:
                norms[done] = float(norm)
            total.zero_()
            if done % args.checkpointing_steps == 0:
                accelerator.save_state(str(args.output_dir / f"step_{done}"))
        if done >= args.max_train_steps:
            break

    model.eval()
    found = []
    for batch in evaluated:
        with torch.no_grad():
            loss = model(**batch).loss
        repeated = loss.repeat(batch["input_ids"].shape[0])
        found.append(accelerator.gather_for_metrics(repeated))
    each = torch.cat(found)
    accelerator.print(f"perplexity {math.exp(each.mean().item()):.3f}")

    accelerator.wait_for_everyone()
    accelerator.unwrap_model(model).save_pretrained(
        args.output_dir,
        is_main_process=accelerator.is_main_process,
        save_function=accelerator.save,
        state_dict=accelerator.get_state_dict(model),
    )
    if accelerator.is_main_process:
        tokenizer.save_pretrained(args.output_dir)
    _leave_a_note(accelerator, model, args, losses, norms, each)
    accelerator.end_training()


def _leave_a_note(accelerator, model, args, losses, norms, each) -> None:
    """What the test looks at; the only part that such scripts don't have."""
    parameters = accelerator.unwrap_model(model).parameters()
    seen = {
        "world": accelerator.num_processes,
        "kind": str(accelerator.distributed_type),
        "elements": sum(_held(parameter) for parameter in parameters),
        "losses": losses,
        "norms": norms,
        "evaluated": each.tolist(),
    }
    path = args.output_dir / f"rank-{accelerator.process_index}.json"
    path.write_text(json.dumps(seen))


def _held(parameter: torch.nn.Parameter) -> int:
    """Elements of it that this rank has."""
    if hasattr(parameter, "ds_tensor"):
        return parameter.ds_tensor.numel()
    return (parameter.to_local() if hasattr(parameter, "to_local") else parameter).numel()


if __name__ == "__main__":
    main()
