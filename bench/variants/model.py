"""What an H200 is predicted to take, in markdown tables: ``python -m bench.variants.model``.

Nothing here was measured. A kernel's time is the longest of what its memory, its tensor cores and its
instructions take, more where two are nearly as long (a norm of the three), and the launches.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

COLUMNS = 25_000_000
MULTIPROCESSORS, CLOCK, COPY = 132, 1.755e9, 4.3e12  # copy: bytes per second, read and written
BYTES_PER_CLOCK = COPY / MULTIPROCESSORS / CLOCK  # of a multiprocessor
FFMA, ISSUE = 128, 4  # a clock: float32 multiply-adds; warp instructions
# mma.sync reaches about 60 % of the dense rate, 2048 multiply-adds of 16-bit numbers a clock.
MMA = 0.6 * 2048
LATENCY = 800  # clocks from a load to its value, unloaded
LAUNCH = 2e-6  # seconds of a launch and of a small kernel's run
REGISTERS, THREADS, BLOCKS = 65536, 2048, 32


@dataclass(frozen=True)
class Kernel:
    """One kernel at one T and row type.

    Attributes:
        name: the kernel.
        tasks: T.
        bytes: of an element of the rows.
        registers: of a thread, from ptxas for sm_90.
        threads: of a block.
        packs: of 16 bytes that a thread has on their way.
        instructions: of a warp, for each column, from SASS (its fast path, at most so many).
        ffma: multiply-adds a column in float32.
        mma: multiply-adds a column on tensor cores, in 16 bits.
        sharpness: of the norm. 4 where loads and sums overlap in a warp; 2 where a block does one and
            then the other.
        asked: the share of the copy's bandwidth that is to be reached, if one is.
    """

    name: str
    tasks: int
    bytes: int
    registers: int
    threads: int
    packs: float
    instructions: float
    ffma: float = 0
    mma: float = 0
    sharpness: int = 4
    asked: float | None = None

    @property
    def resident(self) -> int:
        """Blocks on a multiprocessor, as registers and threads allow."""
        by_warp = -(-self.registers * 32 // 256) * 256
        return min(REGISTERS // (by_warp * (self.threads // 32)), THREADS // self.threads, BLOCKS)

    @property
    def in_flight(self) -> float:
        """KiB on their way to a multiprocessor, at most."""
        return self.resident * self.threads * self.packs * 16 / 1024

    @property
    def clocks(self) -> tuple[float, float, float, float]:
        """Clocks of a multiprocessor for one column: memory, FFMA, tensor cores, instructions."""
        memory = self.tasks * self.bytes / BYTES_PER_CLOCK
        return memory, self.ffma / FFMA, self.mma / MMA, self.instructions / ISSUE

    @property
    def share(self) -> float:
        """Of the copy's bandwidth, with the launches of the kernel and of the sum of its chunks."""
        n = self.sharpness
        memory, _, mma, issue = self.clocks  # FFMA is a part of the instructions, at their rate
        column = (memory**n + mma**n + issue**n) ** (1 / n)
        taken = column * COLUMNS / MULTIPROCESSORS / CLOCK + 2 * LAUNCH
        return self.tasks * self.bytes * COLUMNS / COPY / taken


def triangle(n: int) -> int:
    return n * (n + 1) // 2


def asked(tasks: int, element: int) -> float | None:
    """What the shipped Gram kernels are to reach."""
    if element == 2:
        return 0.85 if tasks <= 16 else None
    return 0.9 if tasks <= 8 else 0.85 if tasks <= 16 else 0.75 if tasks <= 40 else None


# T: registers, packs in flight a row, instructions of a loop, columns a warp takes in it
SMALL = {
    4: {2: (54, 4, 75, 512), 3: (48, 2, 76, 256), 4: (56, 2, 112, 256), 8: (96, 1, 184, 128)},
    2: {2: (80, 4, 225, 1024), 3: (68, 2, 214, 512), 4: (89, 2, 312, 512), 8: (123, 1, 457, 256)},
}
# blocks of 8 rows: registers, packs in flight, instructions of a loop, columns a warp takes in it
MMA_LOOPS = {
    4: {2: (92, 8, 551, 64), 4: (154, 8, 598, 32), 6: (168, 6, 487, 16), 8: (254, 8, 714, 16)},
    2: {2: (110, 8, 483, 128), 4: (142, 8, 503, 64), 6: (158, 6, 369, 32), 8: (236, 8, 553, 32)},
}
TF32_LOOPS = {
    2: (122, 8, 591, 64),
    4: (167, 8, 615, 32),
    6: (168, 6, 561, 16),
    8: (255, 8, 768, 16),
}


def small(tasks: int, element: int) -> Kernel:
    registers, unroll, loop, columns = SMALL[element][tasks]
    wanted = asked(tasks, element)
    return Kernel(
        "small", tasks, element, registers, 256, unroll * tasks, loop / columns, triangle(tasks),
        asked=wanted,
    )  # fmt: skip


