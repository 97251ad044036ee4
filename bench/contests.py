"""Who runs against whom: every op of flatmtl beside plain torch, with the bytes it has to move.

The CPU benchmarks (``test_ops.py``) and the GPU ones (``gpu/``) both take their entrants from here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

import flatmtl
from bench import peers
from bench.cases import Inputs
from flatmtl import ops

Call = Callable[[], object]


@dataclass
class Contest:
    """One measured thing and what it is compared with.

    Attributes:
        name: the op or method.
        bytes: what it has to move at least (each input read once, each output written once).
        ours: flatmtl's call.
        others: name -> the call it is compared with.
        yardsticks: name -> (call, bytes), the bandwidth at this size.
        calls: how often an entrant runs in its turn; more than once where a call takes microseconds.
    """

    name: str
    bytes: int
    ours: Call
    others: dict[str, Call]
    yardsticks: dict[str, tuple[Call, int]] = field(default_factory=dict)
    calls: int = 1


def compiled(function: Callable[..., object]) -> Callable[..., object]:
    """torch.compile for this shape alone."""
    torch._dynamo.config.recompile_limit = 256  # one for each shape; the default is 8
    return torch.compile(function, dynamic=False)


def matrix_yardsticks(inputs: Inputs) -> dict[str, tuple[Call, int]]:
    """``J.sum()`` and a copy of J (its first 400 MB)."""
    target = inputs.copy_target

    def copy() -> object:
        return target.copy_(inputs.jac().view(-1)[: target.numel()])

    return {
        "read": (lambda: inputs.jac().sum(), inputs.jac_bytes),
        "copy": (copy, 2 * target.numel() * target.element_size()),
    }


def row_yardsticks(inputs: Inputs) -> dict[str, tuple[Call, int]]:
    """``row.sum()`` and a copy of a row."""

    def copy() -> object:
        row, _, target, _ = inputs.rows()
        return target.copy_(row)

    row_bytes = inputs.jac_bytes // inputs.tasks
    return {"read": (lambda: inputs.rows()[0].sum(), row_bytes), "copy": (copy, 2 * row_bytes)}


# ---------------------------------------------------------------- ops over J


def _broadcast_gram(jac: Tensor) -> Tensor:
    return (jac[:, None] * jac[None]).sum(-1)


def _few_products(inputs: Inputs) -> bool:
    """Whether inductor's own Gram kernel is worth its time: it computes T^2 P products one by one."""
    return inputs.tasks**2 * inputs.columns <= 2e8


def _row_norms(inputs: Inputs, compile_: bool) -> Contest:
    others: dict[str, Call] = {
        "vector_norm": lambda: torch.linalg.vector_norm(inputs.jac(), dim=1),
        "_foreach_norm": lambda: torch._foreach_norm(list(inputs.jac().unbind())),
    }
    if compile_:
        fused = compiled(lambda jac: jac.square().sum(1).sqrt())
        others["torch.compile"] = lambda: fused(inputs.jac())
    return Contest("row_norms", inputs.jac_bytes, lambda: ops.row_norms(inputs.jac()), others)


def _gram(inputs: Inputs, compile_: bool) -> Contest:
    def matmul() -> object:
        jac = inputs.jac()
        return jac @ jac.T

    others: dict[str, Call] = {"J @ J.T": matmul}
    if compile_ and _few_products(inputs):
        fused = compiled(_broadcast_gram)
        others["torch.compile"] = lambda: fused(inputs.jac())
    return Contest("gram", inputs.jac_bytes, lambda: ops.gram(inputs.jac()), others)


def _gram_difference(inputs: Inputs, compile_: bool) -> Contest:
    def subtract_then_matmul(sam: Tensor, jac: Tensor) -> Tensor:
        difference = sam - jac
        return difference @ difference.T

    def ours() -> object:
        jac, sam = inputs.pair()
        return ops.gram_difference(sam, jac)

    def torch_() -> object:
        jac, sam = inputs.pair()
        return subtract_then_matmul(sam, jac)

    others: dict[str, Call] = {"D = S - J; D @ D.T": torch_}
    if compile_ and _few_products(inputs):
        fused = compiled(lambda sam, jac: _broadcast_gram(sam - jac))

        def fused_call() -> object:
            jac, sam = inputs.pair()
            return fused(sam, jac)

        others["torch.compile"] = fused_call
    return Contest("gram_difference", 2 * inputs.jac_bytes, ours, others)


def _combine(inputs: Inputs, compile_: bool) -> Contest:
    out, weights = inputs.out, inputs.weights
    row_weights = weights.to(inputs.dtype)

    def python_sum() -> object:
        return sum(w * row for w, row in zip(row_weights, inputs.jac(), strict=True))

    others: dict[str, Call] = {
        "w @ J, out=": lambda: torch.mv(inputs.jac().T, row_weights, out=out),
        "w @ J": lambda: row_weights @ inputs.jac(),
        "python sum": python_sum,
    }
    if compile_:
        fused = compiled(lambda jac, w, to: to.copy_((w[:, None] * jac).sum(0)))
        others["torch.compile"] = lambda: fused(inputs.jac(), row_weights, out)
    moved = inputs.jac_bytes // inputs.tasks * (inputs.tasks + 1)
    return Contest("combine", moved, lambda: ops.combine(inputs.jac(), weights, out), others)


