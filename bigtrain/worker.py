"""One rank of a run file's training: the plan in, a trained model out.

Started by bigtrain's agent with a plan, or by torchrun, srun or hand with a run file:

    torchrun --nproc-per-node 2 -m bigtrain.worker RUN.yaml --set training.max_steps=20
    python -m bigtrain.worker RUN.yaml

The order is the point: data is prepared before the ranks join, so that nobody waits for it inside
a collective, and the model is made by the engine, so that no rank holds more of it than it must.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from transformers import default_data_collator

from bigtrain import rank_logging
from bigtrain.checkpoint.agreement import attempt
from bigtrain.cluster.environment import LOG_DIR_VARIABLE, flight_recorder
from bigtrain.cluster.rendezvous import RefusedError
from bigtrain.data.dataset import PadBatch
from bigtrain.data.prepare import PreparedData, prepare
from bigtrain.device import choose_device
from bigtrain.engine import build_engine, process_group
from bigtrain.engine.protocol import Engine
from bigtrain.errors import BigtrainError, ConfigError
from bigtrain.model_section import ModelFactory, load_tokenizer, model_factory
from bigtrain.paths import expand_home
from bigtrain.plan import PLAN_VARIABLE, RunPlan, current_plan
from bigtrain.sample import as_lines, is_small, write_sample
from bigtrain.topology import RankInfo
from bigtrain.trainer.arguments import TrainingArguments
from bigtrain.trainer.stopping import EXIT_REQUEUE
from bigtrain.trainer.trainer import Trainer

# By name: run with -m, this module is __main__.
logger = logging.getLogger("bigtrain.worker")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Parts:
    """What a rank has before it meets the others."""

    args: TrainingArguments
    tokenizer: Any
    data: PreparedData
    factory: ModelFactory


def main(argv: Sequence[str] | None = None) -> int:
    """Train as this rank of the run that the environment's plan, or else `argv`, describes.

    Returns the exit code; raises BigtrainError for what a user can mend.
    """
    world = RankInfo.from_environment(os.environ)
    plan = current_plan(os.environ)
    rank_logging.set_up(world, has_agent=plan is not None)
    if plan is not None:
        # While it trains, the trainer saves first.
        for number in (signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, _leave_to_be_run_again)
        run(plan, world=world)
        return 0
    # An agent's ranks need no planning: not imported.
    from bigtrain.own_plan import own_logs, own_plan

    plan = own_plan(sys.argv[1:] if argv is None else argv, world=world, environment=os.environ)
    logs = own_logs(plan, world=world)
    rank_logging.keep(logs.rank(world.rank))
    os.environ.setdefault(LOG_DIR_VARIABLE, str(logs.directory))
    run(plan, world=world, is_own=True)
    return 0


def run(plan: RunPlan, *, world: RankInfo, is_own: bool = False) -> None:
    """The whole training of `plan` on this rank. All ranks call it.

    `is_own`: the ranks derived the plan themselves, and it is still to be recorded.
    """
    # Where no agent has said so: else DeepSpeed looks for a device itself, and warns.
    os.environ.setdefault("DS_ACCELERATOR", plan.device)
    device = choose_device(plan.device, world=world)
    parts = _prepare(plan, world)
    meeting = None
    if world.world_size > 1:
        _keep_flight_record(plan)
        meeting = _meet(plan, world)
        process_group.join(world, device=device, timeout_s=parts.args.ddp_timeout)
    if is_own:
        from bigtrain.own_agreement import agree
        from bigtrain.own_plan import record

        agree(plan, world=world)
        os.environ[PLAN_VARIABLE] = str(record(plan, world=world))
    engine = build_engine(plan.engine, world=world, device=device)
    trainer = _make_trainer(parts, engine)
    losses = _train(trainer, plan)
    # In no `finally`: after an error here the others may be inside a collective, and leaving in
    # order would wait for them. The launcher ends them; the exit handler of `join` does the rest.
    engine.close()
    process_group.leave()
    del meeting  # rank 0's store has served until now
    if world.is_main:
        _report(plan, parts, losses)


def _meet(plan: RunPlan, world: RankInfo) -> Any:
    """Ranks that srun started one by one find each other; other launchers have said where."""
    if world.source != "slurm" or "MASTER_ADDR" in os.environ:
        return None
    from bigtrain.slurm import ranks

    meeting = ranks.meet(plan, environment=os.environ)
    os.environ.update(meeting.variables)
    return meeting


def _leave_to_be_run_again(number: int, frame: FrameType | None) -> NoReturn:
    """At once: before and after the training there is nothing that the next start would miss."""
    os._exit(EXIT_REQUEUE)


def _prepare(plan: RunPlan, world: RankInfo) -> _Parts:
    args = _arguments(plan)
    root = Path(plan.working_dir)
    tokenizer = load_tokenizer(plan.tokenizer, model=plan.model, root=root)
    factory = model_factory(
        plan.model,
        tokenizer=tokenizer,
        sequence_length=int(plan.data["sequence_length"]),
        seed=args.seed,
        root=root,
    )
    data = prepare(plan.data, tokenizer, cache_root=_cache_root(plan.data), root=root)
    # Tokenising is done. Said before any DataLoader worker is forked, or each would warn of it.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if world.is_main:
        _introduce(plan, args, data)
    return _Parts(args=args, tokenizer=tokenizer, data=data, factory=factory)


def _arguments(plan: RunPlan) -> TrainingArguments:
    said = {"logging_dir": str(Path(plan.output_dir) / "tensorboard"), **plan.training}
    said["output_dir"] = plan.output_dir
    # They are the plan's engine by now, and transformers refuses FSDP1's words among them.
    said |= {"fsdp": None, "fsdp_config": None}
    try:
        return TrainingArguments(**said)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"training: {error}") from error


def _cache_root(section: Mapping[str, Any]) -> Path:
    if section.get("cache_dir"):
        return expand_home(section["cache_dir"], label="data.cache_dir")
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "bigtrain" / "data"


def _keep_flight_record(plan: RunPlan) -> None:
    """NCCL's last collectives, dumped when one hangs; whoever set the variables knows better."""
    if plan.device != "cuda":
        return
    directory = Path(plan.output_dir) / "logs" / f"attempt-{plan.attempt:02d}"
    directory.mkdir(parents=True, exist_ok=True)
    for name, value in flight_recorder(directory).items():
        os.environ.setdefault(name, value)


