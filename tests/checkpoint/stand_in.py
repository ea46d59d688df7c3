"""A small engine over a real model and AdamW, and processes joined over gloo to run it on.

Shards as ZeRO-3 does: rank r of W holds elements [r·P, (r+1)·P) of every flattened tensor, with
P = ceil(n / W), so that cuts fall in the middle of rows and late ranks may hold nothing.
"""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bigtrain.checkpoint.manifest import Progress
from bigtrain.checkpoint.save import save_checkpoint
from bigtrain.engine.protocol import BUFFER, WEIGHT, LocalTensor, StateSource
from bigtrain.topology import RankInfo

DEADLINE_S = 120


class OddModel(nn.Module):
    """Odd shapes: 0-dim, empty, one element, three dims, a tied and a frozen weight, buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 5)
        self.convolution = nn.Conv1d(5, 3, 3)
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.embedding.weight
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.nothing = nn.Parameter(torch.empty(0, 4))
        self.frozen = nn.Parameter(torch.randn(3, 11).to(torch.bfloat16), requires_grad=False)
        self.register_buffer("seen", torch.tensor(3, dtype=torch.int64))
        self.register_buffer("mask", torch.tensor([True, False, True]))

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens).transpose(1, 2)
        hidden = self.convolution(hidden).sum() * self.scale
        return hidden + self.nothing.sum() + self.head.weight.sum()


def make_state(seed: int = 0, steps: int = 3) -> tuple[nn.Module, torch.optim.AdamW]:
    """A model that was trained for a few steps, with two parameter groups."""
    torch.manual_seed(seed)
    model = OddModel()
    decayed = [p for p in model.parameters() if p.requires_grad and p.dim() > 1]
    others = [p for p in model.parameters() if p.requires_grad and p.dim() <= 1]
    groups = [
        {"params": decayed, "weight_decay": 0.1},
        {"params": others, "weight_decay": 0.0, "lr": 3e-4},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95))
    for _ in range(steps):
        model(torch.randint(0, 7, (2, 6))).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


class StandIn:
    """As much of an `Engine` as a checkpoint sees."""

    name = "stand_in"
    device = torch.device("cpu")

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        world: RankInfo,
        is_sharded: bool,
    ) -> None:
        self.model, self.optimizer = model, optimizer
        self.world, self.is_sharded = world, is_sharded
        self.scaler: dict[str, Any] = {"scale": 1024.0}

    def local_state(self, *, optimizer: bool) -> Iterator[LocalTensor]:
        for name, kind, value in self._tensors(optimizer=optimizer):
            start, stop = self._range(value.numel())
            yield LocalTensor(
                name=name,
                kind=kind,
                shape=tuple(value.shape),
                start=start,
                data=value.detach().view(-1)[start:stop],
                owned=self.is_sharded or self.world.is_main,
            )

    def param_groups(self) -> list[dict[str, Any]]:
        names = {p: name for name, p in self.model.named_parameters()}
        return [
            {**group, "params": [names[p] for p in group["params"]]}
            for group in self.optimizer.param_groups
        ]

    def scaler_state(self) -> dict[str, Any]:
        return dict(self.scaler)

    def load_local_state(self, source: StateSource, *, optimizer: bool) -> None:
        for piece in self.local_state(optimizer=optimizer):
            assert source.shape(piece.name, piece.kind) == piece.shape
            source.read_into(piece.name, piece.kind, piece.start, piece.data)
        if optimizer:
            assert source.param_groups is not None
            for group, saved in zip(self.optimizer.param_groups, source.param_groups, strict=True):
                group.update({k: v for k, v in saved.items() if k != "params"})

    def _tensors(self, *, optimizer: bool) -> Iterator[tuple[str, str, Tensor]]:
        for name, parameter in self.model.named_parameters():
            yield name, WEIGHT, parameter
            for kind, value in self.optimizer.state.get(parameter, {}).items() if optimizer else ():
                yield name, kind, value
        persistent = self.model.state_dict().keys()
        for name, buffer in self.model.named_buffers():
            if name in persistent:
                yield name, BUFFER, buffer

    def _range(self, numel: int) -> tuple[int, int]:
        if not self.is_sharded:
            return 0, numel
        each = -(-numel // self.world.world_size)
        start = min(numel, self.world.rank * each)
        return start, min(numel, start + each)


def blank(state: tuple[nn.Module, torch.optim.AdamW]) -> tuple[nn.Module, torch.optim.AdamW]:
    """The same objects with every value spoiled: what isn't loaded is seen."""
    model, optimizer = state
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(False if tensor.dtype == torch.bool else 9)
        for values in optimizer.state.values():
            for tensor in values.values():
                tensor.fill_(9)
    for group in optimizer.param_groups:
        group.update(lr=9.0, weight_decay=9.0, betas=(0.0, 0.0))
    return model, optimizer


