"""Smoke test of an installed flatmtl; run it with the Python it is installed for.

    build/smoke/bin/python .ci/smoke.py --cuda 13.0 --beside build/native-cpython-311/stub

Imports it, compares operators with plain torch, takes an optimizer step, runs the commands, and loads the
CUDA library. --cuda is the toolkit it must be built with ("" for none); --beside are folders with what
the CUDA library needs where torch has no CUDA: the build's stub, and of CUDA 12 the runtime.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.metadata
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import nn

import flatmtl
from flatmtl import ops
from flatmtl.ops import _library

LOAD = """
import sys, torch, flatmtl
from flatmtl.ops import OPERATORS, _library
torch.ops.load_library(sys.argv[1])
without = [name for name in OPERATORS if _library.body(name, "cuda") != "cuda"]
assert not without, f"no CUDA body for {without}"
"""


def check_installed(cuda: str) -> None:
    """It is the installed package, of one version, and what was built is all there."""
    assert Path(flatmtl.__file__).is_relative_to(sys.prefix), flatmtl.__file__
    assert flatmtl.__version__ == importlib.metadata.version("flatmtl"), flatmtl.__version__
    assert "cpu" not in _library.missing, _library.missing
    assert all(_library.body(name, "cpu") == "cpu" for name in ops.OPERATORS)
    from flatmtl import _core

    assert _core.build_info()["cuda"] == cuda, _core.build_info()
    assert _library.LIBRARIES["cuda"].exists() == bool(cuda), _library.LIBRARIES["cuda"]


def check_operators() -> None:
    """A handful of operators against plain torch."""
    torch.manual_seed(0)
    jac, sam = torch.randn(2, 5, 1003)
    weights = torch.rand(5, dtype=torch.float64)
    wide = jac.double()
    torch.testing.assert_close(ops.gram(jac), wide @ wide.T, rtol=1e-5, atol=1e-4)
    parts = (sam - jac).double()
    torch.testing.assert_close(ops.gram_difference(sam, jac), parts @ parts.T, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(ops.combine(jac, weights), (weights @ wide).float())
    row = torch.empty(20)
    grads = [torch.randn(3, 4), torch.randn(5)]
    square = ops.pack_row_(row, grads, [0, 15])  # a gap of three
    packed = torch.cat([grads[0].flatten(), torch.zeros(3), grads[1]])
    torch.testing.assert_close(row, packed, rtol=0, atol=0)
    torch.testing.assert_close(square.double().sum(), (packed.double() ** 2).sum())
    pair = torch.tensor([[1.0, 0.0], [-0.5, 1.0]])  # by hand: each is projected off the other
    first, second = pair
    product = first @ second
    by_hand = (
        first - product / (second @ second) * second + second - product / (first @ first) * first
    )
    torch.testing.assert_close(flatmtl.aggregate(pair, flatmtl.weighting.PCGrad()), by_hand)


def check_step() -> None:
    """One FS-MTL step changes every parameter and lowers nothing to NaN."""
    torch.manual_seed(0)
    trunk, heads = nn.Linear(8, 16), nn.ModuleList([nn.Linear(16, 1) for _ in range(2)])
    model = nn.ModuleList([trunk, heads])
    x, y = torch.randn(32, 8), torch.randn(2, 32, 1)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = flatmtl.MultiTaskOptimizer(
        torch.optim.AdamW(model.parameters(), lr=1e-2),
        weighting=flatmtl.weighting.PCGrad(),
        sharpness=flatmtl.SAM(rho=0.05),
        model=model,
    )

    def losses(tasks: tuple[int, ...] = (0, 1)) -> list[torch.Tensor]:
        features = torch.tanh(trunk(x))
        return [nn.functional.mse_loss(heads[t](features), y[t]) for t in tasks]

    first = optimizer.step(losses)
    for old, new in zip(before, model.parameters(), strict=True):
        assert new.isfinite().all()
        assert not torch.equal(old, new)
    for _ in range(20):
        last = optimizer.step(losses)
    assert sum(last) < sum(first), (first, last)


def check_commands() -> None:
    """The commands run, away from any source tree."""
    with tempfile.TemporaryDirectory() as elsewhere:
        for words in (["info"], ["--help"], ["methods"]):
            command = [sys.executable, "-m", "flatmtl", *words]
            subprocess.run(command, check=True, cwd=elsewhere, stdout=subprocess.PIPE)


def found(library: str) -> bool:
    """Whether the linker finds a library by its name."""
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def check_cuda_library(cuda: str, beside: str) -> str:
    """The CUDA library loads and has a body for every operator; says how that was seen.

    A library of CUDA 12 takes the runtime of the process: in a torch of another CUDA it must not load,
    unless the system has that runtime too.
    """
    path = _library.LIBRARIES["cuda"]
    foreign = cuda.startswith("12.") and (torch.version.cuda or "12.").partition(".")[0] != "12"
    if foreign and found("libcudart.so.12"):
        return f"CUDA library of {cuda} not tried: this system has a libcudart.so.12 of its own"
    folders = "" if torch.version.cuda else beside
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(path)],
        env={**os.environ, "LD_LIBRARY_PATH": folders},
        capture_output=True,
        text=True,
    )
    if foreign:
        assert done.returncode != 0
        assert "libcudart.so.12" in done.stderr, done.stderr
        return f"CUDA library of {cuda} refused by a torch of CUDA {torch.version.cuda}, as it must"
    assert done.returncode == 0, done.stderr
    return f"CUDA library of {cuda} loaded " + ("into torch" if torch.version.cuda else "on a stub")


def main() -> None:
    """Runs all checks and prints one line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cuda", required=True, help='toolkit of the build, "" for none')
    parser.add_argument("--beside", default="", help="folders for the CUDA library, by colons")
    arguments = parser.parse_args()
    check_installed(arguments.cuda)
    check_operators()
    check_step()
    check_commands()
    loaded = check_cuda_library(arguments.cuda, arguments.beside) if arguments.cuda else "no CUDA"
    print(f"smoke test passed: flatmtl {flatmtl.__version__}, torch {torch.__version__}, {loaded}")


if __name__ == "__main__":
    main()
