"""A live ZeRO engine's state as named pieces that this rank holds, and how to fill them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from bigtrain.engine.opaque import Seat, is_opaque, keep, own_kinds
from bigtrain.engine.protocol import BUFFER, WEIGHT, LocalTensor, StateSource
from bigtrain.engine.state import (
    Placement,
    cannot_divide,
    is_like,
    load_opaque,
    load_scalar,
    named_buffers,
    named_parameters,
    number_tensor,
    pieces,
    read_placed,
    whole,
)
from bigtrain.engine.zero_layout import (
    FlatGroup,
    Member,
    flat_groups,
    partitioned_copies,
    stage3_slice,
    whole_shape,
)
from bigtrain.errors import CheckpointError


class ZeroState:
    """`zero` is DeepSpeed's wrapper of the optimizer; without training, what cuts the weights
    (stage 3) or None."""

    def __init__(self, model: nn.Module, zero: Any, *, seat: Seat, trains: bool) -> None:
        self.parameters = named_parameters(model)
        self.buffers = named_buffers(model)
        self._zero = zero
        self._trains = trains
        self._seat = seat
        self._is_main = seat.rank == 0
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        self.groups: list[FlatGroup] = flat_groups(zero, names) if trains else []
        self._trained = {
            member.name: _slice(group.master, member)
            for group in self.groups
            for member in group.members
        }

    @property
    def optimizer(self) -> Optimizer | None:
        """The torch optimizer under DeepSpeed's wrapper; None when nothing is trained."""
        return self._zero.optimizer if self._trains else None

    def weights(self) -> Iterator[LocalTensor]:
        """This rank's pieces: of masters where there are, else of the parameters themselves."""
        for name, parameter in self.parameters.items():
            yield from pieces(name, WEIGHT, self._place(name, parameter))
        for name, buffer in self.buffers.items():
            yield from pieces(name, BUFFER, whole(buffer, owned=self._is_main))

    def moments(self) -> Iterator[LocalTensor]:
        """This rank's pieces of what the optimizer keeps; its scalars, once for each parameter."""
        for group in self.groups:
            for kind, value in self._zero.optimizer.state.get(group.master, {}).items():
                if _is_opaque(value, group):
                    # Of the whole flat group, which the first of its parameters stands for.
                    kept = keep(kind, value, self._seat)
                    name = group.members[0].name
                    yield from pieces(name, kept.kind, whole(kept.local, owned=True))
                    continue
                for member in group.members:
                    placed = self._place_moment(group, member, kind, value)
                    yield from pieces(member.name, kind, placed)

    def whole_weights(self) -> Iterator[tuple[str, Tensor | None]]:
        """Each tensor whole on rank 0, one at a time. All ranks must call."""
        for name, parameter in self.parameters.items():
            placed = self._place(name, parameter)
            yield name, self._gather(placed) if self._is_cut(name) else self._copy(placed)
        for name, buffer in self.buffers.items():
            yield name, self._copy(whole(buffer, owned=self._is_main))

    @torch.no_grad()
    def load_weights(self, source: StateSource) -> None:
        """Fill masters, frozen parameters and buffers; then the model's own copies from them."""
        self._cut_all()
        for name, parameter in self.parameters.items():
            read_placed(source, name, WEIGHT, self._place(name, parameter))
        for name, buffer in self.buffers.items():
            read_placed(source, name, BUFFER, whole(buffer, owned=False))
        self._refresh()

    @torch.no_grad()
    def load_moments(self, source: StateSource) -> None:
        """Make the optimizer's state anew, as `source` has it."""
        optimizer = self._zero.optimizer
        for group in self.groups:
            kinds = {kind for name in group.names for kind in source.kinds(name)}
            state = {
                kind: self._load_moment(group, kind, source)
                for kind in sorted(kinds - {WEIGHT, BUFFER})
                if not is_opaque(kind)
            }
            for name in group.names:
                for kind, stored in own_kinds(name, source.kinds(name), self._seat).items():
                    state[kind] = load_opaque(source, name, stored, group.master.device)
            if state:
                optimizer.state[group.master] = state
        if hasattr(self._zero, "_lazy_init_hp_params_optimizer_state"):
            self._zero._lazy_init_hp_params_optimizer_state()

    @torch.no_grad()
    def fill_masters(self, fine: Mapping[str, tuple[int, Tensor]]) -> None:
        """Take finer weights than the model's into the masters: name → (first element, flat)."""
        for group in self.groups:
            for member in group.members:
                if member.name in fine and member.length:
                    first, flat = fine[member.name]
                    begin = member.start - first
                    _, part = _slice(group.master, member)
                    part.copy_(flat[begin : begin + member.length])

    def _place(self, name: str, parameter: nn.Parameter) -> Placement:
        shape = whole_shape(parameter)
        if name in self._trained:
            start, local = self._trained[name]
            return Placement(shape=shape, start=start, local=local, owned=True)
        if hasattr(parameter, "ds_tensor"):
            start, local = stage3_slice(parameter)
            return Placement(shape=shape, start=start, local=local, owned=True)
        return whole(parameter, owned=self._is_main)

    def _place_moment(self, group: FlatGroup, member: Member, kind: str, value: Any) -> Placement:
        if isinstance(value, Tensor) and value.shape == group.master.shape:
            return Placement(
                shape=member.shape,
                start=member.start,
                local=value.detach()[member.offset : member.offset + member.length],
                owned=True,
            )
        if kind == "step" and not isinstance(value, Tensor):
            # As torch's own optimizers keep it, so that they can go on with it.
            value = torch.tensor(float(value))
        if not isinstance(value, Tensor):
            value = number_tensor(member.name, kind, value)
        return whole(value, owned=self._is_main)

    def _load_moment(self, group: FlatGroup, kind: str, source: StateSource) -> Any:
        having = [member for member in group.members if kind in source.kinds(member.name)]
        shapes = {tuple(source.shape(member.name, kind)) for member in having}
        if kind != "step" and all(
            tuple(source.shape(member.name, kind)) == member.shape for member in having
        ):
            # DeepSpeed's first ones, where it has made some already: no second set beside them.
            moment = self._zero.optimizer.state.get(group.master, {}).get(kind)
            if not is_like(moment, group.master, dtype=group.master.dtype):
                moment = torch.empty_like(group.master, requires_grad=False)
            _clear_between(moment, having)
            for member in having:
                placed = self._place_moment(group, member, kind, moment)
                read_placed(source, member.name, kind, placed)
            return moment
        if shapes != {()}:
            first = having[0]
            shape = source.shape(first.name, kind)
            raise CheckpointError(cannot_divide(first.name, kind, shape, first.shape))
        return self._load_shared_scalar(group, having, kind, source)

    def _load_shared_scalar(
        self, group: FlatGroup, having: list[Member], kind: str, source: StateSource
    ) -> Any:
        options = self._zero.optimizer.param_groups[group.group_index]
        values = {
            member.name: load_scalar(source, member.name, kind, options, group.master.device)
            for member in having
        }
        if len({float(value) for value in values.values()}) > 1:
            raise CheckpointError(
                f"the optimizer's {kind!r} differs between the parameters of group "
                f"{group.group_index}; ZeRO keeps one for all: resume with the engine that wrote it"
            )
        return values[having[0].name]

    def _is_cut(self, name: str) -> bool:
        return name in self._trained or hasattr(self.parameters[name], "ds_tensor")

    def _copy(self, placed: Placement) -> Tensor | None:
        return placed.local.cpu().clone() if self._is_main else None

    def _gather(self, placed: Placement) -> Tensor | None:
        """Sum the ranks' pieces as bytes, of which all but one are zero: exact for any dtype."""
        flat = placed.local.new_zeros(math.prod(placed.shape))
        flat[placed.start : placed.start + placed.local.numel()] = placed.local
        dist.reduce(flat.view(torch.uint8), dst=0)
        return flat.view(placed.shape).cpu() if self._is_main else None

    def _cut_all(self) -> None:
        """Stage 3: give up what is gathered, so that nothing stale is left or written back."""
        if hasattr(self._zero, "_partition_all_parameters"):
            self._zero._partition_all_parameters()
        elif hasattr(self._zero, "partition_all_parameters"):
            self._zero.partition_all_parameters()

    def _refresh(self) -> None:
        """Bring the model's copies, in the compute precision, up to the masters."""
        if hasattr(self._zero, "update_lp_params"):
            self._refresh_partitions()
        elif self._trains:
            for index in range(len(self.groups)):
                self._zero._reassign_or_swap_out_partitioned_parameters(index)
        if kept := getattr(self._zero, "persistent_parameters", None):
            kept[0].all_gather(kept)

    def _refresh_partitions(self) -> None:
        """Stages 1 and 2: what `update_lp_params` does. Over gloo with broadcasts into place, which
        take a fifth of the time of its all-gather."""
        for partitions, master, group in partitioned_copies(self._zero):
            if partitions[0].device.type != "cpu":
                self._zero.update_lp_params()
                return
            partitions[dist.get_rank(group)].copy_(master)
            sending = [
                dist.broadcast(
                    part, src=dist.get_global_rank(group, rank), group=group, async_op=True
                )
                for rank, part in enumerate(partitions)
            ]
            for work in sending:
                work.wait()


def _is_opaque(value: Any, group: FlatGroup) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0 and value.shape != group.master.shape


def _clear_between(flat: Tensor, members: Sequence[Member]) -> None:
    """Make zero what no member's elements will be read into: to clear all of it takes as long as
    to read it."""
    end = 0
    for member in sorted(members, key=lambda member: member.offset):
        if member.length:
            flat[end : member.offset] = 0
            end = member.offset + member.length
    flat[end:] = 0


def _slice(master: Tensor, member: Member) -> tuple[int, Tensor]:
    """First element, and the elements, of a parameter's part in a flat master."""
    return member.start, master.detach()[member.offset : member.offset + member.length]
