"""Gram matrix, solve and combination together: against the byte floor, plain torch, TorchJD, LibMTL."""

from __future__ import annotations

import torch
from torch import Tensor

import flatmtl
from bench import peers, race
from bench.cases import Inputs
from bench.contests import Contest, aggregate_contest, compiled
from bench.fs_mtl_torch import pcgrad_weights
from bench.gpu import sizes
from bench.gpu.bench import Bench, captured, message
from bench.gpu.ceiling import ceiling

METHODS = ("pcgrad", "mgda", "mean")
F32, BF16 = torch.float32, torch.bfloat16
SIZES = (  # T, P, dtype; the main one first
    (8, 25_000_000, F32), (8, 25_000_000, BF16), (2, 25_000_000, F32), (4, 25_000_000, F32),
    (16, 25_000_000, F32), (40, 25_000_000, F32), (8, 1_000_000, F32), (8, 100_000_000, F32),
)  # fmt: skip
QUICK_SIZES = ((8, sizes.QUICK_COLUMNS[0], F32), (2, sizes.QUICK_COLUMNS[0], BF16))
# PCGrad in plain torch: beside every aggregate; compiled; as a CUDA graph
PLAIN = ("plain torch", "torch, solved on the host")
AT_BEST = ("torch.compile", "torch.compile, solved on the host")
CAPTURED = ("plain torch, captured", "torch.compile, captured")
COMPILING = 20.0  # seconds that must be left for torch.compile


def run(bench: Bench) -> None:
    """The part."""
    found = ceiling(bench, brief=True)
    bench.part.note(ceiling=found)
    for t, p, dtype in QUICK_SIZES if bench.quick else SIZES:
        if bench.left < 4:
            bench.part.missing.append(f"T={t}, P={p:.0e}, {dtype}")
            continue
        inputs = Inputs(t, p, dtype, bench.device)
        for name in METHODS:
            _method(bench, name, inputs, found["copy"])
        del inputs
        bench.release()
        bench.say(f"T = {t}, P = {p:.0e}, {str(dtype).removeprefix('torch.')}")
        bench.part.save()
    if bench.device == "cuda":
        _at_its_best(bench)


def _method(bench: Bench, name: str, inputs: Inputs, copy: float) -> None:
    contest = aggregate_contest(name, inputs)
    if name == "pcgrad":
        contest.others["torch, solved on the host"] = lambda: _on_host(inputs.jac())
    about = _about(inputs)
    record = bench.measure(contest, turn=4 * bench.turn, kind="aggregate", **about)
    record["floor_s"] = contest.bytes / copy
    if bench.device == "cuda" and "error" not in record:
        weighting = flatmtl.weighting.by_name(name)
        try:
            replay = captured(lambda: flatmtl.aggregate(inputs.jac(), weighting, inputs.out))
            record["graph_s"] = bench.seconds(replay, 11)
        except RuntimeError as error:
            record["graph_error"] = message(error)


def _about(inputs: Inputs) -> dict[str, object]:
    dtype = str(inputs.dtype).removeprefix("torch.")
    return {"tasks": inputs.tasks, "columns": inputs.columns, "dtype": dtype}


def _on_host(jac: Tensor) -> Tensor:
    """PCGrad in plain torch with its T x T problem in Python, as many write it."""
    weights = pcgrad_weights((jac @ jac.T).tolist(), None)
    return torch.mv(jac.T, jac.new_tensor(weights))


def _at_its_best(bench: Bench) -> None:
    """PCGrad in plain torch at the main size, with both passes over J compiled, and as CUDA graphs.

    Its solve is hundreds of small operators: the host takes longer to launch them than the clock hides,
    and a graph has none of that. Last in the part: a capture that fails may spoil the device's generator.
    """
    inputs = Inputs(sizes.MAIN_TASKS, sizes.columns(bench.quick)[0], F32, bench.device)
    if bench.left < COMPILING:
        bench.part.missing.append("torch.compile and graphs of plain torch")
        return
    gram = compiled(lambda jac: (jac[:, None] * jac[None]).sum(-1))
    combine = compiled(lambda jac, weights: (weights[:, None] * jac).sum(0))

    def theirs() -> object:
        jac = inputs.jac()
        return combine(jac, peers.pcgrad_weights(gram(jac)).to(jac.dtype))

    def on_host() -> object:
        jac = inputs.jac()
        return combine(jac, jac.new_tensor(pcgrad_weights(gram(jac).tolist(), None)))

    plain = peers.plain_torch("pcgrad")
    assert plain is not None
    others = dict(zip(AT_BEST, (theirs, on_host), strict=True))
    failed = {}
    for name, call in zip(CAPTURED, (lambda: plain(inputs.jac()), theirs), strict=True):
        try:
            others[name] = captured(call)
        except Exception as error:  # not all of torch can be captured
            failed[name] = message(error)
    weighting = flatmtl.weighting.by_name("pcgrad")
    contest = Contest("pcgrad", 0, lambda: flatmtl.aggregate(inputs.jac(), weighting), others)
    record = bench.measure(
        contest, turn=4 * bench.turn, kind="aggregate, at its best", **_about(inputs)
    )
    if failed:
        record["failed_rivals"] = failed | record.get("failed_rivals", {})
    bench.part.save()


def nearest(record: dict[str, dict[str, float]]) -> dict[str, float]:
    """Rival -> how many times faster ours is; flatmtl's own other forms left out."""
    return {n: f for n, f in record["faster"].items() if not n.startswith(race.OURS)}
