"""What this rank will write, taken from the live training state."""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bigtrain.checkpoint.boxes import contiguous_strides, cut_range
from bigtrain.checkpoint.dtypes import DType, dtype_named
from bigtrain.checkpoint.manifest import Layout
from bigtrain.checkpoint.pieces import MODEL_KINDS, GroupField, OptimizerFile, Piece, Share
from bigtrain.checkpoint.torch_item import item_bound
from bigtrain.engine.protocol import Engine, LocalTensor
from bigtrain.errors import CheckpointError
from bigtrain.topology import RankInfo

ParamGroups = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """All that one rank contributes to a checkpoint; tensors are the live ones."""

    layout: Layout
    rank: int
    tensors: tuple[LocalTensor, ...]
    param_groups: tuple[Mapping[str, Any], ...] | None
    """None where only the model is saved."""
    is_head: bool
    """Whether this rank writes what a checkpoint holds once: rank 0, or the first of a node that
    keeps its own."""
    objects: Mapping[str, bytes] = field(default_factory=dict)
    """Content of small files, by path relative to the checkpoint."""

    def bound(self) -> int:
        """More bytes than this rank will write, its caller's own files apart."""
        small = sum(map(len, self.objects.values())) + (64 << 10)
        return small + sum(map(_bound, self.tensors))

    def share(
        self,
        place: Callable[[Sequence[Tensor]], Sequence[memoryview]],
        *,
        caller_files: tuple[str, ...] = (),
    ) -> Share:
        """What is written, with its bytes where `place` puts them."""
        memory = place([tensor.data for tensor in self.tensors])
        is_main, groups = self.is_head, self.param_groups
        is_whole = self.layout == "transformers"
        return Share(
            layout=self.layout,
            rank=self.rank,
            is_head=self.is_head,
            pieces=tuple(map(_piece, self.tensors, memory)),
            has_optimizer=groups is not None,
            group_fields=() if is_whole or not is_main else tuple(_group_fields(groups or ())),
            optimizer=(
                _optimizer_file(self.tensors, groups)
                if is_whole and is_main and groups is not None
                else None
            ),
            objects=self.objects,
            caller_files=caller_files,
        )


def take_snapshot(
    engine: Engine,
    *,
    world: RankInfo,
    scheduler_state: Mapping[str, Any] | None,
    rng_state: Mapping[str, Any] | None,
    only_model: bool,
    on_each_node: bool = False,
) -> Snapshot:
    """This rank's share of the training state. All ranks call.

    `on_each_node`: also what other ranks own, where this node would lack it: replicas of shards,
    and, on the node's first rank, what every rank holds whole.
    """
    is_head = world.is_local_main if on_each_node else world.is_main
    layout: Layout = "sharded" if engine.is_sharded else "transformers"
    # Taken whole before anything is written: an engine may have to talk to other ranks meanwhile.
    local = list(engine.local_state(optimizer=not only_model))
    groups = None if only_model else tuple(engine.param_groups())
    states: dict[str, Any] = {}
    if not only_model:
        states[rng_name(layout, world)] = rng_state
        if is_head:
            states["scheduler.pt"] = scheduler_state
            states["scaler.pt"] = engine.scaler_state()
    written = (t for t in local if t.owned or (on_each_node and (is_head or not _is_whole(t))))
    tensors = tuple(t for t in written if t.data.numel() or 0 in t.shape)
    if layout == "transformers":
        _check_whole(tensors)
    return Snapshot(
        layout=layout,
        rank=world.rank,
        tensors=tensors,
        param_groups=groups,
        is_head=is_head,
        objects={name: saved_bytes(state) for name, state in states.items() if state},
    )


def rng_name(layout: Layout, world: RankInfo) -> str:
    """Path of a rank's random state, in either layout, relative to the checkpoint."""
    if layout == "sharded":
        return f"rng/rank-{world.rank:05d}.pth"
    return "rng_state.pth" if world.world_size == 1 else f"rng_state_{world.rank}.pth"


