"""Every kernel at every size, against plain torch and the ceiling."""

from __future__ import annotations

import itertools

import torch

from bench.cases import Inputs
from bench.contests import MATRIX_OPS, ROW_OPS, ROW_TASKS, op_contest
from bench.gpu import sizes
from bench.gpu.accuracy import gram_accuracy
from bench.gpu.bench import Bench
from bench.gpu.ceiling import ceiling

# how many matrices [T, P] an op needs; those that need one come first, others are made after them
MATRICES = dict.fromkeys(MATRIX_OPS, 2) | dict.fromkeys(
    ("row_norms", "gram", "combine", "graddrop_"), 1
)
COMPILED = ("gram", "gram_difference", "combine", "combine_flat", "graddrop_")
COMPILING = 40.0  # seconds that are kept for it


def run(bench: Bench) -> None:
    """The part: float32 before bfloat16 at each P, the P that the promises are for first."""
    bench.part.note(ceiling=ceiling(bench, brief=True))
    kept = COMPILING if bench.device == "cuda" else 0.0
    for p, dtype in itertools.product(sizes.columns(bench.quick), sizes.DTYPES):
        for t in sizes.tasks(bench.quick):
            if bench.left < kept:
                bench.part.missing.append(f"T={t}, P={p:.0e}, {dtype}")
            else:
                _size(bench, t, p, dtype)
        bench.say(f"P = {p:.0e}, {str(dtype).removeprefix('torch.')}")
        bench.part.save()
    gram_accuracy(bench)
    bench.part.save()
    if bench.device == "cuda":
        _compiled(bench)


def _size(bench: Bench, t: int, p: int, dtype: torch.dtype) -> None:
    about = {"tasks": t, "columns": p, "dtype": str(dtype).removeprefix("torch.")}
    inputs = Inputs(t, p, dtype, bench.device)
    for name in sorted(MATRIX_OPS, key=MATRICES.__getitem__):
        if MATRICES[name] * t * p * dtype.itemsize <= sizes.MOST_BYTES:
            contest = op_contest(name, inputs, compile_=False)
            bench.measure(contest, kind="op", **about)
    if t == ROW_TASKS:
        for name in ROW_OPS:
            bench.measure(op_contest(name, inputs, compile_=False), kind="row op", **about)
    del inputs
    bench.release()


def _compiled(bench: Bench) -> None:
    """The ops with torch.compile among their rivals, at one size: each compiles for seconds."""
    t, p = sizes.MAIN_TASKS, sizes.columns(bench.quick)[0]
    about = {"tasks": t, "columns": p, "dtype": "float32"}
    inputs = Inputs(t, p, torch.float32, bench.device)
    for name in COMPILED:
        if bench.left < COMPILING / len(COMPILED):
            bench.part.missing.append(f"torch.compile of {name}")
            continue
        bench.measure(op_contest(name, inputs, compile_=True), kind="op, compiled", **about)
        bench.say(f"{name} beside torch.compile")
        bench.part.save()
