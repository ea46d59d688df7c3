"""DeepSpeed ZeRO checkpoints, stages 1, 2 and 3: the directory of one step, without deepspeed.

    mp_rank_00_model_states.pt, or one per rank at stage 3   names, shapes, buffers, frozen weights
    [bf16_]zero_pp_rank_<r>_mp_rank_00_optim_states.pt       one per rank: fp32 masters and moments

A rank's masters are flat vectors. At stages 1 and 2 a group's parameters lie one after another in
one vector that is cut into equal partitions; at stage 3 every rank has a vector of its own, with
an equal share of each parameter in it.
https://github.com/deepspeedai/DeepSpeed/blob/master/deepspeed/utils/zero_to_fp32.py
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bigtrain.checkpoint.boxes import Box, box_extents
from bigtrain.checkpoint.dtypes import DTYPES, DType
from bigtrain.checkpoint.formats.deepspeed_files import Saved, read_saved
from bigtrain.checkpoint.formats.segments import EqualVectors, Segment, extents_in
from bigtrain.checkpoint.index import BUFFER, WEIGHT, Extent, Extents, TensorEntry, TensorIndex
from bigtrain.checkpoint.inert import brief
from bigtrain.checkpoint.json_object import counts
from bigtrain.checkpoint.torch_file import TensorRef
from bigtrain.errors import CheckpointError

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class DeepSpeedCheckpoint:
    """One step of a DeepSpeed engine."""

    index: TensorIndex
    """Weights are the fp32 masters; frozen ones and buffers as the module holds them. Where the
    optimizer counts steps in a plain number, it is the group's `step` in `param_groups`."""
    stage: int
    world_size: int
    step: int | None
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Name of a tied parameter → the name under which its elements are stored."""
    opaque: frozenset[str] = frozenset()
    """Kinds of optimizer state that don't have their parameter's shape; not in the index."""


def read_deepspeed(directory: Path) -> DeepSpeedCheckpoint:
    """What the step's directory holds; CheckpointError names what is missing or can't be read."""
    try:
        return _Reader(read_saved(directory)).read()
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as fault:
        raise CheckpointError(
            f"{directory}: not laid out as a step of DeepSpeed's ({brief(fault)}); its files are "
            "damaged, or of a version that can't be read yet"
        ) from fault


@dataclass(frozen=True, kw_only=True)
class _Place:
    """Where a trained parameter's elements are, for any kind: the same in masters and moments."""

    shape: tuple[int, ...]
    group: int
    """Of the stored vectors."""
    at: int
    """Its first element, in the group's vector (stages 1, 2) or in that of each rank (3)."""

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


