"""What the compiler made of the CUDA kernels: registers, shared memory, spills, occupancy, wide loads.

    python bench/ptxas_report.py build/native-*/cuda                                print the table
    python bench/ptxas_report.py build/native-*/cuda --markdown docs/kernels_static.md

Reads what the build left there: ptxas' own words (-Xptxas -v) in *.log, and the machine code in *.o.
Ends with status 1 if a kernel spills or has a stack frame, or if a kernel that reads rows has no global load
of 16 bytes (8 in four that have no registers for more) inside a loop. No GPU is needed. The loads are
read from SASS, which takes cuobjdump of a CUDA toolkit (on the PATH, in
$CUDA_HOME/bin, or from PyPI: nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm); without it they are not
checked, and the status is 1 too.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

# Threads, blocks and shared memory (bytes) a multiprocessor holds; CUDA programming guide, table of
# compute capabilities. A block costs 1 KiB of shared memory more than it asks for.
LIMITS = {
    80: (2048, 32, 164),
    86: (1536, 16, 100),
    87: (1536, 16, 164),
    89: (1536, 24, 100),
    90: (2048, 32, 228),
    100: (2048, 32, 228),
    103: (2048, 32, 228),
    120: (1536, 24, 100),
    121: (1536, 24, 100),
}
REGISTERS = 65536
# Threads of a block where it is not 256, and dynamic shared memory at a common size.
BLOCKS = {
    "gram_tiled_kernel<double": (160, 9 * 1024),  # T = 16
    "gram_tiled_kernel": (128, 67 * 1024),  # T > 64
    "gram_mma_kernel": (128, 0),
    "solve_kernel": (32, 2 * 1024),  # T = 8
    "solve_part_kernel": (32, 2 * 1024),
    "add_up_kernel": (32, 2 * 1024),
    "draw_order_kernel": (32, 0),
    "draw_normal_kernel": (32, 0),
    "advance_kernel": (1, 0),
}
# Kernels that read rows: a loop of theirs must hold global loads of so many bits.
WIDE = {
    **{
        f"gram_mma_kernel<{half}, {blocks}, 1>": 64
        for half in ("__half", "__nv_bfloat16")
        for blocks in (6, 8)
    },
    **dict.fromkeys(
        (
            "gram_small_kernel",
            "gram_mma_kernel",
            "gram_tiled_kernel",
            "row_squares_kernel",
            "combine_kernel",
            "project_kernel",
            "drop_kernel",
            "pack_row_kernel",
            "perturb_kernel",
            "adaptive_squares_kernel",
        ),
        128,
    ),
}

ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\S+)' for 'sm_(?P<arch>\d+)[af]?'"
    r".*?(?P<stack>\d+) bytes stack frame, (?P<store>\d+) bytes spill stores, (?P<load>\d+) bytes spill"
    r" loads.*?Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


@dataclass(frozen=True)
class Kernel:
    name: str
    arch: int
    registers: int
    shared: int
    stack: int
    spills: int

    @property
    def block(self) -> tuple[int, int]:
        """Threads and dynamic shared memory of a block."""
        for prefix, value in BLOCKS.items():
            if self.name.startswith(prefix):
                return value
        return 256, 0

    @property
    def occupancy(self) -> float | None:
        """Resident threads over the most a multiprocessor can hold; None if its limits are unknown."""
        if self.arch not in LIMITS:
            return None
        threads, blocks, shared_kib = LIMITS[self.arch]
        size, dynamic = self.block
        warps = -(-size // 32)
        per_warp = -(-self.registers * 32 // 256) * 256
        resident = min(
            blocks,
            threads // (warps * 32),
            REGISTERS // (per_warp * warps),
            shared_kib * 1024 // (self.shared + dynamic + 1024),
        )
        return resident * size / threads

    @property
    def cell(self) -> str:
        """Registers and occupancy, for the table."""
        share = "occupancy unknown" if self.occupancy is None else f"{self.occupancy:.0%}"
        return f"{self.registers} regs, {share}"

    @property
    def clean(self) -> bool:
        return self.stack == 0 and self.spills == 0


def demangle(names: list[str]) -> list[str]:
    """Short readable names: no namespace, no arguments."""
    tool = shutil.which("c++filt")
    if tool and names:
        text = subprocess.run(
            [tool], input="\n".join(names), capture_output=True, text=True, check=True
        )
        names = text.stdout.splitlines()
    short = []
    for name in names:
        name = re.sub(r"\((flatmtl::kernels::(?:Finish|Of))\)", "", name).replace("(bool)", "")
        name = name.replace("flatmtl::kernels::", "").removeprefix("void ")
        short.append(re.sub(r"\(.*", "", name))
    return short


def parse(text: str) -> list[Kernel]:
    """The kernels of a `-Xptxas -v` log."""
    found = list(ENTRY.finditer(text))
    names = demangle([m["name"] for m in found])
    kernels = []
    for name, m in zip(names, found, strict=True):
        shared = re.search(r"(\d+) bytes smem", m["rest"])
        kernels.append(
            Kernel(
                name,
                int(m["arch"]),
                int(m["registers"]),
                int(shared[1]) if shared else 0,
                int(m["stack"]),
                int(m["store"]) + int(m["load"]),
            )
        )
    return kernels


def find_cuobjdump() -> str | None:
    """The disassembler of a CUDA toolkit, or the one from PyPI."""
    home = os.environ.get("CUDA_HOME")
    found = shutil.which("cuobjdump", path=f"{home}/bin" if home else None)
    packaged = Path(sysconfig.get_path("purelib")).glob("nvidia/*/bin/cuobjdump")
    return found or shutil.which("cuobjdump") or next((str(p) for p in packaged), None)


LINE = re.compile(r"/\*(?P<at>[0-9a-f]{4,})\*/\s+(?:@!?U?P\d+\s+)?(?P<code>[^;]*)")


def loop_loads(sass: list[str]) -> set[int]:
    """The widths, in bits, of the wide global loads in the innermost loops of one kernel's SASS."""
    loads: list[tuple[int, int]] = []
    loops: list[tuple[int, int]] = []
    for line in sass:
        found = LINE.search(line)
        if not found:
            continue
        at, code = int(found["at"], 16), found["code"]
        if load := re.match(r"LDG\.E\S*?(?:\.ENL2)?\.(64|128|256)\b", code):
            loads.append((at, int(load[1])))
        elif jump := re.match(r"BRA\S*\s+.*?(0x[0-9a-f]+)", code):
            target = int(jump[1], 16)
            if target < at:
                loops.append((target, at))
    # Innermost ones: a prologue within an outer loop is not where the time goes.
    inner = [a for a in loops if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    return {bits for at, bits in loads if any(first <= at <= last for first, last in inner)}


def kernels_in(cuobjdump: str, binary: Path) -> dict[tuple[str, str], set[int]]:
    """``loop_loads`` by (kernel, architecture)."""
    text = subprocess.run(
        [cuobjdump, "-sass", str(binary)], capture_output=True, text=True, check=True
    ).stdout
    listings: dict[tuple[str, str], list[str]] = {}
    arch = ""
    current: list[str] = []
    for line in text.splitlines():
        if heading := re.match(r"\s*arch = (sm_\d+)", line):
            arch = heading[1]
        elif heading := re.search(r"Function : (\S+)", line):
            current = listings.setdefault((heading[1], arch), [])
        else:
            current.append(line)
    names = demangle([name for name, _ in listings])
    return {
        (name, arch): loop_loads(sass)
        for name, ((_, arch), sass) in zip(names, listings.items(), strict=True)
    }


def bits_asked(name: str) -> int | None:
    """How wide a kernel's loads must be, or None if it reads no rows."""
    return next((bits for prefix, bits in WIDE.items() if name.startswith(prefix)), None)


def table(kernels: list[Kernel]) -> str:
    """One row a kernel: registers and occupancy for every architecture."""
    archs = sorted({k.arch for k in kernels})
    by_name: dict[str, dict[int, Kernel]] = {}
    for k in kernels:
        by_name.setdefault(k.name, {})[k.arch] = k
    head = (
        "| kernel | block | shared | " + " | ".join(f"sm_{a}" for a in archs) + " | spills, stack |"
    )
    lines = [head, "|" + " --- |" * (len(archs) + 4)]
    for name in sorted(by_name):
        found = by_name[name]
        any_ = next(iter(found.values()))
        size, dynamic = any_.block
        cells = [found[a].cell if a in found else "-" for a in archs]
        bad = [f"sm_{k.arch}: {k.spills}, {k.stack}" for k in found.values() if not k.clean]
        shared = f"{any_.shared} + {dynamic}" if dynamic else str(any_.shared)
        lines.append(
            f"| `{name}` | {size} | {shared} | {' | '.join(cells)} | {'; '.join(bad) or '0'} |"
        )
    return "\n".join(lines)


def check_wide(binaries: list[Path]) -> tuple[list[str], bool]:
    """What SASS says of the wide loads; False if a loop has none, or if nothing could be seen."""
    cuobjdump = find_cuobjdump()
    if cuobjdump is None:
        return ["wide loads: not checked, cuobjdump was not found"], False
    total, missing = 0, []
    for binary in binaries:
        for (name, arch), found in kernels_in(cuobjdump, binary).items():
            if bits := bits_asked(name):
                total += 1
                if max(found, default=0) < bits:
                    missing.append(f"{name} ({arch}): {sorted(found)} bits, {bits} are asked for")
    if total == 0:
        return [f"wide loads: {cuobjdump} showed no kernel that reads rows"], False
    lines = [
        f"wide loads (16 bytes; 8 in four) in the loops of {total - len(missing)} of {total} kernels "
        "that read rows"
    ]
    return lines + [f"  not in {m}" for m in missing], not missing


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("build", type=Path, help="the build's folder of CUDA objects and logs")
    parser.add_argument("--markdown", type=Path, help="write the table there too")
    options = parser.parse_args()

    logs = sorted(options.build.glob("*.log"))
    kernels = list(dict.fromkeys(parse("\n".join(path.read_text() for path in logs))))
    if not kernels:
        sys.exit(
            f"build must hold the logs of nvcc -Xptxas -v, got none with kernels in {options.build}"
        )
    notes, wide_ok = check_wide(sorted(options.build.glob("*.o")))
    bad = [k for k in kernels if not k.clean]
    report = table(kernels)
    archs = sorted({k.arch for k in kernels})
    summary = [
        f"{len(kernels)} kernels for {', '.join(f'sm_{a}' for a in archs)}: "
        f"{len(bad)} with spills or a stack frame",
        *notes,
    ]
    print(report, "", *summary, sep="\n")
    if options.markdown:
        options.markdown.parent.mkdir(parents=True, exist_ok=True)
        title = (
            "# Static report on the CUDA kernels\n\nWritten by `bench/ptxas_report.py`; nothing here was"
            " measured on a GPU. Occupancy is what registers, shared memory and block size allow.\n"
            "It is about nvcc: by clang, which compiles the wheels of CUDA 12, some kernels spill or have"
            " stack frames.\n\n"
        )
        options.markdown.write_text(title + report + "\n\n" + "\n".join(summary) + "\n")
    sys.exit(1 if bad or not wide_ok else 0)


if __name__ == "__main__":
    main()
