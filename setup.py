"""Builds the native parts; everything else about the package is in pyproject.toml.

Three shared objects, by one ninja file:

  flatmtl/libflatmtl_cpu.so    operators for CPU tensors        (LibTorch stable ABI, torch >= 2.10)
  flatmtl/libflatmtl_cuda.so   operators for CUDA tensors       (the same; nvcc, static cudart)
  flatmtl/_core.*.so           what is no tensor operator       (pybind11)

FLATMTL_CUDA=auto (default)  builds the CUDA library if nvcc is found
             1               fails without nvcc
             0               leaves it out
FLATMTL_CUDA_CLANG           a clang++ that compiles CUDA in nvcc's place, with the toolkit in CUDA_HOME:
                             for CUDA 12, of which PyPI has no nvcc (.ci/toolkit.py lays it out)
TORCH_CUDA_ARCH_LIST         architectures, default "8.0;9.0;10.0;12.0+PTX", of clang "8.0;9.0+PTX"
MAX_JOBS                     compile jobs at once
FLATMTL_LOCAL_VERSION        goes behind the version, as in 0.1.0+cu130; the build has its own folder then

Without a C++ compiler the package installs as pure Python and runs on its reference operators.
Whether a GPU is there at build time plays no part.
"""

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
INIT = ROOT / "flatmtl" / "__init__.py"
BASE = re.search(r'^__version__ = "(.+)"$', INIT.read_text(), re.MULTILINE)[1]
LOCAL = os.environ.get("FLATMTL_LOCAL_VERSION", "")
VERSION = f"{BASE}+{LOCAL}" if LOCAL else BASE
ARCHS = "8.0;9.0;10.0;12.0+PTX"
CLANG_ARCHS = "8.0;9.0+PTX"  # clang 19 knows no later ones: they run the PTX
CXX = shlex.split(os.environ.get("CXX") or "g++")
HOST = next(word for word in reversed(CXX) if not word.startswith("-"))  # past ccache and such
STABLE = "-DTORCH_TARGET_VERSION=0x020a000000000000"
WARN = "-Wall -Wextra -Wno-maybe-uninitialized"  # gcc's own AVX-512 headers trip the last one
ISA_FLAGS = {
    "kernels_avx2": "-mavx2 -mfma -mf16c",
    "kernels_avx512": "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mf16c"
    " -mprefer-vector-width=512",
}


