"""Which CUDA architectures setup.py takes, asked beside a stand-in for nvcc: nothing is compiled."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.skipif(
    not (ROOT / "setup.py").exists(),
    reason="the sources are not here: flatmtl is tested as installed",
)

NVCC = """#!/bin/sh
case "$1" in
  --version) echo "Cuda compilation tools, release 13.0, V13.0.88" ;;
  *) echo '#$ TOP={top}' >&2 ;;
esac
"""
# setup.py without its call of setup()
PROGRAM = """
import runpy, sys, setuptools
from pathlib import Path
setuptools.setup = lambda **_: None
names = runpy.run_path(sys.argv[1])
print(eval(sys.argv[2], names))
"""


def asked(expression: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """What an expression gives in setup.py."""
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, str(ROOT / "setup.py"), expression],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def test_they_reach_the_compiler_and_the_library_knows_them(tmp_path):
    pytest.importorskip("pybind11")
    for folder in ("bin", "lib"):
        (tmp_path / folder).mkdir()
    (tmp_path / "lib" / "libcudart_static.a").touch()
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.write_text(NVCC.format(top=tmp_path))
    nvcc.chmod(0o755)
    done = asked(
        "ninja_file(Path('/build'), Path('/out'), Path('/core'))",
        CUDA_HOME=str(tmp_path),
        FLATMTL_CUDA="1",
        TORCH_CUDA_ARCH_LIST="8.6 9.0a;12.0+PTX",
    )
    assert done.returncode == 0, done.stderr
    for flag in ("code=sm_86", "code=sm_90a", "code=sm_120", "code=compute_120"):
        assert flag in done.stdout
    assert "code=compute_86" not in done.stdout
    cuda = [line for line in done.stdout.splitlines() if "-DUSE_CUDA" in line]
    assert cuda
    assert all("""-DFLATMTL_BUILD_ARCHS='"8.6 9.0a;12.0+PTX"'""" in line for line in cuda)


OLD = "TORCH_CUDA_ARCH_LIST must list architectures from 8.0 on, whose tensor cores take bfloat16, got"
WRONG = "TORCH_CUDA_ARCH_LIST must list numbers such as 9.0 or 9.0+PTX, got"


@pytest.mark.parametrize(
    ("archs", "said"),
    [
        ("7.5", f"{OLD} 7.5"),
        ("8.0;7.0+PTX", f"{OLD} 7.0+PTX"),
        ("Hopper", f"{WRONG} Hopper"),
        ("90", f"{WRONG} 90"),
        ("9.0+ptx", f"{WRONG} 9.0+ptx"),
    ],
)
def test_what_cannot_be_compiled_is_refused(archs, said):
    done = asked("wanted_archs(ARCHS)", TORCH_CUDA_ARCH_LIST=archs)
    assert done.returncode == 1
    assert done.stderr == f"{said}\n"


@pytest.mark.parametrize("archs", [" ", ";", " ; "])
def test_an_empty_list_is_refused(archs):
    done = asked("wanted_archs(ARCHS)", TORCH_CUDA_ARCH_LIST=archs)
    assert done.returncode == 1
    assert done.stderr == (
        f"TORCH_CUDA_ARCH_LIST must list at least one architecture, got {archs!r}\n"
    )


@pytest.mark.parametrize("archs", ["8.0", "8.0;9.0+PTX", "9.0a 10.0f+PTX"])
def test_what_can_be_is_taken(archs):
    assert asked("wanted_archs(ARCHS)", TORCH_CUDA_ARCH_LIST=archs).stdout == f"{archs}\n"


def test_without_a_list_it_is_the_default():
    assert asked("wanted_archs(ARCHS)", TORCH_CUDA_ARCH_LIST="").stdout == "8.0;9.0;10.0;12.0+PTX\n"


CLANG = """#!/bin/sh
printf 'Available CPUs for this target:\\n\\n\\tsm_75\\n\\tsm_80\\n\\tsm_90\\n\\tsm_90a\\n' >&2
"""


@pytest.fixture
def clang(tmp_path):
    """A stand-in that knows 8.0 and 9.0, and the name that a toolkit is found by."""
    path = tmp_path / "clang++"
    path.write_text(CLANG)
    path.chmod(0o755)
    (tmp_path / "version.json").write_text('{"cuda": {"version": "12.8.1"}}')
    return {
        "FLATMTL_CUDA": "1",
        "FLATMTL_CUDA_CLANG": str(path),
        "CUDA_HOME": str(tmp_path),
    }


def test_clang_takes_what_it_knows(clang):
    done = asked("wanted_toolkit()", **clang, TORCH_CUDA_ARCH_LIST="8.0 9.0a;9.0+PTX")
    assert done.returncode == 0, done.stderr
    for flag in ("arch=sm_80", "arch=sm_90a", "include-ptx=sm_90"):
        assert flag in done.stdout


@pytest.mark.parametrize("arch", ["8.6", "10.0", "12.0+PTX"])
def test_clang_refuses_what_it_does_not(clang, arch):
    done = asked("wanted_toolkit()", **clang, TORCH_CUDA_ARCH_LIST=f"8.0;{arch}")
    assert done.returncode == 1
    assert "must list architectures that" in done.stderr
    assert done.stderr.endswith(f"knows (8.0, 9.0, 9.0a), got {arch}\n")


def test_clang_is_asked_for_by_name(clang, tmp_path):
    """Neither a missing clang nor a missing toolkit leaves CUDA out in silence."""
    missing = asked("wanted_toolkit()", **{**clang, "FLATMTL_CUDA_CLANG": "no-such-clang"})
    assert missing.returncode == 1
    assert "FLATMTL_CUDA_CLANG=no-such-clang is not on the PATH" in missing.stderr
    toolless = asked("wanted_toolkit()", **{**clang, "CUDA_HOME": str(tmp_path / "none")})
    assert toolless.returncode == 1
    assert "needs a CUDA toolkit in CUDA_HOME" in toolless.stderr
