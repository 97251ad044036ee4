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
SIZES = (  # T, P; the main one first
    (8, 25_000_000), (2, 25_000_000), (4, 25_000_000), (16, 25_000_000), (40, 25_000_000),
    (8, 1_000_000), (8, 100_000_000),
)  # fmt: skip
COMPILING = 20.0  # seconds that must be left for torch.compile


def run(bench: Bench) -> None:
    """The part."""
    found = ceiling(bench, brief=True)
    bench.part.note(ceiling=found)
    for t, p in [(t, sizes.QUICK_COLUMNS[0]) for t in sizes.QUICK_TASKS] if bench.quick else SIZES:
        if bench.left < 4:
            bench.part.missing.append(f"T={t}, P={p:.0e}")
            continue
        inputs = Inputs(t, p, torch.float32, bench.device)
        for name in METHODS:
            _method(bench, name, inputs, found["copy"])
        del inputs
        bench.release()
        bench.say(f"T = {t}, P = {p:.0e}")
        bench.part.save()
    if bench.device == "cuda":
        _compiled(bench)


def _method(bench: Bench, name: str, inputs: Inputs, copy: float) -> None:
    contest = aggregate_contest(name, inputs)
    if name == "pcgrad":
        contest.others["torch, solved on the host"] = lambda: _on_host(inputs.jac())
    about = {"tasks": inputs.tasks, "columns": inputs.columns, "dtype": "float32"}
    record = bench.measure(contest, turn=4 * bench.turn, kind="aggregate", **about)
    record["floor_s"] = contest.bytes / copy
    if bench.device == "cuda" and "error" not in record:
        weighting = flatmtl.weighting.by_name(name)
        try:
            replay = captured(lambda: flatmtl.aggregate(inputs.jac(), weighting, inputs.out))
            record["graph_s"] = bench.seconds(replay, 11)
        except RuntimeError as error:
            record["graph_error"] = message(error)


def _on_host(jac: Tensor) -> Tensor:
    """PCGrad in plain torch with its T x T problem in Python, as many write it."""
    weights = pcgrad_weights((jac @ jac.T).tolist(), None)
    return torch.mv(jac.T, jac.new_tensor(weights))


def _compiled(bench: Bench) -> None:
    """PCGrad with both passes over J compiled, at the main size: what plain torch has at its best."""
    inputs = Inputs(sizes.MAIN_TASKS, sizes.columns(bench.quick)[0], torch.float32, bench.device)
    if bench.left < COMPILING:
        bench.part.missing.append("torch.compile")
        return
    gram = compiled(lambda jac: (jac[:, None] * jac[None]).sum(-1))
    combine = compiled(lambda jac, weights: (weights[:, None] * jac).sum(0))

    def theirs() -> object:
        jac = inputs.jac()
        return combine(jac, peers.pcgrad_weights(gram(jac)).to(jac.dtype))

    def on_host() -> object:
        jac = inputs.jac()
        return combine(jac, jac.new_tensor(pcgrad_weights(gram(jac).tolist(), None)))

    weighting = flatmtl.weighting.by_name("pcgrad")
    contest = Contest(
        "pcgrad",
        0,
        lambda: flatmtl.aggregate(inputs.jac(), weighting),
        {"torch.compile": theirs, "torch.compile, solved on the host": on_host},
    )
    about = {"tasks": inputs.tasks, "columns": inputs.columns, "dtype": "float32"}
    bench.measure(contest, turn=4 * bench.turn, kind="aggregate, compiled", **about)
    bench.part.save()


def nearest(record: dict[str, dict[str, float]]) -> dict[str, float]:
    """Rival -> how many times faster ours is; flatmtl's own other forms left out."""
    return {n: f for n, f in record["faster"].items() if not n.startswith(race.OURS)}
