"""A model's and its optimizer's state as named flat tensors, where torch steps the optimizer.

What differs between engines is only how much of a tensor a rank holds; that is a `Placement`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from bigtrain.engine.opaque import Seat, is_opaque, keep, own_kinds, rebuilt
from bigtrain.engine.protocol import BUFFER, WEIGHT, LocalTensor, StateSource
from bigtrain.errors import CheckpointError, ConfigError

# Numbers that an optimizer keeps as plain Python numbers are saved as 0-dim tensors of these
# dtypes, which no torch optimizer uses for a scalar; so their type survives a round trip.
_PLAIN_NUMBERS: dict[torch.dtype, type] = {torch.int64: int, torch.float64: float}
# How an optimizer computes is this run's choice, not the checkpoint's.
_NOT_LOADED = {"params", "foreach", "fused", "capturable", "differentiable"}
_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Which part of a tensor of `shape` this rank holds: `local`, from element `start` on."""

    shape: tuple[int, ...]
    start: int
    local: Tensor
    owned: bool


Place = Callable[[Tensor], Placement]
"""Tells where a parameter's (or its optimizer state's) elements lie on this rank."""


def plain_name(name: str) -> str:
    """`name` without the prefixes that compiling and checkpointing wrappers put in."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter under its one name; of tied ones, the first."""
    return {plain_name(name): parameter for name, parameter in model.named_parameters()}


def named_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The buffers that are part of the model's state dict (rotary caches, for one, are not)."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is None or name in module._non_persistent_buffers_set or id(buffer) in seen:
                continue
            seen.add(id(buffer))
            found[plain_name(f"{prefix}.{name}" if prefix else name)] = buffer
    return found


def optimized_names(model: nn.Module, optimizer: Optimizer) -> list[list[str]]:
    """The names of each group's parameters. An optimizer of another model is refused."""
    names = {id(parameter): name for name, parameter in named_parameters(model).items()}
    groups: list[list[str]] = []
    for index, group in enumerate(optimizer.param_groups):
        if unknown := sum(id(parameter) not in names for parameter in group["params"]):
            raise ConfigError(
                f"{unknown} parameters in the optimizer's group {index} are not the model's; "
                "make the optimizer on the parameters of the model that is trained"
            )
        groups.append([names[id(parameter)] for parameter in group["params"]])
    return groups


def nothing_learns(model: nn.Module) -> ConfigError:
    """The error for a training that could change no weight."""
    name = type(model).__name__.removeprefix("FSDP")  # `fully_shard` renames the class
    if any(parameter.requires_grad for parameter in model.parameters()):
        return ConfigError(
            f"the loss does not depend on any weight of {name} that is trained: it was computed "
            "without gradients (under no_grad, or from detached tensors)"
        )
    return ConfigError(
        f"nothing in {name} is to be trained: none of its parameters has requires_grad; unfreeze "
        "some, or add an adapter"
    )


def plain_groups(optimizer: Optimizer, names: Sequence[Sequence[str]]) -> list[dict[str, Any]]:
    """The optimizer's groups as plain values, with parameters by name."""
    return [
        {
            **{
                key: value.item() if isinstance(value, Tensor) else value
                for key, value in group.items()
                if key != "params" and not key.startswith("_")
            },
            "params": list(group_names),
        }
        for group, group_names in zip(optimizer.param_groups, names, strict=True)
    ]


def load_groups(optimizer: Optimizer, names: Sequence[Sequence[str]], source: StateSource) -> None:
    """Take over the saved hyperparameters, group by group; the groups must hold the same names.

    Groups without parameters don't count: some engines drop them.
    """
    if source.param_groups is None:
        raise CheckpointError("the checkpoint holds weights only, no optimizer state to go on with")
    saved = [group for group in source.param_groups if group["params"]]
    live = [pair for pair in zip(optimizer.param_groups, names, strict=True) if pair[1]]
    if len(saved) != len(live):
        raise CheckpointError(
            f"the checkpoint's optimizer has {len(saved)} parameter groups, this run's {len(live)}"
        )
    for index, ((group, mine), theirs) in enumerate(zip(live, saved, strict=True)):
        if differing := sorted(set(mine) ^ set(theirs["params"])):
            raise CheckpointError(
                f"optimizer group {index} holds other parameters than the checkpoint's "
                f"({len(differing)} differ, first {differing[0]!r}); train the same parameters"
            )
        for key in (group.keys() | {"initial_lr"}) & theirs.keys() - _NOT_LOADED:
            if isinstance(group.get(key), Tensor):
                group[key].fill_(theirs[key])
            else:
                group[key] = theirs[key]


