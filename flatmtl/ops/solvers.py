"""The solvers: from the small Gram matrix of the task gradients to one weight a task.

All take one problem [T, T] or a batch [B, T, T], float32 or float64, and give float64 weights and an
int64 status (the bits of ``flatmtl.weighting.SolveStatus``), each with a leading B if the Gram matrix
has one. A task whose gradient is zero or not finite gets weight 0; the others are solved as if it were
not there, but 1/T always means all T tasks.

``ridge`` is added to the diagonal of the cosine matrix C_ij = G_ij / (n_i n_j), n_i = ||g_i||; None
means 1e-10 for a float64 Gram matrix and 1e-6 for a float32 one. Where the matrix is too noisy for it (a
Gram matrix of float32 rows can be indefinite by 1e-7) it is raised a hundredfold, up to 1e-6, and the
status says so. ``residual``, float64, is the largest componentwise backward error of the method's
optimality equations: |sum of the terms| / sum of |terms|, at most 1e-9 where the solve converged.

ValueError, where a Gram matrix is expected: it is on the CPU and has another shape, is not symmetric or
is clearly not positive semi-definite. On CUDA nothing is read, and such a problem gets weights 0 and a
status bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flatmtl.ops import _check

_ops = torch.ops.flatmtl
_INVALID = "gram must be"

Pair = tuple[Tensor, Tensor]
Triple = tuple[Tensor, Tensor, Tensor]


def _call(solve: Callable[..., Any], *args: object) -> Any:  # noqa: ANN401
    """solve(*args), whose complaint about the Gram matrix is a ValueError in every body."""
    try:
        return solve(*args)
    except RuntimeError as error:
        # torch puts the place in the source before the text, and maybe a trace after it
        _, found, text = str(error).partition(_INVALID)
        if not found:
            raise
        raise ValueError(_INVALID + text.splitlines()[0]) from None


def _ridge(ridge: float | None, gram: Tensor) -> float:
    if ridge is None:
        return 1e-10 if gram.dtype == torch.float64 else 1e-6
    if not 0 <= ridge < math.inf:
        raise ValueError(f"ridge must be finite and at least 0, got {ridge}")
    return float(ridge)


def _check_stream(rng: Tensor, gram: Tensor | None = None) -> None:
    _check.tensor("rng", rng, (torch.int64,))
    if gram is not None:
        _check.like("rng", rng, "gram", gram, dtype=False)
    _check.shape("rng", rng, 2)


def draw_order_(rng: Tensor, tasks: int, batch: int = 1) -> Tensor:
    """Random task orders, a permutation of 0..tasks-1 for every row of every problem.

    Args:
        rng: int64 [2], (seed, step) on the device; step is advanced by one.
        tasks: T.
        batch: B.

    Returns:
        int64 [B, T, T]; the same for the same seed and step on every device.

    Raises:
        ValueError, TypeError: ``rng`` is not int64 [2]; ``tasks`` or ``batch`` is below 1.
    """
    _check_stream(rng)
    if tasks < 1 or batch < 1:
        raise ValueError(f"tasks and batch must be at least 1, got {tasks} and {batch}")
    return _ops.draw_order_.default(rng, tasks, batch)


def solve_constant(gram: Tensor, preference: Tensor | None = None, value: float = 1.0) -> Pair:
    """Given weights, 0 for the tasks that have no gradient. Looks at no task's products but that.

    Args:
        gram: [T, T] or [B, T, T]; the diagonal matrix of the squared norms is enough.
        preference: the weights [T]; None: ``value`` for every task.
        value: the weight without ``preference``.

    Returns:
        weights, status.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit.
    """
    square = _check.gram("gram", gram)
    vector = _check.preference("preference", preference, square)
    return _call(_ops.solve_constant.default, _check.double(square), vector, float(value))


def solve_pcgrad(gram: Tensor, order: Tensor) -> Triple:
    """PCGrad's weights (Yu et al., arXiv 2001.06782, Alg. 1), in the sum form.

    Args:
        gram: [T, T] or [B, T, T].
        order: int64, the shape of ``gram``: row i lists the tasks in the order in which task i is
            projected on them; i itself is passed over.

    Returns:
        weights (the sum over tasks of the coefficients), coefficients float64 of the shape of ``gram``
        (row i: the projected gradient of task i), status.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit; ``gram`` is no Gram matrix.
    """
    square = _check.gram("gram", gram)
    return _call(_ops.solve_pcgrad.default, _check.double(square), _order(order, square))


def solve_pcgrad_drawn_(gram: Tensor, rng: Tensor) -> Triple:
    """PCGrad's weights in a random order: ``draw_order_`` and ``solve_pcgrad`` in one call.

    Args:
        gram: [T, T] or [B, T, T].
        rng: int64 [2], (seed, step) on the device of ``gram``; step is advanced by one.

    Returns:
        weights, coefficients, status, as ``solve_pcgrad``.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit; ``gram`` is no Gram matrix.
    """
    square = _check.gram("gram", gram)
    _check_stream(rng, square)
    return _call(_ops.solve_pcgrad_drawn_.default, _check.double(square), rng)


def solve_random_(gram: Tensor, rng: Tensor) -> Pair:
    """The softmax of standard normal numbers (Philox and Box-Muller), 0 for tasks without a gradient.

    Args:
        gram: [T, T] or [B, T, T]; the diagonal matrix of the squared norms is enough.
        rng: int64 [2], (seed, step) on the device of ``gram``; step is advanced by one. The numbers are
            others than those of ``draw_order_``.

    Returns:
        weights, status; the same random words for the same seed and step on every device.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit.
    """
    square = _check.gram("gram", gram)
    _check_stream(rng, square)
    return _call(_ops.solve_random_.default, _check.double(square), rng)


def _order(order: Tensor, gram: Tensor) -> Tensor:
    _check.tensor("order", order, (torch.int64,))
    _check.like("order", order, "gram", gram, dtype=False)
    _check.shape("order", order, *gram.shape)
    return order.contiguous()


def solve_gradvac(
    gram: Tensor, order: Tensor, target: Tensor, beta: float = 0.01, eps: float = 1e-8
) -> Pair:
    """GradVac's weights (Wang et al., arXiv 2010.05874, Alg. 1), in the sum form.

    A task's gradient is moved so that its cosine with another's is at least that pair's target, which
    follows the cosines by an exponential average. Targets of 0 are PCGrad.

    Args:
        gram: [T, T] or [B, T, T].
        order: int64, the shape of ``gram``, as for ``solve_pcgrad``.
        target: float64, the shape of ``gram``, contiguous: the target cosines, 0 at first; moved.
        beta: how fast they follow.
        eps: added to a divisor that is dimensionless here.

    Returns:
        weights, status.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit; ``gram`` is no Gram matrix;
            ``beta`` is outside [0, 1] or ``eps`` is negative.
    """
    square = _gradvac_operands(gram, target, beta, eps)
    orders = _order(order, square)
    double = _check.double(square)
    return _call(_ops.solve_gradvac.default, double, orders, target, float(beta), float(eps))


def solve_gradvac_drawn_(
    gram: Tensor, rng: Tensor, target: Tensor, beta: float = 0.01, eps: float = 1e-8
) -> Pair:
    """GradVac's weights in a random order: ``draw_order_`` and ``solve_gradvac`` in one call.

    Args:
        gram: [T, T] or [B, T, T].
        rng: int64 [2], (seed, step) on the device of ``gram``; step is advanced by one.
        target: as for ``solve_gradvac``; moved.
        beta: as for ``solve_gradvac``.
        eps: as for ``solve_gradvac``.

    Returns:
        weights, status.

    Raises:
        ValueError, TypeError: as ``solve_gradvac``.
    """
    square = _gradvac_operands(gram, target, beta, eps)
    _check_stream(rng, square)
    double = _check.double(square)
    return _call(_ops.solve_gradvac_drawn_.default, double, rng, target, float(beta), float(eps))


def _gradvac_operands(gram: Tensor, target: Tensor, beta: float, eps: float) -> Tensor:
    square = _check.gram("gram", gram)
    if not 0 <= beta <= 1:
        raise ValueError(f"beta must be between 0 and 1, got {beta}")
    if not eps >= 0:
        raise ValueError(f"eps must be at least 0, got {eps}")
    _check.state("target", target, square, square.shape)
    return square


def solve_mgda(gram: Tensor, ridge: float | None = None) -> Triple:
    """MGDA's weights: min w'Gw over the simplex, exactly (Desideri 2012; arXiv 1810.04650).

    Args:
        gram: [T, T] or [B, T, T].
        ridge: see the module.

    Returns:
        weights, status, residual.

    Raises:
        ValueError, TypeError: shapes or dtypes do not fit, ``gram`` is no Gram matrix, or ``ridge`` is
            negative.
    """
    square = _check.gram("gram", gram)
    return _call(_ops.solve_mgda.default, _check.double(square), _ridge(ridge, square))


def solve_dual_cone(
    gram: Tensor,
    preference: Tensor | None = None,
    each: bool = False,
    ridge: float | None = None,
) -> Triple:
    """Projections on the dual cone of the task gradients: no conflict with any of them.

    Args:
        gram: [T, T] or [B, T, T].
        preference: u, [T], no entry negative (not read here); None: 1/T.
        each: False, DualProj (Lopez-Paz and Ranzato, arXiv 1706.08840): w = argmin v'Gv, v >= u. True,
            UPGrad (Quinton and Rey, arXiv 2406.16232): the sum over i of argmin v'Gv, v >= u_i e_i.
        ridge: see the module.

    Returns:
        weights, status, residual.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit, ``gram`` is no Gram matrix, or
            ``ridge`` is negative.
    """
    square = _check.gram("gram", gram)
    vector = _check.preference("preference", preference, square)
    return _call(
        _ops.solve_dual_cone.default, _check.double(square), vector, each, _ridge(ridge, square)
    )


def solve_cagrad(
    gram: Tensor, c: float = 0.4, rescale: int = 0, ridge: float | None = None
) -> Triple:
    """CAGrad's weights (Liu et al., arXiv 2110.14048): max_d min_i <g_i, d>, ||d - g0|| <= c ||g0||.

    Args:
        gram: [T, T] or [B, T, T].
        c: the radius relative to the mean gradient's norm ||g0||; 0.4 is the paper's for NYUv2.
        rescale: the weights are divided by 0: nothing, 1: 1 + c^2 (the official code), 2: 1 + c.
        ridge: see the module.

    Returns:
        weights, status (with the fallback bit, and d = g0, where the gradients are Pareto-stationary),
        residual.

    Raises:
        ValueError, TypeError: shapes or dtypes do not fit, ``gram`` is no Gram matrix; ``c`` or
            ``ridge`` is negative; ``rescale`` is none of these.
    """
    square = _check.gram("gram", gram)
    if not 0 <= c < math.inf:
        raise ValueError(f"c must be finite and at least 0, got {c}")
    if rescale not in (0, 1, 2):
        raise ValueError(f"rescale must be 0, 1 or 2, got {rescale}")
    double = _check.double(square)
    return _call(_ops.solve_cagrad.default, double, float(c), rescale, _ridge(ridge, square))


def solve_alpha_fair(
    gram: Tensor,
    alpha: float = 2.0,
    preference: Tensor | None = None,
    ridge: float | None = None,
) -> Triple:
    """Alpha-fair weights, (G w)_i = (c_i / w_i)^(1/alpha), w > 0 (Ban and Ji, arXiv 2402.15638).

    Args:
        gram: [T, T] or [B, T, T].
        alpha: above 0 and at most 5; 1 is Nash-MTL's equation, 2 what the released scripts use.
        preference: c, [T], every entry positive (not read here); None: ones.
        ridge: see the module.

    Returns:
        weights, status, residual.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit, ``gram`` is no Gram matrix,
            ``alpha`` is out of range or ``ridge`` is negative.
    """
    square = _check.gram("gram", gram)
    if not 0 < alpha <= 5:
        raise ValueError(f"alpha must be above 0 and at most 5, got {alpha}")
    vector = _check.preference("preference", preference, square)
    double = _check.double(square)
    return _call(_ops.solve_alpha_fair.default, double, float(alpha), vector, _ridge(ridge, square))


def solve_nash_(
    gram: Tensor,
    last: Tensor,
    every: int = 1,
    max_norm: float = 0.0,
    ridge: float | None = None,
) -> Triple:
    """Nash-MTL's weights, G w = 1/w (Navon et al., arXiv 2202.01017), kept for ``every`` calls.

    Args:
        gram: [T, T] or [B, T, T].
        last: float64 [T + 1] or [B, T + 1], contiguous: the last good weights and the number of calls,
            zeros at first; moved. A solve that fails gives the last good weights.
        every: a solve at every so many calls, the last weights in between.
        max_norm: a bound on ||d|| = sqrt(w'Gw) at every call (not on what ``last`` keeps); 0: none.
        ridge: see the module.

    Returns:
        weights, status, residual (0 where nothing was solved).

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit, ``gram`` is no Gram matrix,
            ``every`` is below 1 or ``ridge`` is negative.
    """
    square = _check.gram("gram", gram)
    if every < 1:
        raise ValueError(f"every must be at least 1, got {every}")
    shape = square.shape
    _check.state("last", last, square, (*shape[:-2], shape[-1] + 1))
    double = _check.double(square)
    ridge = _ridge(ridge, square)
    return _call(_ops.solve_nash_.default, double, last, every, float(max_norm), ridge)


def solve_imtl_g(gram: Tensor, ridge: float | None = None) -> Triple:
    """IMTL-G's weights (Liu et al., ICLR 2021): equal projections on every unit gradient, sum 1.

    Args:
        gram: [T, T] or [B, T, T].
        ridge: see the module.

    Returns:
        weights (w_i proportional to 1/||g_i||, with the fallback bit, where the solution would point
        against the gradients), status, residual.

    Raises:
        ValueError, TypeError: shapes or dtypes do not fit, ``gram`` is no Gram matrix, or ``ridge`` is
            negative.
    """
    square = _check.gram("gram", gram)
    return _call(_ops.solve_imtl_g.default, _check.double(square), _ridge(ridge, square))


def solve_config(
    gram: Tensor, preference: Tensor | None = None, ridge: float | None = None
) -> Triple:
    """ConFIG's weights (Liu et al., arXiv 2408.11104): cosines with all gradients in a proportion.

    Args:
        gram: [T, T] or [B, T, T].
        preference: the proportion, [T]; None: ones.
        ridge: see the module.

    Returns:
        weights, status, residual.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit, ``gram`` is no Gram matrix, or
            ``ridge`` is negative.
    """
    square = _check.gram("gram", gram)
    vector = _check.preference("preference", preference, square)
    return _call(_ops.solve_config.default, _check.double(square), vector, _ridge(ridge, square))


def solve_aligned(
    gram: Tensor,
    preference: Tensor | None = None,
    scale_mode: int = 0,
    rank_tolerance: float = 2.0**-23,
) -> Triple:
    """Aligned-MTL's weights (Senushkin et al., arXiv 2305.19000): principal components made equal.

    Args:
        gram: [T, T] or [B, T, T].
        preference: [T]; None: ones.
        scale_mode: the components' common size: 0, the least eigenvalue, 1, the (lower) median, 2, the
            mean ("rmse" in the official code), of those that count.
        rank_tolerance: eigenvalues up to this times T times the largest do not count; by default the
            float32 epsilon, as in the official code.

    Returns:
        weights, status, residual (of the eigenvectors, relative to the largest eigenvalue).

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit, ``gram`` is no Gram matrix,
            ``scale_mode`` is none of these or ``rank_tolerance`` is negative.
    """
    square = _check.gram("gram", gram)
    if scale_mode not in (0, 1, 2):
        raise ValueError(f"scale_mode must be 0, 1 or 2, got {scale_mode}")
    if not 0 <= rank_tolerance < math.inf:
        raise ValueError(f"rank_tolerance must be finite and at least 0, got {rank_tolerance}")
    vector = _check.preference("preference", preference, square)
    double = _check.double(square)
    return _call(_ops.solve_aligned.default, double, vector, scale_mode, float(rank_tolerance))


def solve_pcd_(
    gram: Tensor,
    state: Tensor,
    tau: float = 0.02,
    beta: float = 0.999,
    eps: float = 1e-8,
    ridge: float | None = None,
) -> Triple:
    """PCD's weights (TMLR 2026, arXiv 2606.29521): the primary task 0, and progress on the others.

    Args:
        gram: [T, T] or [B, T, T].
        state: float64 [T + 1] or [B, T + 1], contiguous: averages of the squared norms and the number
            of steps, zeros at first; moved.
        tau: the share of a secondary task's normalised progress that is guaranteed.
        beta: decay of the averages.
        eps: added to them.
        ridge: see the module.

    Returns:
        weights (those of the primary task alone, with the fallback bit, where the guarantees contradict
        each other), status, residual.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit, ``gram`` is no Gram matrix, or an
            option is out of range (0 <= tau <= 1, 0 <= beta < 1, eps >= 0, ridge >= 0).
    """
    square = _check.gram("gram", gram)
    if not 0 <= tau <= 1:
        raise ValueError(f"tau must be between 0 and 1, got {tau}")
    if not 0 <= beta < 1:
        raise ValueError(f"beta must be at least 0 and below 1, got {beta}")
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps must be finite and at least 0, got {eps}")
    shape = square.shape
    _check.state("state", state, square, (*shape[:-2], shape[-1] + 1))
    return _call(
        _ops.solve_pcd_.default,
        _check.double(square),
        state,
        float(tau),
        float(beta),
        float(eps),
        _ridge(ridge, square),
    )


def solve_krum(gram: Tensor, byzantine: int, selected: int = 1) -> Pair:
    """(Multi-)Krum's weights (Blanchard et al., NeurIPS 2017): the mean of the most central gradients.

    Args:
        gram: [T, T] or [B, T, T].
        byzantine: how many gradients may be arbitrary.
        selected: how many are averaged.

    Returns:
        weights, status.

    Raises:
        ValueError, TypeError: shapes or dtypes do not fit, ``gram`` is no Gram matrix, ``byzantine`` is
            negative, ``selected`` is below 1, or T is below ``selected`` or (unless ``byzantine`` is 0)
            below ``byzantine`` + 3.
    """
    square = _check.gram("gram", gram)
    if byzantine < 0:
        raise ValueError(f"byzantine must be at least 0, got {byzantine}")
    if selected < 1:
        raise ValueError(f"selected must be at least 1, got {selected}")
    tasks = square.shape[-1]
    if byzantine > 0 and tasks < byzantine + 3:  # without any, one task is a fine answer
        raise ValueError(
            f"gram must have at least byzantine + 3 = {byzantine + 3} tasks, got {tasks}"
        )
    if tasks < selected:
        raise ValueError(f"gram must have at least selected = {selected} tasks, got {tasks}")
    return _call(_ops.solve_krum.default, _check.double(square), byzantine, selected)


def solve_sdmgrad_(
    cross: Tensor,
    state: Tensor,
    preference: Tensor | None = None,
    lr: float = 10.0,
    momentum: float = 0.5,
    steps: int = 20,
    lambda_: float = 0.3,
) -> Pair:
    """SDMGrad's weights (Xiao et al., arXiv 2305.18409), by projected descent from the last ones.

    Args:
        cross: the products J1 J2' of the gradients of two batches, [T, T] or [B, T, T], float32 or
            float64; not symmetric. One batch's Gram matrix will do, with a bias.
        state: float64 [T] or [B, T], contiguous: the weights on the simplex, 1/T at first; moved.
        preference: the target direction, [T]; None: 1/T.
        lr: step size of the descent on the normalised matrix.
        momentum: its momentum.
        steps: how many steps.
        lambda_: pull to the target.

    Returns:
        weights (state + lambda preference) / (1 + lambda), status.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit, or an option is out of range
            (lr > 0, 0 <= momentum < 1, steps >= 1, lambda_ >= 0).
    """
    square = _check.gram("cross", cross)
    if not 0 < lr < math.inf:
        raise ValueError(f"lr must be finite and above 0, got {lr}")
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum must be at least 0 and below 1, got {momentum}")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if not 0 <= lambda_ < math.inf:
        raise ValueError(f"lambda_ must be finite and at least 0, got {lambda_}")
    _check.state("state", state, square, square.shape[:-1], "cross")
    vector = _check.preference("preference", preference, square, "cross")
    return _call(
        _ops.solve_sdmgrad_.default,
        _check.double(square),
        state,
        vector,
        float(lr),
        float(momentum),
        steps,
        float(lambda_),
    )


def solve_modo_(cross: Tensor, state: Tensor, gamma: float = 0.1, rho: float = 0.1) -> Pair:
    """MoDo's weights (Chen et al., arXiv 2305.20057): one projected step from the last ones.

    Args:
        cross: the products J1 J2' of the gradients of two batches, as for ``solve_sdmgrad_``.
        state: float64 [T] or [B, T], contiguous: the weights on the simplex, 1/T at first; moved.
        gamma: step size.
        rho: regularisation.

    Returns:
        weights, status.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit, ``gamma`` is not above 0 or
            ``rho`` is negative.
    """
    square = _check.gram("cross", cross)
    if not 0 < gamma < math.inf:
        raise ValueError(f"gamma must be finite and above 0, got {gamma}")
    if not 0 <= rho < math.inf:
        raise ValueError(f"rho must be finite and at least 0, got {rho}")
    _check.state("state", state, square, square.shape[:-1], "cross")
    return _call(_ops.solve_modo_.default, _check.double(square), state, float(gamma), float(rho))


def scale_weights(gram: Tensor, weights: Tensor, scaling: int = 0, max_norm: float = 0.0) -> Tensor:
    """Weights scaled to a sum, then to a largest norm of the update ||d|| = sqrt(w'Gw).

    Args:
        gram: float32 or float64 [T, T] or [B, T, T]. Products of a task of weight 0 are not looked at.
        weights: float64 [T] or [B, T].
        scaling: 0, as they are; 1, sum one; 2, sum T. A sum that is not clearly positive is replaced by
            that of the absolute values, so that no update is turned around.
        max_norm: 0: no bound.

    Returns:
        float64, the shape of ``weights``.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit, ``scaling`` is none of these or
            ``max_norm`` is negative.
    """
    square = _check.gram("gram", gram)
    if scaling not in (0, 1, 2):
        raise ValueError(f"scaling must be 0, 1 or 2, got {scaling}")
    if not 0 <= max_norm < math.inf:
        raise ValueError(f"max_norm must be finite and at least 0, got {max_norm}")
    vector = _check.tensor("weights", weights, _check.SMALL_TYPES)
    _check.like("weights", vector, "gram", square, dtype=False)
    _check.shape("weights", vector, *square.shape[:-1])
    double = _check.double(square)
    return _ops.scale_weights.default(double, _check.double(vector), scaling, float(max_norm))