class _Reader:
    """Makes the index from what the files say."""

    def __init__(self, saved: Saved) -> None:
        self.saved = saved
        self.world_size = saved.world_size
        self.files: dict[Path, int] = {}
        self.entries: dict[tuple[str, str], TensorEntry] = {}
        self.opaque: set[str] = set()
        self.aliases: dict[str, str] = dict(saved.listed("shared_params"))

    def read(self) -> DeepSpeedCheckpoint:
        if self.saved.stage == 3:
            self._add_sharded_parameters()
        elif self.saved.stage:
            self._add_partitioned_groups()
        self._add_frozen()
        self._add_module()
        step = self.saved.model[0].get("global_steps")
        return DeepSpeedCheckpoint(
            index=TensorIndex(
                files=tuple(self.files), entries=self.entries, param_groups=self._param_groups()
            ),
            stage=self.saved.stage,
            world_size=self.world_size,
            step=step if isinstance(step, int) else None,
            aliases={alias: self._owner(alias) for alias in self.aliases},
            opaque=frozenset(self.opaque),
        )

    def _owner(self, alias: str) -> str:
        seen = {alias}
        name = alias
        while name in self.aliases and self.aliases[name] not in seen:
            name = self.aliases[name]
            seen.add(name)
        return name

    def _add_partitioned_groups(self) -> None:
        """Stages 1 and 2."""
        optim = self.saved.optim
        paddings = optim[0].get("param_alignment_paddings")
        for group, names in enumerate(self.saved.param_shapes):
            masters = [state["single_partition_of_fp32_groups"][group] for state in optim]
            size = _partition_size(masters, optim, group)
            after = counts(paddings[group]) if paddings else (0,) * len(names)
            places: dict[str, _Place] = {}
            at = 0
            for (name, shape), padding in zip(names.items(), after, strict=True):
                places[name] = _Place(shape=shape, group=group, at=at)
                at += math.prod(shape) + padding
            if at > size * len(optim):
                raise CheckpointError(
                    f"{self.saved.directory}: the partitions of group {group} hold "
                    f"{size * len(optim)} elements, its parameters are {at}; the files are not of "
                    "one save"
                )
            states = [_group_state(state["base_optimizer_state"], group) for state in optim]
            self._add_kind(WEIGHT, places, [self._partitions(masters, size)])
            for kind, vectors in self._partition_kinds(states, masters, size):
                self._add_kind(kind, places, [self._partitions(vectors, size)])
            self._add_step(places, states)

    def _partitions(self, vectors: Sequence[TensorRef], size: int) -> list[Segment]:
        """One long vector, of which each rank stored its partition."""
        return [
            self._segment(vector, start=rank * size, numel=min(size, math.prod(vector.shape)))
            for rank, vector in enumerate(vectors)
        ]

    def _partition_kinds(
        self,
        states: Sequence[Mapping[str, Any]],
        masters: Sequence[TensorRef],
        size: int,
    ) -> Iterator[tuple[str, list[TensorRef]]]:
        """The optimizer's kinds that have an element for each of a partition's."""
        for kind, first in states[0].items():
            if not isinstance(first, TensorRef) or not first.shape:
                continue
            vectors = [state[kind] for state in states]
            if all(
                math.prod(vector.shape) in (math.prod(master.shape), size)
                for vector, master in zip(vectors, masters, strict=True)
            ):
                yield kind, vectors
            else:
                self.opaque.add(kind)

    def _add_sharded_parameters(self) -> None:
        """Stage 3. Sub-groups lie one after another in a rank's vector, as in `param_shapes`."""
        places: dict[str, _Place] = {}
        at = 0
        for group, names in enumerate(self.saved.param_shapes):
            for name, shape in names.items():
                places[name] = _Place(shape=shape, group=group, at=at)
                at += -(-math.prod(shape) // self.world_size)
        masters = [state["fp32_flat_groups"] for state in self.saved.optim]
        self._check_ranks_agree(masters, needed=at)
        self._add_kind(WEIGHT, places, [self._joined(vectors) for vectors in masters])
        states = [state["optimizer_state_dict"]["state"] for state in self.saved.optim]
        for kind in self._sub_group_kinds(states[0], masters[0]):
            vectors = [[state[group][kind] for group in range(len(state))] for state in states]
            self._add_kind(kind, places, [self._joined(rank) for rank in vectors])
        for group in range(len(self.saved.param_shapes)):
            of_group = {name: place for name, place in places.items() if place.group == group}
            self._add_step(of_group, [state.get(group, {}) for state in states])

    def _check_ranks_agree(self, masters: Sequence[Sequence[TensorRef]], *, needed: int) -> None:
        lengths = [sum(math.prod(vector.shape) for vector in vectors) for vectors in masters]
        for rank, length in enumerate(lengths):
            if length != needed:
                raise CheckpointError(
                    f"{self.saved.directory}: rank {rank} holds {length} elements of the {needed} "
                    "that are its share; parameters on NVMe are not in a checkpoint, and files of "
                    "several saves don't fit together"
                )

    def _sub_group_kinds(
        self, states: Mapping[int, Mapping[str, Any]], masters: Sequence[TensorRef]
    ) -> list[str]:
        kinds: list[str] = []
        for kind, first in states.get(0, {}).items():
            if not isinstance(first, TensorRef) or not first.shape:
                continue
            vectors = [states.get(group, {}).get(kind) for group in range(len(masters))]
            if [getattr(vector, "shape", None) for vector in vectors] == [m.shape for m in masters]:
                kinds.append(kind)
            else:
                self.opaque.add(kind)
        return kinds

    def _joined(self, vectors: Sequence[TensorRef]) -> list[Segment]:
        segments: list[Segment] = []
        start = 0
        for vector in vectors:
            numel = math.prod(vector.shape)
            segments.append(self._segment(vector, start=start, numel=numel))
            start += numel
        return segments

    def _segment(self, vector: TensorRef, *, start: int, numel: int) -> Segment:
        if vector.strides not in ((1,), ()) and numel > 1:
            raise CheckpointError(f"{vector.file}: a flat vector is stored with gaps")
        return Segment(start, numel, self._file(vector.file), vector.offset, vector.dtype.itemsize)

    def _add_kind(
        self, kind: str, places: Mapping[str, _Place], vectors: Sequence[Sequence[Segment]]
    ) -> None:
        """The tensors of one kind; `vectors` are one for all ranks, or one for each."""
        dtype = self._dtype_of(kind)
        equal = EqualVectors.of(vectors)
        for name, place in places.items():
            share = -(-place.numel // len(vectors))
            at_once = equal and equal.extents(at=place.at, share=share, numel=place.numel)
            if at_once:
                self._add(name, kind, place.shape, dtype, at_once)
                continue
            extents: list[Extent] = []
            for rank, segments in enumerate(vectors):
                start = rank * share
                numel = min(share, place.numel - start)
                extents += extents_in(segments, at=place.at, numel=numel, start=start)
            self._add(name, kind, place.shape, dtype, extents)

    def _dtype_of(self, kind: str) -> DType:
        vectors = (
            self.saved.optim[0].get("fp32_flat_groups")
            or self.saved.optim[0]["single_partition_of_fp32_groups"]
        )
        if kind != WEIGHT:
            found = self.saved.optim[0]
            states = (
                found["optimizer_state_dict"]["state"]
                if self.saved.stage == 3
                else {0: _group_state(found["base_optimizer_state"], 0)}
            )
            vectors = [states[0][kind]]
        return vectors[0].dtype if vectors else DTYPES["float32"]

    def _add_step(self, places: Mapping[str, _Place], states: Sequence[Mapping[str, Any]]) -> None:
        step = states[0].get("step")
        if not isinstance(step, TensorRef) or step.shape:
            return
        extent = Extent(file=self._file(step.file), offset=step.offset, start=0, run=1)
        for name in places:
            self._add(name, "step", (), step.dtype, [extent])

    def _add_frozen(self) -> None:
        shapes = self.saved.listed("frozen_param_shapes")
        pieces = [state.get("frozen_param_fragments") or {} for state in self.saved.model]
        for name, stored_shape in shapes.items():
            shape = counts(list(stored_shape))
            if self.saved.stage != 3:
                self._add_whole(name, WEIGHT, pieces[0][name])
                continue
            share = -(-math.prod(shape) // self.world_size)
            extents: list[Extent] = []
            for rank, fragments in enumerate(pieces):
                stored = fragments[name]
                numel = min(share, math.prod(shape) - rank * share)
                extents += extents_in(self._joined([stored]), at=0, numel=numel, start=rank * share)
            self._add(name, WEIGHT, shape, pieces[0][name].dtype, extents)

    def _add_module(self) -> None:
        """Buffers; at stage 1, which keeps no fragments, frozen parameters too.

        A parameter that one module has under two names is in no list of DeepSpeed's: that its
        placeholder is the very same tensor as another's tells.
        """
        buffers = set(self.saved.model[0].get("buffer_names") or ())
        weights = {name for name, kind in self.entries if kind == WEIGHT}
        tensors = self.saved.module_tensors(known=weights | self.aliases.keys())
        known: dict[TensorRef, list[str]] = {}
        for name, stored in tensors.items():
            if name in weights:
                known.setdefault(stored, []).append(name)
        for name, stored in tensors.items():
            if name in self.aliases or name in weights:
                continue
            if name in buffers:
                self._add_whole(name, BUFFER, stored)
            elif len(known.get(stored, ())) == 1:
                self.aliases[name] = known[stored][0]
            elif self.saved.stage < 3:
                self._add_whole(name, WEIGHT, stored)
            else:
                raise CheckpointError(
                    f"{self.saved.directory}: the elements of {name} are nowhere in its files"
                )

    def _add_whole(self, name: str, kind: str, stored: TensorRef) -> None:
        extents = box_extents(
            stored.shape,
            Box((0,) * len(stored.shape), stored.shape),
            file=self._file(stored.file),
            offset=stored.offset,
            itemsize=stored.dtype.itemsize,
            file_strides=stored.strides,
        )
        self._add(name, kind, stored.shape, stored.dtype, list(extents))

    def _add(
        self,
        name: str,
        kind: str,
        shape: tuple[int, ...],
        dtype: DType,
        extents: list[Extent] | Extents,
    ) -> None:
        if (name, kind) in self.entries:
            raise CheckpointError(f"{self.saved.directory}: the {kind} of {name} is stored twice")
        whole = extents if isinstance(extents, Extents) else Extents(extents)
        self.entries[name, kind] = TensorEntry(
            name=name, kind=kind, shape=shape, dtype=dtype, extents=whole
        )

    def _file(self, path: Path) -> int:
        return self.files.setdefault(path, len(self.files))

    def _param_groups(self) -> tuple[Mapping[str, Any], ...] | None:
        if not self.saved.optim:
            return None
        names = [list(shapes) for shapes in self.saved.param_shapes]
        if self.saved.stage == 3:
            groups = self.saved.optim[0]["optimizer_state_dict"]["param_groups"]
            owned = [[name for i in group["params"] for name in names[i]] for group in groups]
            steps = self.saved.optim[0]["optimizer_state_dict"]["state"]
            numbers = [group["params"] for group in groups]
            states = [steps.get(ids[0], {}) if ids else {} for ids in numbers]
        else:
            base = self.saved.optim[0]["base_optimizer_state"]
            groups = base["param_groups"] if isinstance(base, dict) else [{} for _ in names]
            owned, states = names, [_group_state(base, i) for i in range(len(names))]
        return tuple(
            {**group, **_plain_step(state), "params": params}
            for group, params, state in zip(groups, owned, states, strict=True)
        )


def _plain_step(state: Mapping[str, Any]) -> Mapping[str, int]:
    step = state.get("step")
    return {"step": step} if isinstance(step, int) else {}


def _group_state(base: Any, group: int) -> Mapping[str, Any]:
    """The optimizer's state of one group; elastic saves keep a list of them."""
    states = base["state"] if isinstance(base, dict) else dict(enumerate(base))
    state: Mapping[str, Any] = states.get(group, {})
    return state


def _partition_size(
    vectors: Sequence[TensorRef], optim: Sequence[Mapping[str, Any]], group: int
) -> int:
    """How long every rank's partition of the group is, its padding included.

    The last ranks store theirs without it; an optimizer that names no stage stores it whole.
    """
    sizes = {
        math.prod(vector.shape) + (state["group_paddings"][group] if "zero_stage" in state else 0)
        for vector, state in zip(vectors, optim, strict=True)
    }
    if len(sizes) > 1:
        raise CheckpointError(
            f"{vectors[0].file.parent}: ranks hold partitions of {sorted(sizes)} elements of "
            f"group {group}; the files are not of one save"
        )
    return sizes.pop()
