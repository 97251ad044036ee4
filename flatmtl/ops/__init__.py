"""The operators flatmtl is made of, on flat rows of task gradients and on their Gram matrices.

``jac`` is the T x P matrix of task gradients: one row a task, any row stride, float32, float64,
bfloat16 or float16. Gradients, parameters and updates are of the rows' dtype, or float32 beside rows in
bfloat16 or float16. Sums of products are float64 and the same bits on every run, whatever the number of
threads. Nothing here reads a value on the host. Each operator runs its C++ or CUDA body where that is
loaded, and plain torch (``flatmtl.ops.reference``) elsewhere. The solvers, from Gram matrices to
weights, are in ``flatmtl.ops.solvers``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flatmtl.ops import _check, _library, _schema, reference
from flatmtl.ops.solvers import (
    draw_order_,
    scale_weights,
    solve_aligned,
    solve_alpha_fair,
    solve_cagrad,
    solve_config,
    solve_constant,
    solve_dual_cone,
    solve_gradvac,
    solve_gradvac_drawn_,
    solve_imtl_g,
    solve_krum,
    solve_mgda,
    solve_modo_,
    solve_nash_,
    solve_pcd_,
    solve_pcgrad,
    solve_pcgrad_drawn_,
    solve_random_,
    solve_sdmgrad_,
)

_library.load()

__all__ = [
    "adaptive_sq_norm",
    "affinity",
    "combine",
    "combine_flat",
    "draw_order_",
    "graddrop_",
    "gram",
    "gram_difference",
    "gram_pair",
    "pack_row_",
    "perturb_",
    "project",
    "reference",
    "restore_",
    "row_norms",
    "scale_weights",
    "solve_aligned",
    "solve_alpha_fair",
    "solve_cagrad",
    "solve_config",
    "solve_constant",
    "solve_dual_cone",
    "solve_gradvac",
    "solve_gradvac_drawn_",
    "solve_imtl_g",
    "solve_krum",
    "solve_mgda",
    "solve_modo_",
    "solve_nash_",
    "solve_pcd_",
    "solve_pcgrad",
    "solve_pcgrad_drawn_",
    "solve_random_",
    "solve_sdmgrad_",
]

OPERATORS = tuple(_schema.SCHEMAS)
_ops = torch.ops.flatmtl


def _written(tensors: Tensor | Sequence[Tensor]) -> None:
    """Tells autograd of a write, so that a graph which needs the old values raises, as after copy_."""
    if not torch.compiler.is_compiling():  # a compiler sees the write in the operator's schema
        torch.autograd.graph.increment_version(tensors)


def row_norms(jac: Tensor) -> Tensor:
    """Euclidean norms of the rows.

    Args:
        jac: [T, P].

    Returns:
        float64 [T].

    Raises:
        ValueError, TypeError: ``jac`` is not a matrix of rows.
    """
    return _ops.row_norms.default(_check.rows("jac", jac))


def gram(jac: Tensor) -> Tensor:
    """The Gram matrix G = J J^T of the rows; exactly symmetric.

    Args:
        jac: [T, P].

    Returns:
        float64 [T, T].

    Raises:
        ValueError, TypeError: ``jac`` is not a matrix of rows.
    """
    return _ops.gram.default(_check.rows("jac", jac))


def gram_difference(sam: Tensor, jac: Tensor) -> Tensor:
    """The Gram matrix of the rows ``sam - jac``, the differences formed one by one.

    (Expanding the product instead would cancel when the two are close, as they are for a small rho.)

    Args:
        sam: [T, P].
        jac: [T, P], dtype and device of ``sam``.

    Returns:
        float64 [T, T].

    Raises:
        ValueError, TypeError: shapes, dtypes or devices differ.
    """
    jac = _check.rows("jac", jac)
    _pair("sam", _check.rows("sam", sam), jac)
    return _ops.gram_difference.default(sam, jac)


def gram_pair(sam: Tensor, jac: Tensor) -> tuple[Tensor, Tensor]:
    """``gram(jac)`` and ``gram_difference(sam, jac)``, the same bits, reading ``jac`` once.

    (In the CUDA body up to 4 rows; it makes the two calls for more.)

    Args:
        sam: [T, P].
        jac: [T, P], dtype and device of ``sam``.

    Returns:
        float64 [T, T] each: of the rows ``jac``, and of the rows ``sam - jac``.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices differ.
    """
    jac = _check.rows("jac", jac)
    _pair("sam", _check.rows("sam", sam), jac)
    return _ops.gram_pair.default(sam, jac)


def _pair(name: str, other: Tensor, jac: Tensor) -> None:
    _check.like(name, other, "jac", jac)
    _check.shape(name, other, *jac.shape)


def _out_row(out: Tensor | None, jac: Tensor) -> Tensor:
    if out is None:
        return jac.new_empty(jac.shape[1])
    _check.beside("out", _check.flat("out", out), "jac", jac)
    _check.shape("out", out, jac.shape[1])
    _check.no_overlap("out", out, "jac", jac)
    return out


def combine(jac: Tensor, weights: Tensor, out: Tensor | None = None) -> Tensor:
    """The weighted sum of the rows, d = sum_i weights_i jac_i.

    A row of weight exactly 0 is not read, so that NaN in it stays there.

    Args:
        jac: [T, P].
        weights: float32 or float64 [T], on the device of ``jac``.
        out: [P], on the device of ``jac``, of its dtype, or float32 where that is bfloat16 or float16
            (the sum is then not rounded to it); allocated, of ``jac``'s dtype, if None. Must not share
            memory with ``jac``.

    Returns:
        ``out``.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit.
    """
    jac = _check.rows("jac", jac)
    scale = _check.weights("weights", weights, jac)
    out = _out_row(out, jac)
    _ops.combine.default(jac, scale, out)
    _written(out)
    return out


def combine_flat(
    jac: Tensor, a: Tensor, sam: Tensor, b: Tensor, out: Tensor | None = None
) -> Tensor:
    """FS-MTL's update in one pass, d = sum_i a_i jac_i + sum_i b_i (sam_i - jac_i).

    Where ``a_i`` equals ``b_i`` (in the arithmetic type), as PCGrad's weights do without conflicts, the
    two terms are ``b_i sam_i``: ``jac_i`` is not read then, and NaN in it stays there.

    Args:
        jac: [T, P], gradients of the losses.
        a: float32 or float64 [T], weights of the losses' gradients.
        sam: [T, P], gradients at the perturbed parameters.
        b: float32 or float64 [T], weights of the flat parts. ``sam_i`` is not read where ``b_i`` is 0,
            nor ``jac_i`` where ``a_i`` is 0 too.
        out: [P], as in ``combine``; allocated if None. Must not share memory with ``jac`` or ``sam``.

    Returns:
        ``out``.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit.
    """
    jac = _check.rows("jac", jac)
    _pair("sam", _check.rows("sam", sam), jac)
    scale_a, scale_b = _check.weights("a", a, jac), _check.weights("b", b, jac)
    out = _out_row(out, jac)
    _check.no_overlap("out", out, "sam", sam)
    _ops.combine_flat.default(jac, scale_a, sam, scale_b, out)
    _written(out)
    return out


def project(jac: Tensor, coefficients: Tensor, out: Tensor | None = None) -> Tensor:
    """Linear combinations of the rows, out_r = sum_k coefficients_rk jac_k.

    With PCGrad's coefficients, the projected task gradients themselves.

    Args:
        jac: [T, P].
        coefficients: float32 or float64 [R, T]; a zero skips its row.
        out: [R, P]; allocated if None. Must not share memory with ``jac``.

    Returns:
        ``out``.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit.
    """
    jac = _check.rows("jac", jac)
    matrix = _check.tensor("coefficients", coefficients, _check.SMALL_TYPES)
    _check.like("coefficients", matrix, "jac", jac, dtype=False)
    if matrix.dim() != 2 or matrix.shape[1] != jac.shape[0]:
        raise ValueError(
            f"coefficients must have shape [R, {jac.shape[0]}], got {list(matrix.shape)}"
        )
    if out is None:
        out = jac.new_empty(matrix.shape[0], jac.shape[1])
    else:
        _check.like("out", _check.rows("out", out), "jac", jac)
        _check.shape("out", out, matrix.shape[0], jac.shape[1])
        _check.no_overlap("out", out, "jac", jac)
    _ops.project.default(jac, _check.double(matrix), out)
    _written(out)
    return out


def graddrop_(
    jac: Tensor,
    rng: Tensor,
    *,
    leak: Tensor | None = None,
    there: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """GradDrop (Chen et al., arXiv 2010.06808), d = sum_i (l_i + (1 - l_i) M_i) jac_i, in one pass.

    For every column one uniform number U is drawn, by Philox from the column, the seed and the step: the
    same on every device. M keeps the positive entries where P > U and the negative ones elsewhere, P =
    0.5 (1 + sum g / sum |g|). That is asked as p (1 - U) > n U, with p and n the sums of the positive
    entries and of the negative ones' magnitudes: there is no 0 / 0 (a column of zeros gives 0) and no
    eps. An absolute eps, 1e-7 in other code, turns the choice into a coin's for gradients of 1e-8. The
    sum over the rows is taken in their order in float32, for float64 rows in float64; U has 23 bits.

    Args:
        jac: [T, P].
        rng: int64 [2], (seed, step) on the device of ``jac``; step is advanced by one.
        leak: float32 or float64 [T], 0 to 1, the part of a task's dropped entries that is added all the
            same; None: 0.
        there: bool [T], the rows that count; the others are not read. None: all.
        out: [P], as in ``combine``; allocated if None. Must not share memory with ``jac``.

    Returns:
        ``out``.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit.
    """
    jac = _check.rows("jac", jac)
    _check.like("rng", _check.tensor("rng", rng, (torch.int64,)), "jac", jac, dtype=False)
    _check.shape("rng", rng, 2)
    if not rng.is_contiguous():
        raise ValueError(f"rng must be contiguous, got stride {list(rng.stride())}")
    if leak is not None:
        leak = _check.weights("leak", leak, jac)
    if there is not None:
        _check.like("there", _check.tensor("there", there, (torch.bool,)), "jac", jac, dtype=False)
        _check.shape("there", there, jac.shape[0])
        there = there.contiguous()
    out = _out_row(out, jac)
    _ops.graddrop_.default(jac, leak, there, rng, out)
    _written(out)
    return out


def affinity(gram: Tensor, losses: Tensor, lr: float) -> Tensor:
    """First-order inter-task affinity, Z_ji = lr * G_ji / L_j: row = recipient, column = source.

    To first order, the relative fall of task j's loss under a plain SGD step of size ``lr`` on task i
    (Fifty et al., arXiv 2109.04617, Eq. 1, expanded).

    Args:
        gram: float32 or float64 [T, T].
        losses: [T]. A row whose loss is not positive and finite becomes NaN.
        lr: step size, the loss's unit over the squared gradient norm's.

    Returns:
        float64 [T, T].

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit.
    """
    square = _check.tensor("gram", gram, _check.SMALL_TYPES)
    if square.dim() != 2 or square.shape[0] != square.shape[1]:
        raise ValueError(f"gram must have shape [T, T], got {list(square.shape)}")
    vector = _check.tensor("losses", losses)
    _check.like("losses", vector, "gram", square, dtype=False)
    _check.shape("losses", vector, square.shape[0])
    return _ops.affinity.default(_check.double(square), _check.double(vector), float(lr))


def pack_row_(
    row: Tensor, grads: Sequence[Tensor], offsets: Sequence[int], *, accumulate: bool = False
) -> Tensor:
    """Copies gradients into one row, or adds them to it, and returns its squared norm, in one pass.

    Args:
        row: [P], contiguous. All of it is written: what no gradient covers becomes 0.
        grads: tensors of any shape, flattened in row-major order; on the device of ``row``, all of its
            dtype, or all float32 where that is bfloat16 or float16: rounded to nearest even.
        offsets: where each begins in ``row``, in elements; ascending, without overlap.
        accumulate: the row becomes ``row`` + gradients, and what no gradient covers stays as it is.
            For a row in half precision the sum is formed in float32, then rounded.

    Returns:
        float64, 0-dim: the squared norm of the row as it is then stored.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit; ``row`` is then as it was.
    """
    row = _check.flat("row", row)
    _check.segments("grads", grads, offsets, row)
    sq_norm = _ops.pack_row_.default(
        row, [g.contiguous() for g in grads], list(offsets), accumulate
    )
    _written(row)
    return sq_norm


def adaptive_sq_norm(saved: Tensor, row: Tensor, eta: float = 0.0) -> Tensor:
    """The squared norm of (|saved| + eta) * row, ASAM's divisor (Kwon et al., arXiv 2102.11600).

    Args:
        saved: [P], the flat parameters; dtype of ``row``, or float32 where that is bfloat16 or
            float16.
        row: [P], their flat gradient.
        eta: added to |saved|; 0 is the form without it.

    Returns:
        float64, 0-dim.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit.
    """
    row = _check.flat("row", row)
    _pair_flat(saved, row)
    return _ops.adaptive_sq_norm.default(saved, row, float(eta))


def _pair_flat(saved: Tensor, row: Tensor) -> None:
    _check.beside("saved", _check.flat("saved", saved), "row", row)
    _check.shape("saved", saved, row.shape[0])


def perturb_(
    params: Sequence[Tensor],
    saved: Tensor,
    row: Tensor,
    sq_norm: Tensor,
    offsets: Sequence[int],
    rho: Sequence[float],
    *,
    adaptive: bool = False,
    eta: float = 0.0,
) -> None:
    """Writes the perturbed parameters: saved + rho * row / norm, norm = sqrt(sq_norm).

    With ``adaptive``, saved + rho * (|saved| + eta)^2 * row / norm, ``sq_norm`` then being
    ``adaptive_sq_norm``'s. Where the norm is 0 or not finite the parameters become ``saved`` exactly.

    Args:
        params: contiguous tensors, dtype of ``saved``, written in their own storage.
        saved: [P], the unperturbed parameters; dtype of ``row``, or float32 where that is bfloat16 or
            float16.
        row: [P], the gradient.
        sq_norm: float64, 0-dim, on the device; not read on the host.
        offsets: where each parameter begins in ``saved`` and ``row``.
        rho: radius for each parameter.
        adaptive: ASAM's geometry.
        eta: added to |saved| in it.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit; nothing is then written.
    """
    row = _check.flat("row", row)
    _pair_flat(saved, row)
    _check_params(params, offsets, saved)
    if len(rho) != len(params):
        raise ValueError(
            f"rho must have one entry for each of params ({len(params)}), got {len(rho)}"
        )
    _check.like(
        "sq_norm", _check.tensor("sq_norm", sq_norm, (torch.float64,)), "row", row, dtype=False
    )
    _check.shape("sq_norm", sq_norm)
    _ops.perturb_.default(
        list(params),
        saved,
        row,
        sq_norm,
        list(offsets),
        [float(r) for r in rho],
        adaptive,
        float(eta),
    )
    _written(params)


def _check_params(params: Sequence[Tensor], offsets: Sequence[int], saved: Tensor) -> None:
    _check.segments("params", params, offsets, saved, "saved", saved)
    for k, param in enumerate(params):
        if not param.is_contiguous():
            raise ValueError(f"params[{k}] must be contiguous, got stride {list(param.stride())}")


def restore_(params: Sequence[Tensor], saved: Tensor, offsets: Sequence[int]) -> None:
    """Copies the saved parameters back into their own storage, bit for bit.

    Args:
        params: contiguous tensors, dtype of ``saved``.
        saved: [P].
        offsets: where each parameter begins in ``saved``.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit; nothing is then written.
    """
    saved = _check.flat("saved", saved)
    _check_params(params, offsets, saved)
    _ops.restore_.default(list(params), saved, list(offsets))
    _written(params)
