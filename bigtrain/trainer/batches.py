"""Data: loaders, samplers, columns, and the accumulation windows that a step is made of."""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, SequentialSampler
from transformers.tokenization_utils_base import BatchEncoding
from transformers.trainer_pt_utils import (
    BatchRebalanceSampler,
    IterableDatasetShard,
    LengthGroupedSampler,
)
from transformers.trainer_utils import (
    RemoveColumnsCollator,
    has_length,
    seed_worker,
    unwrap_peft_model,
)

from bigtrain.trainer import sharding
from bigtrain.trainer.core import TrainerCore
from bigtrain.trainer.schedule import Schedule, make_schedule

logger = logging.getLogger(__name__)

IGNORED_LABEL = -100


class Batches(TrainerCore):
    """What the trainer reads and in which order."""

    _train_batch_size: int

    # ---- Loaders ----

    def get_train_dataloader(self) -> DataLoader[Any]:
        """This rank's training batches. Override for others."""
        if self.train_dataset is None:
            raise ValueError("Trainer: training requires a train_dataset.")
        return self._get_dataloader(
            dataset=self.train_dataset,
            description="Training",
            batch_size=self._train_batch_size,
            sampler_fn=self._get_train_sampler,
            is_training=True,
        )

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """This rank's evaluation batches of a dataset, or of the one in `eval_dataset` with that
        name. With persistent workers a loader is made once."""
        if eval_dataset is None and self.eval_dataset is None:
            raise ValueError("Trainer: evaluation requires an eval_dataset.")
        key = eval_dataset if isinstance(eval_dataset, str) else "eval"
        if isinstance(eval_dataset, str):
            eval_dataset = self.eval_dataset[eval_dataset]
        return self._get_dataloader(
            dataset=self.eval_dataset if eval_dataset is None else eval_dataset,
            description="Evaluation",
            batch_size=self.args.eval_batch_size,
            sampler_fn=self._get_eval_sampler,
            dataloader_key=key,
        )

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader[Any]:
        """This rank's batches of a dataset to predict on."""
        return self._get_dataloader(
            dataset=test_dataset,
            description="test",
            batch_size=self.args.eval_batch_size,
            sampler_fn=self._get_eval_sampler,
        )

    def _get_dataloader(
        self,
        dataset: Any,
        description: str,
        batch_size: int,
        sampler_fn: Callable[[Any], Any] | None = None,
        is_training: bool = False,
        dataloader_key: str | None = None,
    ) -> DataLoader[Any]:
        """`dataloader_key`: made once under this name, where its workers persist."""
        is_kept = dataloader_key is not None and self.args.dataloader_persistent_workers
        if is_kept and dataloader_key in self._eval_dataloaders:
            return self._eval_dataloaders[dataloader_key]  # type: ignore[no-any-return]
        loader = self._make_dataloader(dataset, description, batch_size, sampler_fn, is_training)
        if is_kept:
            self._eval_dataloaders[str(dataloader_key)] = loader
        return loader

    def _make_dataloader(
        self,
        dataset: Any,
        description: str,
        batch_size: int,
        sampler_fn: Callable[[Any], Any] | None,
        is_training: bool,
    ) -> DataLoader[Any]:
        collate = self.data_collator
        if _is_arrow_dataset(dataset):
            dataset = self._remove_unused_columns(dataset, description=description)
        else:
            collate = self._get_collator_with_removed_columns(collate, description=description)
        params: dict[str, Any] = {"batch_size": batch_size, "collate_fn": collate}
        params |= self._worker_params()
        sampler = None
        if not isinstance(dataset, IterableDataset):
            sampler = sampler_fn(dataset) if sampler_fn is not None else None
            params |= self._sampler_params(sampler, params)
            if is_training:
                params["worker_init_fn"] = partial(
                    seed_worker,
                    num_workers=self.args.dataloader_num_workers,
                    rank=self.args.process_index,
                )
        return self._shard_loader(_loader(dataset, params), sampler)

    def _worker_params(self) -> dict[str, Any]:
        args = self.args
        return {
            "num_workers": args.dataloader_num_workers,
            "pin_memory": args.dataloader_pin_memory and args.device.type != "cpu",
            "persistent_workers": args.dataloader_persistent_workers,
            "multiprocessing_context": args.dataloader_multiprocessing_context,
            "prefetch_factor": args.dataloader_prefetch_factor,
            "in_order": args.dataloader_in_order,
        }

    def _sampler_params(self, sampler: Any, params: dict[str, Any]) -> dict[str, Any]:
        if isinstance(sampler, BatchRebalanceSampler):
            del params["batch_size"]
            return {"batch_sampler": sampler}
        chosen = {"drop_last": self.args.dataloader_drop_last}
        return chosen if sampler is None else {**chosen, "sampler": sampler}

    def _shard_loader(self, loader: DataLoader[Any], sampler: Any) -> DataLoader[Any]:
        config: Any = self.args.accelerator_config
        sharded: DataLoader[Any] = sharding.shard(
            loader,
            ranks=self.args.ranks,
            device=self.args.device,
            config=config,
            data_seed=self.args.data_seed,
            is_sharded=isinstance(sampler, BatchRebalanceSampler),
        )
        return sharded

    def num_examples(self, dataloader: DataLoader[Any]) -> int:
        """Samples in a loader's dataset, or as good an estimate as it allows."""
        try:
            dataset: Any = dataloader.dataset
            if isinstance(dataset, IterableDatasetShard):
                dataset = dataset.dataset
            return len(dataset)
        except (NameError, AttributeError, TypeError):
            return len(dataloader) * self.args.per_device_train_batch_size

    # ---- Order ----

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """The order of training samples, by `train_sampling_strategy`; None for an iterable."""
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        strategy = self.args.train_sampling_strategy
        if dataset is None or not _is_sized(dataset):
            return None
        if strategy == "group_by_length":
            return LengthGroupedSampler(
                self.args.train_batch_size * self.args.gradient_accumulation_steps,
                dataset=dataset,
                lengths=self._known_lengths(dataset),
                model_input_name=self._model_input_name(),
            )
        if strategy == "batch_rebalance":
            return self._rebalanced(dataset)
        return SequentialSampler(dataset) if strategy == "sequential" else RandomSampler(dataset)

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        """The order of evaluation samples; None where the sharding makes it."""
        if eval_dataset is None or not _is_sized(eval_dataset):
            return None
        args = self.args
        if args.train_sampling_strategy == "group_by_length":
            seed = args.seed if args.data_seed is None else args.data_seed
            return LengthGroupedSampler(
                args.eval_batch_size,
                dataset=eval_dataset,
                lengths=self._known_lengths(eval_dataset),
                model_input_name=self._model_input_name(),
                generator=torch.Generator().manual_seed(seed),
            )
        return SequentialSampler(eval_dataset) if args.world_size == 1 else None

    def _rebalanced(self, dataset: Any) -> BatchRebalanceSampler:
        lengths = self._known_lengths(dataset)
        if lengths is None:
            name = self._model_input_name() or "input_ids"
            if not isinstance(dataset[0], (dict, BatchEncoding)) or name not in dataset[0]:
                raise ValueError(
                    "Can only automatically infer lengths for datasets whose items are "
                    f"dictionaries with an '{name}' key."
                )
            lengths = [len(feature[name]) for feature in dataset]
        args = self.args
        accumulation = args.gradient_accumulation_steps
        return BatchRebalanceSampler(
            lengths=lengths.tolist() if isinstance(lengths, Tensor) else lengths,
            effective_batch_size=args.train_batch_size * accumulation * args.world_size,
            dp_size=args.world_size,
            grad_accum=accumulation,
            rank=args.process_index,
            drop_last=args.dataloader_drop_last,
        )

    def _known_lengths(self, dataset: Any) -> Any:
        column = self.args.length_column_name
        if _is_arrow_dataset(dataset) and column in dataset.column_names:
            return dataset[column]
        return None

    def _model_input_name(self) -> str | None:
        names = getattr(self.processing_class, "model_input_names", None)
        return names[0] if names else None

    # ---- Columns ----

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            signature = inspect.signature(unwrap_peft_model(self.model).forward)
            columns = list(signature.parameters)
            # Default collators understand labels under these names too.
            self._signature_columns = columns + list({"label", "label_ids", *self.label_names})

    def _remove_unused_columns(self, dataset: Any, description: str | None = None) -> Any:
        """The dataset without the columns that `model.forward` does not take."""
        if not self.args.remove_unused_columns:
            return dataset
        self._set_signature_columns_if_needed()
        known = self._signature_columns or []
        ignored = sorted(set(dataset.column_names) - set(known))
        if not set(dataset.column_names) & set(known):
            raise ValueError(
                "No columns in the dataset match the model's forward method signature: "
                f"({', '.join(known)}). The following columns have been ignored: "
                f"[{', '.join(ignored)}]. Please check the dataset and model. You may need to set "
                "`remove_unused_columns=False` in `TrainingArguments`."
            )
        if ignored:
            name = self.model.__class__.__name__
            logger.info("%s set: %s.forward takes no %s", description, name, ", ".join(ignored))
        return dataset.remove_columns(ignored)

    def _get_collator_with_removed_columns(
        self, data_collator: Callable[..., Any], description: str | None = None
    ) -> Callable[..., Any]:
        if not self.args.remove_unused_columns:
            return data_collator
        self._set_signature_columns_if_needed()
        collator: Callable[..., Any] = _KnownColumnsCollator(
            data_collator=data_collator,
            signature_columns=self._signature_columns,
            logger=logger,
            description=description,
            model_name=self.model.__class__.__name__,
        )
        return collator

    # ---- Windows ----

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """The micro-batches of one window, fewer at the data's end, and the number of items in
        them over all ranks (None where the loss does not ask for it)."""
        batches = []
        for _ in range(num_batches):
            try:
                batches.append(next(epoch_iterator))
            except StopIteration:
                break
        return batches, self._get_num_items_in_batch(batches, device)

    def _get_num_items_in_batch(
        self, batch_samples: list[Any], device: torch.device
    ) -> Tensor | int | None:
        items = self._count_items(batch_samples)
        if items is None:
            return None
        if self.args.average_tokens_across_devices:
            items = self._stop.exchange(items.to(device))
            self._has_exchanged = True
        if items is None:
            return None
        # A float, as in transformers, where it is divided by the other parallel dimensions.
        items = items.to(device, torch.get_default_dtype())
        together = self.get_tp_size() * self.get_cp_size() * self.get_sp_size()
        return items if together == 1 else items / together

    def _count_items(self, batches: list[Any]) -> Tensor | None:
        """Labels that count for the loss; None where there are none to count."""
        wants_items = self.model_accepts_loss_kwargs or self.compute_loss_func is not None
        if not batches or not wants_items or "labels" not in batches[0]:
            return None
        try:
            counts = [self._target_labels(batch).ne(IGNORED_LABEL).sum() for batch in batches]
        except (TypeError, AttributeError):
            return None  # labels that are no tensors, as in object detection
        return sum(counts[1:], counts[0])  # type: ignore[no-any-return]

    def _target_labels(self, batch: Mapping[str, Any]) -> Any:
        if "shift_labels" in batch:
            return batch["shift_labels"]
        return batch["labels"][..., 1:] if self._loss_shifts_labels else batch["labels"]

    # ---- How long it takes ----

    def get_total_train_batch_size(self, args: Any) -> int:
        """Samples in one optimizer step over all ranks."""
        together = self.get_tp_size() * self.get_cp_size() * self.get_sp_size()
        replicas = args.world_size // together
        return int(self._train_batch_size * args.gradient_accumulation_steps * replicas)

    def set_initial_training_values(
        self, args: Any, dataloader: DataLoader[Any]
    ) -> tuple[int, int, int, float, int, int, int]:
        """Epochs, steps an epoch, examples, samples to train on, samples a step, batches an epoch
        and steps, as transformers' Trainer answers."""
        schedule = self._make_schedule(args, dataloader)
        return (
            schedule.num_epochs,
            schedule.steps_per_epoch,
            schedule.num_examples,
            schedule.num_train_samples,
            schedule.global_batch_size,
            schedule.batches_per_epoch,
            schedule.max_steps,
        )

    def _make_schedule(self, args: Any, loader: DataLoader[Any]) -> Schedule:
        return make_schedule(
            args,
            batches=len(loader) if has_length(loader) else None,
            num_examples=lambda: self.num_examples(loader),
            global_batch=self.get_total_train_batch_size(args),
        )

    # ---- Inputs ----

    def _prepare_input(self, data: Any) -> Any:
        """`data` with every tensor in it on the device."""
        if isinstance(data, Mapping):
            prepared = {key: self._prepare_input(value) for key, value in data.items()}
            return type(data)(prepared)  # type: ignore[call-arg]
        if isinstance(data, (tuple, list)):
            return type(data)(self._prepare_input(value) for value in data)
        return data.to(self.engine.device) if isinstance(data, Tensor) else data

    def _prepare_inputs(self, inputs: Any) -> Any:
        """A batch, ready for the model."""
        inputs = self._prepare_input(inputs)
        if len(inputs) == 0:
            self._set_signature_columns_if_needed()
            raise ValueError(
                "The batch received was empty, your model won't be able to train on it. "
                "Double-check that your training dataset contains keys expected by the model: "
                f"{','.join(self._signature_columns or [])}."
            )
        return inputs


class _KnownColumnsCollator(RemoveColumnsCollator):  # type: ignore[misc]
    """As transformers', which looks for unknown columns to tell of in every sample until it has
    found one: here in the first batch alone."""

    def __call__(self, features: list[Any]) -> Any:
        batch = super().__call__(features)
        self.message_logged = True
        return batch


def _is_arrow_dataset(dataset: Any) -> bool:
    """Of the package `datasets`, which is imported already where there is one, and takes long."""
    module = sys.modules.get("datasets")
    return module is not None and isinstance(dataset, module.Dataset)


def _is_sized(dataset: Any) -> bool:
    return bool(has_length(dataset))


def _loader(dataset: Any, params: dict[str, Any]) -> DataLoader[Any]:
    return DataLoader(dataset, **params)
