"""Builds library.cu, by nvcc or by g++ with the emulation of CUDA, and calls it with torch tensors.

python -m bench.variants.library 90     builds it by nvcc for one architecture; needs no GPU
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "variants"
SOURCE = Path(__file__).with_name("library.cu")
EMULATION = ROOT / "tests" / "cuda_emulation"

ROWS = {torch.float32: 0, torch.bfloat16: 1}
GRAM = {"staged": 0, "tf32": 1, "async": 2, "mma": 3}
LEAST_TASKS, MOST_TASKS = 9, 64
FEW_TASKS = 32  # float32: staged in shared memory as shipped up to here, on tensor cores beyond
FACTOR_BYTES = 16  # StepFactors of update.cuh


def gram_variants(tasks: int, dtype: torch.dtype) -> list[str]:
    """Which of them take T rows of this type."""
    if not LEAST_TASKS <= tasks <= MOST_TASKS:
        return []
    if dtype != torch.float32:
        return ["staged"]
    return ["mma", "tf32", "async"] if tasks <= FEW_TASKS else ["staged", "tf32"]


def _compile(command: list[str | Path], log: Path) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    log.write_text(done.stdout + done.stderr)
    if done.returncode != 0:
        raise RuntimeError(f"{command[0]} failed on {SOURCE.name}:\n{done.stderr}")


def build_cuda(arch: str, folder: Path = BUILD) -> Path:
    """For one architecture, as ``"90"``, unless one newer than its sources is there.

    Leaves what bench/ptxas_report.py reads beside it.
    """
    out = folder / f"variants-{arch}.so"
    sources = [*SOURCE.parent.glob("*.cu*"), *(ROOT / "csrc").rglob("*.*h")]
    if out.exists() and out.stat().st_mtime > max(file.stat().st_mtime for file in sources):
        return out
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise RuntimeError("nvcc must be on the PATH, got none")
    folder.mkdir(parents=True, exist_ok=True)
    code = f"-gencode=arch=compute_{arch},code=sm_{arch}"
    unit, linked = folder / "library.o", folder / "linked.so"
    flags = ["-std=c++17", "-O3", "-DNDEBUG", "-Xcompiler", "-fPIC", "-Xptxas", "-v", code]
    _compile([nvcc, *flags, "-c", SOURCE, "-o", unit], folder / "library.log")
    _compile([nvcc, "-shared", code, unit, "-o", linked], folder / "link.txt")
    return linked.replace(out)  # a build that is stopped leaves none


def build_emulated(folder: Path = BUILD) -> Path:
    """For the CPU: every thread of a block in turn."""
    folder.mkdir(parents=True, exist_ok=True)
    out = folder / "emulated.so"
    flags = ["-std=c++17", "-O1", "-Wall", "-Werror", "-Wno-unknown-pragmas", "-shared", "-fPIC"]
    flags += ["-Wno-class-memaccess", "-fno-strict-aliasing", f"-I{EMULATION}"]
    sources = ["-x", "c++", SOURCE, EMULATION / "emulator.cpp"]
    _compile(["g++", *flags, *sources, "-o", out], folder / "emulated.txt")
    return out


class Library:
    """The variants as calls on tensors. J: [T, P], float32 or bfloat16; the rest is float32 or float64."""

    def __init__(self, path: Path, device: str) -> None:
        self.device = device
        self._code = ctypes.CDLL(str(path))
        self._code.variants_gram_partials.restype = ctypes.c_int64
        if device == "cpu":
            self._code.emulated_error.restype = ctypes.c_char_p

    def order(self, mode: int, seed: int) -> None:
        """In what order the emulation runs the threads: 0 forward, 1 backward, 2 shuffled."""
        self._code.emulated_order(mode, seed)

    def gram(self, variant: str, jac: Tensor) -> Tensor:
        """J J^T, float64 [T, T]."""
        tasks, columns = jac.shape
        size = self._code.variants_gram_partials(GRAM[variant], tasks, ctypes.c_int64(columns))
        partials, out = (
            torch.empty(n, dtype=torch.float64, device=self.device) for n in (size, tasks**2)
        )
        self._run("gram", GRAM[variant], *_rows(jac), _address(partials), _address(out))
        return out.view(tasks, tasks)

    def async_chunk(self, jac: Tensor) -> Tensor:
        """The triangle of J J^T, row by row, of the asynchronous form in one chunk; emulation only."""
        tasks, columns = jac.shape
        out = torch.empty(tasks * (tasks + 1) // 2, dtype=torch.float64)
        code = self._code.variants_async_chunk(
            _address(jac), tasks, ctypes.c_int64(columns), _address(out)
        )
        self._check("async_chunk", code)
        return out

    def factors(self) -> Tensor:
        """The count of steps on the device, before the first."""
        return torch.zeros(FACTOR_BYTES, dtype=torch.uint8, device=self.device)

    def combine_sgd(
        self,
        jac: Tensor,
        weights: Tensor,
        params: Tensor,
        buffer: Tensor,
        factors: Tensor,
        *,
        lr: float,
        momentum: float,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
    ) -> None:
        """A step of torch.optim.SGD with the gradient w J; params, buffer: float32 [P]."""
        state = map(_address, (params, buffer, factors))
        numbers = map(ctypes.c_double, (lr, momentum, dampening, weight_decay))
        self._run("combine_sgd", *_weighted(jac, weights), *state, *numbers, int(nesterov))

    def combine_adamw(
        self,
        jac: Tensor,
        weights: Tensor,
        params: Tensor,
        mean: Tensor,
        square: Tensor,
        factors: Tensor,
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        """A step of torch.optim.AdamW with the gradient w J; params, mean, square: float32 [P]."""
        state = map(_address, (params, mean, square, factors))
        numbers = map(ctypes.c_double, (lr, *betas, eps, weight_decay))
        self._run("combine_adamw", *_weighted(jac, weights), *state, *numbers)

    def _run(self, name: str, *arguments: object) -> None:
        stream = torch.cuda.current_stream().cuda_stream if self.device == "cuda" else None
        code = getattr(self._code, f"variants_{name}")(*arguments, ctypes.c_void_p(stream))
        self._check(name, code)

    def _check(self, name: str, code: int) -> None:
        said = b"" if self.device == "cuda" else self._code.emulated_error()
        if code or said:
            raise RuntimeError(f"{name}: CUDA error {code} {said.decode()}".rstrip())


def _address(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def _rows(jac: Tensor) -> tuple[object, ...]:
    stride, columns = ctypes.c_int64(jac.stride(0)), ctypes.c_int64(jac.shape[1])
    return ROWS[jac.dtype], _address(jac), stride, jac.shape[0], columns


def _weighted(jac: Tensor, weights: Tensor) -> tuple[object, ...]:
    dtype, address, stride, tasks, columns = _rows(jac)
    return dtype, address, stride, _address(weights), tasks, columns


if __name__ == "__main__":
    print(f"built {build_cuda(*sys.argv[1:2])}")
