"""Values of all ranks: gathered, padded to one size, averaged. Alone, everything is as it was.

Nested lists, tuples and dicts of tensors are walked with accelerate's own function, so that what
its users gather can be gathered here too.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils.operations import recursively_apply
from torch import Tensor


def world_size() -> int:
    """Ranks in the process group; 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather(data: Any) -> Any:
    """Every tensor in `data` with the ranks' values one after another in dim 0."""
    if world_size() == 1:
        return data
    return recursively_apply(_gather_tensor, data, error_on_other_type=True)


def _gather_tensor(tensor: Tensor) -> Tensor:
    if tensor.ndim == 0:
        tensor = tensor[None]
    if tensor.dtype == torch.bool:  # gloo has no bool
        return _gather_tensor(tensor.to(torch.uint8)).to(torch.bool)
    tensor = tensor.contiguous()
    pieces = [torch.empty_like(tensor) for _ in range(world_size())]
    dist.all_gather(pieces, tensor)
    return torch.cat(pieces)


def reduce(data: Any, reduction: str) -> Any:
    """A copy of `data` with every tensor's sum over the ranks, or its "mean" or "max"."""

    def reduce_tensor(tensor: Tensor) -> Tensor:
        reduced = tensor.clone()
        if world_size() > 1:
            dist.all_reduce(reduced, dist.ReduceOp.MAX if reduction == "max" else dist.ReduceOp.SUM)
            if reduction == "mean":
                reduced /= world_size()
        return reduced

    return recursively_apply(reduce_tensor, data, error_on_other_type=True)


def gather_objects(data: Any) -> Any:
    """The ranks' lists one after another; `data` itself where there is one rank."""
    if world_size() == 1:
        return data
    pieces: list[Any] = [None] * world_size()
    dist.all_gather_object(pieces, data)
    return [item for piece in pieces for item in piece]


def pad(data: Any, *, dim: int = 0, pad_index: int = 0, pad_first: bool = False) -> Any:
    """Every tensor in `data` as long in `dim` as it is on the rank where it is longest."""
    if world_size() == 1:
        return data

    def pad_tensor(tensor: Tensor) -> Tensor:
        if dim >= tensor.ndim or dim < -tensor.ndim:
            return tensor
        sizes = _gather_tensor(torch.tensor([tensor.shape[dim]], device=tensor.device))
        longest, length = int(sizes.max()), tensor.shape[dim]
        if longest == length:
            return tensor
        shape = list(tensor.shape)
        shape[dim] = longest
        padded = tensor.new_full(shape, pad_index)
        padded.narrow(dim, longest - length if pad_first else 0, length).copy_(tensor)
        return padded

    return recursively_apply(pad_tensor, data, error_on_other_type=True)


def mean(value: Tensor) -> Tensor:
    """Mean over the ranks of a 0-dim tensor."""
    gathered: Tensor = gather(value.detach())
    return gathered.mean()


def total(value: float, *, device: torch.device) -> float:
    """Sum of one number over the ranks."""
    if world_size() == 1:
        return value
    summed = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(summed)
    return float(summed.item())


def from_main(value: Any) -> Any:
    """Rank 0's value of a picklable object, on all ranks."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def barrier() -> None:
    """Wait until every rank has come here."""
    if world_size() > 1:
        dist.barrier()