def _combine_flat(inputs: Inputs, compile_: bool) -> Contest:
    out, a, b = inputs.out, inputs.weights, inputs.flat_weights
    a_row, b_row = a.to(inputs.dtype), b.to(inputs.dtype)
    both = a_row - b_row

    def ours() -> object:
        jac, sam = inputs.pair()
        return ops.combine_flat(jac, a, sam, b, out)

    def two_products() -> object:
        jac, sam = inputs.pair()
        torch.mv(jac.T, both, out=out)
        return out.add_(b_row @ sam)

    others: dict[str, Call] = {"(a - b) @ J + b @ S": two_products}
    if compile_:
        fused = compiled(
            lambda jac, sam, a, b, to: to.copy_(
                (a[:, None] * jac + b[:, None] * (sam - jac)).sum(0)
            )
        )

        def fused_call() -> object:
            jac, sam = inputs.pair()
            return fused(jac, sam, a_row, b_row, out)

        others["torch.compile"] = fused_call
    moved = inputs.jac_bytes // inputs.tasks * (2 * inputs.tasks + 1)
    return Contest("combine_flat", moved, ours, others)


def _project(inputs: Inputs, compile_: bool) -> Contest:
    out, coefficients = inputs.wide_out, inputs.coefficients
    row_coefficients = coefficients.to(inputs.dtype)
    return Contest(
        "project",
        2 * inputs.jac_bytes,
        lambda: ops.project(inputs.jac(), coefficients, out),
        {"C @ J, out=": lambda: torch.mm(row_coefficients, inputs.jac(), out=out)},
    )


def _gram_pair(inputs: Inputs, compile_: bool) -> Contest:
    def ours() -> object:
        jac, sam = inputs.pair()
        return ops.gram_pair(sam, jac)

    def two_calls() -> object:
        jac, sam = inputs.pair()
        return ops.gram(jac), ops.gram_difference(sam, jac)

    def torch_() -> object:
        jac, sam = inputs.pair()
        difference = sam - jac
        return jac @ jac.T, difference @ difference.T

    others: dict[str, Call] = {"J @ J.T, D @ D.T": torch_, "flatmtl, two calls": two_calls}
    return Contest("gram_pair", 2 * inputs.jac_bytes, ours, others)


def _graddrop(inputs: Inputs, compile_: bool) -> Contest:
    out, rng = inputs.out, torch.tensor([7, 0], device=inputs.device)

    def drop(jac: Tensor, draw: Tensor) -> Tensor:
        positive, negative = jac.clamp(min=0), jac.clamp(max=0)
        keep = positive.sum(0) * (1 - draw) > -negative.sum(0) * draw
        return torch.where(keep, positive, negative).sum(0)

    def torch_() -> object:
        return drop(inputs.jac(), torch.rand_like(out))

    others: dict[str, Call] = {"torch": torch_}
    if compile_:
        fused = compiled(drop)
        others["torch.compile"] = lambda: fused(inputs.jac(), torch.rand_like(out))
    moved = inputs.jac_bytes // inputs.tasks * (inputs.tasks + 1)
    return Contest("graddrop_", moved, lambda: ops.graddrop_(inputs.jac(), rng, out=out), others)


# ---------------------------------------------------------------- ops over one row and its tensors


def _pack(inputs: Inputs, compile_: bool) -> Contest:
    offsets = inputs.offsets

    def ours() -> object:
        _, _, row, (grads, _, _) = inputs.rows()
        return ops.pack_row_(row, grads, offsets)

    def foreach() -> object:
        _, _, row, (grads, _, views) = inputs.rows()
        torch._foreach_copy_(views, grads)
        return torch.linalg.vector_norm(row)

    def cat() -> object:
        _, _, row, (grads, _, _) = inputs.rows()
        torch.cat(grads, out=row)
        return torch.linalg.vector_norm(row)

    others: dict[str, Call] = {"_foreach_copy_ + norm": foreach, "cat + norm": cat}
    return Contest("pack_row_", 2 * _row_bytes(inputs), ours, others)


def _adaptive(inputs: Inputs, compile_: bool) -> Contest:
    def norm(saved: Tensor, row: Tensor) -> Tensor:
        return ((saved.abs() + 0.01) * row).square().sum()

    others: dict[str, Call] = {"torch": lambda: norm(*inputs.rows()[:2])}
    if compile_:
        fused = compiled(norm)
        others["torch.compile"] = lambda: fused(*inputs.rows()[:2])
    return Contest(
        "adaptive_sq_norm",
        2 * _row_bytes(inputs),
        lambda: ops.adaptive_sq_norm(*inputs.rows()[:2], 0.01),
        others,
    )


