"""Rank 0's model is the model: its parameters and buffers are sent to every rank.

A rank that made the model's skeleton on the meta device gets real tensors here; one that made the
whole model has its own overwritten, so that a head that was initialised at random is the same
everywhere. All ranks must call, in the same order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from bigtrain.errors import ConfigError


def check_same(model: nn.Module) -> None:
    """Refuse models whose parameters or buffers differ in name, shape or training over ranks."""
    described = [(name, tuple(t.shape), t.requires_grad) for name, t in model.named_parameters()]
    described += [(name, tuple(t.shape), False) for name, t in model.named_buffers()]
    digests: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(digests, hashlib.sha256(repr(described).encode()).hexdigest())
    if differing := [rank for rank, digest in enumerate(digests) if digest != digests[0]]:
        raise ConfigError(
            f"the model on rank {differing[0]} has other parameters than the one on rank 0; "
            "build the same model, with the same parameters frozen, on every rank"
        )


class Spreader:
    """Sends a model from rank 0, as much at a time as is asked for."""

    def __init__(self, device: torch.device, *, master_dtype: torch.dtype | None = None) -> None:
        self._device = device
        self._master_dtype = master_dtype
        # What was sent, by the identity of both the old and the new tensor: tied parameters stay
        # one, and nothing is sent twice. The old one is kept, else its identity could be reused.
        self._sent: dict[int, tuple[Tensor, Tensor]] = {}

    def fill(self, module: nn.Module) -> None:
        """Make all of `module`'s tensors real and equal to rank 0's, except those sharded."""
        for _ in self.parameters(module):
            pass

    def parameters(self, module: nn.Module) -> Iterator[nn.Parameter]:
        """As `fill`; yields each parameter when it is real, before the next one is sent.

        Trained parameters arrive in the master precision. A parameter that was real keeps its
        identity; one on the meta device is replaced by a new one.
        """
        for owner in module.modules():
            for name, buffer in owner._buffers.items():
                if buffer is not None:
                    owner._buffers[name] = self._send_buffer(buffer)
            for name, parameter in owner._parameters.items():
                if parameter is None or isinstance(parameter, DTensor):
                    continue
                was_sent = id(parameter) in self._sent
                owner._parameters[name] = real = self._send_parameter(parameter)
                if not was_sent:
                    yield real

    def _send_parameter(self, parameter: nn.Parameter) -> nn.Parameter:
        if id(parameter) in self._sent:
            return self._sent[id(parameter)][1]  # type: ignore[return-value]
        received = self._broadcast(parameter.detach())
        if parameter.requires_grad and parameter.is_floating_point():
            received = received.to(self._master_dtype or received.dtype)
        if parameter.is_meta:
            real = nn.Parameter(received, requires_grad=parameter.requires_grad)
            real.__dict__.update(parameter.__dict__)
        else:
            parameter.data = received
            real = parameter
        self._remember(parameter, real)
        return real

    def _send_buffer(self, buffer: Tensor) -> Tensor:
        if id(buffer) not in self._sent:
            self._remember(buffer, self._broadcast(buffer))
        return self._sent[id(buffer)][1]

    def _broadcast(self, tensor: Tensor) -> Tensor:
        if tensor.is_meta:
            received = torch.empty(tensor.shape, dtype=tensor.dtype, device=self._device)
        else:
            received = tensor.to(self._device).contiguous()
        dist.broadcast(received, src=0)
        return received

    def _remember(self, old: Tensor, new: Tensor) -> None:
        self._sent[id(old)] = self._sent[id(new)] = (old, new)