def find_nvcc() -> Path | None:
    """nvcc from CUDA_HOME, else from the PATH."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    found = (home and shutil.which("nvcc", path=f"{home}/bin")) or shutil.which("nvcc")
    return Path(found) if found else None


class Toolkit(NamedTuple):
    """A CUDA toolkit, and what compiles with it."""

    version: str  # as in "13.0"
    compiler: str  # nvcc, or clang++ with the flags that make it one
    archs: str  # as in "8.0;9.0+PTX"
    link: str  # the CUDA runtime, for the linker


def wanted_toolkit() -> Toolkit | None:
    """The toolkit to build with, or None to leave CUDA out; FLATMTL_CUDA decides."""
    choice = os.environ.get("FLATMTL_CUDA", "auto")
    if choice not in ("0", "1", "auto"):
        sys.exit(f"FLATMTL_CUDA must be 0, 1 or auto, got {choice!r}")
    clang = os.environ.get("FLATMTL_CUDA_CLANG")
    if clang and choice != "0":
        return clang_toolkit(clang, Path(os.environ.get("CUDA_HOME") or "?"))
    nvcc = None if choice == "0" else find_nvcc()
    if choice == "1" and nvcc is None:
        sys.exit("FLATMTL_CUDA=1 needs nvcc: none in CUDA_HOME/bin nor on the PATH")
    if nvcc is None:
        return None
    try:
        return nvcc_toolkit(nvcc)
    except (RuntimeError, subprocess.CalledProcessError) as problem:
        if choice == "1":
            sys.exit(f"FLATMTL_CUDA=1: {problem}")
        print(f"flatmtl: built without CUDA: {problem}", file=sys.stderr)
        return None


def nvcc_toolkit(nvcc: Path) -> Toolkit:
    """Asks nvcc, which may be a wrapper on the PATH, for its release and its place."""
    text = subprocess.run([nvcc, "--version"], check=True, capture_output=True, text=True).stdout
    version = text.split("release ")[1].split(",")[0]
    if tuple(map(int, version.split("."))) < (12, 8):
        raise RuntimeError(f"CUDA 12.8 or later is needed, {nvcc} is {version}")
    dry = subprocess.run([nvcc, "--dryrun", "x.cu"], capture_output=True, text=True).stderr
    top = next((ln.split("=", 1)[1] for ln in dry.splitlines() if ln.startswith("#$ TOP=")), "?")
    for folder in ("lib64", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib", "lib"):
        libraries = (Path(top) / folder).resolve()
        if (libraries / "libcudart_static.a").exists():
            archs = wanted_archs(ARCHS)
            compiler = (
                f"{nvcc} -ccbin {HOST} -Xcompiler -fPIC,-fvisibility=hidden,-fvisibility-inlines-hidden"
                f" -Xptxas -v --compress-mode=size {gencode(archs)}"
            )
            link = f"-L{libraries} -lcudart_static -ldl -lrt -lpthread"
            return Toolkit(version, compiler, archs, link)
    raise RuntimeError(f"{nvcc} is there, but no libcudart_static.a in its toolkit {top}")


def clang_toolkit(clang: str, home: Path) -> Toolkit:
    """What is asked for by name: a missing part ends the build. The runtime is the shared one."""
    if shutil.which(clang) is None:
        sys.exit(f"FLATMTL_CUDA_CLANG={clang} is not on the PATH")
    about = home / "version.json"
    if not about.exists():
        sys.exit(f"FLATMTL_CUDA_CLANG needs a CUDA toolkit in CUDA_HOME: there is no {about}")
    version = ".".join(json.loads(about.read_text())["cuda"]["version"].split(".")[:2])
    archs = wanted_archs(CLANG_ARCHS)
    refuse_unknown(archs, clang)
    compiler = (
        f"{clang} -x cuda --cuda-path={home} -fPIC -fvisibility=hidden -fvisibility-inlines-hidden"
        f" -Wno-unknown-cuda-version -Xcuda-ptxas -v {clang_archs(archs)}"
    )
    return Toolkit(version, compiler, archs, f"-L{home}/lib64 -lcudart")


def entries_of(archs: str) -> list[str]:
    """The architectures of a list like "8.0;9.0+PTX"."""
    return archs.replace(";", " ").split()


def refuse_unknown(archs: str, clang: str) -> None:
    """Ends the build for an architecture that this clang does not know."""
    command = [clang, "--print-supported-cpus", "--target=nvptx64-nvidia-cuda"]
    listed = subprocess.run(command, capture_output=True, text=True)
    known = re.findall(r"\bsm_(\d+)(\d)([af]?)\b", listed.stdout + listed.stderr)
    names = [f"{major}.{minor}{kind}" for major, minor, kind in known if int(major) >= 8]
    for entry in entries_of(archs):
        if entry.removesuffix("+PTX") not in names:
            sys.exit(
                f"TORCH_CUDA_ARCH_LIST must list architectures that {clang} knows "
                f"({', '.join(names) or 'none from 8.0 on'}), got {entry}"
            )


def clang_archs(archs: str) -> str:
    """clang's flags for a list like "8.0;9.0+PTX"."""
    flags = ["--no-cuda-include-ptx=all"]
    for entry in entries_of(archs):
        arch = "sm_" + entry.removesuffix("+PTX").replace(".", "")
        flags.append(f"--cuda-gpu-arch={arch}")
        if entry.endswith("+PTX"):
            flags.append(f"--cuda-include-ptx={arch}")
    return " ".join(flags)


def wanted_archs(default: str) -> str:
    """TORCH_CUDA_ARCH_LIST, or the default; refused where the kernels cannot be compiled for it."""
    archs = os.environ.get("TORCH_CUDA_ARCH_LIST") or default
    entries = entries_of(archs)
    if not entries:
        sys.exit(f"TORCH_CUDA_ARCH_LIST must list at least one architecture, got {archs!r}")
    for entry in entries:
        found = re.fullmatch(r"(\d+)\.\d[af]?(\+PTX)?", entry)
        if found is None:
            sys.exit(f"TORCH_CUDA_ARCH_LIST must list numbers such as 9.0 or 9.0+PTX, got {entry}")
        if int(found[1]) < 8:
            sys.exit(
                "TORCH_CUDA_ARCH_LIST must list architectures from 8.0 on, whose tensor cores take "
                f"bfloat16, got {entry}"
            )
    return archs


def gencode(archs: str) -> str:
    """nvcc's -gencode flags for a list like "8.0;9.0+PTX"."""
    flags = []
    for entry in entries_of(archs):
        number = entry.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if entry.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return " ".join(flags)


