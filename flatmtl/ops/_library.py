"""Loads the compiled bodies, and says which body an operator uses on a device."""

from __future__ import annotations

import ctypes
import warnings
from pathlib import Path

import torch

PACKAGE = Path(__file__).resolve().parent.parent
LIBRARIES = {"cpu": PACKAGE / "libflatmtl_cpu.so", "cuda": PACKAGE / "libflatmtl_cuda.so"}

# device -> why its library is not in use, for `python -m flatmtl info`
missing: dict[str, str] = {}


def _load(device: str) -> None:
    path = LIBRARIES[device]
    if not path.exists():
        missing[device] = "not built"
        return
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        missing[device] = str(error)


def load() -> None:
    """Loads what was built. What is missing is said once, and the reference bodies do its work."""
    _load("cpu")
    if torch.version.cuda is not None:
        _load("cuda")
    else:
        missing["cuda"] = "this torch has no CUDA"
    if "cpu" in missing:
        warnings.warn(
            f"flatmtl runs on its reference operators, which are slower: {LIBRARIES['cpu'].name} "
            f"{missing['cpu']} (`python -m flatmtl info` says more)",
            stacklevel=3,
        )
    if "cuda" in missing and torch.cuda.is_available():
        warnings.warn(
            f"flatmtl runs on its reference operators on CUDA: {LIBRARIES['cuda'].name} "
            f"{missing['cuda']} (`python -m flatmtl info` says more)",
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
