"""How wheels are made: the audit's rules, the toolkit's wrapper, and the version.

The wheels themselves are built, audited and tried by `make wheel` and `make wheel-check`.
"""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import flatmtl

ROOT = Path(__file__).resolve().parent.parent


def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / ".ci" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


audit = script("audit_wheel")
toolkit = script("toolkit")


def dynamic(*needed, path=None):
    """As readelf -d prints it."""
    lines = [f" 0x0001 (NEEDED)             Shared library: [{name}]" for name in needed]
    lines += [f" 0x000f (RUNPATH)            Library runpath: [{path}]"] if path else []
    return "Dynamic section at offset 0x5c5d48 contains 31 entries:\n" + "\n".join(lines)


SYSTEM = ("libstdc++.so.6", "libm.so.6", "libgcc_s.so.1", "libc.so.6", "ld-linux-x86-64.so.2")
CPU = (*SYSTEM, "libtorch_cpu.so")
CUDA = (*CPU, "libtorch_cuda.so")


@pytest.mark.parametrize(
    ("library", "needed", "cuda"),
    [
        ("_core.cpython-311-x86_64-linux-gnu.so", SYSTEM, "13.0"),
        ("libflatmtl_cpu.so", CPU, "13.0"),
        ("libflatmtl_cuda.so", CUDA, "13.0"),
        ("libflatmtl_cuda.so", (*CUDA, "libcudart.so.12"), "12.8"),
    ],
)
def test_links_that_pass(library, needed, cuda):
    assert audit.wrong_links(library, dynamic(*needed), cuda) == []


@pytest.mark.parametrize(
    ("library", "needed", "cuda", "wrong"),
    [
        ("_core.so", (*SYSTEM, "libpython3.11.so.1.0"), "13.0", "needs libpython3.11.so.1.0"),
        ("libflatmtl_cpu.so", SYSTEM, "13.0", "does not need libtorch_cpu.so"),
        ("libflatmtl_cpu.so", (*CPU, "libtorch_python.so"), "13.0", "needs libtorch_python.so"),
        ("libflatmtl_cpu.so", (*CPU, "libgomp.so.1"), "13.0", "needs libgomp.so.1"),
        ("libflatmtl_cuda.so", CPU, "13.0", "does not need libtorch_cuda.so"),
        ("libflatmtl_cuda.so", (*CUDA, "libcudart.so.13"), "13.0", "needs libcudart.so.13"),
        ("libflatmtl_cuda.so", (*CUDA, "libcudart.so.12"), "13.0", "needs libcudart.so.12"),
        ("libflatmtl_cuda.so", CUDA, "12.8", "does not need libcudart.so.12"),
    ],
)
def test_links_that_do_not(library, needed, cuda, wrong):
    assert audit.wrong_links(library, dynamic(*needed), cuda) == [wrong]


def test_a_search_path_does_not_pass():
    text = dynamic(*CPU, path="/home/me/torch/lib")
    assert audit.wrong_links("libflatmtl_cpu.so", text, "13.0") == [
        "has the search path '/home/me/torch/lib'"
    ]


def report(**changes):
    torch = {
        "uses_torch": True,
        "stable": True,
        "unstable_symbols": [],
        "unknown_shim_symbols": [],
        "min_torch_version": "2.10.0",
    }
    return {"bundled_libs": [{"torch": {**torch, **changes}}]}


def test_what_a_library_takes_of_torch():
    assert audit.wrong_abi(report()) == []
    assert audit.wrong_abi(report(min_torch_version="2.9.1")) == []
    assert audit.wrong_abi(report(min_torch_version="2.11.0")) == ["needs torch 2.11.0"]
    assert audit.wrong_abi(report(min_torch_version=None)) == ["needs torch ?"]
    assert len(audit.wrong_abi(report(stable=False, unstable_symbols=["_ZN2at6Tensor"]))) == 2
    assert audit.wrong_abi(report(unknown_shim_symbols=["torch_new"])) == [
        "takes torch_new, unknown"
    ]


def test_symbols_of_torch_in_a_list_of_all():
    text = "                 U cudaLaunch@libcudart.so.12\n                 U torch_list_size\n"
    text += "                 w __gmon_start__\n                 U aoti_torch_get_dim\n\n"
    assert audit.torch_symbols(text) == ["aoti_torch_get_dim", "torch_list_size"]