def _make_trainer(parts: _Parts, engine: Engine) -> Trainer:
    collator: Callable[..., Any] = default_data_collator
    if not parts.data.packed:
        token = parts.tokenizer.pad_token_id
        collator = PadBatch(parts.tokenizer.eos_token_id if token is None else token)
    return Trainer(
        model=engine.construct(parts.factory, parts.factory.skeleton),
        args=parts.args,
        data_collator=collator,
        train_dataset=parts.data.train,
        eval_dataset=parts.data.evaluation,
        processing_class=parts.tokenizer,
        engine=engine,
    )


def _train(trainer: Trainer, plan: RunPlan) -> tuple[float | None, float | None]:
    """Train, export, evaluate. Returns the first and the last evaluation loss; the first is None
    where there was one evaluation."""
    wants_evaluation = trainer.eval_dataset is not None and plan.training.get("do_eval", True)
    if _trains(plan):
        trainer.train()
        if trainer.args.export != "never":
            attempt(trainer.args.ranks, trainer.save_model)
        wants_evaluation = wants_evaluation and not _is_evaluated(trainer)
    else:
        trainer.load_resumed_weights()
    if wants_evaluation:
        trainer.evaluate()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    if not losses:
        return None, None
    return losses[0] if len(losses) > 1 else None, losses[-1]


def _trains(plan: RunPlan) -> bool:
    return bool(plan.training.get("do_train", True))


def _is_evaluated(trainer: Trainer) -> bool:
    """True where the last step's weights have been evaluated already."""
    step = trainer.state.global_step
    history = trainer.state.log_history
    return any("eval_loss" in entry and entry.get("step") == step for entry in history)


def _introduce(plan: RunPlan, args: TrainingArguments, data: PreparedData) -> None:
    evaluation = len(data.evaluation) if data.evaluation is not None else 0
    micro, accumulation = args.per_device_train_batch_size, args.gradient_accumulation_steps
    logger.info(
        "%s on %d × %s, %s; %s sequences to train on, %s to evaluate on; %d per optimizer step",
        plan.engine.name,
        plan.topology.world_size,
        plan.device,
        plan.engine.compute_dtype,
        f"{len(data.train):,}",
        f"{evaluation:,}",
        micro * accumulation * plan.topology.world_size,
    )


def _report(plan: RunPlan, parts: _Parts, losses: tuple[float | None, float | None]) -> None:
    first, last = losses
    if last is not None:
        before = "" if first is None else f"{first:.3f} → "
        logger.info("evaluation loss %s%.3f", before, last)
    if not _trains(plan):
        return
    directory = Path(plan.output_dir)
    is_exported = parts.args.export != "never"
    if is_exported and parts.data.evaluation is not None and is_small(directory):
        rows = range(min(16, len(parts.data.evaluation)))
        texts = [parts.data.evaluation[row]["input_ids"] for row in rows]
        _show_sample(directory, texts, seed=parts.args.seed)
    if is_exported:
        logger.info("model        %s", directory)
    if "tensorboard" in (parts.args.report_to or ()):
        logger.info("tensorboard  %s", parts.args.logging_dir)


def _show_sample(directory: Path, texts: list[Any], *, seed: int) -> None:
    try:
        sample = write_sample(directory, texts=texts, seed=seed)
    except Exception as error:  # of the model's own code, say: the run itself has ended well
        logger.info("no sample of the saved model: %s: %s", type(error).__name__, error)
        return
    logger.info("the saved model, loaded by transformers, goes on (▸):")
    for line in as_lines(*sample):
        logger.info(line)


def _command() -> int:
    """As `main`, for a rank without an agent: a user's mistake ends in its message alone."""
    try:
        return main()
    except RefusedError as error:
        return error.exit_code  # rank 0 has said why
    except BigtrainError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return error.exit_code


if __name__ == "__main__":
    sys.exit(_command())
