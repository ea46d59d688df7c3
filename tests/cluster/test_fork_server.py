"""CUDA is never touched before the fork, and a process in which it was is never forked."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from bigtrain.planning import preloading

# Runs at the start of the server's interpreter: makes torch believe in two GPUs as NVML reports
# them, and writes down every question to the CUDA runtime itself, which is what spoils a fork.
_SPY = """
    import importlib.abc, importlib.machinery, sys, traceback

    PARTS = (
        "init", "getDeviceCount", "getDevice", "setDevice", "getArchFlags", "getCurrentRawStream",
        "getDeviceProperties", "synchronize",
    )

    def spy(name):
        def asked(*arguments, **keywords):
            with open("asked.txt", "a") as file:
                print(name, *traceback.format_stack()[-6:-1], file=file)
            return 0
        return asked

    class Finder(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path, target=None):
            if name != "torch.cuda":
                return None
            spec = importlib.machinery.PathFinder.find_spec(name, path, target)
            run = spec.loader.exec_module
            def exec_module(module):
                run(module)
                import torch
                for part in PARTS:
                    setattr(torch._C, "_cuda_" + part, spy("_cuda_" + part))
                module._device_count_nvml = lambda: 2
                module._raw_device_count_nvml = lambda: 2
                module._is_compiled = lambda: True
            spec.loader.exec_module = exec_module
            return spec

    sys.meta_path.insert(0, Finder())
"""


@pytest.mark.parametrize("engine", ["single", "ddp", "fsdp", "zero3"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_no_preload_asks_the_cuda_runtime_anything(launcher: Any, engine: Any, device: str) -> None:
    launcher.script(_SPY, "spy/sitecustomize.py")
    modules = preloading.for_run_file(engine, "llama", {"report_to": "tensorboard"})
    path = f"{launcher.folder}/spy:{launcher.environment()['PYTHONPATH']}"
    done = launcher.run(
        """
        import sys, torch
        assert torch.cuda._device_count_nvml() == 2  # the spy is there
        assert not torch.cuda.is_initialized()
        print(sorted(name for name in ("deepspeed", "transformers") if name in sys.modules))
        """,
        env={"PYTHONPATH": path},
        device=device,
        preload=modules,
    )
    assert done.code == 0, done.err + done.rank_log(0)
    assert "transformers" in done.out
    assert ("deepspeed" in done.out) == (engine == "zero3")
    asked = launcher.folder / "asked.txt"
    assert not asked.exists(), asked.read_text()
    assert "preload left out" not in done.agent_log()


@pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc is not installed")
@pytest.mark.parametrize(("answer", "code"), [(3, 0), (0, 5)])  # 3: CUDA_ERROR_NOT_INITIALIZED
def test_the_driver_itself_is_asked_whether_cuda_was_started(
    launcher: Any, answer: int, code: int
) -> None:
    library = _stand_in_for_the_driver(launcher.folder, answer)
    launcher.script(f"import ctypes; ctypes.CDLL({str(library)!r})", "loads_driver.py")
    done = launcher.run("print('ran')", preload=["loads_driver"])
    assert done.code == code, done.err
    assert ("importing loads_driver initialised CUDA" in done.err) == (code == 5)
    assert ("start with --start fresh" in done.err) == (code == 5)


def test_long_arguments_arrive_whole(launcher: Any, start: dict[str, Any]) -> None:
    # More than a socket's message holds; a single one may not be longer than the kernel's 128 KiB.
    arguments = [str(n) * 5_000 for n in range(100, 106)]
    done = launcher.run(
        "import json, sys; json.dump(sys.argv[1:], open('argv.json', 'w'))",
        script_args=arguments,
        **start,
    )
    assert done.code == 0, done.err
    assert json.loads((launcher.folder / "argv.json").read_text()) == arguments


def test_the_agent_imports_no_torch(launcher: Any) -> None:
    done = launcher.run(
        """
        import os, pathlib
        maps = pathlib.Path(f"/proc/{os.getppid()}/maps").read_text()
        print("libtorch" in maps, "numpy" in maps)
        """,
        preload=["torch"],
    )
    assert done.out == "False False\n"


def _stand_in_for_the_driver(folder: Path, answer: int) -> Path:
    source, library = folder / "driver.c", folder / "libcuda.so.1"
    source.write_text(f"int cuCtxGetCurrent(void **context) {{ return {answer}; }}\n")
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, source], check=True)
    return library
