"""The CPU kernels of every instruction set this processor runs, not only of the best one.

The choice is made once per process, so the tests of the ops run again in a child process with
FLATMTL_CPU_ISA as an upper bound.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import SEED

from flatmtl.ops import _library

TESTS = Path(__file__).parent
FILES = ["gram", "combine", "pack", "perturb", "determinism"]
# what differs between instruction sets: lanes, tails, conversions; not the largest sizes
ONLY = "cpu and not reference and not 200 and not 65 and not 40 and not test_large"


@pytest.mark.parametrize("isa", ["base", "avx2"])
def test_ops_with_an_older_instruction_set(isa):
    best = _library.cpu_isa()
    if best in ("", isa) or (isa == "avx2" and best == "base"):
        pytest.skip(f"the tests run on {best or 'no C++ body'} anyway")
    files = [str(TESTS / f"test_ops_{name}.py") for name in FILES]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-k", ONLY]
    env = {**os.environ, "FLATMTL_CPU_ISA": isa, "FLATMTL_TEST_SEED": str(SEED)}
    done = subprocess.run(
        [*command, *files], env=env, capture_output=True, text=True, cwd=TESTS.parent
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@pytest.mark.parametrize("isa", ["base", "avx2", "avx512"])
def test_the_choice_is_an_upper_bound(isa):
    code = "from flatmtl.ops import _library; print(_library.cpu_isa())"
    env = {**os.environ, "FLATMTL_CPU_ISA": isa}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True,
                          cwd=TESTS.parent)  # fmt: skip
    order = ["", "base", "avx2", "avx512"]
    chosen, best = done.stdout.strip(), _library.cpu_isa()
    assert done.returncode == 0, done.stderr
    assert chosen == order[min(order.index(isa), order.index(best))] or best == ""