def assert_same_local_state(loaded: StandIn, expected: StandIn, *, optimizer: bool = True) -> None:
    """Every piece that this rank holds is equal to the last bit."""
    pairs = zip(
        loaded.local_state(optimizer=optimizer),
        expected.local_state(optimizer=optimizer),
        strict=True,
    )
    for ours, theirs in pairs:
        assert (ours.name, ours.kind) == (theirs.name, theirs.kind)
        assert torch.equal(ours.data, theirs.data), (ours.name, ours.kind)
    if optimizer:
        assert loaded.param_groups() == expected.param_groups()


def save(
    target: Path,
    engine: StandIn,
    *,
    step: int = 3,
    run_id: str = "run",
    write_files: Callable[[Path], None] | None = None,
    only_model: bool = False,
) -> None:
    """Save with the small states that a trainer would give."""
    import numpy

    save_checkpoint(
        target,
        engine=engine,  # type: ignore[arg-type]
        world=engine.world,
        run_id=run_id,
        progress=Progress(step=step, epoch=0.5, samples_seen=12 * step),
        scheduler_state={"last_epoch": step, "_last_lr": [1e-3, 3e-4]},
        rng_state={
            "cpu": torch.random.get_rng_state(),
            "numpy": numpy.random.get_state(),
            "rank": engine.world.rank,
        },
        write_files=write_files or ModelFiles(engine),
        only_model=only_model,
    )


class ModelFiles:
    """Writes the model's own files as `save_pretrained` would, and one that is no tensor."""

    def __init__(self, engine: StandIn, weights: Mapping[str, Tensor] | None = None) -> None:
        self.engine, self.weights = engine, weights

    def __call__(self, staging: Path) -> None:
        from safetensors.torch import save_file

        (staging / "config.json").write_text('{"model_type": "odd"}')
        if not self.engine.is_sharded:
            model = self.engine.model
            named = (*model.named_parameters(), *model.named_buffers())
            weights = self.weights
            if weights is None:
                weights = {name: value.detach() for name, value in named}
            save_file(dict(weights), staging / "model.safetensors", metadata={"format": "pt"})


def run_ranks(world_size: int, action: Callable[..., Any], *arguments: Any) -> list[Any]:
    """`action(world, *arguments)` on every rank of a gloo group; the values, or their fault."""
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    # Rank 0 serves the store: here its thread could hold a lock at the moment of a fork, which
    # the new rank would then wait for in vain (the resolver's, while it names who has connected).
    with socket.create_server(("127.0.0.1", 0), backlog=world_size) as listener:
        processes = [
            context.Process(
                target=_run_rank, args=(rank, world_size, listener, results, action, arguments)
            )
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
    for process in processes:
        process.join(DEADLINE_S)
    hung = [process for process in processes if process.is_alive()]
    for process in hung:
        assert process.pid is not None
        os.kill(process.pid, signal.SIGABRT)  # which has it say where it is
        process.join(5)
        process.kill()
    assert not hung, f"{len(hung)} ranks still ran after {DEADLINE_S} s"
    found: dict[int, Any] = {}
    while not results.empty():
        rank, value, fault = results.get()
        assert fault is None, f"rank {rank}:\n{fault}"
        found[rank] = pickle.loads(value)
    assert len(found) == world_size, f"only ranks {sorted(found)} finished"
    return [found[rank] for rank in range(world_size)]


def _run_rank(
    rank: int,
    world_size: int,
    listener: socket.socket,
    results: Any,
    action: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    faulthandler.enable(sys.__stderr__)
    try:
        if world_size > 1:
            store = _open_store(listener, is_server=rank == 0)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
            dist.barrier()
        value = action(RankInfo(rank=rank, world_size=world_size), *arguments)
        # One that left now would close its connections while another still makes or reads them.
        with contextlib.suppress(RuntimeError):  # of those that a test has killed
            if dist.is_initialized():
                dist.barrier()
        # As bytes: torch's own way of passing tensors needs the sender to stay.
        results.put((rank, pickle.dumps(value), None))
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _open_store(listener: socket.socket, *, is_server: bool) -> dist.TCPStore:
    host, port = listener.getsockname()
    if not is_server:
        listener.close()
        return dist.TCPStore(host, port)
    return dist.TCPStore(
        host, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
    )
