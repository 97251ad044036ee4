"""The compiled CUDA library without a GPU: it loads, and registers a body for every operator.

A CPU torch has no libtorch_cuda.so; the stub that the build linked against stands in for it.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flatmtl.ops._library import LIBRARIES

ROOT = Path(__file__).resolve().parent.parent
STUB = ROOT / "build" / f"native-{sys.implementation.cache_tag}" / "stub"

CHECK = """
import sys, torch, flatmtl
from flatmtl.ops import OPERATORS, _library
torch.ops.load_library(sys.argv[1])
print([name for name in OPERATORS if _library.body(name, "cuda") != "cuda"])
"""


@pytest.mark.skipif(not LIBRARIES["cuda"].exists(), reason="built without CUDA")
@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch loads the library itself")
@pytest.mark.skipif(not STUB.exists(), reason="not built in this source tree")
def test_it_loads_and_registers_every_operator():
    done = subprocess.run(
        [sys.executable, "-c", CHECK, str(LIBRARIES["cuda"])],
        env={**os.environ, "LD_LIBRARY_PATH": str(STUB)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]", "operators without a CUDA body"


@pytest.mark.skipif(not LIBRARIES["cuda"].exists(), reason="built without CUDA")
def test_it_needs_no_cuda_runtime_and_no_python():
    """Static cudart, no Python: one build for every Python, tied to a driver and not to a torch."""
    text = subprocess.run(
        ["readelf", "-d", str(LIBRARIES["cuda"])], capture_output=True, text=True, check=True
    ).stdout
    needed = [line.split("[")[1].split("]")[0] for line in text.splitlines() if "NEEDED" in line]
    assert {"libtorch_cpu.so", "libtorch_cuda.so"} <= set(needed)
    assert not [n for n in needed if n.startswith(("libcudart", "libpython", "libtorch_python"))]
    assert "RPATH" not in text
    assert "RUNPATH" not in text
