"""Every operator in plain torch: the body on devices without a kernel, and what the others must equal.

Same signatures as the schemas (``_schema.py``). Nothing here reads a tensor's value on the host.
Written to be read; the Gram products go through float64, a block of columns at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

BLOCK = 1 << 16  # columns a block: bounds the float64 copies

# Status bits of a solve; csrc/solvers/team.h has the same.
NO_ACTIVE_TASK = 1
INACTIVE_TASK = 2
NOT_CONVERGED = 4
RIDGE_RAISED = 8

LARGEST_RIDGE = 1e-6  # csrc/solvers/mgda.h


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
    for block in _columns(jac.shape[1]):
        rows = jac[:, block].to(dtype)
        flat = sam[:, block].to(dtype) - rows
        out[block] = scale_a @ _masked(rows, a) + scale_b @ _masked(flat, b)


def project(jac: Tensor, coefficients: Tensor, out: Tensor) -> None:
    """out [R, P] <- coefficients [R, T] @ jac."""
    for row in range(coefficients.shape[0]):
        combine(jac, coefficients[row], out[row])


def affinity(gram: Tensor, losses: Tensor, lr: float) -> Tensor:
    """gram [T, T], losses [T] -> float64 [T, T]: lr * G_ji / L_j, NaN where L_j is not positive."""
    losses = losses.double()
    sound = (losses > 0) & losses.isfinite()
    scaled = lr * gram.double() / losses.unsqueeze(1)
    return torch.where(sound.unsqueeze(1), scaled, torch.full_like(scaled, torch.nan))


def pack_row_(row: Tensor, grads: Sequence[Tensor], offsets: Sequence[int]) -> Tensor:
    """row [P] <- the gradients at their offsets, zero elsewhere. Returns the squared norm, float64."""
    row.zero_()
    for grad, offset in zip(grads, offsets, strict=True):
        row[offset : offset + grad.numel()] = grad.reshape(-1)
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


# ---------------------------------------------------------------------------------------- solvers

_LOW = 0xFFFFFFFF


def _multiply_words(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32-bit words of a * b, both below 2^32, in int64 arithmetic."""
    low, high = a * (b & 0xFFFF), a * (b >> 16)  # both < 2^48
    return ((low >> 16) + high) >> 16, (low + (high << 16)) & _LOW