def ninja_file(build: Path, out: Path, core: Path) -> str:
    """The text of build.ninja: objects in `build`, libraries in `out`, the pybind11 module at `core`."""
    import pybind11
    import torch

    torch_dir = Path(torch.__file__).parent
    torch_include = f"-isystem {torch_dir}/include"
    torch_link = f"-L{torch_dir}/lib -Wl,--no-as-needed -ltorch_cpu"
    cuda = wanted_toolkit()
    archs = cuda.archs if cuda else ""
    info = {"TORCH": torch.__version__, "CUDA": cuda.version if cuda else "", "ARCHS": archs}
    defines = " ".join(f"-DFLATMTL_BUILD_{k}='\"{v}\"'" for k, v in info.items())
    python = f"-I{sysconfig.get_path('include')} -I{pybind11.get_include()}"
    cxx = " ".join(CXX)
    common = "-std=c++17 -O3 -fPIC -fvisibility=hidden -DNDEBUG"
    lines = [
        "ninja_required_version = 1.5",
        f"rule cxx\n  command = {cxx} -MMD -MF $out.d {common} {WARN} $flags -c $in -o $out\n"
        "  depfile = $out.d\n  deps = gcc",
        f"rule link\n  command = {cxx} -shared $in -o $out -Wl,--no-undefined $libs",
    ]

    def compile_all(folder: str, pattern: str, rule: str, flags: str) -> str:
        objects = []
        for source in sorted((ROOT / "csrc" / folder).glob(pattern)):
            target = build / folder / f"{source.name}.o"
            extra = ISA_FLAGS.get(source.stem, "") if platform.machine() == "x86_64" else ""
            lines.append(f"build {target}: {rule} {source}\n  flags = {flags} {extra}")
            objects.append(str(target))
        return " ".join(objects)

    cpu = compile_all("cpu", "*.cpp", "cxx", f"{STABLE} {torch_include}")
    lines.append(f"build {out}/libflatmtl_cpu.so: link {cpu}\n  libs = {torch_link}")
    module = compile_all("core", "*.cpp", "cxx", f"{python} {defines}")
    lines.append(f"build {core}: link {module}\n  libs = -Wl,--unresolved-symbols=ignore-all")
    if cuda:
        lines += [
            f"rule cuda\n  command = {cuda.compiler} -MMD -MF $out.d -std=c++17 -O3 -DNDEBUG"
            " $flags -c $in -o $out 2> $out.log || (cat $out.log >&2; false)\n"
            "  depfile = $out.d\n  deps = gcc",
            f"rule stub\n  command = {cxx} -x c -shared -fPIC -Wl,-soname,libtorch_cuda.so $in -o $out",
            f"build {build}/stub/libtorch_cuda.so: stub {ROOT}/csrc/cuda/stub.c",
        ]
        facts = f"-DFLATMTL_BUILD_ARCHS='\"{archs}\"'"
        objects = compile_all(
            "cuda", "*.cu", "cuda", f"{STABLE} -DUSE_CUDA {facts} {torch_include}"
        )
        lines.append(
            f"build {out}/libflatmtl_cuda.so: link {objects} | {build}/stub/libtorch_cuda.so\n"
            f"  libs = {torch_link} -L{build}/stub -ltorch_cuda -Wl,--as-needed,--exclude-libs,ALL"
            f" {cuda.link}"
        )
    return "\n".join(lines) + "\n"


class NinjaBuild(build_ext):
    """Runs ninja in place of setuptools' own compiler calls."""

    def run(self) -> None:
        """Builds every library, or none where there is no C++ compiler."""
        if shutil.which(CXX[0]) is None:
            if os.environ.get("FLATMTL_CUDA") == "1":
                sys.exit("FLATMTL_CUDA=1 needs a C++ compiler: set CXX or install g++")
            print(
                "flatmtl: no C++ compiler; installing without compiled operators", file=sys.stderr
            )
            return
        # In the source tree, not in pip's temporary folder: ninja then compiles only what changed.
        name = f"wheel-{LOCAL}" if LOCAL else "native"
        build = ROOT / "build" / f"{name}-{sys.implementation.cache_tag}"
        if " " in str(ROOT):
            sys.exit(f"flatmtl must be built in a path without spaces, got {ROOT}")
        build.mkdir(parents=True, exist_ok=True)
        core = Path(self.get_ext_fullpath("flatmtl._core")).resolve()
        core.parent.mkdir(parents=True, exist_ok=True)
        text = ninja_file(build, core.parent, core)
        if "libflatmtl_cuda.so" not in text:  # one of an earlier build must not stay behind
            (core.parent / "libflatmtl_cuda.so").unlink(missing_ok=True)
        (build / "build.ninja").write_text(text)
        jobs = ["-j", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []
        subprocess.run([sys.executable, "-m", "ninja", "-C", str(build), *jobs], check=True)

    def get_outputs(self) -> list[str]:
        """What was built, for an installer's records."""
        folder = Path(self.get_ext_fullpath("flatmtl._core")).parent
        return [str(p) for p in folder.glob("*.so")]


class StampedPy(build_py):
    """Writes the local version into the copy of the package that goes into a wheel."""

    def run(self) -> None:
        """Copies the package; flatmtl.__version__ then is the wheel's version."""
        super().run()
        if not self.editable_mode:
            stamped = INIT.read_text().replace(f'"{BASE}"', f'"{VERSION}"')
            (Path(self.build_lib) / "flatmtl" / "__init__.py").write_text(stamped)


setup(
    version=VERSION,
    ext_modules=[Extension("flatmtl._core", sources=[])],
    cmdclass={"build_ext": NinjaBuild, "build_py": StampedPy},
)
