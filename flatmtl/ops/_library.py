"""Loads the compiled bodies, and says which body an operator uses on a device."""

from __future__ import annotations

import ctypes
import os
import warnings
from pathlib import Path

import torch

from flatmtl.ops import _mismatch

PACKAGE = Path(__file__).resolve().parent.parent
LIBRARIES = {"cpu": PACKAGE / "libflatmtl_cpu.so", "cuda": PACKAGE / "libflatmtl_cuda.so"}

# device -> why its library is not in use, for `python -m flatmtl info`
missing: dict[str, str] = {}


def build() -> _mismatch.Build:
    """What the libraries were built with."""
    try:
        from flatmtl import _core
    except ImportError:  # an install without a C++ compiler has none
        return _mismatch.Build()
    facts = _core.build_info()
    return _mismatch.Build(facts["torch"], facts["compiler"], facts["cuda"], facts["cuda_archs"])


def _driver() -> int:
    """The CUDA version that the driver supports, as in 13000; 0 without a driver.

    Asked of the driver itself, without starting CUDA: a process may still fork after an import.
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    number = ctypes.c_int(0)
    failed = driver.cuDriverGetVersion(ctypes.byref(number))
    return 0 if failed else number.value


def here() -> _mismatch.Here:
    """What they find."""
    cuda = torch.version.cuda
    return _mismatch.Here(str(torch.__version__), cuda, 0 if cuda is None else _driver())


def _left_out() -> bool:
    """Whether the environment wants no CUDA library: by the name that leaves it out of a build."""
    return os.environ.get("FLATMTL_CUDA") == "0"


def _load(device: str, made: _mismatch.Build, found: _mismatch.Here) -> str:
    """Loads a device's library; returns what stands against it, or ""."""
    path = LIBRARIES[device]
    if device == "cuda":
        if found.cuda is None:
            return "this torch has no CUDA"
        if _left_out():
            return "left out by FLATMTL_CUDA=0"
        if not path.exists():
            return _mismatch.not_there(made, found)
        if refusal := _mismatch.old_driver(made, found):
            return refusal
    elif not path.exists():
        return "not built"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        # torch names the file; the linker's own words are the cause
        return _mismatch.not_loaded(made, found, str(error.__cause__ or error))
    return ""


def load() -> None:
    """Loads what was built. What is missing is said once, and the reference bodies do its work."""
    made, found = build(), here()
    for device in LIBRARIES:
        if why := _load(device, made, found):
            missing[device] = why
    # of CUDA there is nothing to say without a driver, hence without CUDA tensors, nor if it was asked for
    silent = not found.driver or _left_out()
    said = [device for device in missing if device == "cpu" or not silent]
    if said:
        devices = " and ".join(device.upper() for device in said)
        reasons = "; ".join(f"{LIBRARIES[device].name}: {missing[device]}" for device in said)
        warnings.warn(
            f"flatmtl runs on its reference operators, which are slower, on {devices} tensors. "
            f"{reasons} (`python -m flatmtl info` says more)",
            stacklevel=3,
        )


def body(name: str, device: str) -> str:
    """Which body ``flatmtl::name`` runs on tensors of ``device`` ("cpu" or "cuda")."""
    key = device.upper()
    own = torch._C._dispatch_has_kernel_for_dispatch_key(f"flatmtl::{name}", key)
    return device if own else "reference"


def cpu_isa() -> str:
    """The instruction set that the CPU library chose: "avx512", "avx2", "base"; "" without it."""
    if "cpu" in missing:
        return ""
    name = ctypes.CDLL(str(LIBRARIES["cpu"])).flatmtl_cpu_isa
    name.restype = ctypes.c_char_p
    return str(name().decode())