def saved_bytes(value: Any) -> bytes:
    """What `torch.save` makes of a small object."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def live_memory(tensors: Sequence[Tensor]) -> list[memoryview]:
    """The bytes of 1-D tensors, copied only where they are not on the CPU already."""
    return [
        tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data
        if tensor.numel()
        else memoryview(b"")
        for tensor in tensors
    ]


def _piece(tensor: LocalTensor, memory: memoryview) -> Piece:
    return Piece(
        name=tensor.name,
        kind=tensor.kind,
        dtype=_dtype(tensor),
        shape=tuple(tensor.shape),
        start=tensor.start,
        data=memory,
    )


def _dtype(tensor: LocalTensor) -> DType:
    return dtype_named(str(tensor.data.dtype).removeprefix("torch."))


def _check_whole(tensors: Sequence[LocalTensor]) -> None:
    for tensor in tensors:
        if not _is_whole(tensor):
            raise CheckpointError(
                f"{tensor.kind} of {tensor.name} is only partly on this rank; an engine that "
                "shards must say so"
            )


def _is_whole(tensor: LocalTensor) -> bool:
    return not tensor.start and tensor.data.numel() == torch.Size(tensor.shape).numel()


def _bound(tensor: LocalTensor) -> int:
    boxes: Iterator[Any] = cut_range(tensor.shape, tensor.start, tensor.start + tensor.data.numel())
    return tensor.data.nbytes + sum(item_bound(0) for _ in boxes)


def _group_fields(groups: ParamGroups) -> Iterator[GroupField]:
    for number, group in enumerate(groups):
        for name, value in group.items():
            yield GroupField(group=number, name=name, content=saved_bytes(value))


def _optimizer_file(tensors: Sequence[LocalTensor], groups: ParamGroups) -> OptimizerFile:
    """`optimizer.pt` as torch's optimizers lay out their state: parameters by number."""
    names = [name for group in groups for name in group["params"]]
    number = {name: position for position, name in enumerate(names)}
    moments = [i for i, tensor in enumerate(tensors) if tensor.kind not in MODEL_KINDS]
    state: dict[int, dict[str, Any]] = {}
    for storage, position in enumerate(moments):
        tensor = tensors[position]
        if tensor.name not in number:
            raise CheckpointError(
                f"the optimizer has {tensor.kind} of {tensor.name}, which is in none of its groups"
            )
        state.setdefault(number[tensor.name], {})[tensor.kind] = _Stored(
            dtype=_dtype(tensor), shape=tuple(tensor.shape), storage=storage
        )
    numbered = [
        {
            **group,
            "params": [number[name] for name in group["params"]],
            "param_names": list(group["params"]),
        }
        for group in groups
    ]
    buffer = io.BytesIO()
    _StructurePickler(buffer).dump({"state": state, "param_groups": numbered})
    return OptimizerFile(pickle=buffer.getvalue(), pieces=tuple(moments))


@dataclass(frozen=True, kw_only=True)
class _Stored:
    """A tensor whose elements are in a storage of its own."""

    dtype: DType
    shape: tuple[int, ...]
    storage: int

    @property
    def stored_numel(self) -> int:
        numel = torch.Size(self.shape).numel()
        return numel if self.dtype.storage else numel * self.dtype.itemsize


class _StructurePickler(pickle.Pickler):
    """Pickles as `torch.save` does, with `_Stored` where it would meet tensors."""

    def __init__(self, buffer: io.BytesIO) -> None:
        super().__init__(buffer, protocol=2)

    def persistent_id(self, obj: Any, /) -> Any:
        if not isinstance(obj, _Storage):
            return None
        stored = obj.of
        kind = getattr(torch, stored.dtype.storage) if stored.dtype.storage else None
        kind = kind or torch.storage.UntypedStorage
        return ("storage", kind, str(stored.storage), "cpu", stored.stored_numel)

    def reducer_override(self, obj: Any, /) -> Any:
        if not isinstance(obj, _Stored):
            return NotImplemented
        strides = contiguous_strides(obj.shape)
        where = (_Storage(obj), 0, obj.shape, strides, False, OrderedDict())  # type: ignore[var-annotated]
        if obj.dtype.storage:
            return torch._utils._rebuild_tensor_v2, where
        dtype = getattr(torch, obj.dtype.name)
        return torch._utils._rebuild_tensor_v3, (*where, dtype)


@dataclass(frozen=True)
class _Storage:
    of: _Stored
