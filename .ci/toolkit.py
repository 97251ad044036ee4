"""Installs one CUDA toolkit from its PyPI packages and prints the folder to use as CUDA_HOME.

    python .ci/toolkit.py 13.0 build/toolkit-cu130

The packages go into a virtual environment of their own in that folder. Those of CUDA 13 hold all of a
toolkit. Those of CUDA 12 have neither nvcc nor fatbinary nor a static runtime: clang compiles in nvcc's
place (setup.py, FLATMTL_CUDA_CLANG), and what it looks for is laid out here as links. fatbinary, which
only packs what was compiled, is that of CUDA 13.
"""

from __future__ import annotations

import json
import subprocess
import sys
import venv
from pathlib import Path

RELEASES = {"12.6": "12.6.3", "12.8": "12.8.1", "13.0": "13.0.2", "13.2": "13.2.2"}
# cicc and its headers are packages of their own; unpinned they would be those of a later toolkit.
NVCC = "cuda-toolkit[nvcc,nvvm,crt,cudart,cccl]"
# curand for a header that clang includes before every CUDA source.
CLANG = "cuda-toolkit[nvcc,cudart,cccl,curand]"
PACKER = "nvidia-cuda-nvcc==13.0.88"

# clang 19 calls fatbinary with the images' old spelling. Uncompressed: what CUDA 13 compresses by default
# cannot be read by the oldest drivers of CUDA 12.
FATBINARY = """#!/bin/bash
arguments=(--compress=false)
for word in "$@"; do
  case $word in
    --image=profile=compute_*) kind=ptx ;;
    --image=profile=sm_*) kind=elf ;;
    *) arguments+=("$word"); continue ;;
  esac
  number=${word#*=*=*_} file=${word#*,file=}
  arguments+=("--image3=kind=$kind,sm=${number%%,*},file=$file")
done
exec "PACKER" "${arguments[@]}"
"""


def packages_of(cuda: str) -> list[str]:
    """What pip installs for a CUDA version such as "13.0"."""
    if cuda not in RELEASES:
        sys.exit(f"CUDA must be one of {', '.join(RELEASES)}, got {cuda!r}")
    if cuda.startswith("12."):
        return [f"{CLANG}=={RELEASES[cuda]}"]
    return [f"{NVCC}=={RELEASES[cuda]}"]


def pip(folder: Path, *arguments: str) -> None:
    """Runs pip of the environment in `folder`; says what could not be had and stops if it fails."""
    command = [f"{folder}/bin/python", "-m", "pip", "install", "-q", *arguments]
    if subprocess.run(command, stdout=sys.stderr).returncode != 0:
        sys.exit(f"cannot be had from the package index: {' '.join(arguments)}")


def link(place: Path, target: Path) -> None:
    """Makes `place` a link to `target`, which must be there."""
    if not target.exists():
        sys.exit(f"{target} is not in the packages")
    place.parent.mkdir(parents=True, exist_ok=True)
    place.unlink(missing_ok=True)
    place.symlink_to(target)


def packages_in(folder: Path) -> Path:
    """Where NVIDIA's packages lie in an environment, whatever its Python."""
    (packages,) = folder.glob("lib/python*/site-packages/nvidia")
    return packages


def lay_out(folder: Path, release: str) -> None:
    """Makes a CUDA root that clang accepts of the folders of the CUDA 12 packages."""
    packages, root = packages_in(folder), folder / "root"
    for package in ("cuda_cccl", "curand", "cuda_nvcc", "cuda_runtime"):
        for header in (packages / package / "include").iterdir():
            if not header.name.startswith("__"):
                link(root / "include" / header.name, header)
    link(root / "bin" / "ptxas", packages / "cuda_nvcc" / "bin" / "ptxas")
    link(root / "nvvm", packages / "cuda_nvcc" / "nvvm")
    runtime = packages / "cuda_runtime" / "lib" / "libcudart.so.12"
    link(root / "lib64" / runtime.name, runtime)
    link(root / "lib64" / "libcudart.so", runtime)
    (root / "version.json").write_text(json.dumps({"cuda": {"version": release}}))
    packer = packages / "cu13" / "bin" / "fatbinary"
    if not packer.exists():
        sys.exit(f"{packer} is not in the packages")
    wrapper = root / "bin" / "fatbinary"
    wrapper.write_text(FATBINARY.replace("PACKER", str(packer)))
    wrapper.chmod(0o755)


def main(cuda: str, folder: Path) -> None:
    """Installs the toolkit `cuda` in `folder`, once, and prints its root."""
    folder = folder.resolve()
    wanted = packages_of(cuda)
    clang = cuda.startswith("12.")
    complete = folder / "complete"
    if not complete.exists():
        venv.create(folder, with_pip=True, clear=True)
        pip(folder, *wanted)
        if clang:
            pip(folder, "--no-deps", PACKER)
            lay_out(folder, RELEASES[cuda])
        complete.touch()
    root = folder / "root" if clang else packages_in(folder) / "cu13"
    compiler = root / "bin" / ("ptxas" if clang else "nvcc")
    if not compiler.exists():  # a build would look for another one on the PATH
        sys.exit(f"{compiler} is not in the packages")
    print(root)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
