"""How long it takes to know what a very large checkpoint holds, and how much memory.

    python benchmarks/index.py [--ranks 4096] [--layers 184] [--dcp-ranks 64] [--json]

Synthetic checkpoints of a Llama of a trillion parameters (hidden 18,432, 184 layers) with AdamW's
two moments: what each rank of an FSDP run leaves in bigtrain's manifest, what each rank of a ZeRO-2
and a ZeRO-3 run leaves in DeepSpeed's files, and torch's `.metadata` of a DCP directory of fewer
ranks. Only what an index is made of is written, not the tensors' bytes: files are sparse. Each
index is made in a fresh process, with its tiling proven; seconds and peak resident memory are that
process's. The files lie in the page cache.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from bigtrain.checkpoint.blocks import hash_bytes
from bigtrain.checkpoint.items import StoredItem, StoredItems
from bigtrain.checkpoint.manifest import Manifest, Part, Progress, StoredTensor, part_name

HIDDEN, INTERMEDIATE, VOCABULARY = 18_432, 73_728, 131_072
KINDS = ("weight", "exp_avg", "exp_avg_sq")
_ITEM_OVERHEAD = 768
"""Of the zip around a tensor's bytes."""


def main() -> int:
    """Measure and print; the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=184)
    parser.add_argument("--dcp-ranks", type=int, default=64)
    parser.add_argument("--directory", type=Path, help="where to write (default: a temporary one)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--read", nargs=2, metavar=("FORMAT", "PATH"), help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.read:
        print(json.dumps(read(*chosen.read)))
        return 0
    shapes = model(chosen.layers)
    found: dict[str, Any] = {"parameters": sum(rows * columns for _, rows, columns in shapes)}
    with tempfile.TemporaryDirectory(dir=chosen.directory) as folder:
        for name, write, ranks in (
            ("bigtrain", write_own, chosen.ranks),
            ("zero2", write_zero2, chosen.ranks),
            ("zero3", write_zero3, chosen.ranks),
            ("dcp", write_dcp, chosen.dcp_ranks),
        ):
            path = Path(folder) / name
            write(path, shapes, ranks)
            found[name] = {"ranks": ranks, **measured(name, path)}
    report(found, as_json=chosen.json)
    return 0


def report(found: dict[str, Any], *, as_json: bool) -> None:
    """Print what was found."""
    if as_json:
        print(json.dumps(found))
        return
    print(f"{found.pop('parameters') / 1e9:,.0f} billion parameters")
    print(f"{'':10}{'ranks':>7}{'pieces':>13}{'seconds':>9}{'memory MB':>11}")
    for name, row in found.items():
        line = f"{name:10}{row['ranks']:7,}{row['pieces']:13,}{row['seconds']:9.2f}"
        print(f"{line}{row['megabytes']:11,.0f}")


def model(layers: int) -> list[tuple[str, int, int]]:
    """(name, rows, columns) of every parameter."""
    found = [("model.embed_tokens.weight", VOCABULARY, HIDDEN)]
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        for name in "qkvo":
            found.append((f"{prefix}.self_attn.{name}_proj.weight", HIDDEN, HIDDEN))
        for name, rows, columns in (
            ("gate", INTERMEDIATE, HIDDEN),
            ("up", INTERMEDIATE, HIDDEN),
            ("down", HIDDEN, INTERMEDIATE),
        ):
            found.append((f"{prefix}.mlp.{name}_proj.weight", rows, columns))
        for name in ("input", "post_attention"):
            found.append((f"{prefix}.{name}_layernorm.weight", HIDDEN, 1))
    return [*found, ("model.norm.weight", HIDDEN, 1), ("lm_head.weight", VOCABULARY, HIDDEN)]


# ---- Reading, in a process of its own ----


def measured(name: str, path: Path) -> dict[str, Any]:
    """What a fresh process takes."""
    command = [sys.executable, __file__, "--read", name, str(path)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def read(name: str, path: str) -> dict[str, Any]:
    """Make the index, prove that it tiles, and say what it took."""
    before = time.perf_counter()
    index = _index(name, Path(path))
    index.check_tiling()
    seconds = time.perf_counter() - before
    assert "torch" not in sys.modules
    return {
        "pieces": sum(len(entry.extents) for entry in index.entries.values()),
        "seconds": seconds,
        "megabytes": _peak_megabytes(),
    }


def _peak_megabytes() -> float:
    # Not getrusage's, which an exec hands on.
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:"))


def _index(name: str, path: Path) -> Any:
    if name == "bigtrain":
        from bigtrain.checkpoint.formats.committed import read_committed
        from bigtrain.checkpoint.manifest import read_manifest, read_parts

        manifest = read_manifest(path)
        parts = read_parts(path, manifest=manifest)
        return read_committed(path, manifest=manifest, parts=parts)
    if name == "dcp":
        from bigtrain.checkpoint.formats.dcp import read_dcp

        return read_dcp(path)
    from bigtrain.checkpoint.formats.deepspeed import read_deepspeed

    return read_deepspeed(path).index


# ---- bigtrain's ----


def write_own(path: Path, shapes: list[tuple[str, int, int]], ranks: int) -> None:
    """Manifest and parts, as FSDP2 cuts: rows by ceil(rows / ranks)."""
    (path / "manifest").mkdir(parents=True)
    parts: dict[str, tuple[int, str]] = {}
    for rank in range(ranks):
        content = _part(shapes, rank, ranks).to_bytes()
        (path / part_name(rank)).write_bytes(content)
        parts[part_name(rank)] = len(content), hash_bytes(content).hex()
    manifest = Manifest(
        uuid="synthetic",
        layout="sharded",
        run_id="synthetic",
        engine="fsdp",
        world_size=ranks,
        progress=Progress(step=1),
        created="2026-01-01T00:00:00+00:00",
        versions={},
        parts=parts,
        param_groups=({"params": [name for name, _, _ in shapes], "lr": 1e-4},),
    )
    (path / "manifest.json").write_bytes(manifest.to_bytes())


def _part(shapes: list[tuple[str, int, int]], rank: int, ranks: int) -> Part:
    tensors: list[StoredTensor] = []
    items: list[StoredItem] = []
    for kind in KINDS:
        folder = "weights" if kind == "weight" else "optimizer"
        end = 0
        for name, rows, columns in shapes:
            each = -(-rows // ranks)
            first, last = min(rows, rank * each), min(rows, (rank + 1) * each)
            if first == last:
                continue
            numel = (last - first) * columns
            items.append(
                StoredItem(
                    tensor=len(tensors),
                    file=f"{folder}/__{rank}_0.distcp",
                    payload=end + 512,
                    start=first * columns,
                    numel=numel,
                    hash=bytes(16),
                    begin=end,
                    length=numel * 4 + _ITEM_OVERHEAD,
                )
            )
            end += numel * 4 + _ITEM_OVERHEAD
            tensors.append(
                StoredTensor(name=name, kind=kind, dtype="float32", shape=(rows, columns))
            )
    return Part(rank=rank, tensors=tuple(tensors), items=StoredItems.of(items))


# ---- DeepSpeed's ----


def write_zero2(path: Path, shapes: list[tuple[str, int, int]], ranks: int) -> None:
    """One group, of which every rank has a partition."""
    total = sum(rows * columns for _, rows, columns in shapes)
    each = -(-total // (2 * ranks)) * 2

    def optimizer(vector: Callable[[int], Any]) -> dict[str, Any]:
        moments = {"exp_avg": vector(each), "exp_avg_sq": vector(each), "step": 1}
        return {
            "zero_stage": 2,
            "partition_count": [ranks],
            "group_paddings": [0],
            "single_partition_of_fp32_groups": [vector(each)],
            "base_optimizer_state": {"state": {0: moments}, "param_groups": [{"lr": 1e-4}]},
        }

    _write_zero(path, shapes, ranks, optimizer, ["mp_rank_00_model_states.pt"])


def write_zero3(path: Path, shapes: list[tuple[str, int, int]], ranks: int) -> None:
    """Every parameter cut over all ranks."""
    each = sum(-(-rows * columns // ranks) for _, rows, columns in shapes)

    def optimizer(vector: Callable[[int], Any]) -> dict[str, Any]:
        moments = {"exp_avg": vector(each), "exp_avg_sq": vector(each), "step": 1}
        groups = [{"lr": 1e-4, "params": [0]}]
        return {
            "zero_stage": 3,
            "partition_count": ranks,
            "fp32_flat_groups": [vector(each)],
            "optimizer_state_dict": {"state": {0: moments}, "param_groups": groups},
        }

    names = [f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" for rank in range(ranks)]
    _write_zero(path, shapes, ranks, optimizer, names)


def _write_zero(
    path: Path,
    shapes: list[tuple[str, int, int]],
    ranks: int,
    optimizer: Callable[[Callable[[int], Any]], dict[str, Any]],
    model_names: list[str],
) -> None:
    """Ranks' files differ in their tensors' bytes alone, which are not written: they are links."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    path.mkdir()
    sizes = {name: torch.Size((rows, columns)) for name, rows, columns in shapes}
    model = {
        "module": {},
        "buffer_names": [],
        "param_shapes": [sizes],
        "shared_params": {},
        "global_steps": 1,
    }
    with FakeTensorMode():
        state = optimizer(torch.empty)
    optimizer_names = [f"zero_pp_rank_{r}_mp_rank_00_optim_states.pt" for r in range(ranks)]
    for content, names in (
        (model, model_names),
        ({"optimizer_state_dict": state}, optimizer_names),
    ):
        with torch.serialization.skip_data(materialize_fake_tensors=True):
            torch.save(content, path / names[0])
        for name in names[1:]:
            (path / name).hardlink_to(path / names[0])


# ---- torch's ----


def write_dcp(path: Path, shapes: list[tuple[str, int, int]], ranks: int) -> None:
    """`.metadata` as torch pickles it; the data files stay empty."""
    from bigtrain.checkpoint.dcp_metadata import metadata_bytes

    path.mkdir()
    parts = []
    for rank in range(ranks):
        part = _part(shapes, rank, ranks)
        file = f"dcp/__{rank}_0.distcp"
        items = [replace(item, file=file) for item in part.items]
        parts.append(replace(part, items=items))
        (path / Path(file).name).touch()
    content = metadata_bytes("dcp", parts)
    assert content is not None
    (path / ".metadata").write_bytes(content)


if __name__ == "__main__":
    raise SystemExit(main())
