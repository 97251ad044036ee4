"""A CUDA library that does not fit its machine: what is decided, what is said, and that all goes on.

The decisions are functions of facts, asked here by table. A package whose CUDA library cannot be loaded,
on a machine whose driver is what a test says, is imported in a process of its own.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import flatmtl
from flatmtl.ops import _library, _mismatch
from flatmtl.ops._mismatch import Build, Here

CU13 = Build("2.13.0", "12.2.0", "13.0", "8.0;9.0;10.0;12.0+PTX")
CU12 = Build("2.12.0", "19.1.0", "12.8", "8.0;9.0+PTX")
PURE = Build()
NO_CUDA = Build("2.13.0+cpu", "12.2.0")


@pytest.mark.parametrize(
    ("build", "driver", "refused"),
    [
        (CU13, 13000, False),
        (CU13, 13020, False),
        (CU13, 14000, False),
        (CU13, 12090, True),
        (CU13, 11080, True),
        (
            CU13._replace(cuda="13.2"),
            13000,
            False,
        ),  # one driver for all toolkits of a major version
        (CU12, 12000, False),
        (CU12, 12080, False),
        (CU12, 13000, False),
        (CU12, 11080, True),
        (CU13, 0, False),  # no driver: nothing is launched either
        (NO_CUDA, 11080, False),
        (PURE, 11080, False),
    ],
)
def test_a_driver_too_old_for_the_toolkit(build, driver, refused):
    text = _mismatch.old_driver(build, Here("2.13.0", "12.8", driver))
    assert bool(text) is refused


def test_an_old_driver_is_named_beside_what_the_build_needs():
    text = _mismatch.old_driver(CU13, Here("2.10.0", "12.8", 12040))
    assert text == (
        "the driver is too old: it is built by CUDA 13.0 for 8.0;9.0;10.0;12.0+PTX, with torch 2.13.0, "
        "which needs a driver for CUDA 13.0 (580) or later; here are torch 2.10.0 for CUDA 12.8 and a "
        "driver for CUDA 12.4: update the driver, or install a flatmtl for CUDA 12, or build it from "
        "source with a CUDA 12 toolkit"
    )


def test_a_torch_that_needs_a_newer_driver_itself_has_no_other_way_out():
    text = _mismatch.old_driver(CU13, Here("2.13.0", "13.0", 12040))
    assert text.endswith("a driver for CUDA 12.4: update the driver")


def test_no_flatmtl_is_for_drivers_older_than_any_toolkit():
    text = _mismatch.old_driver(CU12, Here("2.10.0", "12.6", 11080))
    assert text.endswith("a driver for CUDA 11.8: update the driver")


@pytest.mark.parametrize(
    ("toolkit", "floor"),
    [
        ("12.6", "CUDA 12.0 (525) or later"),
        ("13.2", "CUDA 13.0 (580) or later"),
        ("14.1", "CUDA 14.0 or later"),  # not known yet: without a number of the driver's own
    ],
)
def test_driver_floor(toolkit, floor):
    assert _mismatch.driver_floor(toolkit) == floor


@pytest.mark.parametrize(
    ("error", "driver", "advice"),
    [
        ("libcudart.so.12: cannot open shared object file", 13000, "for CUDA 13, or build it"),
        ("libcudart.so.12: cannot open shared object file", 12080, "update the driver, which this"),
        ("undefined symbol: aoti_torch_new_thing", 13000, "build flatmtl from source with this"),
    ],
)
def test_a_library_that_does_not_load(error, driver, advice):
    text = _mismatch.not_loaded(CU12, Here("2.13.0", "13.0", driver), error)
    assert error in text
    for fact in ("CUDA 12.8", "8.0;9.0+PTX", "torch 2.12.0", "torch 2.13.0 for CUDA 13.0"):
        assert fact in text
    assert advice in text


@pytest.mark.parametrize(
    ("build", "said"), [(NO_CUDA, "built with torch 2.13.0+cpu, without CUDA"), (PURE, "installed")]
)
def test_a_build_without_cuda(build, said):
    text = _mismatch.not_there(build, Here("2.13.0", "13.0", 13000))
    assert text.startswith("not built: ")
    assert said in text
    assert "torch 2.13.0 for CUDA 13.0 and a driver for CUDA 13.0" in text
    assert "install a flatmtl for CUDA 13" in text


@pytest.mark.parametrize(
    ("cuda", "driver", "advice"),
    [
        ("13.0", 13000, "install a flatmtl for CUDA 13"),
        ("12.8", 13000, "install a flatmtl for CUDA 13"),  # it holds its own runtime
        ("12.8", 12040, "install a flatmtl for CUDA 12"),
        ("13.0", 14000, "install a flatmtl for CUDA 13"),
        ("12.8", 0, "install a flatmtl for CUDA 12"),
        ("14.0", 0, "install a flatmtl for CUDA 13"),
        ("13.0", 12040, "update the driver, which this torch needs too"),
        ("12.6", 11080, "update the driver, which this torch needs too"),
    ],
)
def test_which_flatmtl_is_to_be_installed(cuda, driver, advice):
    text = _mismatch.not_there(NO_CUDA, Here("2.13.0", cuda, driver))
    assert text.rpartition(": ")[2].startswith(advice)


def test_a_library_that_is_gone():
    assert _mismatch.not_there(CU13, Here("2.13.0", "13.0", 13000)) == (
        "missing: this flatmtl was built by CUDA 13.0 for 8.0;9.0;10.0;12.0+PTX, with torch 2.13.0, and "
        "its file is gone; here are torch 2.13.0 for CUDA 13.0 and a driver for CUDA 13.0: install it "
        "again"
    )


@pytest.mark.parametrize(
    ("archs", "capability", "by"),
    [
        ("8.0;9.0", (8, 0), "8.0"),
        ("8.0;9.0", (8, 9), "8.0"),
        ("8.0 8.6 9.0", (8, 9), "8.6"),
        ("8.6;8.0", (8, 9), "8.6"),
        ("8.6", (8, 0), ""),
        ("8.0;9.0", (7, 5), ""),
        ("8.0;9.0", (10, 0), ""),
        ("8.0;9.0+PTX", (10, 3), "PTX of 9.0"),
        ("8.0+PTX;9.0", (9, 0), "9.0"),
        ("9.0+PTX;8.0+PTX", (10, 0), "PTX of 9.0"),
        ("8.0;9.0;10.0;12.0+PTX", (11, 0), ""),
        ("8.0;9.0;10.0;12.0+PTX", (12, 1), "12.0"),
        ("9.0a", (9, 0), "9.0a"),
        ("10.0a+PTX", (10, 3), ""),
        ("10.0f", (10, 3), "10.0f"),
        ("", (9, 0), ""),
    ],
)
def test_which_code_a_device_runs(archs, capability, by):
    assert _mismatch.covered_by(archs, capability) == by


@pytest.mark.parametrize(
    ("capability", "driver", "said"),
    [
        ((9, 0), 13000, "code for 9.0"),
        ((7, 5), 13000, "no code for it in this build"),
        ((13, 0), 13000, "PTX of 12.0"),
        ((13, 0), 12090, "PTX of 12.0, which needs a driver for CUDA 13.0"),
    ],
)
def test_what_info_says_of_a_device(capability, driver, said):
    assert _mismatch.coverage(CU13, Here("2.13.0", "13.0", driver), capability) == said


PROGRAM = """
import json, sys, warnings
import torch
torch.version.cuda = sys.argv[1] or None
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import flatmtl
from flatmtl.ops import _library
gram = flatmtl.ops.gram(torch.tensor([[3.0, 4.0], [0.0, 2.0]]))
print(json.dumps({
    "file": flatmtl.__file__,
    "said": [str(w.message) for w in caught if "flatmtl" in str(w.message)],
    "missing": _library.missing,
    "gram": gram.tolist(),
    "bodies": [_library.body("gram", device) for device in ("cpu", "cuda")],
    "started": torch.cuda.is_initialized(),
}))
"""

compiler = pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc to build stand-ins")


def _library_of(source: str, path: Path, *flags: str) -> None:
    command = ["gcc", "-shared", "-fPIC", "-o", str(path), "-x", "c", "-", "-x", "none", *flags]
    subprocess.run(command, input=source, text=True, check=True)


@pytest.fixture
def package(tmp_path):
    """A copy of the package without its CUDA library, to be run with ``_imported``."""
    ignored = shutil.ignore_patterns("__pycache__", "data", _library.LIBRARIES["cuda"].name)
    folder = tmp_path / "flatmtl"
    shutil.copytree(Path(flatmtl.__file__).parent, folder, ignore=ignored)
    return folder


def _foreign(package: Path) -> None:
    """In the CUDA library's place, one that needs a CUDA runtime that is not there."""
    runtime = package.parent / "libcudart.so.99"
    _library_of("int cudart99(void) { return 0; }", runtime, "-Wl,-soname,libcudart.so.99")
    source = "int cudart99(void); int launch(void) { return cudart99(); }"
    _library_of(source, package / _library.LIBRARIES["cuda"].name, str(runtime))
    runtime.unlink()


