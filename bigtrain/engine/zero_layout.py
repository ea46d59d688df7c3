"""Where a live ZeRO optimizer keeps each parameter: which flat master, and at what offset.

ZeRO lays parameters one after another into flat fp32 masters and gives each rank a part of them.
Nothing in DeepSpeed's public interface tells all of it, for all stages; what is read here is what
its own checkpoints are written from (deepspeed/runtime/zero/stage_1_and_2.py, stage3.py and
bf16_optimizer.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Member:
    """Elements [start, start + length) of a parameter, at `offset` in this rank's flat master.

    `length` is 0 where this rank holds none of its elements.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    length: int
    offset: int


@dataclass(frozen=True, kw_only=True)
class FlatGroup:
    """One flat master of this rank, the key under which the optimizer keeps its moments."""

    master: Tensor
    group_index: int
    """Which of the optimizer's param_groups it belongs to."""
    members: tuple[Member, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(member.name for member in self.members)


def flat_groups(zero: Any, names: Mapping[int, str]) -> list[FlatGroup]:
    """This rank's masters. `names` by identity of the model's parameters."""
    if hasattr(zero, "fp32_partitioned_groups_flat"):
        return list(_stage3_groups(zero, names))
    if hasattr(zero, "fp32_groups_flat_partition"):
        # Stage 1 in bf16 with fp32 gradients is a class of its own (BF16_Optimizer).
        layouts = [(group, _running_offsets(group)) for group in zero.bf16_groups]
        masters = zero.fp32_groups_flat_partition
    else:
        layouts = list(
            zip(zero.round_robin_bit16_groups, zero.round_robin_bit16_offsets, strict=True)
        )
        masters = zero.single_partition_of_fp32_groups
    return [
        FlatGroup(
            master=master,
            group_index=index,
            members=tuple(_cut_members(parameters, offsets, master.numel(), names)),
        )
        for index, (master, (parameters, offsets)) in enumerate(zip(masters, layouts, strict=True))
    ]


def partitioned_copies(zero: Any) -> Iterator[tuple[Sequence[Tensor], Tensor, Any]]:
    """Stages 1 and 2, group by group: all ranks' partitions of the model's own copy, in the compute
    precision; this rank's master; and the process group that they are divided over."""
    if hasattr(zero, "bf16_partitioned_groups"):
        copies, masters = zero.bf16_partitioned_groups, zero.fp32_groups_flat_partition
    else:
        copies, masters = (
            zero.parallel_partitioned_bit16_groups,
            zero.single_partition_of_fp32_groups,
        )
    yield from zip(copies, masters, zero.real_dp_process_group, strict=True)


def whole_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """The shape of the whole parameter, also while stage 3 has cut it."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def stage3_slice(parameter: nn.Parameter) -> tuple[int, Tensor]:
    """First element and the elements of this rank's own slice, in the compute precision."""
    slice_ = parameter.ds_tensor  # type: ignore[attr-defined]
    start = slice_.ds_numel * dist.get_rank()
    length = max(0, min(slice_.ds_numel, math.prod(whole_shape(parameter)) - start))
    return start, slice_.detach().view(-1)[:length]


def _stage3_groups(zero: Any, names: Mapping[int, str]) -> Iterator[FlatGroup]:
    for index, (master, parameters) in enumerate(
        zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups, strict=True)
    ):
        members = []
        for parameter in parameters:
            _, offset, _ = zero.grad_position[zero.get_param_id(parameter)]
            start, slice_ = stage3_slice(parameter)
            members.append(
                Member(
                    name=names[id(parameter)],
                    shape=whole_shape(parameter),
                    start=start,
                    length=slice_.numel(),
                    offset=offset,
                )
            )
        yield FlatGroup(
            master=master,
            group_index=zero.sub_group_to_group_id[index],
            members=tuple(members),
        )


def _cut_members(
    parameters: Iterable[nn.Parameter],
    offsets: Iterable[int],
    part: int,
    names: Mapping[int, str],
) -> Iterator[Member]:
    """Stages 1 and 2: rank r holds elements [r·part, (r+1)·part) of the group's whole flat."""
    first = dist.get_rank() * part
    for parameter, offset in zip(parameters, offsets, strict=True):
        begin = max(offset, first)
        end = min(offset + parameter.numel(), first + part)
        held = begin < end
        yield Member(
            name=names[id(parameter)],
            shape=tuple(parameter.shape),
            start=begin - offset if held else 0,
            length=end - begin if held else 0,
            offset=begin - first if held else 0,
        )


def _running_offsets(parameters: Iterable[nn.Parameter]) -> list[int]:
    offsets, total = [], 0
    for parameter in parameters:
        offsets.append(total)
        total += parameter.numel()
    return offsets
