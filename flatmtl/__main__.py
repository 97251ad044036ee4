"""``python -m flatmtl``: what was built, the methods, groups and orders of tasks, and the demo."""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Sequence

import torch

import flatmtl
from flatmtl.ops import OPERATORS, _library, _mismatch
from flatmtl.weighting import methods as all_methods


def _toolkit(build: _mismatch.Build) -> str:
    if not build.cuda:
        return "not built"
    return f"{build.cuda} (needs a driver for {_mismatch.driver_floor(build.cuda)})"


def _driver(here: _mismatch.Here) -> str:
    if here.cuda is None:
        return "none (this torch has no CUDA)"
    return f"supports CUDA {_mismatch.version(here.driver)}" if here.driver else "none"


def _devices(build: _mismatch.Build, here: _mismatch.Here) -> list[str]:
    """Each device's name and capability, and whether the build has code for it."""
    found = []
    for i in range(torch.cuda.device_count()):
        try:  # starts CUDA, which an old driver refuses after it has counted its devices
            major, minor = torch.cuda.get_device_capability(i)
            name = torch.cuda.get_device_name(i)
        except (RuntimeError, torch.cuda.DeferredCudaCallError) as error:
            reason = str(error).strip().partition("\n")[0]
            found.append(f"{i} cannot be asked ({reason})")
            continue
        covered = _mismatch.coverage(build, here, (major, minor))
        found.append(f"{name} (capability {major}.{minor}: {covered})")
    return found or ["none"]


def info() -> int:
    """Prints versions, the build, devices, and which body every operator uses."""
    build, here = _library.build(), _library.here()
    rows = [
        ("flatmtl", flatmtl.__version__),
        ("python", f"{platform.python_version()} ({platform.machine()})"),
        ("torch", f"{torch.__version__} (CUDA {torch.version.cuda or 'none'})"),
        (
            "built with",
            f"torch {build.torch}, compiler {build.compiler}" if build.torch else "nothing",
        ),
        ("CUDA toolkit of the build", _toolkit(build)),
        ("CUDA architectures", build.archs or "none"),
        ("CUDA driver", _driver(here)),
        *[("CUDA device", text) for text in _devices(build, here)],
        ("CPU threads", str(torch.get_num_threads())),
        ("CPU instruction set", _library.cpu_isa() or "none (reference operators)"),
    ]
    rows += [
        (f"{device} library", f"not loaded: {why}") for device, why in _library.missing.items()
    ]
    width = max(len(name) for name, _ in rows) + 2
    for name, value in rows:
        print(f"{name:<{width}}{value}")
    print(f"\n{'operator':<{width}}{'on cpu':<12}on cuda")
    for name in OPERATORS:
        print(f"{name:<{width}}{_library.body(name, 'cpu'):<12}{_library.body(name, 'cuda')}")
    return 0


def methods() -> int:
    """Prints the weighting methods: name, class, needs, state, year, arXiv number and paper."""
    header = ("name", "class", "needs", "state", "year", "arXiv", "paper")
    rows = [
        (m.name, m.cls.__name__, m.needs, m.state or "-", str(m.year), m.arxiv or "-", m.paper)
        for m in all_methods()
    ]
    widths = [max(map(len, column)) + 2 for column in zip(header, *rows, strict=True)]
    for row in (header, *rows):
        print("".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())
    print(
        '\nflatmtl.weighting.by_name("pcgrad", seed=3) makes one; its class says what the options mean.'
    )
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    from flatmtl.affinity import command as group
    from flatmtl.curriculum import command as order
    from flatmtl.demo import run as demo

    parser = argparse.ArgumentParser(
        prog="python -m flatmtl",
        description="flatmtl: multi-task learning with per-task gradients.",
        epilog="In a program: flatmtl.MultiTaskOptimizer(base_optimizer, "
        'weighting=flatmtl.weighting.by_name("pcgrad")); see help(flatmtl.MultiTaskOptimizer).',
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser(
        "info",
        help="versions, the build, devices, and which body (cpu, cuda, reference) each operator uses",
    )
    commands.add_parser(
        "methods",
        help="the weighting methods: what each needs and keeps, and the paper it is from",
    )
    group.add_arguments(
        commands.add_parser(
            "group", help="which tasks to train together, from a file of measured affinities"
        )
    )
    order.add_arguments(
        commands.add_parser(
            "order", help="in which order to train tasks one after the other, from such a file"
        )
    )
    demo.add_arguments(
        commands.add_parser(
            "demo", help="train Mean, PCGrad and FS-MTL on pairs of overlaid Fashion-MNIST images"
        )
    )
    args = parser.parse_args(argv)
    if args.command == "info":
        return info()
    if args.command == "methods":
        return methods()
    return {"group": group, "order": order, "demo": demo}[args.command].main(args)


if __name__ == "__main__":
    sys.exit(main())