def on_tensor_cores(name: str, tasks: int, element: int) -> Kernel:
    blocks = -(-tasks // 16) * 2
    loops = TF32_LOOPS if name == "tf32" else MMA_LOOPS[element]
    registers, packs, loop, columns = loops[blocks]
    tiles = sum(blocks - row for row in range(0, blocks, 2))
    products = 6 if element == 4 else 1  # in 16-bit rates: three of tf32 take as long
    return Kernel(
        name, tasks, element, registers, 128, packs, loop / columns, mma=tiles * 128 * products,
        asked=asked(tasks, element) if name == "mma" else None,
    )  # fmt: skip


def staged(name: str, tasks: int, element: int) -> Kernel:
    """Tiles of 8 x 8 of float32; 280 instructions for four columns of one, and the staging."""
    side = -(-tasks // 8)
    tiles = triangle(side)
    slices = 1
    while slices * 2 * tiles <= 192 and slices < 32:
        slices *= 2
    threads = -(-tiles * slices // 32) * 32
    loop = 280 / 4 / 32 * tiles
    # Staged through registers: four packs a thread, about ten instructions each; by cp.async: a
    # stage of 128 columns of every row, about six for 16 bytes.
    waits = name != "async"
    packs, each = (4, 10) if waits else (tasks * 32 / threads, 6)
    copies = tasks * element / 16 * each / 32
    return Kernel(
        name, tasks, element, 168, threads, packs, loop + copies, 64 * tiles,
        sharpness=2 if waits else 4, asked=asked(tasks, element) if name == "tiled" else None,
    )  # fmt: skip


def shipped() -> Iterator[Kernel]:
    for element in (4, 2):
        for tasks in (2, 3, 4, 8):
            yield small(tasks, element)
        for tasks in (16, 32, 40, 64):
            if element == 4 and tasks <= 32:
                yield staged("tiled", tasks, element)
            else:
                yield on_tensor_cores("mma", tasks, element)


def tried() -> Iterator[Kernel]:
    for tasks in (16, 32):
        yield on_tensor_cores("mma", tasks, 4)
    for tasks in (40, 64):
        yield staged("staged", tasks, 4)
    for tasks in (16, 32, 40, 64):
        yield staged("staged", tasks, 2)
    for tasks in (16, 32, 40, 64):
        yield on_tensor_cores("tf32", tasks, 4)
    for tasks in (16, 32):
        yield staged("async", tasks, 4)


def gram_table(kernels: Iterator[Kernel]) -> str:
    lines = [
        "| kernel | rows | T | registers | blocks an SM | KiB in flight | memory | FFMA | mma | "
        "instructions | predicted | asked |",
        "| --- " * 12 + "|",
    ]
    for k in kernels:
        memory, ffma, mma, issue = k.clocks
        parts = " | ".join(f"{part / memory:.0%}" if part else "-" for part in (ffma, mma, issue))
        lines.append(
            f"| {k.name} | {'float32' if k.bytes == 4 else 'bfloat16'} | {k.tasks} | {k.registers} | "
            f"{k.resident} | {k.in_flight:.0f} | {memory:.2f} | {parts} | {k.share:.0%} | "
            f"{f'{k.asked:.0%}' if k.asked else '-'} |"
        )
    return "\n".join(lines)


def row_table() -> str:
    lines = ["| kernel | bytes an element | us | predicted | asked |", "| --- " * 5 + "|"]
    for name, size, launches in (
        ("combine, T = 2, float32", 12, 1),
        ("combine, T = 8, float32", 36, 1),
        ("combine, T = 8, bfloat16", 18, 1),
        ("pack_row_, float32", 8, 2),
        ("perturb_, float32", 12, 1),
    ):
        moving = size * COLUMNS / COPY
        taken = moving + launches * LAUNCH
        lines.append(f"| {name} | {size} | {taken * 1e6:.0f} | {moving / taken:.0%} | 90% |")
    return "\n".join(lines)


def update_table() -> str:
    lines = [
        "| update | rows | T | two kernels, bytes | one kernel, bytes | two, us | one, us | gain |",
        "| --- " * 8 + "|",
    ]
    for name, state in (("SGD-momentum", 16), ("AdamW", 24)):
        for element, dtype in ((4, "float32"), (2, "bfloat16")):
            for tasks in (2, 3, 8, 40):
                one = element * tasks + state
                two = one + 8  # the combined gradient, float32, is written and read
                times = [b * COLUMNS / COPY + 2 * LAUNCH for b in (two, one)]
                lines.append(
                    f"| {name} | {dtype} | {tasks} | {two} | {one} | {times[0] * 1e6:.0f} | "
                    f"{times[1] * 1e6:.0f} | {times[0] / times[1]:.2f} |"
                )
    return "\n".join(lines)


def main() -> None:
    tables = (gram_table(shipped()), row_table(), gram_table(tried()), update_table())
    needed = BYTES_PER_CLOCK * LATENCY / 1024
    print(f"KiB that must be on their way to a multiprocessor: {needed:.1f}", *tables, sep="\n\n")


if __name__ == "__main__":
    main()