def is_like(kept: Any, parameter: Tensor, *, dtype: torch.dtype) -> bool:
    """Whether what the optimizer has kept can be read into: then no second one is made beside it,
    and no fresh memory has to be cleared."""
    return (
        isinstance(kept, Tensor)
        and type(kept) is type(parameter.data)
        and kept.is_contiguous()
        and (kept.shape, kept.dtype, kept.device) == (parameter.shape, dtype, parameter.device)
        and getattr(kept, "placements", None) == getattr(parameter, "placements", None)
    )


def cannot_divide(name: str, kind: str, shape: Sequence[int], parameter: Sequence[int]) -> str:
    """The message where an optimizer keeps what has not one number for each of its parameter's."""
    return (
        f"the optimizer's {kind!r} of {name!r} has shape {tuple(shape)}, its parameter "
        f"{tuple(parameter)}: such a state can't be divided over ranks; save and resume it with "
        "engine ddp or single, or go on with a new optimizer (reset_optimizer: true)"
    )


def load_scalar(
    source: StateSource, name: str, kind: str, group: Mapping[str, Any], device: torch.device
) -> Any:
    """What an optimizer keeps for `name` besides tensors of its shape: step counts and the like."""
    dtype, shape = source.kinds(name)[kind], tuple(source.shape(name, kind))
    # A step count lies on the host unless the optimizer reads it in a kernel.
    in_kernel = group.get("capturable") or group.get("fused")
    on_host = dtype in _PLAIN_NUMBERS or (kind == "step" and not in_kernel)
    value = torch.empty(shape, dtype=dtype, device="cpu" if on_host else device)
    read_flat(source, name, kind, 0, value)
    if shape == () and dtype in _PLAIN_NUMBERS:
        return _PLAIN_NUMBERS[dtype](value.item())
    return value


def load_opaque(source: StateSource, name: str, stored: str, device: torch.device) -> Tensor:
    """What this rank has kept of its own."""
    dtype, shape = source.kinds(name)[stored], tuple(source.shape(name, stored))
    value = torch.empty(shape, dtype=dtype, device=device)
    read_flat(source, name, stored, 0, value)
    return value


def whole(tensor: Tensor, *, owned: bool) -> Placement:
    """A tensor of which every rank holds all."""
    return Placement(shape=tuple(tensor.shape), start=0, local=tensor.detach(), owned=owned)


