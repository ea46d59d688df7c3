"""Each process's share of a data loader, cut with accelerate's samplers.

accelerate's own `prepare_data_loader` asks its process state, which would join a process group by
environment variables; here the rank is known, so its parts are put together without that state.
A loader yields batches one late: it knows the last one as such, and so do metrics.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from accelerate.data_loader import (
    BatchSamplerShard,
    DataLoaderShard,
    IterableDatasetShard,
    SeedableRandomSampler,
    SkipBatchSampler,
)
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler
from transformers.trainer_pt_utils import AcceleratorConfig

from bigtrain.topology import RankInfo

# What a loader's copy takes over from it; batch size and samplers are decided anew.
_KEPT = (
    "num_workers",
    "collate_fn",
    "pin_memory",
    "timeout",
    "worker_init_fn",
    "multiprocessing_context",
    "generator",
    "prefetch_factor",
    "persistent_workers",
    "in_order",
)


def shard(
    loader: DataLoader[Any],
    *,
    ranks: RankInfo,
    device: torch.device,
    config: AcceleratorConfig,
    data_seed: int | None,
    is_sharded: bool = False,
) -> DataLoaderShard:
    """A loader of this rank's batches, moved to `device`. `is_sharded`: its sampler knows ranks.

    All ranks get equally many batches of one size: the last ones are filled up from the start.
    """
    if config.use_seedable_sampler:
        _make_seedable(loader, data_seed)
    if isinstance(loader.dataset, IterableDataset):
        return _IterableLoader(
            _shard_iterable(loader, ranks, config),
            batch_size=_iterable_batch_size(loader, ranks, config),
            drop_last=loader.drop_last,
            **_common(loader, device, config),
        )
    sampler = loader.batch_sampler
    if ranks.world_size > 1:
        # A sampler that knows ranks is passed through: only its last batch is filled up.
        sampler = BatchSamplerShard(
            sampler,
            num_processes=1 if is_sharded else ranks.world_size,
            process_index=0 if is_sharded else ranks.rank,
            split_batches=config.split_batches,
            even_batches=config.even_batches,
        )
    common = _common(loader, device, config)
    return DataLoaderShard(loader.dataset, batch_sampler=sampler, **common)


def skip_batches(loader: Any, count: int) -> Any:
    """A loader that starts at its batch `count`. Skipped samples of a map-style dataset are not
    loaded; an iterable one has to be read up to there."""
    if isinstance(loader.dataset, IterableDataset):
        common = {"batch_size": loader.batch_size, "drop_last": loader.drop_last}
        if isinstance(loader, DataLoaderShard):
            common["skip_batches"] = count
    else:
        common = {"batch_sampler": SkipBatchSampler(loader.batch_sampler, skip_batches=count)}
    common |= {name: getattr(loader, name) for name in _KEPT}
    if isinstance(loader, DataLoaderShard):
        kind = _IterableLoader if "skip_batches" in common else DataLoaderShard
        return kind(loader.dataset, device=loader.device, iteration=loader.iteration, **common)
    skipping = DataLoader(loader.dataset, **common)
    return _without_first(skipping, count) if "batch_size" in common else skipping


def set_epoch(loader: Any, epoch: int) -> None:
    """Tell the epoch to whatever orders the samples, however deep it is wrapped."""
    target: Any = loader
    while target is not None:
        for one in (target, getattr(target, "sampler", None)):
            set_epoch = getattr(one, "set_epoch", None)
            if set_epoch is not None:
                set_epoch(epoch)
        target = getattr(target, "batch_sampler", None)


def _common(
    loader: DataLoader[Any], device: torch.device, config: AcceleratorConfig
) -> dict[str, Any]:
    return {
        # Looking through each batch for what to move takes time; on a CPU there is nothing to.
        "device": None if device.type == "cpu" else device,
        "_drop_last": loader.drop_last,
        "_non_blocking": config.non_blocking,
        **{name: getattr(loader, name) for name in _KEPT},
    }


def _make_seedable(loader: DataLoader[Any], data_seed: int | None) -> None:
    """Let the order of samples follow from seed and epoch alone, the same on all ranks."""
    sampler, batch_sampler = loader.sampler, loader.batch_sampler
    if not isinstance(sampler, RandomSampler) or not isinstance(batch_sampler, BatchSampler):
        return
    batch_sampler.sampler = SeedableRandomSampler(
        data_source=sampler.data_source,
        replacement=sampler.replacement,
        num_samples=sampler._num_samples,
        generator=sampler.generator,
        data_seed=data_seed,
    )


def _shard_iterable(
    loader: DataLoader[Any], ranks: RankInfo, config: AcceleratorConfig
) -> IterableDataset[Any]:
    dataset: Any = loader.dataset
    if ranks.world_size == 1:
        return dataset  # type: ignore[no-any-return]
    # Every rank reads all of it and keeps its share. A shard of files each would be less to read,
    # but of unequal lengths, and then ranks would wait for each other forever.
    return IterableDatasetShard(  # type: ignore[no-any-return]
        _Counted(dataset),
        batch_size=loader.batch_size,
        drop_last=loader.drop_last,
        num_processes=ranks.world_size,
        process_index=ranks.rank,
        split_batches=config.split_batches,
    )


def _iterable_batch_size(
    loader: DataLoader[Any], ranks: RankInfo, config: AcceleratorConfig
) -> int | None:
    if config.split_batches and loader.batch_size is not None:
        return loader.batch_size // ranks.world_size
    return loader.batch_size


class _Counted(IterableDataset[Any]):
    """A dataset that knows how many samples it has given since its start."""

    def __init__(self, dataset: IterableDataset[Any]) -> None:
        self.dataset = dataset
        self.count = 0

    def __iter__(self) -> Iterator[Any]:
        self.count = 0
        for sample in self.dataset:
            self.count += 1
            yield sample

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]  # TypeError where it has none

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "dataset":
            raise AttributeError(name)
        return getattr(self.dataset, name)


class _IterableLoader(DataLoaderShard):
    """Of a dataset without a length, which shows at its end how many of the last samples count."""

    def _update_state_dict(self) -> None:
        # accelerate calls it before it gives a batch, and by then knows whether it is the last.
        super()._update_state_dict()
        shard: Any = self.dataset
        counted = getattr(shard, "dataset", None)
        if self.end_of_dataloader and isinstance(counted, _Counted) and counted.count:
            ranks = 1 if shard.split_batches else shard.num_processes
            self.remainder = counted.count % (shard.batch_size * ranks)


class _without_first:  # noqa: N801 (it reads as the call that it is)
    """A plain loader of an iterable dataset, read past its first `count` batches."""

    def __init__(self, loader: DataLoader[Any], count: int) -> None:
        self.loader, self.count = loader, count
        self.dataset = loader.dataset

    def __iter__(self) -> Any:
        for index, batch in enumerate(self.loader):
            if index >= self.count:
                yield batch
