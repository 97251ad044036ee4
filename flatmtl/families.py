"""From the rows g_i (at the parameters) and s_i (perturbed) to one update of the shared parameters.

Everything happens on Gram matrices and weights; the rows are read once for a Gram matrix and once for
the update. The flat parts f_i = s_i - g_i are never expanded in products: that cancels for a small radius.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flatmtl import ops
from flatmtl.block import Block
from flatmtl.solves import Solves


@dataclass
class Found:
    """What an aggregation came to.

    Attributes:
        weights: float64 [T], of the gradients g_i (of the s_i for "direct").
        flat: float64 [T], of the flat parts f_i; None if they were not weighted apart.
        gram: float64 [T, T], of the rows that ``weights`` are for; a diagonal one where the weighting
            looks at no more.
    """

    weights: Tensor
    flat: Tensor | None = None
    gram: Tensor | None = None


class Families:
    """Aggregates the rows of a block.

    Args:
        solves: the weightings.
        inverse_scale: 0-dim float64, 1 / scale^2 of Gram matrices of scaled gradients; None: not scaled.
        full: always the whole Gram matrix, also where a weighting needs its diagonal only.
    """

    def __init__(self, solves: Solves, inverse_scale: Tensor | None, *, full: bool) -> None:
        self._solves = solves
        self._inverse = inverse_scale
        self._full = full

    def unscaled(self, gram: Tensor) -> Tensor:
        """``gram`` as if the gradients had not been scaled."""
        return gram if self._inverse is None else gram * self._inverse.to(gram.device)

    def _gram(self, name: str, rows: Tensor, squares: Tensor | None) -> Tensor:
        if squares is not None and self._solves.weightings[name].diagonal_only and not self._full:
            return self.unscaled(squares.diag())  # the packing has counted the norms already
        return self.unscaled(ops.gram(rows))

    def plain(self, block: Block, squares: Tensor, sound: Tensor) -> Found:
        """update = A(g)."""
        gram = self._gram("loss", block.jac, squares)
        weights = self._solves("loss", gram, sound)
        ops.combine(block.jac, weights, block.update)
        return Found(weights, gram=gram)

    def decomposed(self, block: Block, squares: Tensor, sound: Tensor, *, keep: bool) -> Found:
        """update = A(g) + A'(f). With ``keep``, A'(f) alone stays in ``block.kept``."""
        gram = self._gram("loss", block.jac, squares)
        a = self._solves("loss", gram, sound)
        b = self._solves("flat", self.unscaled(ops.gram_difference(block.sam, block.jac)), sound)
        if keep:
            ops.combine_flat(block.jac, torch.zeros_like(b), block.sam, b, block.kept)
            ops.combine(block.jac, a, block.update).add_(block.kept)
            block.has_flat = True
        else:
            ops.combine_flat(block.jac, a, block.sam, b, block.update)
        return Found(a, b, gram)

    def direct(self, block: Block, sound: Tensor) -> Found:
        """update = A(s)."""
        gram = self._gram("loss", block.sam, None)
        weights = self._solves("loss", gram, sound)
        ops.combine(block.sam, weights, block.update)
        return Found(weights, gram=gram)

    def _stacked(self, block: Block, sound: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """S <- S - J; the Gram blocks of g with g, g with f, f with f, zero where not sound."""
        block.sam.sub_(block.jac)
        gram = self.unscaled(ops.gram(block.both))
        sound = torch.cat([sound, sound])
        gram = torch.where(sound.unsqueeze(1) & sound, gram, torch.zeros_like(gram))
        tasks = block.jac.shape[0]
        return gram[:tasks, :tasks], gram[:tasks, tasks:], gram[tasks:, tasks:]

    def second(self, block: Block, sound: Tensor) -> Found:
        """update = A''(A(g), A'(f))."""
        gg, gf, ff = self._stacked(block, sound)
        gg, ff = gg.contiguous(), ff.contiguous()
        a, b = self._solves("loss", gg), self._solves("flat", ff)
        cross = a @ gf @ b
        pair = torch.stack([a @ gg @ a, cross, cross, b @ ff @ b]).view(2, 2)
        outer = self._solves("outer", pair)
        weights = torch.cat([outer[0] * a, outer[1] * b])
        ops.combine(block.both, weights, block.update)
        tasks = a.shape[0]
        return Found(weights[:tasks], weights[tasks:], gg)

    def each(self, block: Block, sound: Tensor) -> Found:
        """update = A(h), h_i = A'(g_i, f_i)."""
        gg, gf, ff = self._stacked(block, sound)
        cross = gf.diag()
        pairs = torch.stack([gg.diag(), cross, cross, ff.diag()], 1).view(-1, 2, 2)  # [T, 2, 2]
        inner = self._solves("flat", pairs)  # [T, 2]
        of_g, of_f = inner.unbind(1)
        mixed = of_g.unsqueeze(1) * gf * of_f  # <g_i, f_k> as h_i and h_k hold them
        gram = of_g.unsqueeze(1) * gg * of_g + of_f.unsqueeze(1) * ff * of_f + mixed + mixed.mT
        weights = self._solves("loss", gram)
        ops.combine(block.both, torch.cat([weights * of_g, weights * of_f]), block.update)
        return Found(weights * of_g, weights * of_f, gg.contiguous())