class TrainingState:
    """A model and its optimizer, seen as named pieces that this rank holds.

    `place` says where a parameter's elements lie; rank 0 writes what all ranks hold whole.
    """

    def __init__(
        self, model: nn.Module, optimizer: Optimizer | None, *, place: Place, seat: Seat
    ) -> None:
        # Kept, because FSDP swaps a module's parameters while they are gathered.
        self.parameters = named_parameters(model)
        self.buffers = named_buffers(model)
        self.optimizer = optimizer
        self._names = optimized_names(model, optimizer) if optimizer is not None else []
        self._place = place
        self._seat = seat
        self._is_main = seat.rank == 0

    def weights(self) -> Iterator[LocalTensor]:
        """This rank's pieces of the parameters, then of the buffers."""
        for name, parameter in self.parameters.items():
            yield from pieces(name, WEIGHT, self._place(parameter))
        for name, buffer in self.buffers.items():
            yield from pieces(name, BUFFER, whole(buffer, owned=self._is_main))

    def moments(self) -> Iterator[LocalTensor]:
        """This rank's pieces of what the optimizer keeps for each parameter."""
        optimizer = self._trained()
        for group, names in zip(optimizer.param_groups, self._names, strict=True):
            for name, parameter in zip(names, group["params"], strict=True):
                for kind, value in optimizer.state.get(parameter, {}).items():
                    if value is not None:
                        yield from self._pieces_of_moment(name, kind, value)

    def groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups as plain values, with parameters by name."""
        return plain_groups(self._trained(), self._names)

    def load_weights(self, source: StateSource) -> None:
        """Fill parameters and buffers, all of which `source` must have."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                read_placed(source, name, WEIGHT, self._place(parameter))
            for name, buffer in self.buffers.items():
                read_placed(source, name, BUFFER, whole(buffer, owned=False))

    def load_moments(self, source: StateSource) -> None:
        """Make the optimizer's state anew, as `source` has it, and take over the groups' values."""
        optimizer = self._trained()
        load_groups(optimizer, self._names, source)
        before = dict(optimizer.state)
        optimizer.state.clear()
        for group, names in zip(optimizer.param_groups, self._names, strict=True):
            for name, parameter in zip(names, group["params"], strict=True):
                kept = before.pop(parameter, {})
                moments = {
                    kind: self._load_moment(
                        source, name, kind, parameter, group, kept=kept.get(kind)
                    )
                    for kind in source.kinds(name)
                    if kind not in (WEIGHT, BUFFER) and not is_opaque(kind)
                }
                for kind, stored in own_kinds(name, source.kinds(name), self._seat).items():
                    local = load_opaque(source, name, stored, parameter.device)
                    moments[kind] = rebuilt(stored, local, parameter)
                if moments:
                    optimizer.state[parameter] = moments

    def _pieces_of_moment(self, name: str, kind: str, value: Any) -> Iterator[LocalTensor]:
        parameter = self.parameters[name]
        differs = isinstance(value, Tensor) and value.ndim and value.shape != parameter.shape
        if differs and self._is_cut(parameter):
            kept = keep(kind, value, self._seat)
            yield from pieces(name, kept.kind, whole(kept.local, owned=True))
        else:
            yield from pieces(name, kind, self._place_moment(name, kind, value))

    def _place_moment(self, name: str, kind: str, value: Any) -> Placement:
        if not isinstance(value, Tensor):
            return whole(number_tensor(name, kind, value), owned=self._is_main)
        parameter = self.parameters[name]
        if value.shape == parameter.shape:
            return self._place(value)
        return whole(value, owned=self._is_main)

    def _load_moment(
        self,
        source: StateSource,
        name: str,
        kind: str,
        parameter: Tensor,
        group: Mapping[str, Any],
        *,
        kept: Any,
    ) -> Any:
        dtype, shape = source.kinds(name)[kind], tuple(source.shape(name, kind))
        if shape == tuple(parameter.shape) and kind != "step":
            # As torch's own load_state_dict: what has the parameter's shape has its precision.
            wanted = parameter.dtype if dtype.is_floating_point else dtype
            moment = kept if is_like(kept, parameter, dtype=wanted) else None
            if moment is None:
                moment = torch.empty_like(parameter, dtype=wanted, requires_grad=False)
            read_placed(source, name, kind, self._place(moment))
            return moment
        if shape != () and self._is_cut(parameter):
            raise CheckpointError(cannot_divide(name, kind, shape, parameter.shape))
        return load_scalar(source, name, kind, group, parameter.device)

    def _is_cut(self, parameter: Tensor) -> bool:
        """The same on all ranks, also where one of them happens to hold all of it."""
        return self._seat.world_size > 1 and isinstance(parameter, DTensor)

    def _trained(self) -> Optimizer:
        if self.optimizer is None:
            raise RuntimeError("the engine was prepared without an optimizer")
        return self.optimizer


def read_placed(source: StateSource, name: str, kind: str, placed: Placement) -> None:
    """Fill this rank's elements of one tensor; a missing tensor or another shape is refused."""
    kinds = source.kinds(name)
    if kind not in kinds:
        raise CheckpointError(
            f"the checkpoint has no {kind} for {name!r}"
            + (f"; it has {', '.join(sorted(kinds))}" if kinds else "")
        )
    if (shape := tuple(source.shape(name, kind))) != placed.shape:
        raise CheckpointError(
            f"{kind} of {name!r} has shape {shape} in the checkpoint, {placed.shape} in the model"
        )
    read_flat(source, name, kind, placed.start, placed.local)


def read_flat(source: StateSource, name: str, kind: str, start: int, target: Tensor) -> None:
    """Read into a tensor of any device and strides, through host memory where it must be."""
    if target.numel() == 0:
        return
    if target.device.type == "cpu" and target.is_contiguous():
        source.read_into(name, kind, start, target.view(-1))
        return
    staged = torch.empty(target.numel(), dtype=target.dtype)
    source.read_into(name, kind, start, staged)
    target.copy_(staged.view(target.shape))


def number_tensor(name: str, kind: str, value: Any) -> Tensor:
    """A plain number of the optimizer's as a 0-dim tensor that keeps its type."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise CheckpointError(
            f"the optimizer keeps {kind!r} of {name!r} as a {type(value).__name__}; "
            "only tensors and numbers can be saved"
        )
    return torch.tensor(value, dtype=torch.int64 if isinstance(value, int) else torch.float64)


def pieces(name: str, kind: str, placed: Placement) -> Iterator[LocalTensor]:
    """The one piece, or none where this rank holds no element."""
    if placed.local.numel() == 0 and 0 not in placed.shape:
        return
    yield LocalTensor(
        name=name,
        kind=kind,
        shape=placed.shape,
        start=placed.start,
        data=placed.local.reshape(-1),
        owned=placed.owned,
    )
