"""How long a training is, and where in it one is: in steps, epochs, batches and samples."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from bigtrain.checkpoint.manifest import Progress
from bigtrain.trainer.arguments import TrainingArguments


@dataclass(frozen=True, kw_only=True)
class Position:
    """Where in the data training goes on, where the number of steps alone does not tell."""

    epoch: int
    windows: int
    """Optimizer steps of now that hold the samples of the epoch that were seen."""
    repeated: int = 0
    """Samples that were seen and come again, being no whole step of now."""

    @classmethod
    def behind(cls, progress: Progress, *, batch_size: int, is_sized: bool) -> Position:
        """Behind what a checkpoint's run has seen, in steps of `batch_size` over all ranks.

        Data without a length is read in passes, and how many steps one has, only the run knew.
        """
        seen, epoch = progress.samples_in_epoch, int(progress.epoch)
        if not is_sized and seen >= progress.samples_seen:
            epoch = 0  # its epoch is a share of all steps, and at the last one a whole
        elif is_sized and epoch == progress.epoch:
            seen = 0  # saved at an epoch's end
        windows, repeated = divmod(seen, batch_size)
        return cls(epoch=epoch, windows=windows, repeated=repeated)


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long a training is, counted in all the ways that are needed."""

    max_steps: int
    num_epochs: int
    steps_per_epoch: int
    """Optimizer steps in an epoch."""
    batches_per_epoch: int
    """Micro-batches of one rank in an epoch."""
    num_examples: int
    num_train_samples: float
    global_batch_size: int

    @property
    def is_sized(self) -> bool:
        """Whether the data has a length; else it is read anew until all steps are done."""
        return self.num_epochs < sys.maxsize

    def after(self, step: int, position: Position, *, by_steps: bool) -> Schedule:
        """The same, gone on with after `step` steps of which some had another number of samples.

        The steps done stay counted. Training ends where the arguments put it: `by_steps` after as
        many, with the passes over the data that this takes; else at the end of the last epoch.
        """
        if not self.is_sized:  # one pass more may have as many steps as are left
            steps = self.steps_per_epoch + max(0, position.windows - step)
            accumulation = self.batches_per_epoch // self.steps_per_epoch
            return replace(self, steps_per_epoch=steps, batches_per_epoch=steps * accumulation)
        done = position.epoch * self.steps_per_epoch + position.windows
        if by_steps:
            passes = (done + self.max_steps - step) / self.steps_per_epoch
            return replace(self, num_epochs=math.ceil(passes))
        max_steps = step + max(0, self.max_steps - done)
        samples = self.num_train_samples * max_steps / self.max_steps
        return replace(self, max_steps=max_steps, num_train_samples=samples)

    @classmethod
    def of(cls, values: tuple[int, int, int, float, int, int, int]) -> Schedule:
        """What `set_initial_training_values` answers, which people override."""
        epochs, steps_per_epoch, examples, samples, global_batch, batches, steps = values
        return cls(
            max_steps=steps,
            num_epochs=epochs,
            steps_per_epoch=steps_per_epoch,
            batches_per_epoch=batches,
            num_examples=examples,
            num_train_samples=samples,
            global_batch_size=global_batch,
        )


def make_schedule(
    args: TrainingArguments,
    *,
    batches: int | None,
    num_examples: Callable[[], int],
    global_batch: int,
) -> Schedule:
    """By `max_steps`, else by epochs. `batches`: of one rank in an epoch; None where the data has
    no length, and then only `max_steps` can tell."""
    accumulation = args.gradient_accumulation_steps
    if not batches and args.max_steps <= 0:
        empty = (
            "; it has no batch at all: the data is empty, or less than one batch of all processes "
            "and dataloader_drop_last is set"
        )
        raise ValueError(
            "args.max_steps must be set to a positive value if dataloader does not have a "
            f"length, was {args.max_steps}{'' if batches is None else empty}"
        )
    by_steps = args.max_steps > 0
    if not batches:
        return Schedule(
            max_steps=args.max_steps,
            num_epochs=sys.maxsize,
            steps_per_epoch=args.max_steps,
            batches_per_epoch=args.max_steps * accumulation,
            num_examples=args.max_steps * global_batch,
            num_train_samples=args.max_steps * global_batch,
            global_batch_size=global_batch,
        )
    per_epoch = math.ceil(batches / accumulation)
    steps = args.max_steps if by_steps else math.ceil(args.num_train_epochs * per_epoch)
    epochs = steps / per_epoch if by_steps else args.num_train_epochs
    examples = num_examples()
    samples = steps * global_batch if by_steps else examples * args.num_train_epochs
    return Schedule(
        max_steps=steps,
        num_epochs=math.ceil(epochs),
        steps_per_epoch=per_epoch,
        batches_per_epoch=batches,
        num_examples=examples,
        num_train_samples=samples,
        global_batch_size=global_batch,
    )


def fitted(
    state: Mapping[str, Any],
    current: Mapping[str, Any],
    *,
    saved: Sequence[bool],
    live: Sequence[bool],
) -> dict[str, Any]:
    """A saved scheduler's state for an optimizer whose empty groups are not the saved one's: some
    engines drop them. `saved` and `live` say which groups have parameters.

    What the state has for each group goes to those with parameters; empty ones keep what they have.
    """
    if list(saved) == list(live) or sum(saved) != sum(live):
        return dict(state)
    made = dict(state)
    for key, value in state.items():
        if isinstance(value, list) and len(value) == len(saved):
            kept = iter([each for each, filled in zip(value, saved, strict=True) if filled])
            own = current.get(key) or []
            made[key] = [
                next(kept) if filled else (own[i] if i < len(own) else None)
                for i, filled in enumerate(live)
            ]
    return made
