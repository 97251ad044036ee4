"""Whether the CUDA library fits what it finds, and what is said if not: functions of facts alone.

Three things must fit: the CUDA runtime (linked into the library, or torch's own of the same major
version), the driver, and the device's architecture. The first two are looked at when the library is
loaded. The third needs the device, which an import must not start: a launch that fails for it says so
(csrc/common/launch_error.h), and so does ``python -m flatmtl info``.
"""

from __future__ import annotations

import re
from typing import NamedTuple

# CUDA's major version -> the first Linux driver that runs what its toolkits build
DRIVERS = {12: "525", 13: "580"}
UPDATE = "update the driver, which this torch needs too"


class Build(NamedTuple):
    """What this flatmtl was built with."""

    torch: str = ""  # "": no compiler was there
    compiler: str = ""
    cuda: str = ""  # the toolkit, as in "13.0"; "" if built without
    archs: str = ""  # as in "8.0;9.0+PTX"


class Here(NamedTuple):
    """What it finds."""

    torch: str
    cuda: str | None  # what this torch was built for, as in "12.8"; None without CUDA
    driver: int  # the CUDA version that the driver supports, as in 13000; 0 without a driver


def version(number: int) -> str:
    """12040 as "12.4"."""
    return f"{number // 1000}.{number % 1000 // 10}"


def _major(text: str) -> int:
    return int(text.split(".")[0])


def _this_build(build: Build) -> str:
    if not build.torch:
        return "installed without compiled parts"
    if not build.cuda:
        return f"built with torch {build.torch}, without CUDA"
    return f"built by CUDA {build.cuda} for {build.archs}, with torch {build.torch}"


def _this_place(here: Here) -> str:
    driver = f"a driver for CUDA {version(here.driver)}" if here.driver else "no driver"
    return f"torch {here.torch} for CUDA {here.cuda or 'none'} and {driver}"


def _fitting(here: Here) -> str:
    """Which flatmtl torch and driver run; "" where the driver is older than this torch needs.

    A library of CUDA 13 holds its runtime and asks for a driver alone; one of 12 takes the runtime of a
    torch for 12.
    """
    assert here.cuda is not None
    torch = _major(here.cuda)
    driver = here.driver // 1000 or torch  # without one, as if it were torch's
    if driver < torch:
        return ""
    major = min(driver, max(DRIVERS))
    return (
        f"install a flatmtl for CUDA {major}, or build it from source with a CUDA {major} toolkit"
    )


def driver_floor(toolkit: str) -> str:
    """Which drivers run what ``toolkit`` builds: "CUDA 13.0 (580) or later"."""
    major = _major(toolkit)
    number = f" ({DRIVERS[major]})" if major in DRIVERS else ""
    return f"CUDA {major}.0{number} or later"


def old_driver(build: Build, here: Here) -> str:
    """Why a library of this build must not be loaded: its launches would fail. "" if it may."""
    if not build.cuda or not here.driver or here.driver // 1000 >= _major(build.cuda):
        return ""
    advice = f"update the driver, or {other}" if (other := _fitting(here)) else "update the driver"
    return (
        f"the driver is too old: it is {_this_build(build)}, which needs a driver for "
        f"{driver_floor(build.cuda)}; here are {_this_place(here)}: {advice}"
    )


def not_there(build: Build, here: Here) -> str:
    """What is said where there is no CUDA library beside a torch with CUDA."""
    if build.cuda:
        return (
            f"missing: this flatmtl was {_this_build(build)}, and its file is gone; here are "
            f"{_this_place(here)}: install it again"
        )
    advice = _fitting(here) or UPDATE
    return (
        f"not built: this flatmtl was {_this_build(build)}; here are {_this_place(here)}: {advice}"
    )


def not_loaded(build: Build, here: Here, error: str) -> str:
    """What is said of a library that the linker refuses, with the linker's own words."""
    advice = "build flatmtl from source with this torch"
    if here.cuda is not None and re.search(r"libcudart\.so\.\d+", error):
        advice = _fitting(here) or UPDATE
    return (
        f"cannot be loaded ({error}): it was {_this_build(build)}; here are "
        f"{_this_place(here)}: {advice}"
    )


_ARCH = re.compile(r"(\d+)\.(\d)([af]?)(\+PTX)?")


def covered_by(archs: str, capability: tuple[int, int]) -> str:
    """The entry of ``archs`` whose code runs on a device of this capability; "" if none does.

    Machine code runs on devices of the same major version from its minor on ("a": on its own alone), PTX
    on all later ones, of which the driver takes the newest.
    """
    found = ""
    best = translated = (-1, -1)
    for entry in archs.replace(";", " ").split():
        match = _ARCH.fullmatch(entry)
        if match is None:
            continue
        arch = (int(match[1]), int(match[2]))
        exact = match[3] == "a"
        same = arch == capability if exact else arch[0] == capability[0] and arch <= capability
        if same and arch > best:
            found, best = entry.removesuffix("+PTX"), arch
        if match[4] and not match[3] and arch <= capability:
            translated = max(translated, arch)
    if found or translated == (-1, -1):
        return found
    return f"PTX of {translated[0]}.{translated[1]}"


def coverage(build: Build, here: Here, capability: tuple[int, int]) -> str:
    """What `info` says of a device: which code it runs, or that there is none."""
    by = covered_by(build.archs, capability)
    if not by:
        return "no code for it in this build"
    major, minor = map(int, build.cuda.split(".")[:2])
    if by.startswith("PTX") and here.driver < major * 1000 + minor * 10:
        return f"{by}, which needs a driver for CUDA {build.cuda}"
    return by if by.startswith("PTX") else f"code for {by}"
