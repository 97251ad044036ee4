"""Random orders, normal and uniform numbers from Philox: the same on every device; random weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flatmtl.ops.reference_solvers._problem import activity_bits, either_rank, find_active

_LOW = 0xFFFFFFFF
# what sets the normal and the uniform numbers' keys apart from that of the orders
_NORMAL = 0x9E3779B97F4A7C15
_DROP = 0xD1B54A32D192ED03


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


def _key(rng: Tensor) -> tuple[Tensor, Tensor]:
    """rng int64 [2] = (seed, step) -> the key's words, low and high."""
    seed, step = rng[0], rng[1]
    return seed & _LOW, ((seed >> 32) & _LOW) ^ ((step >> 32) & _LOW)


def draw_order_(rng: Tensor, tasks: int, batch: int) -> Tensor:
    """rng int64 [2] = (seed, step), step += 1 -> int64 [batch, T, T], a permutation a row."""
    key = _key(rng)
    shape = (batch, tasks)
    row = torch.arange(tasks, device=rng.device).expand(shape)
    item = torch.arange(batch, device=rng.device).unsqueeze(1).expand(shape)
    low_step = (rng[1] & _LOW).expand(shape)
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


def _draw_normal(rng: Tensor, tasks: int, batch: int) -> Tensor:
    """rng int64 [2] = (seed, step), step += 1 -> float64 [batch, T], standard normal (Box-Muller)."""
    low, high = _key(rng)
    key = (low ^ (_NORMAL & _LOW), high ^ (_NORMAL >> 32))
    shape = (batch, tasks)
    row = torch.arange(tasks, device=rng.device).expand(shape)
    item = torch.arange(batch, device=rng.device).unsqueeze(1).expand(shape)
    low_step = (rng[1] & _LOW).expand(shape)
    words = _philox(key, [torch.zeros_like(row), row, item, low_step])
    u1 = ((words[0] * 2**21 + (words[1] >> 11)).double() + 0.5) * 2.0**-53
    u2 = (words[2] * 2**21 + (words[3] >> 11)).double() * 2.0**-53
    rng[1] += 1
    return (-2 * u1.log()).sqrt() * (2 * math.pi * u2).cos()


def uniform_columns(rng: Tensor, start: int, stop: int) -> Tensor:
    """rng int64 [2] = (seed, step) -> float32 [stop - start] in (0, 1), of columns start (4n) to stop."""
    low, high = _key(rng)
    key = (low ^ (_DROP & _LOW), high ^ (_DROP >> 32))
    quad = torch.arange(start // 4, (stop + 3) // 4, device=rng.device)
    words = _philox(key, [quad & _LOW, quad >> 32, torch.zeros_like(quad), rng[1] & _LOW])
    word = torch.stack(words, 1).view(-1)[: stop - start]
    return (2 * (word >> 9) + 1).to(torch.float32) * 2.0**-24


@either_rank()
def solve_random_(gram: Tensor, rng: Tensor) -> tuple[Tensor, Tensor]:
    """gram [.., T, T], rng int64 [2] -> weights [.., T], the softmax of normal numbers; status [..]."""
    active = find_active(gram)
    drawn = _draw_normal(rng, gram.shape[1], gram.shape[0]).softmax(1)
    return torch.where(active, drawn, 0.0), activity_bits(active)