def _perturb(inputs: Inputs, compile_: bool) -> Contest:
    offsets = inputs.offsets
    rho = [0.05] * len(offsets)
    sq_norm = torch.ones((), dtype=torch.float64, device=inputs.device)

    def ours() -> object:
        saved, row, _, (_, _, params) = inputs.rows()
        return ops.perturb_(params, saved, row, sq_norm, offsets, rho)

    def foreach() -> object:
        _, _, _, (saved, row, params) = inputs.rows()
        scale = (0.05 / sq_norm.sqrt()).to(inputs.dtype)
        torch._foreach_copy_(params, saved)
        return torch._foreach_add_(params, torch._foreach_mul(row, scale))

    others: dict[str, Call] = {"_foreach_copy_, _mul, _add_": foreach}
    return Contest("perturb_", 3 * _row_bytes(inputs), ours, others)


def _restore(inputs: Inputs, compile_: bool) -> Contest:
    offsets = inputs.offsets

    def ours() -> object:
        saved, _, _, (_, _, params) = inputs.rows()
        return ops.restore_(params, saved, offsets)

    def foreach() -> object:
        _, _, _, (saved, _, params) = inputs.rows()
        return torch._foreach_copy_(params, saved)

    return Contest("restore_", 2 * _row_bytes(inputs), ours, {"_foreach_copy_": foreach})


def _row_bytes(inputs: Inputs) -> int:
    return inputs.columns * inputs.dtype.itemsize


MATRIX_OPS: dict[str, Callable[[Inputs, bool], Contest]] = {
    "row_norms": _row_norms,
    "gram": _gram,
    "gram_difference": _gram_difference,
    "combine": _combine,
    "combine_flat": _combine_flat,
    "project": _project,
    "gram_pair": _gram_pair,
    "graddrop_": _graddrop,
}
ROW_OPS: dict[str, Callable[[Inputs, bool], Contest]] = {
    "pack_row_": _pack,
    "adaptive_sq_norm": _adaptive,
    "perturb_": _perturb,
    "restore_": _restore,
}
ROW_TASKS = 8  # rows that the single-row ops cycle through


def op_contest(name: str, inputs: Inputs, *, compile_: bool) -> Contest:
    """The contest of one op of ``MATRIX_OPS`` or ``ROW_OPS``."""
    make = MATRIX_OPS.get(name) or ROW_OPS[name]
    contest = make(inputs, compile_)
    contest.yardsticks = (matrix_yardsticks if name in MATRIX_OPS else row_yardsticks)(inputs)
    return contest


# ---------------------------------------------------------------- the whole aggregate

METHODS = ("mean", "pcgrad", "mgda")
# measured at this P alone: with more columns, a method costs its two passes over J
SOLVER_METHODS = ("upgrad", "cagrad", "nash_mtl", "imtl_g", "config")
SOLVER_COLUMNS = 100_000


def aggregate_contest(name: str, inputs: Inputs) -> Contest:
    """``flatmtl.aggregate`` with one method against the same method elsewhere."""
    weighting = flatmtl.weighting.by_name(name)
    into_out = flatmtl.weighting.by_name(name)
    others: dict[str, Call] = {
        "flatmtl, out=": lambda: flatmtl.aggregate(inputs.jac(), into_out, inputs.out)
    }
    plain = peers.plain_torch(name)
    if plain is not None:
        others["plain torch"] = lambda: plain(inputs.jac())
    torchjd = peers.torchjd_aggregator(name, inputs.tasks)
    if torchjd is not None:
        others["TorchJD"] = lambda: torchjd(inputs.jac())
    # T^2 passes over whole gradients: seconds a call where both are large
    if name == "pcgrad" and inputs.tasks**2 * inputs.columns <= 2e9:
        others["LibMTL's maths"] = lambda: peers.pcgrad_on_gradients(inputs.jac())
    passes = 1 if name == "mean" else 2  # a mean needs no Gram matrix
    moved = _row_bytes(inputs) * (passes * inputs.tasks + 1)
    contest = Contest(name, moved, lambda: flatmtl.aggregate(inputs.jac(), weighting), others)
    contest.yardsticks = matrix_yardsticks(inputs)
    return contest


def pipeline_contest(inputs: Inputs) -> Contest:
    """PCGrad from the parameters' gradients to their ``.grad``, as a training step meets it.

    Ours begins at T lists of gradients as autograd leaves them, packs them into J, and ``.grad`` are
    views of d. TorchJD begins at the ``.jac`` fields that its own backward pass has filled.
    """
    weighting, jac = flatmtl.weighting.PCGrad(), inputs.wide_out
    offsets, out = inputs.offsets, inputs.out

    def ours() -> object:
        for row, grads in zip(jac, inputs.task_gradients(), strict=True):
            ops.pack_row_(row, grads, offsets)
        return flatmtl.aggregate(jac, weighting, out)

    others: dict[str, Call] = {}
    if peers.torchjd is not None:
        others["TorchJD's jac_to_grad"] = peers.torchjd_jac_to_grad(inputs.jac(), inputs.offsets)
    moved = _row_bytes(inputs) * (4 * inputs.tasks + 1)
    return Contest("pcgrad", moved, ours, others, matrix_yardsticks(inputs))
