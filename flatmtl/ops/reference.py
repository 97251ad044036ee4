"""Every operator in plain torch: the body on devices without a kernel, and what the others must equal.

Same signatures as the schemas (``_schema.py``). Nothing here reads a tensor's value on the host.
Written to be read; the Gram products go through float64, a block of columns at a time. Rows in bfloat16
or float16 may stand beside float32 gradients, parameters and updates. The solvers, on the small Gram
matrices, are in ``reference_solvers``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from flatmtl.ops.reference_solvers import *  # noqa: F403 (their names are looked up here)
from flatmtl.ops.reference_solvers.random import uniform_columns

BLOCK = 1 << 16  # columns a block: bounds the float64 copies


def _accumulate(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _columns(size: int) -> Iterator[slice]:
    for start in range(0, size, BLOCK):
        yield slice(start, min(start + BLOCK, size))


def row_norms(jac: Tensor) -> Tensor:
    """jac [T, P] -> float64 [T]."""
    total = jac.new_zeros(jac.shape[0], dtype=torch.float64)
    for block in _columns(jac.shape[1]):
        total += jac[:, block].double().square().sum(1)
    return total.sqrt()


def _symmetric(product: Tensor) -> Tensor:
    return product.triu() + product.triu(1).mT


def gram(jac: Tensor) -> Tensor:
    """jac [T, P] -> float64 [T, T]."""
    tasks = jac.shape[0]
    total = jac.new_zeros((tasks, tasks), dtype=torch.float64)
    for block in _columns(jac.shape[1]):
        rows = jac[:, block].double()
        total += rows @ rows.mT
    return _symmetric(total)


def gram_difference(sam: Tensor, jac: Tensor) -> Tensor:
    """sam, jac [T, P] -> float64 [T, T], the Gram matrix of sam - jac."""
    tasks = jac.shape[0]
    total = jac.new_zeros((tasks, tasks), dtype=torch.float64)
    for block in _columns(jac.shape[1]):
        rows = sam[:, block].double() - jac[:, block].double()
        total += rows @ rows.mT
    return _symmetric(total)


def gram_pair(sam: Tensor, jac: Tensor) -> tuple[Tensor, Tensor]:
    """sam, jac [T, P] -> float64 [T, T] twice, the Gram matrices of jac and of sam - jac."""
    return gram(jac), gram_difference(sam, jac)


def _masked(rows: Tensor, weights: Tensor) -> Tensor:
    # a row of weight 0 must not be multiplied: 0 * NaN is NaN
    return torch.where((weights != 0).unsqueeze(1), rows, torch.zeros_like(rows))


def combine(jac: Tensor, weights: Tensor, out: Tensor) -> None:
    """out [P] <- sum_i weights_i jac_i."""
    dtype = _accumulate(jac.dtype)
    scale = weights.to(dtype)
    for block in _columns(jac.shape[1]):
        out[block] = scale @ _masked(jac[:, block].to(dtype), weights)


def combine_flat(jac: Tensor, a: Tensor, sam: Tensor, b: Tensor, out: Tensor) -> None:
    """out [P] <- sum_i a_i jac_i + sum_i b_i (sam_i - jac_i)."""
    dtype = _accumulate(jac.dtype)
    scale_a, scale_b = a.to(dtype), b.to(dtype)
    same = (scale_a == scale_b) & (b != 0)  # a g + a (s - g) = a s: g is not looked at
    flat_weights = torch.where(same, torch.zeros_like(b), b)
    for block in _columns(jac.shape[1]):
        perturbed = sam[:, block].to(dtype)
        rows = torch.where(same.unsqueeze(1), perturbed, jac[:, block].to(dtype))
        flat = _masked(perturbed - rows, flat_weights)
        out[block] = scale_a @ _masked(rows, a) + scale_b @ flat


def project(jac: Tensor, coefficients: Tensor, out: Tensor) -> None:
    """out [R, P] <- coefficients [R, T] @ jac."""
    for row in range(coefficients.shape[0]):
        combine(jac, coefficients[row], out[row])


def graddrop_(
    jac: Tensor, leak: Tensor | None, there: Tensor | None, rng: Tensor, out: Tensor
) -> None:
    """out [P] <- sum_i (l_i + (1 - l_i) M_i) jac_i, M by GradDrop's signs; rng (seed, step), step += 1.

    P > U, P = 0.5 (1 + sum g / sum |g|), without its division: above (1 - U) > -below U, with the sums
    of the positive and of the negative entries.
    """
    dtype = _accumulate(jac.dtype)
    zero = torch.zeros((), dtype=dtype, device=jac.device)
    for block in _columns(jac.shape[1]):
        above, below, up, down = (out.new_zeros(out[block].shape, dtype=dtype) for _ in range(4))
        for i in range(jac.shape[0]):
            row = jac[i, block].to(dtype)
            if there is not None:
                row = torch.where(there[i], row, zero)
            # NaN, neither above nor below 0, goes to both sides
            above += torch.where(row < 0, zero, row)
            below += torch.where(row > 0, zero, row)
            if leak is not None:
                part = leak[i].to(dtype) * row
                up += torch.where(row < 0, part, row)
                down += torch.where(row > 0, part, row)
        kept = (above, below) if leak is None else (up, down)
        uniform = uniform_columns(rng, block.start, block.stop).to(dtype)
        out[block] = torch.where(above * (1 - uniform) > -below * uniform, *kept)
    rng[1] += 1


def affinity(gram: Tensor, losses: Tensor, lr: float) -> Tensor:
    """gram [T, T], losses [T] -> float64 [T, T]: lr * G_ji / L_j, NaN where L_j is not positive."""
    losses = losses.double()
    sound = (losses > 0) & losses.isfinite()
    scaled = lr * gram.double() / losses.unsqueeze(1)
    return torch.where(sound.unsqueeze(1), scaled, torch.full_like(scaled, torch.nan))


def pack_row_(
    row: Tensor, grads: Sequence[Tensor], offsets: Sequence[int], accumulate: bool = False
) -> Tensor:
    """row [P] <- the gradients at their offsets, zero elsewhere; accumulate: row + the gradients.

    Returns the squared norm of what is then stored, float64.
    """
    if not accumulate:
        row.zero_()
    dtype = _accumulate(row.dtype)
    for grad, offset in zip(grads, offsets, strict=True):
        segment = row[offset : offset + grad.numel()]
        flat = grad.reshape(-1)
        segment.copy_(segment.to(dtype) + flat.to(dtype) if accumulate else flat)
    total = row.new_zeros((), dtype=torch.float64)
    for block in _columns(row.shape[0]):
        total += row[block].double().square().sum()
    return total


def adaptive_sq_norm(saved: Tensor, row: Tensor, eta: float) -> Tensor:
    """saved, row [P] -> float64: the squared norm of (|saved| + eta) * row."""
    total = row.new_zeros((), dtype=torch.float64)
    for block in _columns(row.shape[0]):
        total += ((saved[block].double().abs() + eta) * row[block].double()).square().sum()
    return total


def perturb_(
    params: Sequence[Tensor],
    saved: Tensor,
    row: Tensor,
    sq_norm: Tensor,
    offsets: Sequence[int],
    rho: Sequence[float],
    adaptive: bool,
    eta: float,
) -> None:
    """params_k <- saved_k + rho_k * row_k / norm, or its adaptive form; saved_k where norm is 0."""
    dtype = _accumulate(row.dtype)
    sound = (sq_norm > 0) & sq_norm.isfinite()
    inverse = torch.where(sound, sq_norm.rsqrt(), torch.zeros_like(sq_norm))
    for param, offset, radius in zip(params, offsets, rho, strict=True):
        segment = slice(offset, offset + param.numel())
        origin, direction = saved[segment].to(dtype), row[segment].to(dtype)
        scale = (inverse * radius).to(dtype)
        if adaptive:
            direction = direction * (origin.abs() + eta).square()
        moved = (origin + scale * direction).to(saved.dtype)
        param.copy_(torch.where(scale != 0, moved, saved[segment]).view(param.shape))


def restore_(params: Sequence[Tensor], saved: Tensor, offsets: Sequence[int]) -> None:
    """params_k <- saved_k, exactly."""
    for param, offset in zip(params, offsets, strict=True):
        param.copy_(saved[offset : offset + param.numel()].view(param.shape))
