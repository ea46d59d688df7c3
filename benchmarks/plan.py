"""How long `bigtrain plan` takes to answer, and in how much memory.

    python benchmarks/plan.py                     # the table
    python benchmarks/plan.py --write docs/scale.md

Each case is asked in a process of its own: seconds from its start to its end, its processor time,
and the most memory that it held. None of them may import torch.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_MARK = "<!-- planned -->"
_TRILLION = """\
model:
  config: {model_type: llama, hidden_size: 25600, intermediate_size: 81920, num_hidden_layers: 130,
    num_attention_heads: 160, num_key_value_heads: 8, vocab_size: 128256,
    max_position_embeddings: 4096}
tokenizer: {kind: bytes}
data: {name: builtin:python-docs, sequence_length: 4096}
global_batch_size: 16384
training: {bf16: true, per_device_train_batch_size: 1, gradient_checkpointing: true}
"""
_EXPERTS = _TRILLION.replace("llama", "mixtral").replace("81920", "24576")
# Name → run file, and the nodes of eight GPUs that it is planned for.
CASES = {
    "quickstart, 1 node": ("quickstart.yaml", 1),
    "Llama-3 8B, 2 nodes": ("llama3-8b.yaml", 2),
    "Llama-3 70B, 16 nodes": ("llama3-70b.yaml", 16),
    "Llama of 1.0 T, 2,048 nodes": (_TRILLION, 2048),
    "Mixtral of 2.0 T, 2,048 nodes": (_EXPERTS, 2048),
}
_ASKED = """
import re, sys, time
from pathlib import Path
from bigtrain.cli import main
try:
    main()
finally:
    status = Path("/proc/self/status").read_text()
    peak = re.search(r"VmHWM:\\s+(\\d+)", status)[1]
    print(time.process_time(), peak, "torch" in sys.modules, file=sys.stderr)
"""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What one question took."""

    wall_s: float
    processor_s: float
    peak_mb: float


def main() -> None:
    """Ask, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--write", metavar="FILE", help="put the table into this document")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        table = "\n".join(_table(Path(folder), options.repeats))
    print(table)
    if options.write:
        _write(Path(options.write), table)


def _table(folder: Path, repeats: int) -> Iterator[str]:
    yield "| plan of | one engine, s | `--compare`, s | processor, s | memory, MB |"
    yield "|---|---|---|---|---|"
    for name, (content, nodes) in CASES.items():
        target = _run_file(folder, content)
        asked = [_ask(folder, target, nodes) for _ in range(repeats + 1)][1:]
        compared = [_ask(folder, target, nodes, "--compare") for _ in range(repeats)]
        yield (
            f"| {name} | {_spread([answer.wall_s for answer in asked])} | "
            f"{_spread([answer.wall_s for answer in compared])} | "
            f"{statistics.median(answer.processor_s for answer in asked):.2f} | "
            f"{max(answer.peak_mb for answer in (*asked, *compared)):.0f} |"
        )


def _run_file(folder: Path, content: str) -> str:
    if content.endswith(".yaml"):
        return content  # by its name among those that come with bigtrain
    path = folder / "run.yaml"
    path.write_text(content, encoding="utf-8")
    return path.name


def _ask(folder: Path, target: str, nodes: int, *more: str) -> Answer:
    command = [sys.executable, "-c", _ASKED, "plan", target, "--nodes", str(nodes)]
    command += ["--procs-per-node", "8", "--device-memory", "80GiB", *more]
    begin = time.perf_counter()
    done = subprocess.run(
        command,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    wall_s = time.perf_counter() - begin
    if done.returncode:
        sys.exit(done.stderr)
    processor_s, peak_kb, has_torch = done.stderr.split()[-3:]
    if has_torch == "True":
        sys.exit(f"{target}: torch was imported")
    return Answer(wall_s=wall_s, processor_s=float(processor_s), peak_mb=int(peak_kb) * 1024 / 1e6)


def _spread(seconds: list[float]) -> str:
    return f"{statistics.median(seconds):.2f} ({min(seconds):.2f}–{max(seconds):.2f})"


def _write(path: Path, table: str) -> None:
    """Replace what stands between the two marks of the document."""
    before, _, rest = path.read_text(encoding="utf-8").partition(_MARK)
    _, _, after = rest.partition(_MARK)
    path.write_text(f"{before}{_MARK}\n{table}\n{_MARK}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
