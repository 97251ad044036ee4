"""What a launch says that fails because library, driver and device do not fit: text, without a GPU."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CSRC = HERE.parent / "csrc"
ARCHS = b"8.0;9.0+PTX"
OLD_DRIVER, NO_FUNCTION, NO_IMAGE, NEW_PTX = 35, 98, 209, 222
Text = Callable[..., str]


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Text:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    if not CSRC.is_dir():
        pytest.skip("the sources are not here: flatmtl is tested as installed")
    target = tmp_path_factory.mktemp("launch_error") / "launch_error.so"
    flags = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", f"-I{CSRC}/common"]
    command = [compiler, *flags, str(HERE / "launch_error.cpp"), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    function = ctypes.CDLL(str(target)).mismatch_text
    function.restype = ctypes.c_char_p
    function.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p] + [
        ctypes.c_int
    ] * 3

    def call(code: int, name: bytes = b"cudaErrorX", *, capability: int, driver: int) -> str:
        return function(code, name, 13020, ARCHS, 1, capability, driver).decode()

    return call


def test_both_sides_are_named(text):
    said = text(NO_IMAGE, b"cudaErrorNoKernelImageForDevice", capability=110, driver=13000)
    assert said == (
        "flatmtl's CUDA library cannot run on device 1 (cudaErrorNoKernelImageForDevice): it was built "
        "by CUDA 13.2 for the architectures 8.0;9.0+PTX; the device has capability 11.0 and the driver "
        "supports CUDA 13.0: build flatmtl with TORCH_CUDA_ARCH_LIST=11.0; with FLATMTL_CUDA=0 in the "
        "environment flatmtl runs on its reference operators (`python -m flatmtl info` says more)"
    )


@pytest.mark.parametrize(
    ("code", "capability", "driver", "advice"),
    [
        (NO_IMAGE, 86, 13020, "build flatmtl with TORCH_CUDA_ARCH_LIST=8.6"),
        (NO_FUNCTION, 121, 13020, "build flatmtl with TORCH_CUDA_ARCH_LIST=12.1"),
        (
            NO_IMAGE,
            75,
            13020,
            "need 8.0 or later; with FLATMTL_CUDA=0 in the environment flatmtl runs on its reference",
        ),
        (NO_FUNCTION, 0, 0, "build flatmtl with TORCH_CUDA_ARCH_LIST=the device's capability"),
        (
            NEW_PTX,
            100,
            13000,
            "update the driver to one for CUDA 13.2, or build flatmtl with TORCH",
        ),
        (
            OLD_DRIVER,
            90,
            12040,
            "update the driver, or install a flatmtl for CUDA 12 beside a torch for CUDA 12;",
        ),
        (OLD_DRIVER, 90, 13000, "the driver supports CUDA 13.0: update the driver;"),
        (OLD_DRIVER, 90, 11080, "the driver supports CUDA 11.8: update the driver;"),
        (OLD_DRIVER, 0, 0, "no driver was found: update the driver;"),
    ],
)
def test_what_is_to_be_done(text, code, capability, driver, advice):
    said = text(code, capability=capability, driver=driver)
    assert advice in said
    for fact in ("built by CUDA 13.2 for the architectures 8.0;9.0+PTX", "device 1"):
        assert fact in said
    assert (f"capability {capability // 10}.{capability % 10}" in said) is bool(capability)


@pytest.mark.parametrize("code", [0, 1, 2, 700, 719])
def test_other_errors_are_left_to_torch(text, code):
    assert text(code, capability=90, driver=13020) == ""


def test_the_codes_are_those_of_the_toolkit():
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no CUDA toolkit")
    dry = subprocess.run([nvcc, "--dryrun", "x.cu"], capture_output=True, text=True).stderr
    top = re.search(r"^#\$ TOP=(.*)$", dry, re.MULTILINE)
    assert top is not None
    header = next(Path(top[1]).rglob("driver_types.h")).read_text()
    for name, code in {
        "cudaErrorInsufficientDriver": OLD_DRIVER,
        "cudaErrorInvalidDeviceFunction": NO_FUNCTION,
        "cudaErrorNoKernelImageForDevice": NO_IMAGE,
        "cudaErrorUnsupportedPtxVersion": NEW_PTX,
    }.items():
        assert re.search(rf"\b{name}\s*=\s*{code}\b", header), name


def test_every_launch_is_checked_so():
    """A binding that asks torch alone would not name the architectures."""
    if not CSRC.is_dir():
        pytest.skip("the sources are not here: flatmtl is tested as installed")
    for source in sorted((CSRC / "cuda").iterdir()):
        uses = source.read_text().count("STD_CUDA_CHECK(")
        assert uses == (source.name == "binding.h"), source.name