def _philox(key: tuple[Tensor, Tensor], counter: list[Tensor]) -> list[Tensor]:
    """Philox4x32-10 on int64 tensors that hold 32-bit words."""
    k0, k1 = key
    c0, c1, c2, c3 = counter
    for _ in range(10):
        high0, low0 = _multiply_words(0xD2511F53, c0)
        high1, low1 = _multiply_words(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _LOW, (k1 + 0xBB67AE85) & _LOW
    return [c0, c1, c2, c3]


def draw_order_(rng: Tensor, tasks: int, batch: int) -> Tensor:
    """rng int64 [2] = (seed, step), step += 1 -> int64 [batch, T, T], a permutation a row."""
    seed, step = rng[0], rng[1]
    key = (seed & _LOW, ((seed >> 32) & _LOW) ^ ((step >> 32) & _LOW))
    shape = (batch, tasks)
    row = torch.arange(tasks, device=rng.device).expand(shape)
    item = torch.arange(batch, device=rng.device).unsqueeze(1).expand(shape)
    low_step = (step & _LOW).expand(shape)
    order = torch.arange(tasks, device=rng.device).expand(batch, tasks, tasks).clone()
    words: list[Tensor] = []
    for draw, last in enumerate(range(tasks - 1, 0, -1)):
        if draw % 4 == 0:
            words = _philox(key, [torch.full_like(row, draw // 4), row, item, low_step])
        pick = ((words[draw % 4] * (last + 1)) >> 32).unsqueeze(2)
        at_last, at_pick = order[:, :, last : last + 1].clone(), order.gather(2, pick)
        order[:, :, last : last + 1] = at_pick
        order.scatter_(2, pick, at_last)
        # where pick == last, both writes put the same value back
    rng[1] += 1
    return order


def _active(gram: Tensor) -> Tensor:
    """gram [B, T, T] -> bool [B, T]: gradient neither zero nor non-finite."""
    diagonal = gram.diagonal(dim1=1, dim2=2)
    alone = diagonal.isfinite() & (diagonal > 0)
    sound = gram.isfinite() & gram.mT.isfinite()
    return alone & (sound | ~alone.unsqueeze(1)).all(2)


def _status(active: Tensor) -> Tensor:
    none, some = ~active.any(1), ~active.all(1)
    return none.long() * NO_ACTIVE_TASK + some.long() * INACTIVE_TASK


def solve_pcgrad(gram: Tensor, order: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """gram, order [B, T, T] -> weights [B, T], coefficients [B, T, T], status [B]."""
    gram = gram.double()
    active = _active(gram)
    on = active.unsqueeze(2) & active.unsqueeze(1)
    gram = torch.where(on, gram, torch.zeros_like(gram))
    tasks = gram.shape[1]
    norm2 = gram.diagonal(dim1=1, dim2=2)
    product = gram.clone()  # K G
    coefficients = torch.diag_embed(active.double())
    own = torch.arange(tasks, device=gram.device)
    for visit in range(tasks):
        j = order[:, :, visit]  # [B, T]
        p = product.gather(2, j.unsqueeze(2)).squeeze(2)
        square = norm2.gather(1, j)
        conflict = (p < 0) & (j != own) & (square > 0) & active
        c = torch.where(conflict, p / square, torch.zeros_like(p)).unsqueeze(2)
        coefficients.scatter_add_(2, j.unsqueeze(2), -c)
        product -= c * gram.gather(1, j.unsqueeze(2).expand_as(gram))
    return coefficients.sum(1), coefficients, _status(active)


def solve_mgda(gram: Tensor, ridge: float) -> tuple[Tensor, Tensor, Tensor]:
    """gram [B, T, T] -> weights [B, T], status [B], residual [B]; csrc/solvers/mgda.h has the maths."""
    weights, sound, residual, active = _mgda(gram, ridge)
    raised = torch.zeros_like(sound)
    while ridge < LARGEST_RIDGE:
        # Tried on every problem, kept where the smaller ridge failed: no value is read on the host.
        ridge = min(100 * ridge, LARGEST_RIDGE) if ridge > 1e-12 else 1e-10
        again = _mgda(gram, ridge)
        raised = raised | ~sound
        weights = torch.where(sound.unsqueeze(1), weights, again[0])
        residual = torch.where(sound, residual, again[2])
        sound = sound | again[1]
    bits = (~sound).long() * NOT_CONVERGED + raised.long() * RIDGE_RAISED
    return weights, _status(active) + bits, residual


def _mgda(gram: Tensor, ridge: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weights [B, T], whether they are sound [B], residual [B], active tasks [B, T]."""
    gram = gram.double()
    batch, tasks, _ = gram.shape
    active = _active(gram)
    one, zero = gram.new_ones(()), gram.new_zeros(())
    norm2 = gram.diagonal(dim1=1, dim2=2)
    inverse = torch.where(active, norm2.where(active, one).rsqrt(), zero)  # [B, T]
    on = active.unsqueeze(2) & active.unsqueeze(1)
    half = torch.where(on, gram, zero) * inverse.unsqueeze(2) * inverse.unsqueeze(1)
    cosine = (0.5 * (half + half.mT)).clamp(-1, 1)
    eye = torch.eye(tasks, dtype=torch.float64, device=gram.device)
    cosine = cosine * (1 - eye) + (1 + ridge) * eye
    top = inverse.amax(1, keepdim=True)
    b = torch.where(top > 0, inverse / top.where(top > 0, one), zero)

    y = torch.zeros_like(b)
    passive = torch.zeros_like(active)
    barred = torch.zeros_like(active)
    entering = torch.ones(batch, 1, dtype=torch.bool, device=gram.device)
    done = torch.zeros_like(entering)
    index = torch.arange(tasks, device=gram.device)
    for _ in range(4 * tasks + 10):
        terms = cosine * y.unsqueeze(1)
        slack = b - terms.sum(2)
        violated = slack > 1e-14 * (b + terms.abs().sum(2))
        slack = torch.where(violated & active & ~passive & ~barred, slack, zero)
        best = index == slack.argmax(1, keepdim=True)
        any_left = slack.amax(1, keepdim=True) > 0
        done |= entering & ~any_left
        newcomer = best & entering & any_left & ~done
        passive = passive | newcomer
        block = passive.unsqueeze(2) & passive.unsqueeze(1)
        system = torch.where(block, cosine, eye)
        z = torch.linalg.solve_ex(system, torch.where(passive, b, zero))[0]
        # A newcomer that does not grow, or that the others determine (no finite solution), is barred.
        singular = passive & ~(z.abs() < 1e13)
        stuck = (newcomer & ~(z > 0)).any(1, keepdim=True) | singular.any(1, keepdim=True)
        blocking = passive & ~(z > 0)
        ratio = torch.where(blocking, y / (y - z).where(blocking, one), one)
        alpha = ratio.amin(1, keepdim=True)
        full = ~blocking.any(1, keepdim=True)
        moved = torch.where(full, z, y + alpha * (z - y))
        leaves = blocking & (ratio <= alpha)
        advance = ~done & ~stuck
        y = torch.where(advance & passive, torch.where(leaves, zero, moved), y)
        passive = torch.where(advance, passive & (y > 0), passive & ~(stuck & newcomer))
        y = torch.where(passive, y, zero)
        barred = torch.where(advance & full, torch.zeros_like(barred), barred | (stuck & newcomer))
        entering = full | stuck

    rest = b - (cosine @ y.unsqueeze(2)).squeeze(2)
    worst = torch.where(passive, rest.abs(), rest.clamp(min=0)).where(active, zero)
    residual = worst.amax(1) if tasks else rest.new_zeros(batch)
    v = y * b
    total = v.sum(1, keepdim=True)
    weights = torch.where(total > 0, v / total.where(total > 0, one), zero)
    sound = done.squeeze(1) & (residual <= 1e-6 + 1e-13 * y.sum(1))
    return weights, sound, residual, active
