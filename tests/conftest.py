"""What every test stands on: a clean environment, a tiny model and a tokenizer without downloads.

Nothing here imports torch at module level, so that the torch-free tests stay quick.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

# A test run must mean the same inside a Slurm job, under torchrun and on a laptop.
_LAUNCHER_PREFIXES = (
    "ACCELERATE_",
    "BIGTRAIN_",
    "DEEPSPEED_",
    "FSDP_",
    "GROUP_",
    "HF_",
    "LOCAL_",
    "MASTER_",
    "NCCL_",
    "OMPI_",
    "PMI",
    "ROLE_",
    "SBATCH_",
    "SLURM_",
    "TORCHELASTIC_",
)
_LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "GLOO_SOCKET_IFNAME", "DS_ACCELERATOR")
# Kept although its prefix says otherwise: it is about the tests, not about a run.
REQUIRED_VARIABLE = "BIGTRAIN_TEST_REQUIRE"
"""Comma-separated markers and packages whose tests may not be skipped; CI sets what it installs."""
MARKERS = ("gpu", "slurm")


def pytest_configure(config: pytest.Config) -> None:
    """Set what libraries read when they are imported, before any test module imports them."""
    packages = set(filter(None, os.environ.get(REQUIRED_VARIABLE, "").split(","))) - {*MARKERS}
    if missing := sorted(name for name in packages if importlib.util.find_spec(name) is None):
        raise pytest.UsageError(f"{REQUIRED_VARIABLE} asks for {', '.join(missing)}: not installed")
    # In the background of a shell, or under nohup, these are ignored, and ranks would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["HF_DATASETS_OFFLINE"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # DeepSpeed compiles an operator at its first use, which takes a minute: kept between sessions.
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(home) / "torch_extensions"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip, with the reason, what this machine lacks; unless the run says it may not lack it."""
    required = os.environ.get(REQUIRED_VARIABLE, "").split(",")
    missing = {
        "gpu": None if Path("/dev/nvidia0").exists() else "no NVIDIA GPU (/dev/nvidia0)",
        "slurm": None if shutil.which("slurmctld") else "Slurm is not installed (slurmctld)",
    }
    for item in items:
        for marker, reason in missing.items():
            if reason and marker not in required and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def clean_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """No launcher's variable is set, caches are the session's own, nothing reaches the network.

    It is what a test's subprocesses inherit, too.
    """
    for name in list(os.environ):
        if name in _LAUNCHER_VARIABLES or name.startswith(_LAUNCHER_PREFIXES):
            monkeypatch.delenv(name)
    cache = tmp_path_factory.getbasetemp() / "cache"
    for name, value in {
        "HF_HOME": str(cache / "huggingface"),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "XDG_CACHE_HOME": str(cache),
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "100",
        "NO_COLOR": "1",
    }.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(autouse=True)
def own_log_level() -> Iterator[None]:
    """A test whose trainer sets `log_level` does not silence the tests after it."""
    levels = {name: logging.getLogger(name).level for name in ("bigtrain", "transformers")}
    yield
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


@pytest.fixture
def make_tiny_llama() -> Callable[..., LlamaForCausalLM]:
    """Builds a two-layer Llama (hidden 32, vocabulary 64), the same for the same seed.

    `make_tiny_llama(seed=0, **config)`: config replaces fields of its `LlamaConfig`.
    """

    def make(*, seed: int = 0, **config: Any) -> LlamaForCausalLM:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        fields = {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "vocab_size": 64,
            "max_position_embeddings": 128,
            "attention_dropout": 0.0,
            "tie_word_embeddings": False,
        } | config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return LlamaForCausalLM(LlamaConfig(**fields))

    return make


@pytest.fixture
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of `tokenizer: {kind: bytes}`: 256 bytes and `<|endoftext|>`."""
    from bigtrain.data.byte_tokenizer import make_byte_tokenizer

    return make_byte_tokenizer()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"can't mount a small disk: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)