def _imported(package: Path, *, cuda: str, driver: int, choice: str = "auto") -> dict:
    """What importing the copy leads to, beside a driver that supports this CUDA version.

    ``choice`` is FLATMTL_CUDA in its environment.
    """
    drivers = package.parent / "driver"
    drivers.mkdir()
    source = f"int cuDriverGetVersion(int *version) {{ *version = {driver}; return 0; }}"
    _library_of(source, drivers / "libcuda.so.1", "-Wl,-soname,libcuda.so.1")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, cuda],
        cwd=package.parent,
        env={
            **os.environ,
            "LD_LIBRARY_PATH": str(drivers),
            "PYTHONPATH": str(package.parent),
            "FLATMTL_CUDA": choice,
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert Path(found["file"]).parent == package
    assert found["gram"] == [[25.0, 8.0], [8.0, 4.0]]
    assert not found["started"]
    return found


@compiler
def test_a_library_for_another_cuda_is_named_and_all_goes_on(package):
    _foreign(package)
    found = _imported(package, cuda="13.0", driver=13000)
    [said] = found["said"]
    assert "libcudart.so.99: cannot open shared object file" in said
    assert f"torch {torch.__version__} for CUDA 13.0 and a driver for CUDA 13.0" in said
    assert "install a flatmtl for CUDA 13" in said
    if build := _library.build().cuda:
        assert f"built by CUDA {build} for {_library.build().archs}" in said
    assert found["bodies"][1] == "reference"
    assert found["missing"]["cuda"] in said


@compiler
def test_a_library_that_is_left_out_is_not_opened_and_nothing_is_said(package):
    _foreign(package)
    found = _imported(package, cuda="13.0", driver=13000, choice="0")
    assert found["said"] == []
    assert found["missing"]["cuda"] == "left out by FLATMTL_CUDA=0"
    assert found["bodies"][1] == "reference"


@compiler
def test_a_package_without_libraries_says_so_once(package):
    for library in package.glob("*.so"):
        library.unlink()
    found = _imported(package, cuda="13.0", driver=12040)
    [said] = found["said"]
    assert "on CPU and CUDA tensors" in said
    assert "torch for CUDA 13.0 and a driver for CUDA 12.4" in said.replace(
        torch.__version__ + " ", ""
    )
    assert found["bodies"] == ["reference", "reference"]


LINKER = OSError("libcudart.so.12: cannot open shared object file")


@pytest.mark.parametrize(
    ("here", "there", "error", "tried", "said"),
    [
        (Here("2.13.0", "13.0", 13000), True, None, True, ""),
        (Here("2.13.0", "13.0", 0), True, None, True, ""),
        (Here("2.13.0", "13.0", 13000), True, LINKER, True, "cannot be loaded (libcudart.so.12: "),
        (Here("2.13.0", "13.0", 0), True, LINKER, True, ""),  # no driver: no CUDA tensors
        (Here("2.13.0", "12.8", 12080), True, None, False, "the driver is too old"),
        (Here("2.13.0", "13.0", 13000), False, None, False, "missing: this flatmtl was built by"),
        (Here("2.13.0", None, 0), True, None, False, ""),
    ],
)
def test_what_is_loaded_and_said(here, there, error, tried, said, monkeypatch, tmp_path):
    path = tmp_path / "libflatmtl_cuda.so"
    if there:
        path.touch()
    asked = []

    def load_library(name):
        asked.append(name)
        if error is not None:
            raise OSError(f"Could not load this library: {name}") from error

    monkeypatch.delenv("FLATMTL_CUDA", raising=False)
    monkeypatch.setattr(torch.ops, "load_library", load_library)
    monkeypatch.setattr(_library, "LIBRARIES", {"cuda": path})
    monkeypatch.setattr(_library, "missing", {})
    monkeypatch.setattr(_library, "build", lambda: CU13)
    monkeypatch.setattr(_library, "here", lambda: here)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _library.load()
    assert bool(asked) is tried
    messages = [str(warning.message) for warning in caught]
    assert len(messages) == bool(said)
    assert all(said in message for message in messages)
    assert bool(_library.missing) is (error is not None or not tried)  # for `info`


FORKED = """
import os, sys, torch, flatmtl
assert not torch.cuda.is_initialized()
child = os.fork()
if child == 0:
    flatmtl.ops.gram(torch.eye(3, device="cuda"))
    os._exit(0)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.gpu
def test_a_process_may_fork_after_the_import():
    """The import asks the driver for its version and starts nothing."""
    done = subprocess.run([sys.executable, "-c", FORKED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