@pytest.mark.parametrize(
    ("made", "cuda", "asked", "wrong"),
    [
        ("8.0;9.0;10.0;12.0+PTX", "13.0", "", []),
        ("8.0;9.0+PTX", "12.8", "", []),
        ("9.0", "13.0", "", ["was built for 9.0, not 8.0;9.0;10.0;12.0+PTX"]),
        ("8.0;9.0;10.0;12.0", "13.0", "", ["was built for 8.0;9.0;10.0;12.0, not "]),
        ("9.0", "13.0", "9.0", []),
        ("8.6 9.0", "13.0", "8.6;9.0", []),
        ("8.0;9.0;10.0;12.0+PTX", "13.0", "9.0", ["was built for 8.0;9.0;10.0;12.0+PTX, not 9.0"]),
    ],
)
def test_the_architectures_of_a_wheel(made, cuda, asked, wrong):
    found = audit.wrong_build({"cuda": cuda, "cuda_archs": made}, cuda, asked)
    assert len(found) == len(wrong)
    assert all(text.startswith(start) for text, start in zip(found, wrong, strict=True))


def test_the_toolkit_of_a_wheel():
    made = {"cuda": "13.0", "cuda_archs": audit.PROMISED["13"]}
    assert audit.wrong_build(made, "13.2", "") == ["was built by CUDA 13.0, not 13.2"]


def test_what_a_build_says_without_the_package():
    core = pytest.importorskip("flatmtl._core")
    assert audit.built_by(Path(core.__file__)) == core.build_info()


def test_the_readme_promises_what_is_built():
    """Its table, the audit and the defaults of setup.py are one list."""
    rows = re.findall(
        r"^\| `\+cu(\d\d)\d` \|(.*)\|$", (ROOT / "README.md").read_text(), re.MULTILINE
    )
    assert len(rows) == len(toolkit.RELEASES)
    source = (ROOT / "setup.py").read_text()
    for major, row in rows:
        archs = audit.PROMISED[major]
        machine, later = (cell.strip() for cell in row.split("|")[2:])
        assert machine == archs.replace("+PTX", "").replace(";", ", ")
        assert later.startswith(f"PTX of {archs.split(';')[-1].removesuffix('+PTX')}")
        name = {"12": "CLANG_ARCHS", "13": "ARCHS"}[major]
        assert re.search(rf'^{name} = "{re.escape(archs)}"', source, re.MULTILINE)


@pytest.mark.parametrize(
    ("tag", "refused"),
    [
        ("manylinux_2_17_x86_64.manylinux2014_x86_64", False),
        ("manylinux_2_34_x86_64", False),
        ("manylinux_2_35_x86_64", False),
        ("manylinux_2_39_x86_64", True),
        ("manylinux_3_1_x86_64", True),
        ("linux_x86_64", True),
    ],
)
def test_a_wheel_for_newer_systems_only(tag, refused):
    assert audit.too_new(f"flatmtl-0.1.0+cu128-cp311-cp311-{tag}.whl", "2.35") is refused


def test_files_that_are_no_part_of_the_package():
    mine = ["flatmtl/ops/_library.py", "flatmtl-0.1.0+cu130.dist-info/RECORD"]
    assert audit.foreign(mine) == []
    assert audit.foreign([*mine, "tests/cases.py", "flatmtl.libs/libgomp.so"]) == [
        "tests/cases.py",
        "flatmtl.libs/libgomp.so",
    ]


def test_clangs_call_of_fatbinary_in_the_new_spelling(tmp_path):
    wrapper = tmp_path / "fatbinary"
    wrapper.write_text(toolkit.FATBINARY.replace("PACKER", "/bin/echo"))
    wrapper.chmod(0o755)
    images = [
        "--image=profile=sm_80,file=/tmp/x=1_sm_80.o",
        "--image=profile=compute_90,file=/tmp/x.s",
    ]
    done = subprocess.run(
        [wrapper, "-64", "--create", "/tmp/x.fatbin", *images],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == [
        "--compress=false",
        "-64",
        "--create",
        "/tmp/x.fatbin",
        "--image3=kind=elf,sm=80,file=/tmp/x=1_sm_80.o",
        "--image3=kind=ptx,sm=90,file=/tmp/x.s",
    ]


def test_an_unknown_toolkit_is_named(tmp_path):
    with pytest.raises(SystemExit, match=r"CUDA must be one of 12\.6, .*13\.2, got '12\.9'"):
        toolkit.main("12.9", tmp_path)


@pytest.mark.parametrize("local", ["", "cu130"])
def test_the_version_of_a_wheel(local):
    """What setup.py says; the smoke test compares flatmtl.__version__ with it in every wheel."""
    done = subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=ROOT,
        env={**os.environ, "FLATMTL_LOCAL_VERSION": local},
        capture_output=True,
        text=True,
        check=True,
    )
    base = re.sub(r"\+.*", "", flatmtl.__version__)
    assert done.stdout.split()[-1] == (f"{base}+{local}" if local else base)
